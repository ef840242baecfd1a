"""Classification of labelled images, by any backbone: what SDNets and their ResNet twins are trained by.

Letters: B images of a batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common.dist import SINGLE, World
from common.flags import Flags, Spec, flag
from common.seed import seed_of
from datasets import ImageSet, Loading, PictureSet, Split
from datasets.augment import AlignedSpec
from datasets.sets import floats
from evals.classify import correct_of
from evals.trained import evaluation_mode
from models import ModelSpec
from models.checkpoint import build_net
from models.csc import csc_layers
from training.modes.setup import (
    all_classes,
    coding_settings,
    keep_atoms,
    own_device,
    precision,
    start_from_pretrained,
    with_shared_statistics,
)
from training.optim import LengthSpec, RateSpec
from training.recipe import Batch, EpochEnd, Recipe, Step
from training.specs import CompileSpec, StepSpec

HELD_OUT = "held_out/accuracy"


@dataclass(frozen=True)
class SupervisedSpec(Spec, group="training"):
    """Schedule and augmentation of supervised training."""

    lr_final: float = flag(1e-6, "supervised: learning rate at the end of the cosine", at_least=0)
    lr_drops: Sequence[int] = flag(
        (),
        "supervised: epochs after which the rate falls to a tenth, in place of the cosine",
        type=int,
        nargs="+",
        at_least=1,
    )
    lr_schedule: str = flag(
        "auto",
        "supervised: auto: drops where --lr_drops are given, else cosine; cycle: up from 0 and down again",
        choices=lambda: ("auto", "cosine", "drops", "cycle"),
    )
    no_nesterov: bool = flag(False, "supervised: plain momentum")
    pad: int = flag(4, "supervised: pixels that images are padded by before the random crop", at_least=0)
    no_flip: bool = flag(False, "supervised: images are not mirrored")

    def lr(self, lr_init: float, epoch: float, epochs: int) -> float:
        """The learning rate after `epoch` (fractional) of `epochs` epochs."""
        if self.lr_schedule == "cycle":
            # Not quite 0 in the first step, or it would change nothing.
            return lr_init * max(1e-3, 1 - abs(2 * epoch / epochs - 1))
        if self.lr_schedule == "drops" or (self.lr_schedule == "auto" and self.lr_drops):
            return lr_init * 0.1 ** sum(epoch >= drop for drop in self.lr_drops)
        share = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        return self.lr_final + (lr_init - self.lr_final) * share


class Setup(NamedTuple):
    """What all modes that train a classifier from scratch share.

    net: on the device, in training mode. held_out: training images that select the best epoch, where there are any.
    """

    net: Any
    data: ImageSet | PictureSet
    held_out: ImageSet | PictureSet | None
    optimizer: torch.optim.Optimizer
    lr: Callable[[float], float]
    loading: Loading
    after_step: Callable[[], None]


def set_up(flags: Flags, split: Split, world: World, kind: str) -> Setup:
    """A fresh network of a row of `NETS`, SGD with momentum, and the images.

    Raises: UserError where there is but one class.
    """
    all_classes(flags, split)
    device = own_device(flags, world)
    spec, rates, epochs = flags.of(SupervisedSpec), flags.of(RateSpec), flags.of(LengthSpec).epochs
    crop = flags.of(AlignedSpec, only=["resize_factor", "resize_fix"]) if split.spec.stream else AlignedSpec()
    data, held_out = split.training_parts(crop)
    data, held_out = data.to(device), held_out.to(device) if held_out is not None else None
    net = build_net(
        kind,
        flags.of(ModelSpec, only=["model"]).model,
        n_classes=split.n_classes,
        seed=seed_of(flags.seed, "weights"),
    )
    coding_settings(flags, net)
    start_from_pretrained(flags, net)
    net = with_shared_statistics(net.to(device), world).train()
    after_step = keep_atoms(net, data.size)
    groups = parameter_groups(net, rates.weight_decay)
    optimizer = torch.optim.SGD(groups, rates.lr_init, momentum=0.9, nesterov=not spec.no_nesterov, fused=True)
    loading = Loading(pad=0 if data.cropped else spec.pad, flip=not spec.no_flip)
    lr = partial(spec.lr, rates.lr_init, epochs=epochs)
    return Setup(net, data, held_out, optimizer, lr, loading, after_step)


def build(flags: Flags, split: Split, world: World = SINGLE) -> Recipe:
    """The recipe of `supervised`: cross-entropy, SGD with momentum; held-out training images select the best epoch.

    Raises: UserError where there is but one class.
    """
    net, data, held_out, optimizer, lr, loading, after_step = set_up(flags, split, world, "classifier")
    amp, batch_size = precision(flags, world), flags.of(StepSpec).batch_size
    if flags.of(CompileSpec).compile:
        net.compile()

    def losses(batch: Batch) -> Step:
        with amp():
            logits = net(floats(batch.local_images[0]))
        return Step({"cls": F.cross_entropy(batch.shard.all_gather(logits), batch.labels)}, {})

    def end_epoch(epoch: int) -> EpochEnd:
        if held_out is None:
            return EpochEnd()
        with evaluation_mode(net), amp():
            right = correct_of(net, held_out, batch_size, world).sum().item()
        return EpochEnd({HELD_OUT: sum(world.all_gather_object(right)) / len(held_out)}, select=HELD_OUT)

    return Recipe(net, data, losses, (optimizer,), lr, loading, after_step=after_step, end_epoch=end_epoch)


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """All parameters, the atoms of sparse coding layers in a group of their own without weight decay: it would change
    their norm alone, which is 1 after each step."""
    atoms = [layer.weight for layer in csc_layers(net).values()]
    known = set(map(id, atoms))
    others = [p for p in net.parameters() if id(p) not in known]
    groups: list[dict[str, object]] = [{"params": others, "weight_decay": weight_decay}]
    return [*groups, {"params": atoms, "weight_decay": 0.0}] if atoms else groups
