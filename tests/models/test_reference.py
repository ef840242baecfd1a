"""Networks against others that were written elsewhere, and what is read off files."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from common.errors import UserError
from models.checkpoint import build_net, load_net
from models.feature_net import CocsrNet, FeatureTransform
from models.sparse.admm import admm_lasso
from models.sparse.dictionary import CodingSpec, DictionaryBank


def with_statistics(net: nn.Module) -> nn.Module:
    """Batch normalisation with statistics and weights that make a difference."""
    g = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low in ((module.running_mean, -0.2), (module.running_var, 0.5), (module.weight.data, 0.5)):
                values.copy_(torch.rand(values.shape, generator=g) + low)
            module.bias.data.copy_(torch.rand(module.bias.shape, generator=g) - 0.5)
    return net.eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_residual_networks_are_those_of_torchvision_behind_a_small_stem(name):
    net = with_statistics(build_net("feature", name, n_classes=2, simclr_dim=8, n_shifts=2, seed=0))
    with torch.random.fork_rng():
        theirs = getattr(torchvision.models, name)(weights=None)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    theirs.fc = nn.Identity()
    own = net.backbone.state_dict()
    theirs.load_state_dict({key.replace("shortcut", "downsample"): value for key, value in own.items()})
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(net(x).h, theirs.eval()(2 * x - 1), atol=1e-4, rtol=1e-4)


def test_resnet8_by_hand():
    """Three stages of one block each, the second and third at half the resolution of the one before."""
    net = with_statistics(build_net("feature", "resnet8", n_classes=2, simclr_dim=8, n_shifts=2, seed=0))
    b, x = net.backbone, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y = b.bn1(b.conv1(2 * x - 1)).clamp(min=0)
        for stage, side in ((b.layer1, 16), (b.layer2, 8), (b.layer3, 4)):
            (block,) = stage
            inner = block.bn2(block.conv2(block.bn1(block.conv1(y.clone())).clamp(min=0)))
            y = (inner + block.shortcut(y.clone())).clamp(min=0)
            assert y.shape[2:] == (side, side)
        torch.testing.assert_close(net(x).h, y.mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_the_projector_is_two_layers_with_a_relu_and_the_shift_head_one():
    net = build_net("feature", "resnet8", n_classes=2, simclr_dim=8, n_shifts=3, seed=0).eval()
    with torch.inference_mode():
        h, z, shift = net(torch.rand(5, 3, 8, 8))
        state = net.state_dict()
        hidden = (h @ state["simclr_layer.0.weight"].T + state["simclr_layer.0.bias"]).clamp(min=0)
        torch.testing.assert_close(z, hidden @ state["simclr_layer.2.weight"].T + state["simclr_layer.2.bias"])
        torch.testing.assert_close(shift, h @ state["shift_cls_layer.weight"].T + state["shift_cls_layer.bias"])


def test_lambda_and_rho_are_the_files_and_steps_and_tolerance_the_callers():
    net = build_net("feature", "resnet8", n_classes=2, simclr_dim=8, n_shifts=2, seed=0)
    bank = DictionaryBank(2, 64, 7, CodingSpec(0.02, 3.0, 5))
    state = CocsrNet(net, bank, FeatureTransform()).state_dict()
    settings = {
        "model": "resnet8",
        "n_shifts": 2,
        "transform": FeatureTransform(),
        "path": Path("x"),
        "flag": "load_path",
    }
    found = load_net("cocsr", state, steps=11, tol=0.3, **settings)
    assert found.sr_nets.coding == CodingSpec(pytest.approx(0.02), pytest.approx(3.0), 11, 0.3)
    assert torch.equal(found.sr_nets.dictionary, bank.dictionary)
    s = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
    expected = admm_lasso(bank.dictionary, s, lam=0.02, rho=3.0, steps=11).codes
    torch.testing.assert_close(found.sr_nets.code(s).codes, expected)
    for name in ("lambdaV", "rho"):
        with pytest.raises(UserError, match="lambda and rho"):
            load_net("cocsr", {**state, f"sr_nets.{name}": torch.tensor(0.0)}, steps=1, **settings)


def test_without_strict_everything_that_fits_is_loaded(capsys):
    state = build_net("feature", "resnet8", n_classes=2, simclr_dim=8, n_shifts=2, seed=5).state_dict()
    bias = state.pop("linear.bias")
    settings = {"model": "resnet8", "n_shifts": 2, "path": Path("x"), "flag": "load_path"}
    found = load_net("feature", {**state, "more": bias}, strict=False, **settings).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert f"loaded {len(state)} of {len(state) + 1} tensors; fresh: linear.bias" in capsys.readouterr().out
    with pytest.raises(UserError, match="--no_strict"):
        load_net("feature", state, **settings)
