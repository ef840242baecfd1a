import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from evals.metrics import (
    accuracy,
    aupr_anomalous,
    aupr_normal,
    auroc,
    auroc_interval,
    calibration_error,
    detection_metrics,
    fpr_at_recall,
    mean_aurocs,
    resampled,
)


def by_pairs(normal, anomalous):
    wins = [(a > b) + 0.5 * (a == b) for a in normal for b in anomalous]
    return sum(wins) / len(wins)


def average_precision(positive, negative):
    """The sum over thresholds, from the highest, of precision times the gain of recall."""
    total, before = 0.0, 0.0
    for threshold in sorted({*positive, *negative}, reverse=True):
        right, wrong = sum(x >= threshold for x in positive), sum(x >= threshold for x in negative)
        recall = right / len(positive)
        total += (recall - before) * right / (right + wrong)
        before = recall
    return total


def fpr_by_thresholds(normal, anomalous, recall):
    """The lowest share of anomalous images accepted by a threshold that accepts enough normal ones."""
    accepted = [[np.mean(x >= t) for x in (normal, anomalous)] for t in {*normal, *anomalous}]
    return min(false for true, false in accepted if true >= recall)


@pytest.fixture(params=[3, 1000], ids=["many ties", "few ties"])
def scores(request):
    rng = np.random.default_rng(0)
    return rng.integers(0, request.param, 40) + 1.0, rng.integers(0, request.param, 70) + 0.0


def test_auroc_counts_pairs_and_half_of_the_ties(scores):
    normal, anomalous = scores
    assert auroc(normal, anomalous) == pytest.approx(by_pairs(normal, anomalous), abs=1e-12)
    labels = [1] * 40 + [0] * 70
    assert auroc(normal, anomalous) == pytest.approx(roc_auc_score(labels, [*normal, *anomalous]), abs=1e-12)


def test_auroc_of_separated_reversed_and_tied_scores():
    low, high = np.array([0.0, 1.0]), np.array([2.0, 3.0])
    assert (auroc(high, low), auroc(low, high), auroc(low, low)) == (1.0, 0.0, 0.5)


def test_aupr_of_either_side_is_average_precision(scores):
    normal, anomalous = scores
    assert aupr_normal(normal, anomalous) == pytest.approx(average_precision(normal, anomalous), abs=1e-12)
    assert aupr_anomalous(normal, anomalous) == pytest.approx(average_precision(-anomalous, -normal), abs=1e-12)
    labels = np.array([1] * 40 + [0] * 70)
    both = np.concatenate([normal, anomalous])
    assert aupr_normal(normal, anomalous) == pytest.approx(average_precision_score(labels, both), abs=1e-12)
    assert aupr_anomalous(normal, anomalous) == pytest.approx(average_precision_score(1 - labels, -both), abs=1e-12)


@pytest.mark.parametrize("recall", [0.5, 0.95, 1.0])
def test_fpr_is_that_of_the_highest_threshold_with_enough_recall(scores, recall):
    normal, anomalous = scores
    found = fpr_at_recall(normal, anomalous, recall)
    assert found == pytest.approx(fpr_by_thresholds(normal, anomalous, recall), abs=1e-12)
    labels = [1] * 40 + [0] * 70
    false, true, _ = roc_curve(labels, [*normal, *anomalous], drop_intermediate=False)
    assert found == pytest.approx(false[np.flatnonzero(true >= recall)[0]], abs=1e-12)


def test_fpr_at_95_percent_by_hand():
    """Of 20 normal images 19 must be kept, so that the threshold is the second lowest, 2."""
    normal, anomalous = np.arange(1.0, 21.0), np.array([1.0, 1.5, 2.0, 30.0])
    assert fpr_at_recall(normal, anomalous) == 0.5


