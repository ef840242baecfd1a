"""Stage 1: contrastive training, plain (SimCLR) or with shifting transformations (CSI), without labels or with.

Letters: B images, C classes, K shifts, V = K B views of one copy, P projection size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from common.device import Amp
from common.dist import SINGLE, Shard, World
from common.errors import UserError
from common.files import load_state_dict, load_tensors, read_facts
from common.flags import Flags, WeightsSpec
from common.run import start_epoch
from common.seed import generator
from datasets import ImageSet, Loading, ShiftSpec, Split
from datasets.augment import AlignedSpec
from datasets.outliers import TestBatchSpec
from datasets.views import shift_labels, train_views
from evals.classify import error_rate
from evals.trained import evaluation_mode
from models import ModelSpec
from models.checkpoint import find_weights, load_net
from models.feature_net import FeatureNet
from training.losses.contrastive import nt_xent, sup_nt_xent, uniclr
from training.micro_batch import forward_in_micro_batches, micro_batch_size
from training.modes.setup import (
    all_classes,
    few_views,
    fresh_net,
    keep_atoms,
    own_device,
    precision,
    same_classes,
    sheet,
    training_images,
    view_renderer,
    with_shared_statistics,
)
from training.optim import OptimSpec
from training.recipe import Batch, Check, EpochEnd, Recipe, Shown, Step
from training.specs import CompileSpec, ContrastiveSpec, ProbeSpec

_PROBE_LR = 1e-3
_PUBLISHED = ContrastiveSpec()
_COLLAPSE = Check(
    "train/z_spread",
    "all projections point the same way, the network has collapsed. Try a lower --lr_init, more --warmup, or a larger"
    " --batch_size",
    below=0.01,
)


def build(
    flags: Flags,
    split: Split,
    world: World = SINGLE,
    *,
    shifts: Callable[[Flags], ShiftSpec],
    labelled: bool = False,
) -> Recipe:
    """The recipe of `simclr` and `simclr_CSI`: NT-Xent plus the cross-entropy of the shift label.

    labelled: of `sup_simclr` and `sup_simclr_CSI`: the supervised NT-Xent.
    A linear probe on detached features of unshifted views is trained beside it, for monitoring.
    Raises: UserError where a labelled mode is given a single class, and for parts of the loss that a mode lacks.
    """
    if labelled:
        all_classes(flags, split)
    device, amp = own_device(flags, world), precision(flags, world)
    optim, contrast = flags.of(OptimSpec), flags.of(ContrastiveSpec)
    if labelled and contrast.sim_loss != "nt_xent":
        raise UserError(f"--sim_loss {contrast.sim_loss}: --mode {flags.mode} has the supervised NT-Xent; leave it out")
    if labelled and contrast.deep_supervision:
        raise UserError(f"--deep_supervision: not for --mode {flags.mode}; leave it out")
    shift_spec = shifts(flags)
    data, aligned = training_images(split, shift_spec, flags.of(AlignedSpec), device)
    shift_functions = shift_spec.functions(aligned)
    n_shifts = len(shift_functions)
    if n_shifts < 2 and contrast.sim_loss == "uniclr":
        raise UserError(f"--sim_loss uniclr: its negatives are shifted views, and --mode {flags.mode} has none")
    if (n_shifts < 2 or labelled) and flags.given("shift_lambda"):
        raise UserError(f"--shift_lambda: --mode {flags.mode} has no classifier of the shift; leave it out")
    state: dict[str, Any] | None = None
    resume_path = flags.of(WeightsSpec, only=["resume_path"]).resume_path
    if resume_path:
        file = find_weights(resume_path, ("last.resume", "last.model"), flag="resume_path")
        if file.suffix == ".resume":
            state = load_tensors(file, flag="resume_path")
        net = load_net(
            "feature",
            state["model"] if state else load_state_dict(file, flag="resume_path"),
            model=flags.of(ModelSpec, only=["model"]).model,
            n_shifts=n_shifts,
            path=file,
            flag="resume_path",
            strict=not flags.of(WeightsSpec, only=["no_strict"]).no_strict,
            **flags.asked(ModelSpec, "simclr_dim", "projector_layers"),
        )
        same_classes(net, split, file, flag="resume_path")
        split.check_trained(read_facts(file).get("data", {}), file, flag="resume_path")
    else:
        net = fresh_net(flags, split, n_shifts, stage_heads=contrast.deep_supervision > 0)
    if contrast.deep_supervision and not net.stage_layers:
        why = "its weights were trained without" if resume_path else "the backbone has no stages"
        raise UserError(f"--deep_supervision: {why}; leave it out")
    if n_shifts > 1 and not labelled and not contrast.shift_lambda:
        # What is not trained shall say nothing: scores leave a logit of 0 out.
        nn.init.zeros_(net.shift_cls_layer.weight)
        nn.init.zeros_(net.shift_cls_layer.bias)
    net = with_shared_statistics(net.to(device), world).train()
    after_step = keep_atoms(net, data.size)
    probe = list(net.linear.parameters())
    others = [p for name, p in net.named_parameters() if not name.startswith("linear.")]
    optimizers = (optim.build(others), torch.optim.Adam(probe, _PROBE_LR, fused=True))
    first_epoch = _resume(file, state, optimizers, epochs=optim.epochs) if resume_path else 0
    average = optim.average(net)
    if average is not None and state is not None and "average" in state:
        average.load_state_dict(state["average"])
    seed = flags.seed
    render, micro_batch = view_renderer(flags), micro_batch_size(flags)
    if flags.of(CompileSpec).compile:
        net.compile()

    def losses(batch: Batch) -> Step:
        gen = generator(seed, "augment", batch.epoch, batch.step, device=device)
        return contrastive_step(
            net,
            train_views(batch.images, shift_functions, aligned, gen, render, batch.shard),
            batch.labels,
            n_shifts=n_shifts,
            n_classes=split.n_classes if labelled else None,
            contrast=contrast,
            amp=amp,
            micro_batch=micro_batch,
            shard=batch.shard,
        )

    # With one class there is nothing to classify: the flags of the probe's test are not even read.
    every = flags.of(ProbeSpec).error_step if split.one_class_idx is None else 0
    test = probe_images(split, device) if every > 0 else None
    batch_size = flags.of(TestBatchSpec).test_batch_size if test is not None else 0

    def end_epoch(epoch: int) -> EpochEnd:
        due = test is not None and (epoch % every == 0 or epoch == optim.epochs)
        kept = net if average is None else average.net
        return EpochEnd({"test/probe_error": probe_error(kept, test, batch_size)} if due and test is not None else {})

    def show(epoch: int) -> Shown:
        return Shown({"views/shifts": sheet(few_views(data, shift_functions, aligned, seed, epoch))}, {})

    return Recipe(
        net,
        data,
        losses,
        optimizers,
        optim.lr,
        Loading(views=contrast.copies),
        after_step=after_step,
        end_epoch=end_epoch,
        show=show,
        checks=(_COLLAPSE,),
        first_epoch=first_epoch,
        average=average,
    )


def contrastive_step(
    net: FeatureNet,
    views: Tensor,
    labels: Tensor,
    *,
    n_shifts: int,
    n_classes: int | None = None,
    contrast: ContrastiveSpec = _PUBLISHED,
    amp: Amp = nullcontext,
    micro_batch: int | None = None,
    shard: Shard | None = None,
) -> Step:
    """The losses of one batch. views (copies * K B, 3, H, W) in the order of `train_views`; labels (B,).

    Without labels (n_classes None), `sim` is NT-Xent over all views; positives are the same image under the same shift,
    so that another shift of the same image is a negative; or UniCLR. `deep`: the same of the heads of earlier stages,
    with positives that weigh alike, added up, absent for a weight of 0. `shift`: cross-entropy of the shift, absent for
    K = 1 and a weight of 0. With labels, `sim` is the supervised NT-Xent of the joint label class + C * shift, and
    there is no `shift`. `cls`: the probe's, on detached features. micro_batch: images that go through the network at a
    time. shard: whose images the views are, where other ranks have the others of the batch.
    Source: CSI (Tack et al. 2020), eqs. 1 and 6, and its labelled form.
    """
    shard = shard or Shard(len(labels))
    with amp():
        features = forward_in_micro_batches(net, views, shard.size, micro_batch)
    copies, z = contrast.copies, shard.all_gather(features.z)
    shift = shift_labels(n_shifts, len(labels), 1, views.device)
    if n_classes is not None:
        joint = labels.repeat(n_shifts) + n_classes * shift
        terms = {"sim": contrast.sim_lambda * sup_nt_xent(z, joint, contrast.temperature, copies)}
    else:
        terms = {"sim": contrast.sim_lambda * unlabelled_loss(z, shift, contrast)}
        if contrast.deep_supervision:
            earlier = shard.all_gather(features.stages).unbind(1)
            hard = replace(contrast, soft_temperature=None)
            deep = torch.stack([unlabelled_loss(z, shift, hard) for z in earlier]).sum()
            terms["deep"] = contrast.deep_supervision * deep
        if n_shifts > 1 and contrast.shift_lambda:
            logits = shard.all_gather(features.shift)
            terms["shift"] = contrast.shift_lambda * F.cross_entropy(logits, shift.repeat(copies))
    unshifted = torch.cat([h[: shard.size] for h in features.h.detach().chunk(copies)])
    terms["cls"] = F.cross_entropy(shard.all_gather(net.linear(unshifted)), labels.repeat(copies))
    return Step(terms, {"train/z_spread": spread(z)})


def unlabelled_loss(z: Tensor, shift: Tensor, contrast: ContrastiveSpec) -> Tensor:
    """--sim_loss of projections (copies * V, P); shift (V,)."""
    if contrast.sim_loss == "uniclr":
        return uniclr(z, shift == 0, contrast.temperature, contrast.soft_temperature, contrast.copies)
    return nt_xent(z, contrast.temperature, contrast.copies)


def spread(z: Tensor) -> Tensor:
    """One minus the squared length of the mean of unit projections (V, P): 0 where all point the same way."""
    return 1 - F.normalize(z.detach(), dim=1).mean(0).square().sum()


def probe_images(split: Split, device: torch.device) -> ImageSet | None:
    """The test images of the classes of a multi-class set; None where it has but one class, or no test images."""
    if split.n_classes < 2:
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
    with evaluation_mode(net):
        return error_rate(lambda images: net.linear(net(images).h), test, batch_size)


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
