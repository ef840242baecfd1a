import pytest
import torch

from evals.accuracy import accuracy, calibration_error


def test_calibration_error_by_hand():
    """Three bins. To 1/3: none. To 2/3: 0.5 right and 0.6 wrong, |1 - 1.1|. To 1: 0.9 wrong, 1.0 and 0.7 right,
    |2 - 2.6|. Together 0.7 of 5 images."""
    confidence = torch.tensor([0.5, 0.6, 0.9, 1.0, 0.7], dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    labels = torch.tensor([0, 1, 1, 0, 0])
    assert calibration_error(probabilities, labels, bins=3) == pytest.approx(0.7 / 5, abs=1e-12)
    assert accuracy(probabilities, labels) == pytest.approx(3 / 5)


def test_calibration_error_against_a_loop_over_the_bins():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(400, 7, dtype=torch.float64, generator=generator).mul(2).softmax(1)
    labels = torch.randint(7, (400,), generator=generator)
    confidence, named = probabilities.max(1)
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            right = (named == labels)[inside].double().mean()
            expected += float(inside.double().mean() * (right - confidence[inside].mean()).abs())
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-12)


def test_a_confidence_on_a_border_belongs_to_the_bin_below():
    """Two bins: 0.5 right falls into the first, with 0.4 wrong, |1 - 0.9|; 0.6 wrong into the second, |0 - 0.6|."""
    first = torch.tensor([0.5, 0.4, 0.6], dtype=torch.float64)
    probabilities = torch.stack([first, torch.tensor([0.3, 0.3, 0.3]), torch.tensor([0.2, 0.3, 0.1])], 1)
    labels = torch.tensor([0, 1, 1])
    assert calibration_error(probabilities, labels, bins=2) == pytest.approx((0.1 + 0.6) / 3, abs=1e-12)


def test_certain_and_right_is_perfectly_calibrated_and_certain_and_wrong_not_at_all():
    certain = torch.eye(4)
    assert calibration_error(certain, torch.arange(4)) == 0
    assert calibration_error(certain, torch.arange(4).flip(0)) == 1
