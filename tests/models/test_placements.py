"""Where operators go in networks of timm, and that slots change nothing."""

import pytest
import torch
from torch import Tensor, nn

from models.mean_sparse import collect, insert, mean_sparse, operators, remove, sparsify
from models.placements import Site, Slot, channels_of, sites

timm = pytest.importorskip("timm")


def transformer() -> nn.Module:
    """A Swin of two stages."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make = timm.models.swin_transformer.SwinTransformer
        net = make(
            img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 2), num_heads=(1, 2), num_classes=0
        )
    return net.eval()


def convnext() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.models.convnext.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 12, 16, 20), num_classes=0).eval()


def pictures(n: int = 3, size: int = 32) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_a_swin_gets_operators_behind_both_sums_and_around_its_perceptron():
    net, x = transformer(), pictures()
    expected, keys = net(x), list(net.state_dict())
    names = [site.name for site in sites(net, "blocks")]
    assert len(names) == 4 * 3 and torch.equal(net(x), expected) and list(net.state_dict()) == keys
    for tail in ("meansparse1", "meansparse2", "mlp.meansparse1", "mlp.meansparse2"):
        assert f"layers.1.blocks.1.{tail}" in names
    insert(net, "blocks")
    assert torch.equal(net(x), expected)
    found = operators(net)
    assert {(o.channels, o.dim) for name, o in found.items() if "layers.1" in name} == {(16, -1), (64, -1)}
    seen: dict[str, Tensor] = {}
    for name, operator in found.items():
        operator.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].clone()}))
    collect(net, [x])
    for name, operator in found.items():
        values = seen[name].flatten(0, -2)  # Those of the perceptron are tokens, too.
        torch.testing.assert_close(operator.running_mean, values.mean(0), rtol=0, atol=1e-5)
    sparsify(net, 0.5)
    assert not torch.equal(net(x), expected)
    remove(net)
    assert torch.equal(net(x), expected) and list(net.state_dict()) == keys


def test_a_swin_with_operators_is_what_its_formula_says():
    net, x = insert(transformer(), "blocks"), pictures(2)
    collect(net, [x])
    sparsify(net, 0.4)
    block = net.layers[0].blocks[0]
    maps = torch.rand(2, 8, 8, 8, generator=torch.Generator().manual_seed(2))

    def f(operator, values):
        return mean_sparse(values, operator.running_mean, operator.running_var, 0.4, dim=-1)

    y = f(block.meansparse1, (maps + block._attn(block.norm1(maps))).flatten(1, 2))
    h = f(block.mlp.meansparse2, block.mlp.fc2(block.mlp.act(f(block.mlp.meansparse1, block.mlp.fc1(block.norm2(y))))))
    expected = f(block.meansparse2, y + h).unflatten(1, (8, 8))
    torch.testing.assert_close(block(maps), expected, rtol=0, atol=1e-6)


def test_a_convnext_gets_operators_before_activations_and_behind_residual_branches():
    net, x = convnext(), pictures()
    expected, keys = net(x), list(net.state_dict())
    found = sites(net, "activations")
    assert (
        found[:2]
        == [
            Site("stages.0.blocks.0.mlp.act.0", 32, -1),
            Site("stages.0.blocks.0.drop_path.1", 8, 1),
        ]
        and len(found) == 2 * 5
    )
    insert(net, "activations")
    assert torch.equal(net(x), expected)
    collect(net, x.split(2))
    sparsify(net, 1e6)
    found = net(x)
    assert not torch.equal(found, expected)
    sparsify(net, 0)
    assert torch.equal(net(x), expected)
    assert list(remove(net).state_dict()) == keys and torch.equal(net(x), expected)


@pytest.mark.parametrize("name, count", [("convnext_large", 72), ("swin_large_patch4_window7_224", 96)])
def test_numbers_of_operators_in_the_published_networks(name, count):
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    assert len(sites(net, "activations" if "convnext" in name else "blocks")) == count


def test_gates_over_channels_are_left_alone():
    with torch.device("meta"):
        net = timm.create_model("seresnet18", num_classes=0)
    names = [site.name for site in sites(net, "activations")]
    assert names and not [name for name in names if ".se." in name]


def test_layers_say_their_channels():
    assert (
        channels_of(nn.BatchNorm2d(3)) == channels_of(nn.Conv2d(1, 3, 1)) == channels_of(nn.GroupNorm(1, 3)) == (3, 1)
    )
    assert channels_of(nn.Linear(2, 3)) == channels_of(nn.LayerNorm(3)) == (3, -1)
    assert channels_of(timm.layers.LayerNorm2d(3)) == (3, 1) and channels_of(nn.ReLU()) is None
    assert Slot(3)(torch.ones(1)).item() == 1
