"""Shifts that pictures make meaningless are named."""

import numpy as np
import torch

from detector import advisor
from detector.advisor import advise


def pictures(kind, n=60, size=32):
    """Noise, which looks the same from all sides; or a bright upper left corner."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, 3, size, size))
    if kind == "upright":
        x[:, :, : size // 2, : size // 2] = x[:, :, : size // 2, : size // 2] // 4 + 190
    return torch.from_numpy(x.astype(np.uint8))


def test_pictures_with_an_upper_side_tell_rotations_apart_and_noise_does_not(monkeypatch):
    monkeypatch.setattr(advisor, "CANDIDATES", ("rotation",))
    upright = {each.shift: each for each in advise(pictures("upright"), steps=30)}
    noise = {each.shift: each for each in advise(pictures("noise"), steps=30)}
    assert upright["rotation"].means_something and upright["rotation"].accuracy > 0.9
    assert not noise["rotation"].means_something and "meaningless" in str(noise["rotation"])
    assert upright["rotation"].chance == 0.25
