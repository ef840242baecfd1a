"""Inversion of sparse coding networks against known answers, chains written by hand and round trips."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.csc import CSC2d
from models.invert import CodingLayer, batch_norm_inverse, inspect, invert, invert_layers, tap_of, taps
from models.resnet import BasicBlock, ResNet


class Chain(nn.Module):
    """A block without shortcut and activations."""

    expansion = 1

    def __init__(self, inputs, width, stride, *, conv, act):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 1), nn.BatchNorm2d(width)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))))


def coding(inputs, outputs, stride=1, **changes) -> CSC2d:
    return CSC2d(inputs, outputs, 3, stride, 1, **changes)


def network(block=Chain, *, widths=(6, 8), conv=coding, stem=coding, **changes) -> ResNet:
    """In float64, with statistics and parameters of batch normalisation that are far from 0 and 1."""
    gen = torch.Generator().manual_seed(1)

    def made(make):
        return lambda *shape: make(*shape, **changes) if make is coding else make(*shape)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        acts = {"act": nn.ReLU} if conv is not coding else {"act": nn.Identity}
        net = ResNet(block, (1,) * len(widths), widths, stem=made(stem), conv=made(conv), stem_act=nn.Identity, **acts)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for values in (module.weight, module.running_var):
                    values.copy_(0.5 + torch.rand(values.shape, generator=gen))
                for values in (module.bias, module.running_mean):
                    values.copy_(torch.randn(values.shape, generator=gen))
                module.weight[0] *= -1
    return net.double().eval()


def images(*size, count=2) -> Tensor:
    return torch.randn(count, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def adjoint(layer: CSC2d, z: Tensor, size) -> Tensor:
    """A(z) as the gradient of <conv(x), z>, which knows of no output padding."""
    x = torch.zeros(len(z), layer.weight.shape[1], *size, dtype=z.dtype, requires_grad=True)
    code = F.conv2d(x, layer.weight.detach(), None, layer.stride, layer.padding)
    return torch.autograd.grad((code * z).sum(), x)[0]


@pytest.mark.parametrize("affine", [True, False])
def test_batch_normalisation_is_taken_back(affine):
    bn = nn.BatchNorm2d(5, affine=affine).double().eval()
    x = 3 * images(7, 4)[:, :1] + torch.arange(5, dtype=torch.float64).view(5, 1, 1)
    # Without eps, 1e-5, the channels of small variance would come back far off.
    bn.running_var.copy_(torch.tensor([1.0, 4.0, 1e-2, 1e-6, 0.0]))
    bn.running_mean.copy_(torch.tensor([0.0, -2.0, 1.0, 5.0, 0.3]))
    if affine:
        with torch.no_grad():
            bn.weight.copy_(torch.tensor([1.0, -2.0, 0.1, 1e-3, 0.5]))
            bn.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0]))
    assert (batch_norm_inverse(bn, bn(x)) - x).abs().max() < 1e-10


def test_a_channel_that_batch_normalisation_switched_off_is_an_error_that_names_it():
    net = network()
    with torch.no_grad():
        net.layer2[0].bn1.weight[3] = -9e-9
    y = net.layer2[0](net.layer1(net.bn1(net.conv1(images(8, 8)))))
    with pytest.raises(ValueError, match=r"channel 3 of layer2\.0\.bn1 has gamma -9e-09"):
        invert(net, y, "2.1", (8, 8))
    with torch.no_grad():
        net.layer2[0].bn1.weight[3] = -2e-8
    assert invert(net, y, "2.1", (8, 8)).isfinite().all()
    with pytest.raises(ValueError, match="no running statistics"):
        batch_norm_inverse(nn.BatchNorm2d(4, track_running_stats=False), y)


def known_layers(g) -> list[CodingLayer]:
    """The block of the golden file."""
    found = []
    for n in (1, 2):
        atoms, channels, kernel, _ = g[f"inv_weight{n}"].shape
        csc = CSC2d(channels, atoms, kernel, int(g[f"inv_stride{n}"]), 1, lam=float(g["inv_lam"])).double()
        csc.set_lambda(float(g["inv_lam"]))
        bn = nn.BatchNorm2d(atoms, eps=g["inv_bn_eps"]).double().eval()
        with torch.no_grad():
            csc.weight.copy_(g[f"inv_weight{n}"])
            csc.step.fill_(float(g[f"inv_step{n}"]))
            for name, value in (
                ("weight", "gamma"),
                ("bias", "beta"),
                ("running_mean", "mean"),
                ("running_var", "var"),
            ):
                getattr(bn, name).copy_(g[f"inv_bn{n}_{value}"])
        found.append(CodingLayer(csc, bn))
    return found


def test_known_inverse_of_a_block(golden):
    g = golden("sdnet_b")
    first, second = known_layers(g)
    code = second.norm(second.csc(first.norm(first.csc(g["inv_x"]))))
    torch.testing.assert_close(code, g["inv_code"], atol=1e-9, rtol=0)
    found = invert_layers([first, second], g["inv_code"], g["inv_x"].shape[2:])
    torch.testing.assert_close(found, g["inv_image_eps"], atol=1e-9, rtol=0)
    assert (found - g["inv_image_released"]).abs().max() > 1e-6  # the released program left eps out


@pytest.mark.parametrize("size", [(12, 12), (13, 11)])
def test_a_network_is_inverted_layer_by_layer(size):
    net = network(widths=(4, 6, 8))
    x = images(*size)
    assert list(taps(net)) == ["stem", "1.1", "2.1", "3.1"]
    y = net.bn1(net.conv1(x))
    chain, sizes = [(net.conv1, net.bn1)], [size]
    for name in ("stem", "1.1", "2.1", "3.1"):
        if name != "stem":
            block = net.get_submodule(f"layer{name[0]}")[0]
            for csc, bn in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
                chain.append((csc, bn))
                sizes.append(y.shape[2:])
                y = bn(csc(y))
        z = y
        for (csc, bn), before in zip(reversed(chain), reversed(sizes), strict=True):
            gamma, beta = bn.weight.view(-1, 1, 1), bn.bias.view(-1, 1, 1)
            mean, var = bn.running_mean.view(-1, 1, 1), bn.running_var.view(-1, 1, 1)
            z = adjoint(csc, ((z - beta) / gamma * (var + bn.eps).sqrt() + mean).detach(), before)
        found = invert(net, y, name, size)
        assert found.shape == x.shape
        torch.testing.assert_close(found.detach(), z, atol=1e-10, rtol=1e-10)


def test_differences_of_outputs_become_differences_of_images():
    net, size = network(widths=(4, 6)), (9, 8)
    y = net.layer2(net.layer1(net.bn1(net.conv1(images(*size))))).detach()
    layers = taps(net)["2.1"].layers
    expected = (invert_layers(layers, y[:1], size) - invert_layers(layers, y[1:], size)).detach()
    found = invert_layers(layers, y[:1] - y[1:], size, offset=False).detach()
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
    # One part in 1e20 of the output, which no offset leaves anything of.
    small = invert_layers(layers, 1e-20 * (y[:1] - y[1:]), size, offset=False).detach()
    torch.testing.assert_close(1e20 * small, expected, atol=1e-10, rtol=1e-8)


def test_what_the_codes_explain_comes_back():
    """Signed codes without a penalty, of many more atoms than channels, reconstruct their inputs."""
    layers, x = [], images(7, 6, count=1)
    y = x
    for inputs, atoms in ((3, 12), (12, 48)):
        with torch.random.fork_rng():
            torch.manual_seed(atoms)
            layer = CodingLayer(coding(inputs, atoms, lam=0.0, steps=600, nonneg=False), nn.BatchNorm2d(atoms))
        layers.append(CodingLayer(layer.csc.double(), layer.norm.double().eval()))
        layers[-1].norm.running_mean.fill_(0.7)
        with torch.no_grad():
            y = layers[-1].norm(layers[-1].csc(y))
    with torch.no_grad():
        found = invert_layers(layers, y, (7, 6))
        assert (found - x).norm() / x.norm() < 1e-3
        few = invert_layers(layers[:1], layers[0].norm(0.9 * layers[0].csc(x)), (7, 6))
    torch.testing.assert_close(few, 0.9 * x, atol=1e-3, rtol=0)


def test_only_chains_of_sparse_coding_are_inverted():
    shortcut, ordinary = network(BasicBlock), network(BasicBlock, conv=lambda i, o, s: nn.Conv2d(i, o, 3, s, 1))
    for net in (shortcut, ordinary):
        assert list(taps(net)) == ["stem"]
        y = net.bn1(net.conv1(images(8, 8)))
        torch.testing.assert_close(
            invert(net, y, "stem", (8, 8)), net.conv1.synthesise(net.conv1(images(8, 8)), (8, 8))
        )
        with pytest.raises(ValueError, match="only the stem can be inverted"):
            invert(net, y, "1.1", (8, 8))
    plain = ResNet(BasicBlock, (1,), (4,))
    with pytest.raises(ValueError, match="the stem is no sparse coding layer"):
        tap_of(plain, "stem")
    with pytest.raises(ValueError, match=r"there are stem, 1\.1, 2\.1"):
        tap_of(network(), "3.1")
    with pytest.raises(ValueError, match="8 x 8 entries is not of images of 9 x 8"):
        invert(network(), y, "stem", (9, 8))


def test_a_chain_ends_at_an_activation_and_goes_through_a_coded_pooling():
    net = network()
    net.layer2[0].act1 = nn.ReLU()
    assert list(taps(net)) == ["stem", "1.1"]
    net.act1 = nn.ReLU()
    assert list(taps(net)) == ["stem"]
    net = network()
    net.pool = nn.MaxPool2d(3, 2, 1)
    assert list(taps(net)) == ["stem"]
    net.pool = coding(6, 6, 2).double()
    assert list(taps(net)) == ["stem", "pool", "1.1", "2.1"]
    code = net.pool(net.bn1(net.conv1(images(9, 8))))
    expected = batch_norm_inverse(net.bn1, adjoint(net.pool, code.detach(), (9, 8)))
    found = invert(net, code, "pool", (9, 8)).detach()
    torch.testing.assert_close(found, adjoint(net.conv1, expected.detach(), (9, 8)), atol=1e-10, rtol=0)


def test_what_each_layer_codes_is_measured_and_the_network_is_left_as_it_was():
    net = network(lam=0.3).train()
    net.layer1.eval()
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    x = images(9, 8, count=3)
    x[2] = 0
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, CSC2d)}
    coded, outputs = inspect(net, x, layers, ["bn1", "layer1.0", "layer2.0.conv2"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks for module in net.modules())
    net.eval()
    with torch.no_grad():
        stem = net.bn1(net.conv1(x))
        first = net.layer1(stem)
    assert torch.equal(outputs["bn1"], stem) and torch.equal(outputs["layer1.0"], first)
    block = net.layer2[0]
    inside = {"conv1": (net.conv1, x), "layer2.0.conv1": (block.conv1, first)}
    assert list(coded) == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"]
    for name, (layer, seen) in inside.items():
        z = layer(seen).detach()
        found = coded[name]
        assert found.size == tuple(seen.shape[2:]) and found.nonzero.shape == z.shape[:2]
        for n in range(3):
            count = sum(float(value) != 0 for value in z[n].flatten())
            assert float(found.nonzero[n].mean()) == pytest.approx(count / z[n].numel())
            assert float(found.mean[n]) == pytest.approx(sum(map(abs, z[n].flatten().tolist())) / z[n].numel())
            left = (seen[n] - adjoint(layer, z, seen.shape[2:])[n]).square().sum()
            share = float(left / seen[n].square().sum()) if seen[n].any() else 0.0
            assert float(found.residual[n]) == pytest.approx(share)
    z = outputs["layer2.0.conv2"]
    torch.testing.assert_close(coded["layer2.0.conv2"].nonzero, (z > 0).double().mean((2, 3)))
    assert 0 < float(coded["conv1"].nonzero[:2].mean()) < 1 and math.isfinite(float(coded["conv1"].residual.sum()))


def test_a_failure_leaves_no_hook_and_no_mode_behind():
    net = network().train()
    layers = {"conv1": net.conv1}
    with pytest.raises(RuntimeError):
        inspect(net, torch.zeros(1, 5, 8, 8, dtype=torch.float64), layers)
    with pytest.raises(AttributeError):
        inspect(net, images(8, 8), layers, ["nothing"])
    assert not any(module._forward_hooks for module in net.modules()) and all(m.training for m in net.modules())


def test_outputs_are_those_before_what_follows_in_place():
    net = network(BasicBlock)
    x = images(8, 8)
    _, outputs = inspect(net, x, {}, ["layer1.0.bn2"])
    with torch.no_grad():
        expected = net.layer1[0].body(net.bn1(net.conv1(x)))
    assert torch.equal(outputs["layer1.0.bn2"], expected)
