"""What the recipe of each mode does with its flags: rates that are set, draws of each step, weights of terms, seeds."""

from pathlib import Path

import pytest
import torch

from common.dist import SINGLE, Shard
from common.errors import UserError
from common.flags import build_parser, parse
from common.seed import generator
from datasets import DataSource, split_one_class
from datasets.augment import AlignedSpec
from datasets.one_class import SplitSpec
from datasets.shifts import ShiftSpec
from datasets.views import train_views
from models.csc import csc_layers
from program import SPECS
from tests.conftest import TINY
from training import STAGE1, STAGE2
from training.loop import descend, set_lr
from training.losses.contrastive import nt_xent, sup_nt_xent
from training.modes.adversarial import METHODS
from training.modes.sup_linear import rate
from training.modes.supervised import SupervisedSpec
from training.optim import OptimSpec
from training.recipe import Batch, Recipe

# These train nothing.
MODES = {name: mode for name, mode in (STAGE1 | STAGE2).items() if name not in ("meansparse", "level_dict")}
AUTOENCODERS = [name for name, mode in MODES.items() if not mode.backbone]
SIMCLR = ["simclr", "simclr_CSI", "sup_simclr", "sup_simclr_CSI"]


def recipe_of(mode: str, start: Path, *more: str) -> Recipe:
    """The recipe of a mode on 8 x 8 digits, in four rotations where it has shifts, as the flags `more` say."""
    args = [
        *(TINY[:-2] if mode.startswith(("sup", *METHODS)) else TINY),
        "--mode",
        mode,
        "--epochs",
        "10",
        "--device",
        "cpu",
        *more,
    ]
    args += ["--shift_trans_type", "rotation"] if mode in ("simclr_CSI", "cocsr_dict") else []
    args += {"sup_linear": ["--load_path", str(start)], "sup_CSI_linear": ["--load_path", str(start)]}.get(mode, [])
    args += ["--resume_path", str(start), "--sr_dict_size", "12"] if mode == "cocsr_dict" else []
    flags = parse([*args, *more], build_parser("test", MODES, mode, SPECS))
    split = split_one_class(
        "digits", DataSource.of(flags, "digits", training=True), flags.of(SplitSpec).one_class_idx, 8
    )
    return MODES[mode].build(flags.filled(MODES[mode].defaults) if mode in AUTOENCODERS else flags, split)


