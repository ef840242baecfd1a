import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from evals.detection import auroc, detect, quantile_line


def by_pairs(normal, anomalous):
    wins = [(a > b) + 0.5 * (a == b) for a in normal for b in anomalous]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("levels", [3, 1000])
def test_auroc_counts_pairs_and_half_of_the_ties(levels):
    rng = np.random.default_rng(0)
    normal, anomalous = rng.integers(0, levels, 40) + 1.0, rng.integers(0, levels, 70) + 0.0
    expected = by_pairs(normal, anomalous)
    assert auroc(normal, anomalous) == pytest.approx(expected, abs=1e-12)
    labels = [1] * 40 + [0] * 70
    assert auroc(normal, anomalous) == pytest.approx(roc_auc_score(labels, [*normal, *anomalous]), abs=1e-12)


def test_auroc_of_separated_reversed_and_tied_scores():
    low, high = np.array([0.0, 1.0]), np.array([2.0, 3.0])
    assert (auroc(high, low), auroc(low, high), auroc(low, low)) == (1.0, 0.0, 0.5)


def test_mean_is_over_sets_and_pooled_over_images():
    found = detect(np.array([1.0]), {"a": np.array([0.0]), "b": np.array([2.0, 2.0, 2.0])})
    assert found.aurocs == {"a": 1.0, "b": 0.0}
    assert (found.mean, found.pooled, found.n_in, found.n_out) == (0.5, 0.25, 1, 4)


def test_quantiles_go_by_tens():
    assert quantile_line(np.arange(101.0)) == "0 10 20 30 40 50 60 70 80 90 100  mean 50"


def test_other_sets_are_told_apart_and_count_only_where_there_are_no_classes():
    normal, low, high = np.array([1.0]), np.array([0.0]), np.array([2.0, 3.0, 4.0])
    both = detect(normal, {"class": low}, {"other": high})
    assert both.aurocs == {"class": 1.0, "other": 0.0} and (both.mean, both.pooled, both.n_out) == (1.0, 1.0, 1)
    alone = detect(normal, {}, {"a": low, "b": high})
    assert (alone.mean, alone.pooled, alone.n_out) == (0.5, 0.25, 4)
