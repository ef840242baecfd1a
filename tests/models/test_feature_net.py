import pytest
import torch

from models import BACKBONES
from models.checkpoint import build_net
from models.feature_net import CocsrNet, Features, FeatureTransform, RotTransNet
from models.resnet import BasicBlock, ResNet
from models.sparse.dictionary import CodingSpec, DictionaryBank
from tests.conftest import HEAVY
from tests.models.published import published_shapes


def net(model: str = "resnet8", **changes):
    return build_net("feature", model, **{"n_classes": 10, "simclr_dim": 128, "n_shifts": 5, "seed": 0, **changes})


def test_resnet18_has_the_published_keys_and_shapes():
    state = net("resnet18").state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == published_shapes("resnet18", 10, 5)
    assert len(state) == 130


@pytest.mark.parametrize("model, tensors", [("resnet50", 328), ("resnet18_imagenet", 130), ("resnet50_imagenet", 328)])
def test_other_published_networks_have_their_keys_and_shapes(model, tensors):
    state = net(model).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == published_shapes(model, 10, 5) and len(state) == tensors


@pytest.mark.parametrize("model", [name for name in BACKBONES if name not in HEAVY])
def test_every_backbone_gives_features_of_the_stated_shapes(model):
    n = net(model, n_shifts=4).eval()
    with torch.inference_mode():
        h, z, shift = n(torch.rand(2, 3, 32, 32))
        assert h.shape == (2, n.feature_dim) and z.shape == (2, 128) and shift.shape == (2, 4)
        assert n.linear(h).shape == (2, 10) and n.joint_distribution_layer(h).shape == (2, 40)


def test_a_projector_has_as_many_linear_layers_as_asked_for():
    n = net(projector_layers=4, simclr_dim=16).eval()
    linear = [module for module in n.simclr_layer if isinstance(module, torch.nn.Linear)]
    assert [module.out_features for module in linear] == [64, 64, 64, 16]
    h = torch.randn(5, 64)
    by_hand = h
    for module in linear[:-1]:
        by_hand = module(by_hand).relu()
    torch.testing.assert_close(n.head_outputs(h).z, linear[-1](by_hand))


@pytest.mark.parametrize("model, stages", [("resnet8", 2), ("resnet18", 3), ("wrn16_1", 2), ("preact18_64", 3)])
def test_earlier_stages_have_heads_in_training_and_all_else_is_as_without(model, stages):
    n = net(model, stage_heads=True)
    images = torch.rand(3, 3, 32, 32)
    maps = []
    for layer in n.backbone.layers():
        layer.register_forward_hook(lambda module, inputs, output: maps.append(output.clone()))
    found = n.train()(images)
    assert found.stages.shape == (3, stages, 128) and len(maps) == stages + 1
    for k, (head, x) in enumerate(zip(n.stage_layers, maps, strict=False)):
        torch.testing.assert_close(found.stages[:, k], head(x.mean((2, 3))))
    assert isinstance(n.eval()(images), Features)
    plain = net(model).train()
    plain.load_state_dict({k: v for k, v in net(model, stage_heads=True).state_dict().items() if "stage" not in k})
    for own, expected in zip(found, plain(images), strict=False):
        torch.testing.assert_close(own, expected)


def test_resnet8_is_the_classic_6n_plus_2_network():
    n = net()
    assert n.feature_dim == 64
    convs = [m for m in n.backbone.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [c.out_channels for c in convs] == [16, 16, 16, 32, 32, 64, 64]


def test_state_dict_makes_the_round_trip_and_weights_follow_the_seed():
    a, b = net(seed=1), net(seed=2)
    assert not torch.equal(a.linear.weight, b.linear.weight) and torch.equal(a.linear.weight, net(seed=1).linear.weight)
    b.load_state_dict(a.state_dict())
    x = torch.rand(3, 3, 16, 16)
    assert torch.equal(a.eval()(x).z, b.eval()(x).z)


def test_building_a_network_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    net()
    assert torch.equal(torch.rand(1), expected)


def test_images_are_normalised_inside():
    n = net().eval()
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(n(x).h, n.backbone((x - 0.5) / 0.5))


def test_transform_divides_by_the_square_of_the_norm():
    """Trap 5: the published help text names another power; the published program divides by the square."""
    f = Features(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))
    torch.testing.assert_close(FeatureTransform()(f), f.h)
    torch.testing.assert_close(FeatureTransform(invert_sr_feature_norm=True)(f), f.h / torch.tensor([[25.0], [1.0]]))
    for unit in ("normalize_sr_dict_feature", "normalize_sr_feature"):  # trap 6: two names for one step
        transform = FeatureTransform(invert_sr_feature_norm=True, **{unit: True})
        torch.testing.assert_close(transform(f)[0], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(FeatureTransform("simclr")(f), f.z)


def test_stage_2_network_stays_frozen_in_eval_mode_and_builds_no_graph():
    """Trap 4: in the published program gradients of the frozen network were computed and piled up."""
    bank = DictionaryBank(5, 64, 8, CodingSpec(0.1, 1.0, 5))
    model = CocsrNet(net(), bank, FeatureTransform())
    model.train()
    assert model.sr_nets.training and not any(m.training for m in model.feature_net.modules())
    before = {k: v.clone() for k, v in model.feature_net.state_dict().items()}
    s = model(torch.rand(4, 3, 16, 16)).s
    assert not s.requires_grad and s.shape == (4, 64)
    assert all(torch.equal(v, before[k]) for k, v in model.feature_net.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["sr_nets.dictionary"]


def test_stage_2_state_dict_has_the_published_keys():
    model = CocsrNet(net("resnet18"), DictionaryBank(5, 512, 4, CodingSpec(0.1, 1.0, 5)), FeatureTransform())
    state = model.state_dict()
    inner = {k.removeprefix("feature_net.") for k in state if k.startswith("feature_net.")}
    assert inner == set(published_shapes("resnet18", 10, 5)) and len(state) == 133
    assert {k for k in state if k.startswith("sr_nets.")} == {f"sr_nets.{n}" for n in ("dictionary", "rho", "lambdaV")}


def test_the_number_of_channels_is_the_backbones():
    backbone = ResNet(BasicBlock, (1,), (4,), in_channels=1)
    n = RotTransNet(backbone).eval()
    assert n.in_channels == 1 and n.input_mean.shape == (1, 1, 1) and net().in_channels == 3
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(n.features(x), backbone(2 * x - 1))
    backbone.input_mean, backbone.input_std = (0.25,), (2.0,)
    torch.testing.assert_close(RotTransNet(backbone).eval().features(x), backbone((x - 0.25) / 2))
