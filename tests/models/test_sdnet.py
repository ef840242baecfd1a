"""SDNets: sizes, blocks, settings, and files of them."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from models import BACKBONES, backbone_spec
from models.checkpoint import build_net, load_net
from models.csc import CSC2d, csc_layers, follow_weights, input_sizes, stem_of
from models.sdnet import CIFAR, IMAGENET, VARIANTS, CSCSpec

# Section 2.6 of the specification: with 10, 100 classes for 32 pixels, with 1000 for 224.
COUNTS = {
    "resnet18": (11_173_962, 11_220_132, 11_689_512),
    "sdnet18": (11_173_962, 11_220_132, 11_689_512),
    "resnet34": (21_282_122, 21_328_292, 21_797_672),
    "sdnet34": (21_282_122, 21_328_292, 21_797_672),
    "sdnet18_all": (11_173_962, 11_220_132, 11_726_376),
    "sdnet34_all": (21_282_122, 21_328_292, 21_834_536),
    "sdnet18_all_noshortcut": (11_000_138, 11_046_308, 11_552_552),
    "sdnet34_all_noshortcut": (21_108_298, 21_154_468, 21_660_712),
}
SDNETS = [name for name in BACKBONES if name.startswith("sdnet")]


def classifier(model, seed=0, **settings):
    net = build_net("classifier", model, n_classes=3, seed=seed)
    CSCSpec(**settings).apply(net)
    return net


def pictures(n=2, side=16):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model", COUNTS)
def test_parameter_counts_are_the_published_ones(model):
    for name, classes, expected in zip(
        [model, model, f"{model}_imagenet"], (10, 100, 1000), COUNTS[model], strict=True
    ):
        with torch.device("meta"):
            found = BACKBONES[name].make()
        head = (found.feature_dim + 1) * classes
        assert sum(p.numel() for p in found.parameters()) + head == expected


def test_there_is_a_row_for_each_variant_depth_and_size():
    small = {f"sdnet{depth}{variant}" for depth in (8, 18, 34) for variant in VARIANTS}
    large = {f"sdnet{depth}{variant}_imagenet" for depth in (18, 34) for variant in VARIANTS}
    assert set(SDNETS) == small | large
    assert {backbone_spec(name).image_size for name in small} == {32}
    assert {backbone_spec(name).image_size for name in large} == {224}


@pytest.mark.parametrize("model", ["sdnet8", "sdnet8_all", "sdnet8_all_noshortcut"])
def test_the_layers_stand_where_the_variant_says(model):
    net = BACKBONES[model].make()
    twin = BACKBONES["resnet8"].make()
    # CSC layers have the weights of the convolutions they replace, in their order.
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    expected = {name: tuple(p.shape) for name, p in twin.named_parameters()}
    if model.endswith("noshortcut"):
        expected = {name: shape for name, shape in expected.items() if "shortcut" not in name}
    assert shapes == expected
    convolutions = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    relus = [name for name, module in net.named_modules() if isinstance(module, nn.ReLU)]
    blocks = [f"layer{n}.0" for n in (1, 2, 3)]
    shortcuts = [f"layer{n}.0.shortcut.0" for n in (2, 3)]
    assert net.conv1.lam == pytest.approx(0.1) and net.conv1.solver == (2, 0.0, True, "extrapolated")
    if model == "sdnet8":
        assert list(csc_layers(net)) == ["conv1"]
        assert relus == [f"{block}.{act}" for block in blocks for act in ("act1", "act2")]
    else:
        assert list(csc_layers(net)) == [
            "conv1",
            *(f"{block}.{conv}" for block in blocks for conv in ("conv1", "conv2")),
        ]
        assert convolutions == ([] if model.endswith("noshortcut") else shortcuts)
        assert relus == ([] if model.endswith("noshortcut") else [f"{block}.act2" for block in blocks])
    assert stem_of(net) is net.conv1 and stem_of(twin) is None
    out = net.train()(pictures(8))  # Under statistics that were never measured, deep codes are empty.
    assert out.shape == (8, 64) and bool((out < 0).any()) == model.endswith("noshortcut")


def test_a_stem_for_large_images_halves_twice():
    with torch.device("meta"):
        plain, coded = (BACKBONES[name].make() for name in ("sdnet18_imagenet", "sdnet18_all_imagenet"))
    assert (plain.conv1.kernel_size, plain.conv1.stride, plain.conv1.padding) == (7, 2, 3)
    assert isinstance(plain.pool, nn.MaxPool2d) and isinstance(coded.pool, CSC2d) and coded.pool.stride == 2
    images = torch.empty(1, 3, 224, 224, device="meta")
    assert plain.conv1(images).shape[2:] == (112, 112)
    assert coded.pool(coded.conv1(images)).shape[2:] == plain.pool(plain.conv1(images)).shape[2:] == (56, 56)


@pytest.mark.parametrize("model, expected", [("sdnet8", CIFAR), ("sdnet18_imagenet", IMAGENET)])
def test_images_are_normalised_to_about_unit_variance(model, expected):
    net = build_net("classifier", model, n_classes=2, seed=0)
    torch.testing.assert_close(net.input_mean.flatten(), torch.tensor(expected[0]))
    torch.testing.assert_close(net.input_std.flatten(), torch.tensor(expected[1]))


@pytest.mark.parametrize("side", [8, 9, 13])
def test_sizes_of_all_layers_are_those_of_a_forward_pass(side):
    net = BACKBONES["sdnet8_all"].make().train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = input_sizes(net, 3, (side, side))
    half = -(-side // 2)
    quarter = -(-half // 2)
    assert [size[0] for size in found.values()] == [side] * 4 + [half] * 2 + [quarter]
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in found)


@pytest.mark.parametrize("model", ["sdnet8", "sdnet8_all", "sdnet8_all_noshortcut"])
def test_evaluation_changes_nothing_and_a_file_gives_the_same_outputs(model, tmp_path):
    net = classifier(model, csc_lambda=0.07, csc_steps=3, csc_gradient_at="iterate", csc_mu=0.02, csc_signed=True)
    follow_weights(input_sizes(net.backbone, 3, (16, 16)), fresh=True)
    net.train()(pictures(8))
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, second = net(pictures()), net(pictures())
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    torch.save(net.state_dict(), tmp_path / "net")
    state = torch.load(tmp_path / "net", weights_only=True)
    other = load_net("classifier", state, model=model, path=tmp_path, flag="load_path").eval()
    assert torch.equal(other(pictures()), first)
    assert all(layer.solver == (3, 0.02, False, "iterate") for layer in csc_layers(other).values())
    for layer in csc_layers(other).values():
        torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), torch.ones(len(layer.weight)))


@pytest.mark.parametrize(
    "saved, asked",
    [("sdnet8", "sdnet8_all"), ("sdnet8_all", "sdnet8"), ("sdnet8_all", "sdnet8_all_noshortcut"),
     ("sdnet8_all_noshortcut", "sdnet8_all"), ("resnet8", "sdnet8"), ("sdnet8", "resnet8")],
)  # fmt: skip
def test_a_file_of_another_variant_is_named(saved, asked, tmp_path):
    net = classifier(saved)
    if csc_layers(net):
        follow_weights(input_sizes(net.backbone, 3, (16, 16)), fresh=True)
    with pytest.raises(UserError) as error:
        load_net("classifier", net.state_dict(), model=asked, path=tmp_path, flag="load_path")
    assert str(error.value).startswith(f"--model: {tmp_path} does not hold a {asked} but a {saved};")


@pytest.mark.parametrize(
    "settings, text",
    [({"csc_lambda": -0.1}, "--csc_lambda must be >= 0"), ({"csc_steps": 0}, "--csc_steps must be >= 1"),
     ({"csc_mu": -1.0}, "--csc_mu must be >= 0")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings, text):
    with pytest.raises(UserError, match=text):
        CSCSpec(**settings)


def test_iterates_are_kept_but_in_the_stem_unless_asked():
    net, asked = classifier("sdnet8_all"), classifier("sdnet8_all", csc_recompute=True)
    assert [layer.recompute for layer in csc_layers(net).values()] == [True] + [False] * 6
    assert all(layer.recompute for layer in csc_layers(asked).values())
    gradients = []
    for one in (net, asked):
        one(pictures(4)).square().sum().backward()
        gradients.append([p.grad for p in one.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("model", ["sdnet8", "sdnet8_all", "sdnet8_all_noshortcut"])
def test_a_network_learns_random_labels_of_random_images_by_heart(model):
    net = classifier(model).train()
    x, labels = pictures(64, 32), torch.arange(64) % 3
    sizes = input_sizes(net.backbone, 3, (32, 32))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        follow_weights(sizes)
        losses.append(loss.item())
    assert losses[0] > 1 and losses[-1] < 0.05
