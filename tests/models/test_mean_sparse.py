"""MeanSparse against golden numbers, by hand, and the properties of its definition."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import BACKBONES
from models.checkpoint import build_net
from models.dm_wide_resnet import dm_wrn
from models.feature_net import Classifier
from models.mean_sparse import (
    BUFFERS,
    Batchwise,
    MeanSparse,
    Moments,
    alpha_of,
    collect,
    gather,
    insert,
    mean_sparse,
    merged,
    operators,
    put_statistics,
    remove,
    sparsify,
    with_alpha,
    with_backward,
    with_own_buffers,
)
from models.resnet import BasicBlock, ResNet
from tests.models.test_reference import with_statistics


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backward, expected", [("plain", [1, 1, 0, 0, 0, 1, 1]), ("straight_through", [1] * 7)])
def test_values_and_gradients_by_hand(backward, expected, dtype):
    x = torch.tensor([0.4, 0.5, 0.51, 1.0, 1.49, 1.5, 1.6], dtype=dtype)[:, None].requires_grad_()
    mean, var = (torch.tensor([value], dtype=dtype) for value in (1, 4))
    y = mean_sparse(x, mean, var, 0.25, backward=backward)
    assert torch.equal(y[:, 0], torch.tensor([0.4, 0.5, 1, 1, 1, 1.5, 1.6], dtype=dtype))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad[:, 0].tolist() == expected


def test_known_outputs_and_gradients(golden):
    g = golden("meansparse_ops")
    mean, var, alpha = g["mean"], g["var"], float(g["alpha"])
    for backward in ("plain", "straight_through"):
        x = g["x"].clone().requires_grad_()
        y = mean_sparse(x, mean, var, alpha, backward=backward)
        torch.testing.assert_close(y, g["out"], rtol=0, atol=2e-5)
        (grad,) = torch.autograd.grad(y, x, g["grad_out"])
        torch.testing.assert_close(grad, g[f"grad_in_{backward}"], rtol=0, atol=1e-5)
    for name, dim in (("tok", 2), ("tok", -1), ("last", 3), ("last", -1)):
        torch.testing.assert_close(
            mean_sparse(g[f"{name}_x"], mean, var, alpha, dim=dim), g[f"{name}_out"], rtol=0, atol=2e-5
        )
    operator = MeanSparse(5)
    operator.running_mean.copy_(mean)
    operator.running_var.copy_(var)
    operator.alpha = alpha
    share = operator.blocked(g["x"]).float().mean((0, 2, 3))
    torch.testing.assert_close(share, g["blocked_fraction_per_channel"].float(), rtol=0, atol=1e-6)


def drawn(dim: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(4, 6, 5, 3, generator=gen(1), dtype=torch.float64)
    mean, var = torch.randn(6, generator=gen(2)).double() * 0.3, torch.rand(6, generator=gen(3)).double()
    var[2] = 0
    return x.movedim(1, dim), mean, var


def test_it_is_a_projection_that_keeps_order_and_moves_nothing_far():
    x, mean, var = drawn()
    y = mean_sparse(x, mean, var, 0.7)
    centre, limit = mean.view(-1, 1, 1), 0.7 * var.sqrt().view(-1, 1, 1)
    assert torch.equal(mean_sparse(y, mean, var, 0.7), y)
    assert bool(((y - x).abs() <= limit).all()) and bool(((y - centre).abs() <= (x - centre).abs()).all())
    assert torch.equal(y[:, 2], x[:, 2]) and not torch.equal(y, x)
    order = x.flatten(2).transpose(0, 1).flatten(1).argsort(1)
    assert bool((y.flatten(2).transpose(0, 1).flatten(1).gather(1, order).diff(dim=1) >= 0).all())
    assert torch.equal(y, torch.where((x - centre).abs() < limit, centre, x))


def test_it_goes_along_with_scaling_shifting_permuting_and_transposing():
    x, mean, var = drawn()
    y = mean_sparse(x, mean, var, 0.5)
    torch.testing.assert_close(mean_sparse(3 * x + 2, 3 * mean + 2, 9 * var, 0.5), 3 * y + 2, rtol=0, atol=1e-12)
    order = torch.randperm(6, generator=gen(4))
    assert torch.equal(mean_sparse(x[:, order], mean[order], var[order], 0.5), y[:, order])
    assert torch.equal(mean_sparse(x.movedim(1, -1), mean, var, 0.5, dim=-1), y.movedim(1, -1))
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(mean_sparse(tokens, mean, var, 0.5, dim=2), y.flatten(2).transpose(1, 2))
    assert torch.equal(mean_sparse(x.contiguous(memory_format=torch.channels_last), mean, var, 0.5), y)


def test_of_gaussian_values_it_replaces_what_the_error_function_says():
    x, shares = torch.randn(100_000, 1, generator=gen(5)), []
    for alpha in (0.1, 0.15, 0.2, 0.25, 0.3):
        y = mean_sparse(x, torch.zeros(1), torch.ones(1), alpha)
        shares.append(float((y == 0).float().mean()))
        assert shares[-1] == pytest.approx(math.erf(alpha / math.sqrt(2)), abs=0.005)
    assert shares == sorted(shares)


def test_alpha_0_is_the_very_tensor_and_half_precision_is_compared_in_float32():
    x, mean, var = (values.float() for values in drawn())
    assert mean_sparse(x, mean, var, 0) is x
    half = mean_sparse(x.bfloat16(), mean, var, 0.5)
    rounded = x.bfloat16().float()
    replaced = (rounded - mean.view(-1, 1, 1)).abs() < 0.5 * var.sqrt().view(-1, 1, 1)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, torch.where(replaced, mean.bfloat16().view(-1, 1, 1), x.bfloat16()))


def test_gradients_are_those_of_finite_differences_and_can_be_differentiated_again():
    x, mean, var = drawn()
    x = x[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mean_sparse(x, mean, var, 0.5), (x,), eps=1e-7)
    y = mean_sparse(x, mean, var, 0.5, backward="straight_through")
    (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    torch.testing.assert_close(grad, 3 * y**2)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, 6 * y.detach())


def test_what_the_operator_cannot_be_given_raises():
    x, mean, var = drawn()
    with pytest.raises(ValueError, match="backward must be plain or straight_through, got 'through'"):
        mean_sparse(x, mean, var, 0.1, backward="through")
    operator = MeanSparse(5)
    for alpha in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha must be a finite number >= 0"):
            operator.alpha = alpha
    with pytest.raises(ValueError, match="5 channels in dimension 1"):
        operator(x)


# ------------------------------------------------------------------------------------------------------ statistics


def test_known_statistics(golden):
    g = golden("meansparse_ops")
    parts = g["stat_x"].split(int(g["stat_batch_size"]))
    net = nn.Sequential(nn.Identity(), MeanSparse(5))
    collect(net, parts, rule="batchwise")
    torch.testing.assert_close(net[1].running_mean, g["stat_mean_batchwise"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net[1].running_var, g["stat_var_batchwise"], rtol=1e-4, atol=1e-6)
    assert int(net[1].batch_num) == 3
    collect(net, parts)
    torch.testing.assert_close(net[1].running_mean, g["stat_mean_exact"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(net[1].running_var, g["stat_var_exact_population"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "batches, batchwise, exact",
    [([[0, 2], [4, 6]], (3, 2), (3, 5)), ([[0, 2, 4], [7, 9]], (5, 3), (4.4, 10.64))],
)
def test_statistics_by_hand(batches, batchwise, exact):
    parts = [torch.tensor(values, dtype=torch.float32)[:, None] for values in batches]
    for rule, (mean, var) in (("batchwise", batchwise), ("exact", exact)):
        net = nn.Sequential(MeanSparse(1))
        collect(net, parts, rule=rule)
        assert float(net[0].running_mean) == pytest.approx(mean) and float(net[0].running_var) == pytest.approx(var)


def test_exact_statistics_do_not_depend_on_batches_order_or_processes_and_survive_large_means():
    x = torch.randn(101, 3, 4, 4, generator=gen(6)) * torch.tensor([1, 5, 0.1]).view(3, 1, 1) + 1000
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    for parts in (x.split(101), x.split(7), x.flip(0).split(10), x.split(1)):
        net = nn.Sequential(MeanSparse(3))
        collect(net, parts)
        torch.testing.assert_close(net[0].running_mean.double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(net[0].running_var.double(), var, rtol=1e-3, atol=1e-7)
    net = nn.Sequential(MeanSparse(3))
    put_statistics(net, merged([gather(net, x[:60].split(7)), gather(net, x[60:].split(9))]))
    torch.testing.assert_close(net[0].running_var.double(), var, rtol=1e-3, atol=1e-7)


def test_collecting_leaves_all_else_as_it_was_and_twice_is_once():
    net = insert(small(), "activations").train()
    x = torch.rand(8, 3, 8, 8, generator=gen(7))
    collect(net, x.split(3))
    sparsify(net, 0.3)
    net.backbone.layer1[0].eval()
    before, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    collect(net, x.split(8))
    assert [m.training for m in net.modules()] == modes and alpha_of(net) == 0.3
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(value, before[name]) or "running" in name and ".0.running" in name
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_what_has_no_statistics_raises():
    net = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no MeanSparse operators; insert them first"):
        collect(net, [torch.rand(2, 3)])
    net = nn.Sequential(MeanSparse(3))
    with pytest.raises(ValueError, match="statistics are exact or batchwise, got 'mean'"):
        collect(net, [torch.rand(2, 3)], rule="mean")
    with pytest.raises(ValueError, match="0 saw no values"):
        collect(net, [])
    with pytest.raises(ValueError, match="one value in each channel has no variance"):
        collect(net, [torch.rand(1, 3)], rule="batchwise")
    with pytest.raises(ValueError, match="0 has no statistics of its channels; collect them first"):
        sparsify(net, 0.1)
    assert not bool(net[0].running_mean.any())
    sparsify(net, 0)


def test_moments_of_a_part_are_those_of_float64():
    x = torch.randn(64, 5, 16, 16, generator=gen(8)) * 3 - 7
    found, (var, mean) = Moments.of(x, 1), torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.squares / found.count, var, rtol=2e-6, atol=0)
    assert Batchwise.of(x, 1).count == 1


# ------------------------------------------------------------------------------------------------- within networks


def small(seed: int = 0) -> Classifier:
    """A classifier of the layout of this project's ResNets."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return with_statistics(Classifier(ResNet(BasicBlock, (1, 1), (4, 6)), n_classes=3))


