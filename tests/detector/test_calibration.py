"""Thresholds keep what they promise, by exact formulas and by simulation."""

import math

import numpy as np
import pytest
from scipy.stats import beta, binom, kstest

from detector.calibration import (
    Drift,
    Threshold,
    benjamini_hochberg,
    interval,
    needed,
    p_values,
    rank_for,
    rate_at,
)


@pytest.mark.parametrize("alpha, m", [(0.05, 59), (0.01, 299), (0.001, 2995)])
def test_a_promise_needs_as_many_pictures_as_are_known(alpha, m):
    assert needed(alpha) == m and rank_for(alpha, m) == 1 and rank_for(alpha, m - 1) == 0
    assert needed(alpha, None) == round(1 / alpha) - 1


@pytest.mark.parametrize("m", [59, 100, 299, 1000])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_ranks_are_the_largest_that_keep_the_promise(m, alpha):
    k = rank_for(alpha, m)
    assert beta.cdf(alpha, k, m + 1 - k) >= 0.95 > beta.cdf(alpha, k + 1, m - k)
    # Beta and binomial tails are one thing.
    assert beta.cdf(alpha, k, m + 1 - k) == pytest.approx(1 - binom.cdf(k - 1, m, alpha))
    assert rate_at(k, m) <= alpha < rate_at(k + 1, m)
    assert rank_for(alpha, m, None) == math.floor(alpha * (m + 1) + 1e-12) >= k


def test_realised_rates_keep_the_promise_and_the_expectation():
    rng, m, alpha, kept, rates = np.random.default_rng(0), 120, 0.05, 0, []
    for _ in range(2000):
        found = Threshold.at(rng.normal(size=m), alpha)
        from scipy.stats import norm

        rates.append(norm.cdf(found.value))
        kept += rates[-1] <= alpha
    assert kept / 2000 == pytest.approx(beta.cdf(alpha, found.rank, m + 1 - found.rank), abs=0.02) and kept >= 1900
    assert np.mean(rates) == pytest.approx(found.expected, abs=0.002)


def test_where_pictures_are_too_few_the_threshold_says_what_it_can_promise():
    found = Threshold.at(np.arange(40.0), 0.01)
    assert found.value == 0 and found.rank == 1 and found.promised == pytest.approx(1 - 0.05 ** (1 / 40))
    assert "at most 7.22 % false alarms, with 95 % confidence, from 40 normal pictures" == str(found)


def test_p_values_by_hand_ties_count_against_the_picture():
    calibration = np.array([3.0, 1.0, 2.0, 2.0])
    assert p_values(np.array([0.0, 1.0, 2.0, 2.5, 9.0, np.nan, -np.inf]), calibration).tolist() == [
        1 / 5, 2 / 5, 4 / 5, 4 / 5, 1, 1 / 5, 1 / 5
    ]  # fmt: skip


def test_p_values_of_normal_pictures_are_valid_in_finite_samples():
    rng = np.random.default_rng(1)
    p = np.concatenate([p_values(rng.normal(size=5), rng.normal(size=19)) for _ in range(4000)])
    for t in (0.05, 0.1, 0.5):
        assert (p <= t).mean() <= t + 0.01
    assert kstest(p - rng.random(len(p)) / 20, "uniform").statistic < 0.02


def test_benjamini_hochberg_by_hand_and_its_rate():
    p = np.array([0.01, 0.8, 0.02, 0.04, 0.03])
    assert benjamini_hochberg(p, 0.05).tolist() == [True, False, True, True, True]
    assert not benjamini_hochberg(p, 0.001).any() and not len(benjamini_hochberg(np.array([]), 0.1))
    rng, shares = np.random.default_rng(2), []
    for _ in range(300):
        scores = np.concatenate([rng.normal(size=80), rng.normal(-4, 1, 20)])
        found = benjamini_hochberg(p_values(scores, rng.normal(size=1000)), 0.1)
        shares.append(found[:80].sum() / max(1, found.sum()))
    assert np.mean(shares) <= 0.1 and np.mean(shares) > 0.05


def test_intervals_are_those_of_clopper_and_pearson():
    assert interval(0, 10) == (0.0, pytest.approx(1 - 0.025**0.1)) and interval(10, 10)[1] == 1
    low, high = interval(3, 20)
    assert binom.sf(2, 20, low) == pytest.approx(0.025) and binom.cdf(3, 20, high) == pytest.approx(0.025)
    assert interval(0, 0) == (0, 1)


def drifted(calibration, scores):
    drift = Drift(calibration)
    for score in scores:
        drift.add(score)
    return drift


def test_drift_is_noticed_and_seldom_where_there_is_none():
    rng = np.random.default_rng(3)
    assert sum(drifted(rng.normal(size=40), rng.normal(size=300)).warns for _ in range(300)) <= 6
    # Of few calibration pictures and many new ones, too: the calibration alone would be found to differ.
    assert sum(drifted(rng.normal(size=15), rng.normal(size=2000)).warns for _ in range(30)) <= 2
    assert drifted(rng.normal(size=100), rng.normal(-1.5, 1, 150)).warns
    assert drifted(rng.normal(size=100), rng.normal(1.5, 1, 150)).warns  # Too normal is not exchangeable, either.
    late = drifted(rng.normal(size=100), [*rng.normal(size=100), *rng.normal(-2, 1, 150)])
    assert late.warns and late.highest > Drift.LIMIT


def test_ties_are_no_drift():
    assert not drifted(np.zeros(50), np.zeros(500)).warns


@pytest.mark.parametrize("scores, told", [([], "no calibration scores"), ([1.0, np.nan], "non-finite")])
def test_what_cannot_calibrate_raises(scores, told):
    with pytest.raises(ValueError, match=told):
        p_values(np.array([1.0]), np.array(scores))
    with pytest.raises(ValueError, match=told):
        Threshold.at(np.array(scores), 0.1)
    with pytest.raises(ValueError, match="lies in"):
        rank_for(1.5, 10)
