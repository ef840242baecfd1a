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
