"""How well scores tell normal images from others. Higher scores mean more normal."""

from dataclasses import dataclass
from typing import Any

import numpy as np

QUANTILES = np.linspace(0, 1, 11)


def auroc(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """Chance in [0, 1] that a normal image scores above an anomalous one, ties counted half. Scores (n,) and (m,)."""
    from sklearn.metrics import roc_auc_score

    labels = np.concatenate([np.ones(len(normal)), np.zeros(len(anomalous))])
    return float(roc_auc_score(labels, np.concatenate([normal, anomalous])))


def resampled(labels: np.ndarray, times: int, seed: int = 0) -> np.ndarray:
    """Bootstrap samples of images, as how often each is in each: (times, N) float32. Classes keep their sizes."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((times, len(labels)), np.float32)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=times)
    return counts


def mean_aurocs(scores: np.ndarray, labels: np.ndarray, normal: int, counts: np.ndarray) -> np.ndarray:
    """The mean over the other classes of the AUROC of class `normal` against them, of each sample: (times,).

    scores, labels (N,); counts (times, N): how often each image is in each sample, `resampled`. Ties count half.
    """
    order = np.argsort(scores, kind="stable")
    scores, labels, counts = scores[order], labels[order], counts[:, order]
    is_normal = labels == normal
    below = np.zeros((len(counts), len(scores) + 1))
    np.cumsum(counts * is_normal, 1, out=below[:, 1:])
    first, last = np.searchsorted(scores, scores, "left"), np.searchsorted(scores, scores, "right")
    # Of the normal images in a sample, the share above each image, ties counted half.
    above = 1 - (below[:, first] + below[:, last]) / (2 * below[:, -1:])
    weighed = counts * above
    others = [label for label in np.unique(labels).tolist() if label != normal]
    of_class = [weighed[:, labels == c].sum(1) / counts[:, labels == c].sum(1) for c in others]
    return np.mean(of_class, 0)


@dataclass(frozen=True)
class Detection:
    """aurocs: by name of the anomalous set. mean: of those of classes, where there are any, else of other sets; pooled:
    against all images of these together, n_out of them."""

    aurocs: dict[str, float]
    mean: float
    pooled: float
    n_in: int
    n_out: int

    def as_result(self) -> dict[str, Any]:
        """The entries of a result file."""
        return {"auroc": self.aurocs, "mean": self.mean, "pooled": self.pooled, "n_in": self.n_in, "n_out": self.n_out}


def detect(
    normal: np.ndarray, classes: dict[str, np.ndarray], others: dict[str, np.ndarray] | None = None
) -> Detection:
    """AUROC of the scores of normal images (n,) against each class of the same data set, and each other set."""
    aurocs = {name: auroc(normal, scores) for name, scores in (classes | (others or {})).items()}
    counted = classes or others or {}
    everything = np.concatenate(list(counted.values()))
    mean = float(np.mean([aurocs[name] for name in counted]))
    return Detection(aurocs, mean, auroc(normal, everything), len(normal), len(everything))


def quantile_line(scores: np.ndarray) -> str:
    """Quantiles 0, 10, ... 100 % of the scores, and their mean."""
    return " ".join(f"{q:.4g}" for q in np.quantile(scores, QUANTILES)) + f"  mean {scores.mean():.4g}"
