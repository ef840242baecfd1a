"""The ResNets against their formula written out, and what can be replaced in them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from models import BACKBONES
from models.resnet import BasicBlock, Bottleneck, ResNet, normalised
from tests.models.test_reference import with_statistics

SMALL = ["resnet8", "resnet18", "resnet50"]


def images(channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0)).to(
        memory_format=torch.channels_last
    )


def fresh(name: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BACKBONES[name].make().to(memory_format=torch.channels_last)


def written_out(net: ResNet, x: Tensor) -> Tensor:
    """The forward pass with functional ReLUs, as it was before activations became modules."""
    x = F.relu(net.bn1(net.conv1(x)), inplace=True)
    for block in [block for stage in range(1, net.stages + 1) for block in net.get_submodule(f"layer{stage}")]:
        y = F.relu(block.bn1(block.conv1(x)), inplace=True)
        y = block.bn2(block.conv2(y))
        if isinstance(block, Bottleneck):
            y = block.bn3(block.conv3(F.relu(y, inplace=True)))
        x = F.relu(y.add_(block.shortcut(x)), inplace=True)
    return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


@pytest.mark.parametrize("name", SMALL)
def test_outputs_gradients_and_statistics_are_those_of_functional_relus_bit_for_bit(name):
    results = []
    for forward in (lambda net, x: net(x), written_out):
        net, x = fresh(name).train(), images().requires_grad_()
        h = forward(net, x)
        h.square().sum().backward()
        results.append([h, x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    assert len(results[0]) == len(results[1]) and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_fresh_weights_are_drawn_layer_by_layer_the_shortcut_first():
    state = fresh("resnet8", seed=3).state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = {"conv1.weight": nn.Conv2d(3, 16, 3, bias=False).weight}
        for stage, (inputs, width) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            if inputs != width:
                expected[f"layer{stage}.0.shortcut.0.weight"] = nn.Conv2d(inputs, width, 1, bias=False).weight
            expected[f"layer{stage}.0.conv1.weight"] = nn.Conv2d(inputs, width, 3, bias=False).weight
            expected[f"layer{stage}.0.conv2.weight"] = nn.Conv2d(width, width, 3, bias=False).weight
    drawn = {k: v for k, v in state.items() if v.ndim == 4}
    assert list(drawn) == list(expected) and all(torch.equal(drawn[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_imagenet_networks_are_torchvisions_bit_for_bit(name):
    results = []
    for own in (True, False):
        if own:
            net = fresh(f"{name}_imagenet", seed=1)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(1)
                net = getattr(torchvision.models, name)(weights=None).to(memory_format=torch.channels_last)
            net.fc = nn.Identity()
        x = images(size=32).requires_grad_()
        h = net.train()(x)
        h.square().sum().backward()
        results.append({"h": h, "x": x.grad, **{f"{k}'": p.grad for k, p in net.named_parameters()}})
        results[-1] |= net.state_dict()
    assert list(results[0]) == list(results[1])
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


# Networks with activations; SDNets of other depths, and wide networks of others, are built of the same blocks.
_LARGE = ("sdnet", "wrn28", "wrn34", "dm_wrn", "ra_wrn")
ACTIVATED = [name for name in BACKBONES if not name.startswith(_LARGE)] + ["sdnet8", "sdnet8_all"]


def activations(name: str) -> int:
    """How many a network has."""
    if name.startswith("sdnet8"):
        return 3 if name.endswith("_all") else 6
    blocks = {"resnet8": 3, "resnet18": 8, "resnet34": 16, "resnet50": 16, "wrn16_1": 6, "preact18_64": 8}[
        name.removesuffix("_imagenet")
    ]
    return 1 + blocks * (3 if "resnet50" in name else 2)


@pytest.mark.parametrize("name", ACTIVATED)
def test_every_activation_is_a_module_used_once(name):
    net = fresh(name).eval()
    calls: dict[str, int] = {}
    for where, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, nn.ReLU):
            assert module.inplace
            calls[where] = 0
            module.register_forward_hook(lambda *_, where=where: calls.update({where: calls[where] + 1}))
    with torch.inference_mode():
        net(images(size=32))
    assert len(calls) == activations(name) and set(calls.values()) == {1}


class Doubled(nn.Conv2d):
    """A 3 x 3 convolution of its own class, in place of the ordinary ones."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride, 1, bias=False)


