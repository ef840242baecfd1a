"""Projections against a bisection in float64, noise against its distribution, directions by hand."""

import pytest
import torch

from common.attacks.ball import NORMS, L2Ball, LinfBall, replace_
from common.seed import generator


def images(n=6, side=8):
    """Grey ones, and binary ones, of which no pixel can move one way."""
    x = torch.rand(n, 3, side, side, generator=generator(1, "images"))
    x[: n // 2] = (x[: n // 2] > 0.5).float()
    return x


def away(x, by, seed=2):
    return x + by * torch.randn(x.shape, generator=generator(seed, "away"))


def nearest(v, x0, eps):
    """Of the Euclidean ball and [0, 1], by bisection: the factor of v - x0 after which clipping just keeps to eps."""
    d, x0 = (v.double() - x0.double()).flatten(1), x0.double().flatten(1)
    low, high = torch.zeros(len(d), 1, dtype=torch.float64), torch.ones(len(d), 1, dtype=torch.float64)
    for _ in range(50):
        s = (low + high) / 2
        inside = ((x0 + s * d).clamp(0, 1) - x0).norm(dim=1, keepdim=True) <= eps
        low, high = torch.where(inside, s, low), torch.where(inside, high, s)
    return (x0 + high * d).clamp(0, 1).view(v.shape)


@pytest.mark.parametrize("eps", [0.0, 0.03, 0.5, 2.0])
@pytest.mark.parametrize("norm", NORMS)
def test_projected_images_are_in_the_ball_and_in_0_to_1(norm, eps):
    x0 = images()
    for by in (1e-3, 0.3, 5.0):
        ball = NORMS[norm](x0, eps)
        x = ball.project_(away(x0, by))
        assert ball.distance(x, x0).max() <= eps + 1e-6 and x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_what_the_set_contains_is_what_the_projection_leaves_alone(norm):
    x0 = torch.full((4, 1, 1, 2), 0.5)
    x = x0 + torch.tensor([[0.1, 0], [0.2, 0], [0.3, 0], [0.6, 0]]).view(4, 1, 1, 2)
    assert NORMS[norm](x0, 0.2).contains(x).tolist() == [True, True, False, False]
    assert NORMS[norm](x0, 1.0).contains(x).tolist() == [True, True, True, False]


@pytest.mark.parametrize("norm", NORMS)
def test_images_inside_stay_as_they_are(norm):
    x0 = images()
    x = away(x0, 1e-3).clamp(0, 1)
    torch.testing.assert_close(NORMS[norm](x0, 0.2).project_(x.clone()), x, atol=1e-7, rtol=0)


@pytest.mark.parametrize("eps", [0.1, 0.5, 2.0, 4.0])
def test_the_euclidean_projection_is_the_nearest_image_of_both_sets(eps):
    x0 = images()
    for by in (0.05, 0.5, 3.0):
        v = away(x0, by)
        found, exact = L2Ball(x0, eps).project_(v.clone()), nearest(v, x0, eps)
        assert (found - exact).flatten(1).norm(dim=1).max() < 2e-4 * eps


def test_clipping_leaves_nothing_of_the_radius_unused():
    x0 = images()
    v = away(x0, 0.5)
    d = v - x0
    clipped_last = (x0 + d * (1 / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1))).clamp(0, 1)
    binary = L2Ball.distance(clipped_last, x0)[:3]
    assert binary.max() < 0.8  # Half of the pixels were clipped away.
    assert L2Ball(x0, 1.0).project_(v).sub(x0).flatten(1).norm(dim=1).min() > 1 - 1e-4


def test_the_projection_of_linf_is_two_clips():
    x0 = images()
    v = away(x0, 0.5)
    expected = torch.minimum(torch.maximum(v, x0 - 0.1), x0 + 0.1).clamp(0, 1)
    assert torch.equal(LinfBall(x0, 0.1).project_(v.clone()), expected)


def test_noise_of_linf_is_uniform():
    noise = LinfBall(images(200), 0.1).noise(generator(0, "noise"))
    assert noise.abs().max() <= 0.1 and abs(float(noise.mean())) < 5e-4
    assert float(noise.std()) == pytest.approx(0.1 / 3**0.5, rel=0.01)


def test_noise_of_l2_is_uniform_in_the_ball():
    x0 = torch.rand(20_000, 1, 1, 3, generator=generator(1, "images"))
    noise = L2Ball(x0, 0.5).noise(generator(0, "noise"))
    radius = noise.flatten(1).norm(dim=1)
    assert radius.max() <= 0.5 + 1e-6
    # The share of a ball of three dimensions within half of its radius, and within nine tenths.
    assert float((radius < 0.25).float().mean()) == pytest.approx(1 / 8, abs=0.01)
    assert float((radius < 0.45).float().mean()) == pytest.approx(0.729, abs=0.01)
    assert noise.flatten(1).mean(0).abs().max() < 0.01


def test_directions():
    grad = torch.tensor([[3.0, -4.0], [0.0, 0.0], [3e-30, -4e-30], [torch.nan, 1.0]])
    nan_is_0 = torch.tensor([[1.0, -1.0], [0.0, 0.0], [1.0, -1.0], [0.0, 1.0]])
    assert torch.equal(LinfBall.direction(grad.clone()), nan_is_0)
    unit = torch.tensor([[0.6, -0.8], [0.0, 0.0], [0.6, -0.8], [0.0, 1.0]])  # Squares of the third underflow.
    torch.testing.assert_close(L2Ball.direction(grad.clone()), unit)


def test_distances():
    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([0.3, -0.4, 0, 0, 0, 0, 0, 0.5]).view(2, 1, 2, 2)
    torch.testing.assert_close(LinfBall.distance(x, y), torch.tensor([0.4, 0.5]))
    torch.testing.assert_close(L2Ball.distance(x, y), torch.tensor([0.5, 0.5]))


def test_chosen_images_are_replaced_exactly():
    x, y = images(), images().flip(0) * 0.1
    chosen = torch.tensor([True, False] * 3)
    expected = torch.stack([b if c else a for a, b, c in zip(x, y, chosen, strict=True)])
    assert torch.equal(replace_(x, y, chosen), expected)
