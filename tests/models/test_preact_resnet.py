"""Pre-activation and wide networks against their formula written out, their sizes and their first weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import BACKBONES
from models.checkpoint import build_net
from models.preact_resnet import PreActResNet, WideResNet
from tests.models.test_reference import with_statistics
from tests.models.test_resnet import fresh, images


def norm(x: Tensor, state: dict[str, Tensor], at: str) -> Tensor:
    mean, var, weight, bias = (
        state[f"{at}.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def written_out(state: dict[str, Tensor], x: Tensor, blocks: int, stages: int) -> Tensor:
    """The map behind the last normalisation and ReLU, from a state dict by its keys."""
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in range(1, stages + 1):
        for n in range(blocks):
            at, stride = f"layer{stage}.{n}", 2 if stage > 1 and n == 0 else 1
            y = norm(x, state, f"{at}.bn1").relu()
            key = f"{at}.shortcut.0.weight"
            past = F.conv2d(y, state[key], stride=stride) if key in state else x
            y = norm(F.conv2d(y, state[f"{at}.conv1.weight"], stride=stride, padding=1), state, f"{at}.bn2").relu()
            x = F.conv2d(y, state[f"{at}.conv2.weight"], padding=1) + past
    return norm(x, state, "bn").relu()


@pytest.mark.parametrize("name, blocks, stages, grid", [("wrn16_1", 2, 3, 1), ("preact18_64", 2, 4, 2)])
def test_networks_are_their_formula_written_out(name, blocks, stages, grid):
    net = with_statistics(fresh(name)).double()
    x = images(size=32).double()
    with torch.inference_mode():
        z = written_out(net.state_dict(), x, blocks, stages)
        side = z.shape[-1] // grid
        assert z.shape[-1] == 32 // 2 ** (stages - 1)
        quarters = [z[:, :, side * i : side * (i + 1), side * j : side * (j + 1)].mean((2, 3)) for i in range(grid)
                    for j in range(grid)]  # fmt: skip
        torch.testing.assert_close(net(x), torch.stack(quarters, 2).flatten(1))


def test_the_grid_is_that_of_maps_at_any_size_and_must_divide_them():
    net = PreActResNet((1, 1), (4, 4), stem=4, grid=2).eval()
    assert net.feature_dim == 16 and net(images(size=8)).shape == net(images(size=12)).shape == (4, 16)
    with pytest.raises(ValueError, match="a map of 5 x 5 has no grid of 2 x 2; give larger images"):
        net(images(size=10))


@pytest.mark.parametrize(
    "name, n_classes, parameters",
    [
        ("resnet18", 10, 11_173_962),
        ("preact18_64", 200, 11_576_840),
        ("wrn34_10", 10, 46_160_474),
        ("wrn28_10", 10, 36_479_194),
    ],
)
@pytest.mark.parametrize("kind", ["classifier", "ra_classifier"])
def test_networks_have_the_published_numbers_of_parameters(name, n_classes, parameters, kind):
    with torch.device("meta"):
        net = build_net(kind, name, n_classes=n_classes, seed=0)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_the_wide_networks_blocks_and_channels_are_the_published_ones():
    with torch.device("meta"):
        net = BACKBONES["wrn34_10"].make()
    assert [len(layer) for layer in net.layers()] == [5, 5, 5] and net.feature_dim == 640
    assert [layer[0].conv1.weight.shape[:2] for layer in net.layers()] == [(160, 16), (320, 160), (640, 320)]
    assert [layer[0].conv1.stride[0] for layer in net.layers()] == [1, 2, 2] and net.conv1.out_channels == 16
    with pytest.raises(ValueError, match="the depth must be 6 n \\+ 4, got 30"):
        WideResNet(30, 10)


@pytest.mark.parametrize("kind", ["classifier", "ra_classifier"])
def test_wide_networks_start_from_the_published_distribution(kind):
    net = build_net(kind, "wrn16_1", n_classes=10, seed=0)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 1 + 2 * 6 + 2
    for conv in convs:
        k, outputs = conv.kernel_size[0], conv.out_channels
        scaled = conv.weight.detach() / math.sqrt(2 / (k * k * outputs))
        # The mean of squares of n normal numbers has a deviation of sqrt(2 / n).
        assert abs(float(scaled.square().mean()) - 1) < 5 * math.sqrt(2 / scaled.numel())
        assert float(scaled.abs().max()) > 2
    assert not net.linear.bias.any() and net.linear.weight.any()
    assert build_net(kind, "resnet8", n_classes=10, seed=0).linear.bias.any()


def test_weights_of_wide_networks_follow_the_seed():
    a, b = (build_net("classifier", "wrn16_1", n_classes=3, seed=seed).state_dict() for seed in (1, 2))
    again = build_net("classifier", "wrn16_1", n_classes=3, seed=1).state_dict()
    assert all(torch.equal(a[key], again[key]) for key in a) and not torch.equal(a["conv1.weight"], b["conv1.weight"])
