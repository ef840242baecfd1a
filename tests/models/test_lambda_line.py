"""Lambda of the stem from the residual: the line, and a network within which it is followed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from models.csc import CSC2d
from models.lambda_line import (
    MEASURES,
    LambdaLine,
    adaptive,
    energy,
    fit_line,
    fixed,
    follow,
    highpass,
    measured,
    residual,
)
from models.resnet import BasicBlock, ResNet


def toy(**settings) -> ResNet:
    """A residual network of one block with sparse coding in place of its first convolution, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)

        def stem(inputs, outputs):
            return CSC2d(inputs, outputs, 3, 1, 1, **settings)

        net = ResNet(BasicBlock, (1,), (6,), stem=stem, stem_act=nn.Identity)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):  # whatever lies below zero would be cut off
                nn.init.constant_(module.bias, 0.5)
    return net.double().eval()


@pytest.fixture
def net():
    return toy()


@pytest.fixture
def images():
    """Of very different residuals: from almost flat to noise."""
    gen = torch.Generator().manual_seed(1)
    scale = torch.tensor([0.05, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64).view(5, 1, 1, 1)
    return scale * torch.randn(5, 3, 7, 6, generator=gen, dtype=torch.float64)


LINE = LambdaLine(a=0.002, b=0.05, low=0.1, high=1.4, reference=0.1)


def by_hand(stem, x, lam):
    """|x - A(z)|^2 of one image (C, H, W) with its second iterate z, by matrices."""
    size, shape = x.shape[1:], (1, len(stem.weight), *x.shape[1:])
    basis = torch.eye(math.prod(shape), dtype=x.dtype).view(-1, *shape[1:])
    A = stem.synthesise(basis, size).flatten(1).T.detach()
    x, eta = x.flatten(), stem.step
    z = torch.relu(eta * A.T @ x - lam * eta)
    z = torch.relu(z + eta * A.T @ (x - A @ z) - lam * eta)
    return float((x - A @ z).square().sum())


def test_the_residual_is_that_of_the_code_at_the_reference_whatever_lambda_is(net, images):
    stem = net.conv1
    expected = [by_hand(stem, x, 0.3) for x in images]
    stem.set_lambda(torch.arange(5.0))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = residual(stem, images, 0.3)
    assert found.shape == images.shape
    np.testing.assert_allclose(energy(found).detach(), expected, rtol=1e-10)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert residual(stem.float(), images.float(), 0.3).dtype == torch.float32


def test_the_residual_is_not_computed_in_bfloat16(net, images):
    exact = residual(net.conv1, images, 0.1)
    stem, x = net.float().conv1, images.float()
    expected = residual(stem, x, 0.1)
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(residual(stem, x, 0.1), expected)
        coarse = residual(stem, x.bfloat16(), 0.1)
        assert coarse.dtype == torch.float32
        torch.testing.assert_close(energy(coarse), energy(expected), rtol=0.02, atol=1e-3)


def test_the_residual_grows_with_noise(net):
    """Section 7, property 9, at the iterate that the layer returns."""
    gen = torch.Generator().manual_seed(3)
    x = torch.rand(8, 3, 2, 2, generator=gen, dtype=torch.float64)
    x = torch.nn.functional.interpolate(x, (8, 8), mode="bilinear")
    noise = torch.randn(8, 3, 8, 8, generator=gen, dtype=torch.float64)
    for measure in MEASURES.values():
        found = torch.stack([measure(residual(net.conv1, x + std * noise, 0.1)) for std in (0, 0.1, 0.2, 0.5, 1)])
        assert (found.mean(1).diff() > 0).all()


def test_the_high_pass_measure_is_that_of_immerkaers_mask_and_blind_to_what_is_smooth():
    gen = torch.Generator().manual_seed(7)
    noise = torch.randn(2, 3, 40, 40, generator=gen, dtype=torch.float64)
    mask = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=torch.float64).expand(3, 1, 3, 3)
    expected = torch.nn.functional.conv2d(noise, mask, groups=3).abs().mean((1, 2, 3))
    torch.testing.assert_close(highpass(noise), expected)
    # Of Gaussian noise it is 6 sqrt(2 / pi) standard deviations.
    assert (highpass(0.3 * noise) / (6 * math.sqrt(2 / math.pi) * 0.3)).tolist() == pytest.approx([1, 1], rel=0.05)
    ramp = torch.linspace(0, 5, 40, dtype=torch.float64)
    plane = ramp.view(1, 1, 1, -1) + ramp.square().view(1, 1, -1, 1)
    torch.testing.assert_close(highpass(noise + plane), highpass(noise))
    assert energy(noise + plane).min() > 2 * energy(noise).max()


