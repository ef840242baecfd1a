"""Metrics of scores and of classifications. A higher score means more normal.

Letters: N images, C classes.
"""

import math

import numpy as np
import torch
from torch import Tensor

# Bins of the calibration error.
_BINS = 15
# Bootstrap samples of the interval, how many of them are held at a time, and its percentiles.
_TIMES, _TOGETHER, LEVELS = 1000, 100, (2.5, 97.5)


def auroc(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """Probability that a normal image scores above an anomalous one, ties counted half. Scores (n,) and (m,)."""
    from sklearn.metrics import roc_auc_score

    labels = np.concatenate([np.ones(len(normal)), np.zeros(len(anomalous))])
    return float(roc_auc_score(labels, np.concatenate([normal, anomalous])))


def aupr_normal(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """Average precision of finding the normal images by high scores. Its chance level is the share of normal ones."""
    from sklearn.metrics import average_precision_score

    labels = np.concatenate([np.ones(len(normal)), np.zeros(len(anomalous))])
    return float(average_precision_score(labels, np.concatenate([normal, anomalous])))


def aupr_anomalous(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """Average precision of finding the anomalous images by low scores."""
    return aupr_normal(-anomalous, -normal)


def fpr_at_recall(normal: np.ndarray, anomalous: np.ndarray, recall: float = 0.95) -> float:
    """Share of the anomalous images that score at or above the threshold which keeps a share `recall` of the normal.

    The threshold is the highest score of a normal image for which this holds.
    """
    kept = max(1, math.ceil(recall * len(normal) - 1e-9))
    threshold = np.sort(normal)[len(normal) - kept]
    return float((anomalous >= threshold).mean())


_FAMILIES = {
    "auroc": auroc,
    "aupr_normal": aupr_normal,
    "aupr_anomalous": aupr_anomalous,
    "fpr_at_95_recall": fpr_at_recall,
}


def detection_metrics(
    normal: np.ndarray, classes: dict[str, np.ndarray], others: dict[str, np.ndarray] | None = None
) -> dict[str, float]:
    """Scores of the normal images (n,) against those of each class of the data set, and of each other set.

    `<family>/<set>` is one set's; `<family>/mean` is the mean over sets, `<family>/pooled` against all their images
    together. Where there are classes, these two are over classes alone. The AUROC's own are `mean` and `pooled`, as
    published tables call them; `auroc_interval/low` and `/high` bound its mean.
    """
    sets, counted = classes | (others or {}), classes or others or {}
    pooled = np.concatenate(list(counted.values()))
    metrics: dict[str, float] = {}
    for family, measure in _FAMILIES.items():
        of = {name: measure(normal, scores) for name, scores in sets.items()}
        whole = "" if family == "auroc" else f"{family}/"
        metrics |= {f"{family}/{name}": value for name, value in of.items()}
        metrics[f"{whole}mean"] = float(np.mean([of[name] for name in counted]))
        metrics[f"{whole}pooled"] = measure(normal, pooled)
    low, high = auroc_interval(normal, list(counted.values()))
    return {**metrics, "auroc_interval/low": low, "auroc_interval/high": high}


def auroc_interval(
    normal: np.ndarray, anomalous: list[np.ndarray], times: int = _TIMES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval, over test images, of the mean AUROC against several sets.

    Every set keeps its size in a sample.
    """
    groups = [normal, *anomalous]
    scores = np.concatenate(groups)
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    found = []
    for start in range(0, times, _TOGETHER):
        counts = resampled(labels, min(_TOGETHER, times - start), seed + start)
        found.append(mean_aurocs(scores, labels, 0, counts))
    low, high = np.percentile(np.concatenate(found), LEVELS)
    return float(low), float(high)


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


def accuracy(correct: Tensor) -> float:
    """Share of the images (N,) that are classified correctly."""
    return float(correct.double().mean())


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = _BINS) -> float:
    """Expected calibration error: the mean over images of |accuracy - mean confidence| in the image's bin.

    confidence (N,): the largest class probability of each image; correct (N,) bool. Bins of equal width split the
    confidences; one on a border belongs to the bin below. Over the whole set, where the published program averaged over
    batches. Source: Guo et al. 2017.
    """
    confidence = confidence.double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    zeros = torch.zeros(bins, dtype=torch.float64)
    right = zeros.index_add(0, which, correct.double())
    claimed = zeros.index_add(0, which, confidence)
    return float((right - claimed).abs().sum() / len(confidence))