def batch_of(mode: str, epoch: int = 1, step: int = 0) -> Batch:
    """The same six pictures, whatever epoch and step."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 if "simclr" in mode else 1, 6, 3, 8, 8), dtype=torch.uint8, generator=g)
    return Batch(images, torch.tensor([0, 1, 2, 3, 4, 0]), torch.arange(6), epoch, step, Shard(6))


def losses(recipe: Recipe, batch: Batch) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in recipe.losses(batch).losses.items()}


def test_without_its_classifier_the_head_of_the_shift_is_zero_and_stays_so(start):
    recipe = recipe_of("simclr_CSI", start, "--shift_lambda", "0")
    descend(recipe, batch_of("simclr_CSI"), SINGLE)
    head = recipe.model.shift_cls_layer
    assert not head.weight.any() and not head.bias.any()
    assert recipe_of("simclr_CSI", start).model.shift_cls_layer.weight.any()


@pytest.mark.parametrize("mode", MODES)
def test_the_learning_rate_that_is_reported_is_the_one_that_is_set(mode, start):
    recipe = recipe_of(mode, start, "--lr_init", "0.03", "--warmup", "2", "--sr_lr", "0.02", "--optimizer", "sgd")
    optim = OptimSpec(optimizer="sgd", lr_scheduler="cosine", lr_init=0.03, weight_decay=1e-6, warmup=2, epochs=10)
    epochs = [0.0, 0.5, 1.5, 6.25, 7.75, 9.5]
    if mode == "supervised" or mode in METHODS:
        expected = [SupervisedSpec().lr(0.03, e, 10) for e in epochs]
    elif mode == "cocsr_dict" or mode in AUTOENCODERS:
        expected = [0.02 if mode == "cocsr_dict" else 0.03] * 6
    else:
        expected = [rate(0.03, e, 10) if "linear" in mode else optim.lr(e) for e in epochs]
        assert len(set(expected)) > 3
    first, *others = recipe.optimizers
    for epoch, lr in zip(epochs, expected, strict=True):
        assert set_lr(recipe, epoch) == pytest.approx(lr)
        assert [group["lr"] for group in first.param_groups] == pytest.approx([lr])
        assert all(group["lr"] == 1e-3 for other in others for group in other.param_groups)  # the probe's, held


@pytest.mark.parametrize("mode", MODES)
def test_weight_decay_reaches_the_optimiser_of_every_mode(mode, start):
    flag = "--sr_decay_lr" if mode == "cocsr_dict" else "--weight_decay"
    recipe = recipe_of(mode, start, flag, "0.07", "--optimizer", "sgd")
    assert [group["weight_decay"] for group in recipe.optimizers[0].param_groups] == [0.07]
    if mode == "cocsr_dict":
        # Adam turns the gradient of the decay alone into steps of the size of the rate, towards zero.
        (dictionary,) = recipe.optimizers[0].param_groups[0]["params"]
        before = dictionary.detach().clone()
        dictionary.grad = torch.zeros_like(dictionary)
        recipe.optimizers[0].step()
        away = before.abs() > 1e-2
        torch.testing.assert_close((before - dictionary)[away], torch.full_like(before, 1e-3)[away], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in (*AUTOENCODERS, "supervised")])
def test_every_step_of_every_epoch_has_draws_of_its_own(mode, start):
    """Of the same pictures under the same weights, so that nothing differs but what is drawn."""
    recipe = recipe_of(mode, start)
    state = {name: value.clone() for name, value in recipe.model.state_dict().items()}
    found = []
    for at in ((1, 0), (1, 1), (2, 0), (2, 1), (1, 11), (1, 0)):
        recipe.model.load_state_dict(state)  # Attacks see running statistics, which every pass moves.
        found.append(losses(recipe, batch_of(mode, *at)))
    assert found.pop() == found[0]
    drawn = [tuple(values[name] for name in values if name != "sr_dict") for values in found]
    assert len(set(drawn)) == 5
    other = recipe_of(mode, start, "--seed", "1")
    other.model.load_state_dict(state)
    assert losses(other, batch_of(mode)) != found[0]


@pytest.mark.parametrize(
    "mode, flags, told",
    [
        ("simclr", ["--sim_loss", "uniclr"], "its negatives are shifted views"),
        ("sup_simclr_CSI", ["--sim_loss", "uniclr"], "supervised NT-Xent"),
        ("simclr", ["--shift_lambda", "0"], "no classifier of the shift"),
        ("sup_simclr", ["--deep_supervision", "1"], "--deep_supervision: not for"),
        ("simclr_CSI", ["--deep_supervision", "1", "--resume_path", "START"], "trained without"),
        ("simclr", ["--ema_decay", "0.9", "--model", "sdnet8"], "sparse coding layers"),
        ("sup_simclr_CSI", ["--shift_lambda", "2"], "no classifier of the shift"),
    ],
)
def test_parts_of_the_loss_that_a_mode_lacks_are_refused(mode, flags, told, start):
    with pytest.raises(UserError, match=told):
        recipe_of(mode, start, *[str(start) if flag == "START" else flag for flag in flags])


@pytest.mark.parametrize("mode", ["simclr_CSI", "sup_simclr", "rot_trans"])
def test_a_moving_average_is_kept_where_one_is_asked_for(mode, start):
    recipe = recipe_of(mode, start, "--ema_decay", "0.9")
    assert recipe.result is recipe.average.net is not recipe.model
    plain = recipe_of(mode, start)
    assert plain.average is None and plain.result is plain.model
    for (name, own), given in zip(recipe.result.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(own, given), name


def test_as_many_views_are_loaded_as_there_are_copies(start):
    assert recipe_of("simclr", start, "--copies", "5").loading.views == 5
    assert recipe_of("simclr", start).loading.views == 2


@pytest.mark.parametrize("mode", SIMCLR)
def test_the_contrastive_term_has_its_weight_and_its_temperature(mode, start):
    """Against the loss of the views that generator and shifts stand for."""
    recipe = recipe_of(mode, start, "--sim_lambda", "3", "--temperature", "0.2")
    shifts = ShiftSpec("rotation" if mode.endswith("CSI") else "none").functions()
    batch = batch_of(mode, 2, 5)
    views = train_views(batch.images, shifts, AlignedSpec(), generator(0, "augment", 2, 5))
    with torch.no_grad():
        z = recipe.model(views).z
    if mode.startswith("sup_"):
        joint = torch.cat([batch.labels + 10 * k for k in range(len(shifts))])
        expected = sup_nt_xent(z, joint, 0.2)
    else:
        expected = nt_xent(z, 0.2)
    found = losses(recipe, batch)
    assert found["sim"] == pytest.approx(3 * float(expected), rel=1e-5)
    plain = losses(recipe_of(mode, start, "--temperature", "0.2"), batch)
    assert plain.pop("sim") == pytest.approx(found.pop("sim") / 3, rel=1e-5) and plain == found


@pytest.mark.parametrize(
    "mode", [name for name in STAGE1 if name in MODES and MODES[name].backbone and "linear" not in name]
)
def test_sparse_coding_layers_of_a_backbone_follow_each_step(mode, start):
    """Atoms of norm 1, and the step of the solver that fits them: of every mode that trains a backbone."""
    more = ["--model", "sdnet8_all", "--csc_lambda", "0.2", "--csc_steps", "3", "--csc_mu", "0.01"]
    recipe = recipe_of(mode, start, *more, "--lr_init", "0.5", "--optimizer", "sgd", "--warmup", "0")
    layers = csc_layers(recipe.model)
    before = {name: (layer.weight.clone(), layer.step.clone()) for name, layer in layers.items()}
    descend(recipe, batch_of(mode), SINGLE)
    recipe.after_step()
    assert len(layers) == 7
    for name, layer in layers.items():
        assert layer.solver == (3, 0.01, True, "extrapolated") and float(layer.lam) == pytest.approx(0.2)
        assert not torch.equal(layer.weight, before[name][0]) and not torch.equal(layer.step, before[name][1])
        torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), torch.ones(len(layer.weight)))
        layer.refresh_step((layer.power.shape[2] * layer.stride,) * 2, fresh=True)
    recipe.after_step()
    for layer in layers.values():  # power iterations end some percent below the largest eigenvalue
        found = float(layer.step)
        layer.refresh_step((layer.power.shape[2] * layer.stride,) * 2, fresh=True)
        assert float(layer.step) == pytest.approx(found, rel=4e-2)


@pytest.mark.parametrize("mode", ["simclr_CSI", "sup_simclr", "rot_trans", "supervised", "cocsr_dict"])
def test_weights_that_are_drawn_follow_the_seed(mode, start):
    """Those of the network in stage 1, of the dictionary in stage 2."""
    a, b, c = (recipe_of(mode, start, "--seed", seed).model.state_dict() for seed in ("0", "0", "1"))
    name = "sr_nets.dictionary" if mode == "cocsr_dict" else "conv1.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])


@pytest.mark.parametrize("mode", ["sup_linear", "sup_CSI_linear", "cocsr_dict"])
def test_a_step_leaves_frozen_networks_as_they_are(mode, start):
    """Bit for bit, running statistics included; what it trains moves."""
    recipe = recipe_of(mode, start)
    before = {name: value.clone() for name, value in recipe.model.state_dict().items()}
    descend(recipe, batch_of(mode), SINGLE)
    moved = {name for name, value in recipe.model.state_dict().items() if not torch.equal(value, before[name])}
    heads = ("linear", *(("shift_cls_layer", "joint_distribution_layer") if mode == "sup_CSI_linear" else ()))
    trained = {f"{head}.{part}" for head in heads for part in ("weight", "bias")}
    assert moved == ({"sr_nets.dictionary"} if mode == "cocsr_dict" else trained)


@pytest.mark.parametrize("every, expected", [("2", [2, 4, 6, 8, 10]), ("4", [4, 8, 10])])
def test_the_probe_is_tested_every_so_many_epochs_and_at_the_end(every, expected, start):
    args = ["--dataset", "digits", "--error_step", every]
    recipe = recipe_of("sup_simclr", start, *args)
    assert [epoch for epoch in range(1, 11) if recipe.end_epoch(epoch).values] == expected