def test_a_line_is_recovered_from_points_on_it():
    residuals = [3.0, 70.0, 150.5, 900.0]
    line = fit_line(residuals, [0.004 * r + 0.07 for r in residuals], 0.1, 1.4, 0.1)
    assert (line.a, line.b) == (pytest.approx(0.004, rel=1e-12), pytest.approx(0.07, rel=1e-12))
    assert (line.low, line.high, line.reference) == (0.1, 1.4, 0.1)


def test_a_line_is_that_of_polyfit_where_points_do_not_lie_on_one():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(1, 500, 9), rng.uniform(0, 2, 9)
    line = fit_line(list(x), list(y), 0.0, 2.0, 0.1)
    np.testing.assert_allclose((line.a, line.b), np.polyfit(x, y, 1), rtol=1e-10)


@pytest.mark.parametrize("residuals", [[5.0], [5.0, 5.0, 5.0], [0.0, 0.0], [300.1, 300.1 * (1 + 1e-12)]])
def test_equal_residuals_give_a_constant_line(residuals):
    lambdas = [0.1, 0.5, 0.9][: len(residuals)]
    line = fit_line(residuals, lambdas, 0.1, 1.4, 0.1)
    assert (line.a, line.b) == (0.0, pytest.approx(np.mean(lambdas)))


def test_what_is_no_line_is_refused():
    for numbers in [(math.nan, 0, 0, 1, 0.1), (0, 0, 1, 0.5, 0.1), (0, 0, -1, 0, 0.1), (0, 0, 0, math.inf, 0.1)]:
        with pytest.raises(ValueError, match="finite"):
            LambdaLine(*numbers)
    with pytest.raises(ValueError, match="measures of a residual are energy, highpass, got 'mean'"):
        LambdaLine(0, 0, 0, 1, 0.1, "mean")
    for residuals, lambdas in [([], []), ([1.0, 2.0], [1.0])]:
        with pytest.raises(ValueError, match="as many residuals as lambdas"):
            fit_line(residuals, lambdas, 0.0, 1.0, 0.1)


def test_the_prediction_is_clipped_at_both_ends():
    found = LINE.predict(torch.tensor([0.0, 25.0, 100.0, 674.9, 675.1, 1e9]))
    torch.testing.assert_close(found, torch.tensor([0.1, 0.1, 0.25, 1.3998, 1.4, 1.4]))
    assert LINE.predict(torch.tensor(100.0)).shape == ()


def one_by_one(net, images, lambdas):
    found = []
    for image, lam in zip(images, lambdas, strict=True):
        net.conv1.set_lambda(lam)
        found.append(net(image[None]))
    net.conv1.set_lambda(0.1)
    return torch.cat(found)


def predicted(images, net):
    values = [LINE.a * by_hand(net.conv1, x, LINE.reference) + LINE.b for x in images]
    return [min(max(value, LINE.low), LINE.high) for value in values]


def test_a_batch_under_the_prediction_of_each_image_is_its_images_one_by_one(net, images):
    """Section 7, property 13."""
    lambdas = predicted(images, net)
    assert len(set(lambdas)) == 4 and lambdas[0] == LINE.low and lambdas[-1] == LINE.high
    expected = one_by_one(net, images, lambdas)
    with torch.no_grad(), adaptive(net, LINE):
        whole, parts = net(images), torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(whole, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts, expected.detach(), rtol=1e-10, atol=1e-12)
    assert (whole - net(images)).abs().max() > 1e-3


def test_a_batch_under_one_prediction_has_that_of_the_mean_residual(net, images):
    mean = np.mean([by_hand(net.conv1, x, LINE.reference) for x in images])
    expected = one_by_one(net, images, [LINE.a * mean + LINE.b] * 5)
    with adaptive(net, LINE, per="batch"):
        torch.testing.assert_close(net(images), expected, rtol=1e-10, atol=1e-12)


