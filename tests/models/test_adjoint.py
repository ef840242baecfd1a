"""The adjoint of a convolution by each of its ways, and the gradient of its weight, by their definitions."""

import pytest
import torch
import torch.nn.functional as F

from models.adjoint import Frame


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(8, 8), (12, 10), (9, 8)])
@pytest.mark.parametrize("kernel, padding", [(1, 0), (2, 0), (3, 0), (3, 1), (3, 3), (4, 1), (5, 2), (7, 3), (7, 0)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_all_ways_are_the_adjoint(channels, stride, kernel, padding, size):
    frame = Frame(size, stride, padding, kernel)
    weight, x = draws(5, channels, kernel, kernel), draws(2, channels, *size, seed=1)
    z = torch.randn_like(frame.analyse(x, weight))
    found = frame.synthesis(weight)(z)
    assert found.shape == x.shape
    assert float((found * x).sum()) == pytest.approx(float((z * frame.analyse(x, weight)).sum()), rel=1e-10)
    torch.testing.assert_close(found, F.conv_transpose2d(z, weight, None, stride, padding, frame.rest))


def test_images_of_few_channels_are_made_in_blocks(monkeypatch):
    monkeypatch.setattr(Frame, "_synthesis_in_blocks", lambda *args: "in blocks")
    assert Frame((4, 4), 1, 1, 3).synthesis(draws(5, 3, 3, 3)) == "in blocks"
    assert Frame((4, 4), 1, 1, 3).synthesis(draws(5, 6, 3, 3)) != "in blocks"
    assert Frame((5, 4), 1, 1, 3).synthesis(draws(5, 3, 3, 3)) != "in blocks"


@pytest.mark.parametrize("stride, size", [(1, (6, 7)), (2, (8, 8)), (2, (7, 8))])
def test_the_gradient_of_the_weight(stride, size):
    frame = Frame(size, stride, 1, 3)
    weight, x = draws(5, 3, 3, 3).requires_grad_(), draws(2, 3, *size, seed=1)
    z = draws(*frame.analyse(x, weight).shape, seed=2)
    (expected,) = torch.autograd.grad((frame.analyse(x, weight) * z).sum(), weight)
    torch.testing.assert_close(frame.correlate(x, z, weight.detach()), expected)
