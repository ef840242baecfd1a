"""Do thresholds keep what they promise? `python -m scripts.guarantee FILE.detector ...` simulates calibrations.

Scores are drawn from a smooth density around those of the pictures that calibrated the detectors (a Gaussian kernel of
Silverman's width), so that the true rate of false alarms of a threshold is known exactly. Rules: of `detect.py`, with
confidence; of conformal p-values at most alpha, as nonconform and crepes have it, which promise the mean over
calibrations; the lowest normal score, as anomalib falls back to without anomalies.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import norm

from common.errors import command
from detector.calibration import CONFIDENCE, Threshold, p_values, rank_for
from detector.detector import Detector
from scripts.tables import markdown

_CALIBRATIONS = 1000
_SIZES = (59, 100, 299, 1000)
_ALPHAS = (0.05, 0.01)


def _conformal(scores: np.ndarray, alpha: float) -> float:
    """The lowest score whose p-value exceeds alpha: all below are alarms; minus infinity where none can be."""
    k = rank_for(alpha, len(scores), None)
    if not k:
        return -np.inf
    threshold = float(np.sort(scores)[k - 1])
    assert p_values(np.array([np.nextafter(threshold, -np.inf)]), scores)[0] <= alpha + 1e-12
    return threshold


RULES: dict[str, Callable[[np.ndarray, float], float]] = {
    f"this program, {100 * CONFIDENCE:g} % confidence": lambda s, alpha: Threshold.at(s, alpha).value,
    "p-values at most alpha": _conformal,
    "the lowest normal score": lambda s, alpha: float(s.min()),
}


def simulated(pools: Sequence[np.ndarray], alpha: float, m: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The true rates of false alarms of each rule's thresholds, by calibration (`_CALIBRATIONS`,)."""
    rng = np.random.default_rng(seed)
    rates: dict[str, list[float]] = {name: [] for name in RULES}
    for i in range(_CALIBRATIONS):
        pool = pools[i % len(pools)]
        width = 1.06 * pool.std() * len(pool) ** -0.2
        scores = rng.choice(pool, m) + width * rng.normal(size=m)
        for name, rule in RULES.items():
            rates[name].append(float(norm.cdf(rule(scores, alpha), pool, width).mean()))
    return {name: np.array(values) for name, values in rates.items()}


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.guarantee", description=__doc__)
    parser.add_argument("files", nargs="+")
    pools = [Detector.load(path).calibration for path in parser.parse_args(argv).files]
    header = ["alpha", "pictures held out", "rule", "promised", "mean rate", "calibrations above alpha"]
    rows = []
    for alpha in _ALPHAS:
        for m in _SIZES:
            found = simulated(pools, alpha, m)
            promised = Threshold.at(np.arange(float(m)), alpha).promised
            for n, (name, rates) in enumerate(found.items()):
                above = (rates > alpha + 1e-12).mean()
                told = f"{100 * promised:.2g} %" if n == 0 else ""
                rows.append(
                    [f"{100 * alpha:g} %", str(m), name, told, f"{100 * rates.mean():.2f} %", f"{100 * above:.1f} %"]
                )
    print(markdown(header, rows))


if __name__ == "__main__":
    raise SystemExit(main())