def pictures(n: int = 6) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=gen(9))


COUNTS = {
    "resnet8": (7, None),
    "resnet18": (17, None),
    "resnet50": (49, None),
    "resnet18_imagenet": (17, None),
    "resnet50_imagenet": (49, None),
    "sdnet8": (6, None),
    "sdnet8_all": (3, None),
    "wrn28_10": (25, None),
    "dm_wrn10_1": (7, 10),
    "dm_wrn28_10": (25, 37),
    "dm_wrn34_10": (31, 46),
    "dm_wrn70_16": (67, 100),
    "dm_wrn94_16": (91, 136),
    "ra_wrn70_16": (143, 214),
    "ra_wrn101_2": (75, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_numbers_of_operators(name):
    for placement, count in zip(("activations", "blocks"), COUNTS[name], strict=True):
        with torch.device("meta"):
            net = BACKBONES[name].make()
        if count is None:
            with pytest.raises(ValueError, match="there is no slot"):
                insert(net, placement)
        else:
            assert len(operators(insert(net, placement))) == count


@pytest.mark.parametrize(
    "name, placement",
    [
        *((name, "activations") for name in ("resnet8", "resnet18_imagenet", "sdnet8", "wrn16_1", "dm_wrn10_1")),
        ("dm_wrn10_1", "blocks"),
    ],
)
def test_inserting_changes_no_bit_and_removing_restores_the_keys(name, placement):
    net = with_statistics(build_net("classifier", name, n_classes=3, seed=0))
    x, keys = pictures(2).requires_grad_(), list(net.state_dict())
    expected = net(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    insert(net, placement)
    assert torch.equal(net(x), expected)
    assert torch.equal(torch.autograd.grad(net(x).sum(), x)[0], gradient)
    assert len(net.state_dict()) == len(keys) + len(BUFFERS) * len(operators(net))
    with pytest.raises(ValueError, match="already been inserted"):
        insert(net, placement)
    remove(net)
    assert list(net.state_dict()) == keys and torch.equal(net(x), expected)
    assert operators(insert(net, placement))
    with pytest.raises(ValueError, match="no MeanSparse operators"):
        remove(remove(net))


@pytest.mark.parametrize(
    "name, placement", [("resnet8", "activations"), ("dm_wrn10_1", "blocks"), ("resnet50_imagenet", "activations")]
)
def test_every_operator_sees_the_channels_it_is_of_and_a_huge_alpha_leaves_nothing_of_the_image(name, placement):
    net = insert(with_statistics(build_net("classifier", name, n_classes=3, seed=0)), placement)
    x = pictures(4)
    collect(net, x.split(2))
    sparsify(net, 1e6)
    x.requires_grad_()
    logits = net(x)
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=0, atol=1e-6)
    assert not bool(torch.autograd.grad(logits[:, 0].sum(), x)[0].any())
    with with_backward(net, "straight_through"):
        through = net(x)
        assert torch.equal(through, logits) and bool(torch.autograd.grad(through[:, 0].sum(), x)[0].any())
    assert {operator.backward for operator in operators(net).values()} == {"plain"}


def test_both_gradients_agree_where_nothing_is_replaced():
    net, x = insert(small(), "activations"), pictures(2).requires_grad_()
    collect(net, [x.detach()])
    for alpha, same in ((1e-9, True), (0.5, False)):
        sparsify(net, alpha)
        gradients = []
        for backward in ("plain", "straight_through"):
            with with_backward(net, backward):
                gradients.append(torch.autograd.grad(F.cross_entropy(net(x), torch.tensor([0, 1])), x)[0])
        assert torch.equal(*gradients) == same


def test_a_state_dict_keeps_alpha_and_a_deep_copy_has_its_own():
    net = insert(small(), "activations")
    collect(net, [pictures()])
    sparsify(net, 0.25)
    other = insert(small(1), "activations")
    state = {**net.state_dict(), "act1.0.momentum": torch.tensor(0.1)}
    state["act1.0.epsilon"] = torch.tensor(1e-10)  # As files of the first version have it.
    state["act1.0.batch_num"] = state["act1.0.batch_num"].view(1).float()
    other.load_state_dict(with_own_buffers(state))
    assert alpha_of(other) == 0.25 and torch.equal(other(pictures()), net(pictures()))
    twin = copy.deepcopy(net)
    sparsify(twin, 0)
    assert alpha_of(net) == 0.25 and alpha_of(twin) == 0
    twin.backbone.act1[0].alpha = 0.5
    with pytest.raises(ValueError, match="different alpha: 0, 0.5"):
        alpha_of(twin)
    with pytest.raises(ValueError, match="running_var is negative"):
        bad = net.state_dict()
        bad["act1.0.running_var"] = -bad["act1.0.running_var"]
        other.load_state_dict(bad)
    assert alpha_of(small()) == 0


def test_alpha_and_backward_come_back_after_an_error():
    net = insert(small(), "activations")
    collect(net, [pictures()])
    sparsify(net, 0.25)
    with pytest.raises(RuntimeError), with_alpha(net, 0), with_backward(net, "straight_through"):
        assert alpha_of(net) == 0
        raise RuntimeError
    assert alpha_of(net) == 0.25 and net.backbone.act1[0].backward == "plain"


def test_a_layout_says_where_channels_are():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    insert(net, "activations", layout="channels_last")
    assert net[1][0].dim == -1
    with pytest.raises(ValueError, match="layouts are channels_first, channels_last"):
        insert(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "activations", layout="rows")
    with pytest.raises(ValueError, match="placements are activations, blocks"):
        insert(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "first")
    tokens = nn.Sequential(nn.Linear(3, 4), nn.GELU())
    assert operators(insert(tokens, "activations"))["1.0"].dim == -1
    with pytest.raises(ValueError, match="nothing before the activation 0 says"):
        insert(nn.Sequential(nn.ReLU()), "activations")
    relu = nn.ReLU()
    with pytest.raises(ValueError, match="1 and 2 are one activation module"):
        insert(nn.Sequential(nn.Linear(2, 2), relu, relu), "activations")
    with pytest.raises(ValueError, match="no activation module"):
        insert(nn.Sequential(nn.Linear(2, 2)), "activations")


# --------------------------------------------------------------------------------------------------- the golden net


def golden_net(g) -> Classifier:
    statistics = tuple(tuple(g[f"meta_{name}"].tolist()) for name in ("mean", "std"))
    net = Classifier(
        dm_wrn(int(g["meta_depth"]), int(g["meta_width"]), statistics=statistics), n_classes=int(g["meta_num_classes"])
    )
    state = {key.removeprefix("net."): value for key, value in g.items() if key.startswith("net.")}
    state = {key.replace("logits.", "linear."): value for key, value in state.items()}
    net.load_state_dict(state | {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")})
    return net.eval()


def test_the_known_network(golden):
    g = golden("meansparse_net")
    net = golden_net(g)
    x, y = g["x"], g["y"]
    torch.testing.assert_close(net(x), g["logits_alpha0"], rtol=1e-4, atol=1e-5)
    insert(net, "blocks")
    torch.testing.assert_close(net(x), g["logits_alpha0"], rtol=1e-4, atol=1e-5)
    collect(net, x.split(int(g["stat_batch_size"])), rule="batchwise")
    found = operators(net.backbone)
    assert sorted(found) == sorted(g["op_names"])
    for name, operator in found.items():
        torch.testing.assert_close(operator.running_mean, g[f"stat_mean.{name}"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(operator.running_var, g[f"stat_var.{name}"], rtol=1e-4, atol=1e-5)
    sparsify(net, float(g["alpha"]))
    blocked: dict[str, float] = {}
    for name, operator in found.items():
        operator.register_forward_pre_hook(
            lambda module, args, name=name: blocked.update({name: float(module.blocked(args[0]).float().mean())})
        )
    for backward in ("plain", "straight_through"):
        with with_backward(net, backward):
            images = x.clone().requires_grad_()
            logits = net(images)
            torch.testing.assert_close(logits, g["logits_alpha"], rtol=1e-4, atol=1e-5)
            (grad,) = torch.autograd.grad(F.cross_entropy(logits, y), images)
            torch.testing.assert_close(grad, g[f"grad_x_{backward}"], rtol=0, atol=1e-5)
    for name, share in zip(g["op_names"], g["blocked_fraction"].tolist(), strict=True):
        assert blocked[name] == pytest.approx(share, abs=2e-4)
    for name, operator in found.items():
        if name.endswith("meansparse_2"):
            operator.alpha = 0
    torch.testing.assert_close(net(x), g["logits_alpha_preactivation_only"], rtol=1e-4, atol=1e-5)


def test_both_placements_see_the_same_before_activations(golden):
    g = golden("meansparse_net")
    first, second = (insert(golden_net(g), placement) for placement in ("activations", "blocks"))
    for net in (first, second):
        collect(net, [g["x"]])
    theirs = operators(second.backbone)
    names = {"relu_0.0": "meansparse_0", "relu_1.0": "meansparse_1", "relu.0": "meansparse_end"}
    for name, operator in operators(first.backbone).items():
        twin = next(name.replace(ours, other) for ours, other in names.items() if name.endswith(ours))
        assert torch.equal(operator.running_mean, theirs[twin].running_mean)
