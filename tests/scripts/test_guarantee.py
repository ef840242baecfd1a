"""Simulated calibrations keep what they promise."""

import numpy as np
import pytest

from scripts import guarantee
from scripts.guarantee import RULES, simulated


@pytest.mark.parametrize("alpha, m", [(0.05, 59), (0.05, 299), (0.01, 299)])
def test_rules_keep_their_promises_on_any_scores(alpha, m, monkeypatch):
    monkeypatch.setattr(guarantee, "_CALIBRATIONS", 400)
    rng = np.random.default_rng(0)
    found = simulated([rng.gamma(2, size=80), rng.normal(size=60)], alpha, m)
    ours, mean, lowest = (found[name] for name in RULES)
    assert (ours > alpha).mean() <= 0.05 + 0.03
    assert mean.mean() == pytest.approx(np.floor(alpha * (m + 1)) / (m + 1), abs=0.003)
    assert lowest.mean() == pytest.approx(1 / (m + 1), abs=0.003)
