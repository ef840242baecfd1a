"""Reverse attention against golden numbers, by hand, and against its definition written out."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import build_net, load_net
from models.feature_net import Classifier, Heads
from models.insert import insert_before_activations
from models.mode import evaluation_mode
from models.preact_resnet import PreActBlock, PreActResNet
from models.resnet import BasicBlock, ResNet
from models.reverse_attention import (
    RaClassifier,
    from_published,
    predicted_rows,
    reverse_attention,
    rows_of,
    soft_rows,
    straight_through_rows,
)
from tests.models.test_resnet import activations

# Small networks of the three layouts, and of one block a stage.
LAYOUTS = {
    "post": lambda: ResNet(BasicBlock, (1, 2), (4, 6)),
    "wide": lambda: PreActResNet((1, 2), (4, 6), stem=4),
    "grid": lambda: PreActResNet((1, 2), (4, 6), stem=4, grid=2),
    "one": lambda: ResNet(BasicBlock, (1, 1), (4, 6)),
}
C = 5


def small(layout: str, kind: type[Classifier] = RaClassifier, dtype: torch.dtype = torch.float32) -> Classifier:
    """A network in evaluation mode whose statistics and logits make a difference."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = kind(LAYOUTS[layout](), n_classes=C)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        nn.init.normal_(net.linear.weight)
    return net.to(dtype).eval()


