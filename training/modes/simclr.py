"""Stage 1: contrastive training, plain (SimCLR) or with shifting transformations (CSI).

Letters: B images, K shifts, V = K B views of one copy.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from common.device import autocast, pick_device
from common.errors import UserError
from common.files import load_state_dict, load_tensors
from common.flags import Flags, pick
from common.run import start_epoch
from common.seed import generator, seed_of
from datasets import ImageSet, ShiftSpec, Split
from datasets.augment import AlignedSpec
from datasets.views import shift_labels, train_views
from models.checkpoint import build_net, find_weights, net_from_state
from models.feature_net import FeatureNet
from training.losses.contrastive import nt_xent
from training.optim import OptimSpec, set_lr
from training.recipe import Batch, Recipe, Step, no_values

_PROBE_LR = 1e-3


def no_shifts(flags: Flags) -> ShiftSpec:
    """`simclr` has no shifting transformation, whatever --shift_trans_type says."""
    return ShiftSpec("none")


def several_shifts(flags: Flags) -> ShiftSpec:
    """`simclr_CSI` needs at least two."""
    spec = any_shifts(flags)
    if spec.count < 2:
        raise UserError(f"--shift_trans_type: --mode {flags.mode} tells shifts apart; choose one other than none")
    return spec


def any_shifts(flags: Flags) -> ShiftSpec:
    """Raises: UserError where one image would have to be mixed with itself."""
    spec = pick(ShiftSpec, flags)
    if flags.batch_size == 1 and spec.mixes_neighbours:
        raise UserError(f"--batch_size 1: {spec.shift_trans_type} mixes each image with its neighbour; use 2 or more")
    return spec


def training_images(split: Split, shifts: ShiftSpec, device: torch.device) -> ImageSet:
    """The normal training images. Raises: UserError for a single one that would have to be mixed with itself."""
    data = split.train().to(device)
    if len(data) == 1 and shifts.mixes_neighbours:
        raise UserError(f"--data_path: one training image alone cannot be mixed by {shifts.shift_trans_type}")
    return data


def build(flags: Flags, split: Split, shift_spec: ShiftSpec) -> Recipe:
    """The recipe of `simclr` and `simclr_CSI`: NT-Xent plus the cross-entropy of the shift label.

    A linear probe on detached features of unshifted views is trained beside it, for monitoring.
    """
    device = pick_device(flags.device)
    optim = pick(OptimSpec, flags)
    aligned = pick(AlignedSpec, flags)
    shifts = shift_spec.functions()
    amp = autocast(flags.amp, device)
    data = training_images(split, shift_spec, device)
    state: dict[str, Any] | None = None
    if flags.resume_path:
        file = find_weights(flags.resume_path, ("last.resume", "last.model"), flag="resume_path")
        if file.name == "last.resume":
            state = load_tensors(file, flag="resume_path")
        net = net_from_state(
            state["model"] if state else load_state_dict(file, flag="resume_path"),
            model=flags.model,
            n_shifts=len(shifts),
            path=file,
            flag="resume_path",
            strict=not flags.no_strict,
            simclr_dim=flags.simclr_dim if flags.given("simclr_dim") else None,
        )
    else:
        net = build_net(
            flags.model,
            n_classes=split.n_classes,
            simclr_dim=flags.simclr_dim,
            n_shifts=len(shifts),
            seed=seed_of(flags.seed, "weights"),
        )
    net.to(device).train()
    probe = list(net.linear.parameters())
    others = [p for name, p in net.named_parameters() if not name.startswith("linear.")]
    optimizers = (optim.build(others), torch.optim.Adam(probe, _PROBE_LR))
    first_epoch = _resume(file, state, optimizers, epochs=optim.epochs) if flags.resume_path else 0
    seed, temperature, sim_lambda = flags.seed, flags.temperature, flags.sim_lambda
    if flags.compile:
        net.compile()

    def losses(batch: Batch) -> Step:
        gen = generator(seed, "augment", batch.epoch, batch.step, device=device)
        return contrastive_step(
            net,
            train_views(batch.images, shifts, aligned, gen, copies=2),
            batch.labels,
            n_shifts=len(shifts),
            temperature=temperature,
            sim_lambda=sim_lambda,
            amp=amp,
        )

    def before_step(epoch: float) -> float:
        lr = optim.lr(epoch)
        set_lr(optimizers[0], lr)
        return lr

    end_epoch = no_values
    test = probe_images(split, device)
    if test is not None:
        every, size = flags.error_step, flags.test_batch_size

        def end_epoch(epoch: int) -> dict[str, float]:
            due = every > 0 and (epoch % every == 0 or epoch == optim.epochs)
            return {"test/probe_error": probe_error(net, test, size)} if due else {}

    return Recipe(net, data, losses, optimizers, before_step, end_epoch=end_epoch, first_epoch=first_epoch)


def contrastive_step(
    net: FeatureNet,
    views: Tensor,
    labels: Tensor,
    *,
    n_shifts: int,
    temperature: float,
    sim_lambda: float,
    amp: Callable[[], AbstractContextManager] = nullcontext,
) -> Step:
    """The losses of one batch. views (2 K B, 3, H, W) in the order of `train_views`; labels (B,).

    `sim`: NT-Xent over all views; positives are the same image under the same shift, so that another shift of the same
    image is a negative. `shift`: cross-entropy of the shift, absent for K = 1. `cls`: the probe's, on detached features
    Source: CSI (Tack et al. 2020), eqs. 1 and 6.
    """
    with amp():
        features = net(views)
    z0, z1 = features.z.chunk(2)
    terms = {"sim": sim_lambda * nt_xent(z0, z1, temperature)}
    if n_shifts > 1:
        target = shift_labels(n_shifts, len(labels), 2, views.device)
        terms["shift"] = F.cross_entropy(features.shift, target)
    unshifted = torch.cat([h[: len(labels)] for h in features.h.detach().chunk(2)])
    terms["cls"] = F.cross_entropy(net.linear(unshifted), labels.repeat(2))
    return Step(terms, {})


def probe_images(split: Split, device: torch.device) -> ImageSet | None:
    """The test images of the training classes, where there are several classes and such images to test the probe on."""
    if split.one_class_idx is not None or split.n_classes < 2:
        return None
    try:
        test = split.test()
    except UserError as error:
        print(f"note: the linear probe is not tested ({error})")
        return None
    test = test.where(split.normal(test.labels)).to(device)
    return test if len(test) else None


def probe_error(net: FeatureNet, test: ImageSet, batch_size: int) -> float:
    """Share of the test images that the linear probe gets wrong."""
    was_training = net.training
    net.eval()
    with torch.inference_mode():
        labels = test.labels.to(test.device)
        wrong = [
            (net.linear(net(test.batch(index)).h).argmax(1) != labels[index]).sum()
            for index in torch.arange(len(test), device=test.device).split(batch_size)
        ]
    net.train(was_training)
    return float(torch.stack(wrong).sum()) / len(test)


def _resume(file: Path, state: dict[str, Any] | None, optimizers: tuple[Optimizer, ...], *, epochs: int) -> int:
    """Take over epoch and, where the whole state is kept, optimisers of another run; hyper-parameters stay the flags'.

    Raises: UserError where the other run had another optimiser, or there is nothing left to train.
    """
    if state is not None:
        options = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
        try:
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                if saved["param_groups"][0].keys() != optimizer.param_groups[0].keys():
                    raise ValueError
                optimizer.load_state_dict(saved)
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--resume_path: {file} was trained with another --optimizer; give its last.model"
            ) from None
        for optimizer, groups in zip(optimizers, options, strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)
    first_epoch = start_epoch(file)
    if first_epoch >= epochs:
        raise UserError(f"--epochs {epochs}: {file} has trained {first_epoch} epochs already; give more")
    return first_epoch