def test_the_interval_of_the_mean_auroc_equals_a_loop_over_resampled_images():
    rng = np.random.default_rng(0)
    groups = [rng.normal(1, 1, 30), rng.normal(0, 1, 25), rng.normal(0.5, 1, 20)]
    low, high = auroc_interval(groups[0], groups[1:])
    means = []
    for _ in range(1000):
        normal, *others = (rng.choice(group, len(group)) for group in groups)
        means.append(np.mean([by_sorting(normal, other) for other in others]))
    # Two bootstraps of 1000 samples agree to their own error.
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.012)
    assert low < np.mean([auroc(groups[0], other) for other in groups[1:]]) < high
    assert auroc_interval(groups[0], groups[1:]) == (low, high)
    # No sample comes twice, although samples are drawn in blocks.
    labels = np.repeat(np.arange(3), [30, 25, 20])
    counts = np.concatenate([resampled(labels, 100, seed) for seed in range(0, 1000, 100)])
    assert len(np.unique(counts, axis=0)) == 1000
    aurocs = mean_aurocs(np.concatenate(groups), labels, 0, counts)
    assert (low, high) == tuple(np.percentile(aurocs, [2.5, 97.5]))


def by_sorting(normal, anomalous):
    below = np.searchsorted(np.sort(anomalous), normal, "left") + np.searchsorted(np.sort(anomalous), normal, "right")
    return below.mean() / (2 * len(anomalous))


def test_the_interval_of_separated_scores_has_no_width():
    assert auroc_interval(np.array([2.0, 3.0]), [np.array([0.0, 1.0])]) == (1.0, 1.0)


def test_mean_is_over_sets_and_pooled_over_images():
    found = detection_metrics(np.array([1.0]), {"a": np.array([0.0]), "b": np.array([2.0, 2.0, 2.0])})
    assert (found["auroc/a"], found["auroc/b"]) == (1.0, 0.0)
    assert (found["mean"], found["pooled"]) == (0.5, 0.25)
    assert (found["fpr_at_95_recall/mean"], found["fpr_at_95_recall/pooled"]) == (0.5, 0.75)
    # Positive among one of its kind and one, or three, that score higher.
    assert (found["aupr_normal/a"], found["aupr_normal/b"], found["aupr_normal/mean"]) == (1.0, 0.25, 0.625)


def test_other_sets_are_compared_and_count_only_where_there_are_no_classes():
    normal, low, high = np.array([1.0]), np.array([0.0]), np.array([2.0, 3.0, 4.0])
    both = detection_metrics(normal, {"class": low}, {"other": high})
    assert (both["auroc/class"], both["auroc/other"], both["mean"], both["pooled"]) == (1.0, 0.0, 1.0, 1.0)
    assert (both["auroc_interval/low"], both["auroc_interval/high"]) == (1.0, 1.0)
    alone = detection_metrics(normal, {}, {"a": low, "b": high})
    assert (alone["mean"], alone["pooled"]) == (0.5, 0.25)


def test_calibration_error_by_hand():
    """Three bins. To 1/3: none. To 2/3: 0.5 right and 0.6 wrong, |1 - 1.1|. To 1: 0.9 wrong, 1.0 and 0.7 right,
    |2 - 2.6|. Together 0.7 of 5 images."""
    confidence = torch.tensor([0.5, 0.6, 0.9, 1.0, 0.7], dtype=torch.float64)
    correct = torch.tensor([True, False, False, True, True])
    assert calibration_error(confidence, correct, bins=3) == pytest.approx(0.7 / 5, abs=1e-12)
    assert accuracy(correct) == pytest.approx(3 / 5)


def test_calibration_error_against_a_loop_over_the_bins():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(400, dtype=torch.float64, generator=generator)
    correct = torch.rand(400, generator=generator) < 0.6
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            right = correct[inside].double().mean()
            expected += float(inside.double().mean() * (right - confidence[inside].mean()).abs())
    assert calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-12)


def test_a_confidence_on_a_border_belongs_to_the_bin_below():
    """Two bins: 0.5 right falls into the first, with 0.4 wrong, |1 - 0.9|; 0.6 wrong into the second, |0 - 0.6|."""
    confidence, correct = torch.tensor([0.5, 0.4, 0.6], dtype=torch.float64), torch.tensor([True, False, False])
    assert calibration_error(confidence, correct, bins=2) == pytest.approx((0.1 + 0.6) / 3, abs=1e-12)


def test_certain_and_right_is_perfectly_calibrated_and_certain_and_wrong_not_at_all():
    certain = torch.ones(4)
    assert calibration_error(certain, torch.ones(4, dtype=torch.bool)) == 0
    assert calibration_error(certain, torch.zeros(4, dtype=torch.bool)) == 1