def pictures(n: int = 6, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


@pytest.fixture
def ops(golden) -> dict:
    return golden("ancra_ops")


def close(found: Tensor, expected: Tensor | float, scale: float = 2e-5) -> None:
    """Within the recommended tolerance of the golden numbers."""
    expected = torch.as_tensor(expected, dtype=found.dtype)
    atol = scale * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_the_golden_ones(ops, dtype):
    z, weight, bias = (ops[f"ra_{name}"].to(dtype).requires_grad_() for name in ("z", "weight", "bias"))
    label = ops["ra_label"]
    out = reverse_attention(z, weight, bias, pool=4, labels=label)
    for found, name in zip(out, ("zprime", "aux_logits", "final_logits"), strict=True):
        close(found, ops[f"ra_train_{name}"])
    loss = F.cross_entropy(out.final, label) + 2 * F.cross_entropy(out.auxiliary, label)
    close(loss, ops["ra_train_loss"])
    for found, name in zip(torch.autograd.grad(loss, (weight, bias, z)), ("weight", "bias", "z"), strict=True):
        close(found, ops[f"ra_train_grad_{name}"])

    out = reverse_attention(z, weight, bias, pool=4)
    assert torch.equal(out.auxiliary.argmax(1), ops["ra_eval_pred"])
    for found, name in zip(out, ("zprime", "aux_logits", "final_logits"), strict=True):
        close(found, ops[f"ra_eval_{name}"])
    loss = F.cross_entropy(out.final, label)
    close(loss, ops["ra_eval_loss"])
    close(torch.autograd.grad(loss, z)[0], ops["ra_eval_grad_z"])


def test_the_grid_form_is_the_golden_one(ops):
    z, weight, bias, label = (ops[f"grid_{name}"] for name in ("z", "weight", "bias", "label"))
    out = reverse_attention(z, weight, bias, pool=4, labels=label)
    for found, name in zip(out, ("zprime", "aux_logits", "final_logits"), strict=True):
        close(found, ops[f"grid_train_{name}"])


def test_by_hand():
    z, weight = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    predicted = reverse_attention(z, weight, torch.zeros(2), pool=1)
    given = reverse_attention(z, weight, torch.zeros(2), pool=1, labels=torch.tensor([0]))
    assert predicted.auxiliary.tolist() == given.auxiliary.tolist() == [[1.0, 4.5]]
    assert predicted.z.flatten().tolist() == [0.5, 4.0] and predicted.final.tolist() == [[0.5, 8.25]]
    assert given.z.flatten().tolist() == [1.0, 0.0] and given.final.tolist() == [[1.0, 0.5]]


def test_weights_of_one_leave_everything_as_it_was_and_weighted_logits_exceed_the_bias_of_the_chosen_class():
    z = torch.rand(6, 7, 4, 4, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([1.0, -2, 0.5])
    for labels in (None, torch.tensor([0, 1, 2, 2, 1, 0])):
        out = reverse_attention(z, torch.ones(3, 7), bias, pool=4, labels=labels)
        assert torch.equal(out.z, z) and torch.equal(out.final, out.auxiliary)
        weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
        out = reverse_attention(z, weight, bias, pool=4, labels=labels)
        chosen = out.auxiliary.argmax(1) if labels is None else labels
        assert (out.final - bias).gather(1, chosen[:, None]).min() >= 0 > (out.auxiliary - bias).min()


def test_each_weight_of_a_grid_multiplies_its_quadrant_and_pooling_sees_their_product():
    z = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    weight = torch.arange(24.0).view(2, 12)
    weight[0] = torch.tensor([0.0, 1, 2, 3]).repeat(3)
    out = reverse_attention(z, weight, torch.zeros(2), pool=4, labels=torch.tensor([0, 1]))
    for i in range(2):
        for j in range(2):
            at = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
            assert torch.equal(out.z[(0, slice(None), *at)], (2 * i + j) * z[(0, slice(None), *at)])
    u = F.avg_pool2d(z, 4).flatten(1)
    torch.testing.assert_close(F.avg_pool2d(out.z, 4).flatten(1), u * weight)
    torch.testing.assert_close(out.final, (u * weight) @ weight.T)
    assert out.z.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("side, pool", [(6, 4), (8, 8), (4, 4)])
def test_windows_that_do_not_fit_raise(side, pool):
    with pytest.raises(ValueError, match=f"a map of 3 x {side} x {side} and windows of {pool} x {pool} do not give 12"):
        reverse_attention(torch.rand(1, 3, side, side), torch.rand(2, 12), torch.zeros(2), pool=pool)


# ------------------------------------------------------------------------------------------------------------- networks


def golden_wide(ops: dict) -> RaClassifier:
    """The last stage of a wide network alone: its input comes where images would, and the first block halves it."""
    backbone = PreActResNet((3,), (6,), stem=4, in_channels=4, input_mean=(0.0,) * 4, input_std=(1.0,) * 4)
    backbone.conv1, backbone.layer1[0] = nn.Identity(), PreActBlock(4, 6, 2)
    net = RaClassifier(backbone, n_classes=C)
    theirs = {key.removeprefix("wrn."): value for key, value in ops.items() if key.startswith("wrn.")}
    named = {
        key.replace("stage.layer", "layer1").replace("convShortcut", "shortcut.0").replace("fc.", "linear."): value
        for key, value in theirs.items()
    }
    missing, unexpected = net.load_state_dict(named, strict=False)
    own = ("num_batches_tracked", "ra_blocks", "input_mean", "input_std")
    assert not unexpected and all(key.endswith(own) for key in missing)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_stage_of_a_wide_network_is_the_golden_one(ops, dtype):
    net, x = golden_wide(ops).to(dtype), ops["wrn_x"].to(dtype)
    for mode, labels in (("eval", None), ("train", ops["wrn_label"])):
        # The tail's statistics move with each pass, so that the map is looked at in a network of its own.
        looked = copy.deepcopy(net).train(mode == "train")
        heads = net.train(mode == "train").heads(x, labels)
        for found, name in zip((heads.final, *heads.auxiliary), ("final_logits", "aux0", "aux1"), strict=True):
            close(found, ops[f"wrn_{mode}_{name}"])
        rows = rows_of(labels) if labels is not None else predicted_rows
        close(looked._attend(x, rows)[-1].z, ops[f"wrn_{mode}_zprime"])
    assert net.backbone.bn.num_batches_tracked == 2
    close(net.backbone.bn.running_mean, ops["wrn_bn_running_mean_after"])
    close(net.backbone.bn.running_var, ops["wrn_bn_running_var_after"])


def golden_net(answers: dict) -> RaClassifier:
    """The small network of the golden file, by its published names."""
    backbone = ResNet(BasicBlock, (1, 1, 1, 2), (4, 6, 6, 8))
    backbone.layer3[0] = BasicBlock(6, 6, 1)
    net = RaClassifier(backbone, n_classes=C)
    state = from_published({k.removeprefix("net."): v for k, v in answers.items() if k.startswith("net.")})
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    return net


def weighted(loss, heads: tuple[Heads, ...], cr_beta: float = 2.0) -> Tensor:
    """H: the loss of the final heads, and cr_beta times the mean of those of the auxiliary ones."""
    auxiliary = [loss(*logits) for logits in zip(*(each.auxiliary for each in heads), strict=True)]
    return loss(*(each.final for each in heads)) + cr_beta * torch.stack(auxiliary).mean()


def divergence(natural: Tensor, attacked: Tensor) -> Tensor:
    p = natural.softmax(1)
    return (p * (p.log() - attacked.softmax(1).log())).sum(1).mean()


def contrast(anchor: Tensor, negative: Tensor) -> Tensor:
    (p, a), (q, b) = anchor.softmax(1).detach().max(1), negative.softmax(1).max(1)
    return ((p * q).sqrt() * (a == b)).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_a_network_in_both_modes_and_its_statistics_are_the_golden_ones(golden, dtype):
    answers = golden("ancra_net")
    net, x, y = golden_net(answers).to(dtype).eval(), answers["x"].to(dtype), answers["y"]
    heads = net.heads(x)
    for found, name in zip((heads.final, *heads.auxiliary), ("final_logits", "aux0", "aux1"), strict=True):
        close(found, answers[f"eval_{name}"])
    close(net(x), answers["eval_final_logits"])
    close(net.linear(net.features(x)), answers["eval_final_logits"])
    close(net(answers["x_adv_untargeted"].to(dtype)), answers["eval_final_logits_on_x_adv"])
    heads = net.train().heads(x, y)
    for found, name in zip((heads.final, *heads.auxiliary), ("final_logits", "aux0", "aux1"), strict=True):
        close(found, answers[f"train_{name}"])
    close(net.backbone.bn1.running_mean, answers["train_bn1_running_mean_after_one"])
    close(net.backbone.bn1.running_var, answers["train_bn1_running_var_after_one"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_every_parameter_through_three_passes_are_the_golden_ones(golden, dtype):
    answers = golden("ancra_net")
    net, y = golden_net(answers).to(dtype).train(), answers["y"]
    x, adversarial, negative = (answers[name].to(dtype) for name in ("x", "x_adv_untargeted", "x_neg_adv"))
    passes = (net.heads(x, y), net.heads(adversarial, y), net.heads(negative, y[answers["neg_index"]]))
    natural = weighted(lambda logits: F.cross_entropy(logits, y), passes[:1])
    robust, anc = weighted(divergence, passes[:2]), weighted(contrast, passes[::2])
    for found, name in ((natural, "natural"), (robust, "robust"), (anc, "anc")):
        assert found.item() == pytest.approx(answers[f"loss_{name}"], rel=1e-4)
    total = natural + 6 * robust + 3 * anc
    assert total.item() == pytest.approx(answers["loss_total"], rel=1e-4)
    total.backward()
    gradients = {key.removeprefix("backbone."): p.grad for key, p in net.named_parameters()}
    expected = {k.removeprefix("grad.").replace("fc.", "linear."): v for k, v in answers.items() if k[:5] == "grad."}
    assert set(gradients) == set(expected)
    for key, value in expected.items():
        close(gradients[key], value, 1e-4)
    after = {key.removeprefix("after."): value for key, value in answers.items() if key.startswith("after.")}
    state = net.state_dict()
    assert len(after) == 12
    for key, value in after.items():
        close(state[key], value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_mode_with_the_predicted_classes_is_evaluation_mode(layout):
    """Where batch normalisation does not learn, and each block predicts the same class; and twice the same is the
    same, as the divergence of an image from itself must be."""
    net, x = small(layout), pictures()
    with torch.inference_mode():
        predicted = net.heads(x)
        named = torch.stack([logits.argmax(1) for logits in predicted.auxiliary])
        x = x[(named == named[0]).all(0)]
        assert len(x) > 0
        predicted = net.heads(x)
        net.training = True
        given = net.heads(x, predicted.auxiliary[0].argmax(1))
        again = net.heads(x, predicted.auxiliary[0].argmax(1))
    assert len(predicted.auxiliary) == (1 if layout == "one" else 2)
    for pair in ((predicted, given), (given, again)):
        assert torch.equal(pair[0].final, pair[1].final)
        assert all(map(torch.equal, pair[0].auxiliary, pair[1].auxiliary))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_count_in_training_mode_alone_and_are_asked_for_there(layout):
    net, x = small(layout), pictures()
    own, told = net.heads(x), net.heads(x, LABELS)
    assert torch.equal(own.final, told.final) and torch.equal(net(x), own.final)
    net.train()
    for call in (net, net.heads, net.features):
        with pytest.raises(ValueError, match="needs labels in training mode"):
            call(x)
    assert not torch.equal(net.heads(x, LABELS).final, net.heads(x, (LABELS + 1) % C).final)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_what_the_linear_head_classifies_last(layout):
    net, x = small(layout, dtype=torch.float64), pictures(dtype=torch.float64)
    h = net.features(x)
    assert h.shape == (6, net.feature_dim)
    torch.testing.assert_close(net.linear(h), net(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plain_classifier_has_the_same_parameters_and_no_auxiliary_heads(layout):
    net, plain, x = small(layout), small(layout, Classifier), pictures()
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert set(net.state_dict()) - set(plain.state_dict()) == {"ra_blocks", "input_mean", "input_std"}
    heads = plain.heads(x, LABELS)
    assert torch.equal(heads.final, plain(x)) and heads.auxiliary == ()
    # Nothing weighs features where the rows are all ones: the same network, but for a tail that is applied twice.
    if layout in ("post", "one"):
        found = net.heads(x, rows=lambda logits, weight: torch.ones(len(logits), weight.shape[1]))
        torch.testing.assert_close(found.final, heads.final)


@pytest.mark.parametrize("layout, tail", [("post", 0), ("wide", 6), ("grid", 6)])
def test_batch_normalisation_learns_once_a_pass_and_the_shared_one_twice(layout, tail):
    net, x = small(layout).train(), pictures()
    counts = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for _ in range(3):
        net.heads(x, LABELS)
    found = {name: int(module.num_batches_tracked) for name, module in counts.items()}
    assert found.pop("backbone.bn", 0) == tail and set(found.values()) == {3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_activation_is_a_module_used_once_and_operators_before_them_change_nothing(layout):
    net, x = small(layout), pictures()
    expected, names = net.heads(x), []
    calls: dict[str, int] = {}
    for where, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_, where=where: calls.update({where: calls.get(where, 0) + 1}))
    net.heads(x)
    plain = sum(isinstance(module, nn.ReLU) for module in LAYOUTS[layout]().modules())
    assert set(calls.values()) == {1} and len(calls) == plain + (layout in ("wide", "grid"))
    insert_before_activations(net.backbone, lambda at: names.append(at) or nn.Identity())
    found = net.heads(x)
    assert len(names) == len(calls) and torch.equal(found.final, expected.final)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "wrn16_1", "preact18_64"])
def test_the_backbones_end_with_reverse_attention(name):
    net, x = build_net("ra_classifier", name, n_classes=C, seed=0).eval(), pictures(2, 32)
    with torch.inference_mode():
        heads = net.heads(x)
    assert len(heads.auxiliary) == int(net.ra_blocks) == (1 if name == "resnet8" else 2)
    assert [logits.shape for logits in (heads.final, *heads.auxiliary)] == [(2, C)] * (1 + len(heads.auxiliary))
    shared = name in ("wrn16_1", "preact18_64")
    assert sum(isinstance(m, nn.ReLU) for m in net.modules()) == activations(name) + shared


def test_backbones_that_take_none_and_numbers_of_blocks_that_there_are_not_raise():
    with pytest.raises(ValueError, match="needs a backbone made of residual blocks, got Linear"):
        RaClassifier(nn.Linear(2, 2), n_classes=C)
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"between 1 and 2, the blocks of the last stage, got {count}"):
            RaClassifier(LAYOUTS["post"](), n_classes=C, ra_blocks=count)
    assert len(RaClassifier(LAYOUTS["wide"](), n_classes=C, ra_blocks=1).eval().heads(pictures()).auxiliary) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_is_a_network_of_its_own(layout):
    net, x = small(layout), pictures()
    twin = copy.deepcopy(net)
    before = net(x)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert torch.equal(twin(x), before) and not torch.equal(net(x), before)


# ----------------------------------------------------------------------------------------------------- rows for attacks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_can_be_held_at_a_class_for_all_images_or_at_one_for_each(layout):
    net, x = small(layout), pictures()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    held = [net.heads(x, rows=rows_of(k)).final for k in range(C)]
    for k in range(C):
        each = net.heads(x, rows=rows_of(torch.full((6,), k)))
        torch.testing.assert_close(each.final, held[k])
    mixed = net.heads(x, rows=rows_of(LABELS)).final
    torch.testing.assert_close(mixed, torch.stack([held[k][i] for i, k in enumerate(LABELS.tolist())]))
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(x), net.heads(x, rows=predicted_rows).final)


def test_soft_rows_are_means_of_all_rows_and_come_to_the_predicted_ones_as_the_temperature_falls():
    logits, weight = torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.tensor([[1.0, 0.0, 2.0], [5.0, 4.0, 0.0]])
    more, less = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))  # Logits differ by 2, at a temperature of 2.
    expected = torch.tensor([[less, more], [more, less]]) @ weight
    torch.testing.assert_close(soft_rows(2.0)(logits, weight), expected)
    torch.testing.assert_close(soft_rows(1e-3)(logits, weight), predicted_rows(logits, weight))
    torch.testing.assert_close(soft_rows(1e6)(logits, weight), weight.mean(0).expand(2, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_soft_rows_pass_the_gradient_of_the_choice_on_and_straight_through_keeps_the_prediction(layout):
    net, x = small(layout, dtype=torch.float64), pictures(2, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net.heads(x, rows=soft_rows(0.7)).final, (x,), atol=1e-6)
    through = net.heads(x, rows=straight_through_rows(0.7))
    torch.testing.assert_close(through.final, net(x))
    hard, soft, both = (
        torch.autograd.grad(net.heads(x, rows=rows).final.square().sum(), x)[0]
        for rows in (predicted_rows, soft_rows(0.7), straight_through_rows(0.7))
    )
    assert not torch.allclose(hard, both) and not torch.allclose(soft, both)
    # Of the one operation: the gradient by the rows is that of the soft ones.
    logits, weight = torch.randn(3, C, dtype=torch.float64, requires_grad=True), net.linear.weight.detach()
    scale = torch.randn(3, weight.shape[1], dtype=torch.float64)
    gradients = [
        torch.autograd.grad((rows(logits, weight) * scale).sum(), logits)[0]
        for rows in (soft_rows(0.7), straight_through_rows(0.7))
    ]
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------------------------------------------------------- files


def test_published_names_of_a_wide_network_are_ours_and_its_dead_stage_is_left_out():
    net = build_net("ra_classifier", "wrn16_1", n_classes=C, seed=3)
    theirs: dict[str, Tensor] = {}
    for key, value in net.state_dict().items():
        if key in ("ra_blocks", "input_mean", "input_std"):
            continue
        stage, _, rest = key.partition(".")
        if stage.startswith("layer"):
            key = f"block{stage[5:]}.layer.{rest}".replace("shortcut.0", "convShortcut")
            theirs |= {f"sub_{key}": value} if stage == "layer1" else {}
        theirs[{"bn": "bn1", "linear": "fc"}.get(stage, stage) + f".{rest}" if stage in ("bn", "linear") else key] = (
            value
        )
    assert "bn1.weight" in theirs and any(key.startswith("sub_block1.layer.0.conv1") for key in theirs)
    state = from_published(theirs)
    found = load_net("ra_classifier", state, model="wrn16_1", path=Path("f.model"), flag="load_path")
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in found.state_dict().items() if not k.startswith("input"))
    x = pictures()
    net.input_mean.zero_(), net.input_std.fill_(1)
    with evaluation_mode(net), evaluation_mode(found):
        assert torch.equal(found(x), net(x))
