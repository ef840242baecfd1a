"""What scores of normal pictures outside the fit say of a new one: p-values, thresholds with a promise, drift.

Higher scores are more normal. Letters: m calibration scores, alpha a rate of false alarms, delta the chance that a
promise does not hold. Sources: Vovk, Gammerman & Shafer 2005 (conformal p-values), Bates et al. 2023 (outliers),
Clopper & Pearson 1934, Benjamini & Hochberg 1995, Volkhonskiy et al. 2017 (martingales).

All of it holds where new normal pictures are exchangeable with those of the calibration.
"""

import bisect
import math
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

CONFIDENCE = 0.95


def p_values(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """(1 + how many calibration scores are at most as high) / (m + 1), for each score (n,).

    Of a normal picture, P(p <= t) <= t for every t. Ties count against the picture; NaN is as low as can be.
    """
    order = np.sort(np.asarray(calibration, dtype=np.float64))
    _check(order)
    scores = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    return (1 + np.searchsorted(order, scores, side="right")) / (len(order) + 1)


def rate_at(k: int, m: int, confidence: float = CONFIDENCE) -> float:
    """The false-alarm rate that a threshold at the k-th lowest of m scores does not exceed, with this confidence.

    The rate of pictures below it is distributed as Beta(k, m + 1 - k); ties make it smaller. k 0: no alarms.
    """
    return 0.0 if k == 0 else float(betaincinv(k, m + 1 - k, confidence))


def rank_for(alpha: float, m: int, confidence: float | None = CONFIDENCE) -> int:
    """The largest k for which a threshold at the k-th lowest of m scores keeps the rate of false alarms at most alpha:
    with a confidence, or None, in expectation, k / (m + 1) <= alpha. 0: no threshold can promise that."""
    if not 0 < alpha < 1:
        raise ValueError(f"a rate of false alarms lies in (0, 1), got {alpha}")
    if confidence is None:
        return math.floor(alpha * (m + 1) + 1e-12)
    low, high = 0, m
    while low < high:  # The rate rises with k.
        k = (low + high + 1) // 2
        low, high = (k, high) if rate_at(k, m, confidence) <= alpha else (low, k - 1)
    return low


def needed(alpha: float, confidence: float | None = CONFIDENCE) -> int:
    """How many calibration pictures a promise of alpha needs at least."""
    if confidence is None:
        return math.ceil(1 / alpha - 1 - 1e-9)
    return math.ceil(math.log(1 - confidence) / math.log1p(-alpha) - 1e-9)


@dataclass(frozen=True)
class Threshold:
    """A picture is an anomaly where its score is below `value`.

    rank: of the calibration score that it is, from the lowest; 0: below all, and nothing is ever an anomaly by it.
    promised: the rate of false alarms that is not exceeded with `confidence`. expected: rank / (m + 1).
    """

    value: float
    rank: int
    count: int
    confidence: float
    promised: float
    expected: float

    @classmethod
    def at(cls, calibration: np.ndarray, alpha: float, confidence: float = CONFIDENCE) -> "Threshold":
        """For a rate of alpha, with confidence; where too few pictures can promise that, at the lowest score, which
        promises what they can."""
        order = np.sort(np.asarray(calibration, dtype=np.float64))
        _check(order)
        m = len(order)
        rank = max(1, rank_for(alpha, m, confidence))
        # Scores below the k-th lowest: equal ones are normal.
        return cls(float(order[rank - 1]), rank, m, confidence, rate_at(rank, m, confidence), rank / (m + 1))

    @classmethod
    def without_promise(cls, calibration: np.ndarray, value: float) -> "Threshold":
        """At a value that the calibration did not choose."""
        below, m = int((np.asarray(calibration) < value).sum()), len(calibration)
        return cls(value, below, m, 0.0, 1.0, (below + 1) / (m + 1))

    def __str__(self) -> str:
        rate, sure = f"{100 * self.promised:.3g} %", f"{100 * self.confidence:.3g} %"
        return f"at most {rate} false alarms, with {sure} confidence, from {self.count} normal pictures"


def interval(hits: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The two-sided Clopper-Pearson interval of a share of n; (0, 1) of nothing."""
    tail = (1 - confidence) / 2
    low = float(betaincinv(hits, n - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return low, high


def benjamini_hochberg(p: np.ndarray, rate: float) -> np.ndarray:
    """Which pictures (n,) to call anomalies so that the expected share of normal ones among them is at most `rate`."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    passing = np.nonzero(p[order] <= rate * np.arange(1, len(p) + 1) / max(1, len(p)))[0]
    found = np.zeros(len(p), dtype=bool)
    if len(passing):
        found[order[: passing[-1] + 1]] = True
    return found


class Drift:
    """A simple jumper martingale on transductive p-values: what a gambler wins who bets that the scores of calibration
    and of new pictures, in the order in which they come, are not exchangeable.

    Where they are, it exceeds 100 with a chance of at most 1 %, however many pictures come: each is ranked among those
    of the calibration and all new ones before it, not among the former alone, from which anything would be found to
    differ in time. Ties are broken by a draw.
    """

    LIMIT = 100.0
    _JUMP = 0.01
    _BETS = np.array((-1.0, 0.0, 1.0))

    def __init__(self, calibration: np.ndarray):
        self._scores = sorted(np.asarray(calibration, dtype=np.float64).tolist())
        self._capital = np.full(3, 1 / 3)
        self._rng = np.random.default_rng(0)
        self.highest = 1.0

    def add(self, score: float) -> float:
        """Bet on one more score. Returns: the highest value so far."""
        low, high = bisect.bisect_left(self._scores, score), bisect.bisect_right(self._scores, score)
        p = (low + self._rng.random() * (high - low + 1)) / (len(self._scores) + 1)
        self._scores.insert(high, score)
        mixed = (1 - self._JUMP) * self._capital + self._JUMP * self._capital.sum() / 3
        self._capital = mixed * (1 + self._BETS * (p - 0.5))
        self.highest = max(self.highest, float(self._capital.sum()))
        return self.highest

    @property
    def warns(self) -> bool:
        return self.highest > self.LIMIT


def _check(order: np.ndarray) -> None:
    if not len(order):
        raise ValueError("there are no calibration scores")
    if not np.isfinite(order).all():
        raise ValueError("calibration scores are non-finite")