def test_a_line_predicts_from_the_measure_that_it_was_fitted_to(net, images):
    line = LambdaLine(a=0.1, b=0.0, low=0.0, high=2.0, reference=0.3, measure="highpass")
    assert fit_line([1.0, 2.0], [0.1, 0.2], 0.0, 2.0, 0.3, "highpass") == line
    lambdas = line.predict(highpass(residual(net.conv1, images, 0.3))).tolist()
    assert len(set(lambdas)) > 3
    with adaptive(net, line):
        torch.testing.assert_close(net(images), one_by_one(net, images, lambdas), rtol=1e-7, atol=1e-8)


def test_a_fixed_lambda_holds_within_and_not_afterwards(net, images):
    for lam, lambdas in [(0.7, [0.7] * 5), (torch.linspace(0.1, 1.4, 5), np.linspace(0.1, 1.4, 5))]:
        with fixed(net, lam):
            torch.testing.assert_close(net(images), one_by_one(toy(), images, lambdas), rtol=1e-7, atol=1e-8)
        assert net.conv1.lam == pytest.approx(0.1)


@pytest.mark.parametrize(
    "setting", [lambda net: fixed(net, 0.7), lambda net: adaptive(net, LINE), lambda net: measured(net, 0.1)]
)
def test_lambda_is_restored_after_an_error(setting, net, images):
    before = net(images)
    with pytest.raises(KeyError), setting(net):
        net(images)
        raise KeyError
    assert torch.equal(net(images), before) and not net.conv1._forward_pre_hooks
    with pytest.raises(ValueError, match="no layer of sparse coding"), setting(nn.Linear(2, 2)):
        pass


def test_lambda_changes_of_the_stem_alone(images):
    def conv(inputs, outputs, stride=1):
        return CSC2d(inputs, outputs, 3, stride, 1, lam=0.2)

    net = ResNet(BasicBlock, (1,), (6,), stem=conv, conv=conv).double().eval()
    layers = [module for module in net.modules() if isinstance(module, CSC2d)]
    assert len(layers) == 3
    with adaptive(net, LINE):
        net(images)
        assert layers[0].lam.shape == (5,) and all(layer.lam == torch.tensor(0.2) for layer in layers[1:])
    assert all(layer.lam == torch.tensor(0.2) for layer in layers)


def test_the_prediction_lasts_until_it_is_ended(net, images):
    before = net(images)
    with adaptive(net, LINE):
        expected = net(images)
    end = follow(net, LINE)
    assert torch.equal(net(images), expected) and torch.equal(net(images[:2]), net(images)[:2])
    end()
    assert torch.equal(net(images), before)
    with pytest.raises(ValueError, match="per must be one of image, batch"):
        follow(net, LINE, per="set")


def test_the_residual_of_the_last_batch_is_there_after_the_pass(net, images):
    with measured(net, 0.4) as last:
        assert torch.equal(net(images), toy()(images))
        torch.testing.assert_close(last(), residual(net.conv1, images, 0.4))
        net(images[:2])
        assert len(last()) == 2


@pytest.mark.parametrize(
    "recompute, measure, a", [(False, "energy", 0.01), (True, "energy", 0.01), (True, "highpass", 0.1)]
)
def test_gradients_flow_through_the_prediction(recompute, measure, a):
    """Against finite differences, in which lambda moves with the input; without its part the gradient is another."""
    net = toy(recompute=recompute)
    line = LambdaLine(a=a, b=0.05, low=0.0, high=5.0, reference=0.1, measure=measure)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def out(x):
        with adaptive(net, line):
            return net(x)

    assert torch.autograd.gradcheck(out, x.clone().requires_grad_(), eps=1e-6, atol=1e-6)
    lam = line.predict(MEASURES[measure](residual(net.conv1, x, 0.1))).detach()
    grads = []
    for forward in (out, lambda x: fixed_pass(net, lam, x)):
        inputs = x.clone().requires_grad_()
        forward(inputs).sum().backward()
        grads.append(inputs.grad)
    assert (grads[0] - grads[1]).abs().max() > 1e-3


def fixed_pass(net, lam, x):
    with fixed(net, lam):
        return net(x)