def test_stem_convolutions_and_activations_can_be_replaced():
    net = ResNet(
        Bottleneck, (1, 2), (4, 8), in_channels=1, stem=partial(nn.Conv2d, kernel_size=5, padding=2), conv=Doubled,
        act=nn.SiLU, stem_act=nn.Identity,
    )  # fmt: skip
    assert net.conv1.weight.shape == (4, 1, 5, 5) and net.conv1.bias is not None and net.in_channels == 1
    convs = {name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    doubled = {name: m for name, m in net.named_modules() if isinstance(m, Doubled)}
    assert convs == set(doubled) == {"layer1.0.conv2", "layer2.0.conv2", "layer2.1.conv2"}
    assert [m.stride for m in doubled.values()] == [(1, 1), (2, 2), (1, 1)]
    assert isinstance(net.act1, nn.Identity) and sum(isinstance(m, nn.SiLU) for m in net.modules()) == 9
    assert not any(isinstance(m, nn.ReLU) for m in net.modules())
    assert net(images(channels=1)).shape == (4, 32)
    basic = ResNet(BasicBlock, (1, 1), (4, 8), conv=Doubled)
    blocks = (basic.layer1[0], basic.layer2[0])
    assert all(isinstance(conv, Doubled) for block in blocks for conv in (block.conv1, block.conv2))


def test_a_stem_without_activation_passes_negative_values_on():
    """As SDNet's, whose code is rectified already and then normalised; the input of a block must stay as it is."""
    net = with_statistics(ResNet(BasicBlock, (1,), (4,), stem_act=nn.Identity))
    block, x = net.layer1[0], images()
    with torch.inference_mode():
        y = net.bn1(net.conv1(x))
        inner = block.bn2(block.conv2(block.bn1(block.conv1(y)).clamp(min=0)))
        assert (y < 0).any()
        torch.testing.assert_close(net(x), (inner + y).clamp(min=0).mean((2, 3)), atol=1e-6, rtol=1e-6)


def conv_and_norm(bias: bool = False, stride: int = 2) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv, bn = nn.Conv2d(5, 7, 3, stride, 1, bias=bias).double(), nn.BatchNorm2d(7).double()
    return conv, with_statistics(bn)


def test_folded_weights_give_what_normalisation_gives_and_its_gradient():
    conv, bn = (module.eval().requires_grad_(False) for module in conv_and_norm())
    x = torch.randn(3, 5, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found, expected = normalised(conv, bn, x), bn(conv(x))
    assert found.grad_fn.name().startswith("Convolution")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    grads = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", ["training", "of the convolution", "of the scale", "of the shift", "bias"])
def test_weights_are_folded_only_where_nobody_can_tell(case):
    conv, bn = (module.requires_grad_(False) for module in conv_and_norm(bias=case == "bias"))
    bn.train(case == "training")
    for which, p in (("of the convolution", conv.weight), ("of the scale", bn.weight), ("of the shift", bn.bias)):
        p.requires_grad_(case == which)
    x = torch.randn(3, 5, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = normalised(conv, bn, x)
    assert not found.grad_fn.name().startswith("Convolution") and torch.equal(found, bn(conv(x)))
    trained = [p for p in (conv.weight, bn.weight, bn.bias) if p.requires_grad]
    if trained:
        assert torch.autograd.grad(found.sum(), trained)[0].abs().sum() > 0
        with torch.no_grad():
            assert torch.allclose(normalised(conv, bn, x), found, rtol=0, atol=1e-13)
