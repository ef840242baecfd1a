"""Rot+Trans: predict how an image was rotated and moved (Hendrycks, Mazeika, Kadavath, Song 2019).

The row of the published tables that contrastive training is compared with. Letters: B images, V = 4 B views.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from common.attacks.specs import EpsilonSpec, StepsSpec
from common.dist import SINGLE, Shard, World
from common.flags import Flags, flag
from common.seed import generator, seed_of
from datasets import Split
from datasets.augment import AlignedSpec
from datasets.sets import floats
from datasets.shifts import rotate_and_translate
from datasets.views import shift_labels
from models import ModelSpec
from models.checkpoint import build_net
from models.feature_net import RotTransNet, Transformation
from models.mode import evaluation_mode, frozen
from training.attack import ATTACKS, Attack
from training.micro_batch import forward_in_micro_batches, micro_batch_size
from training.modes.setup import (
    coding_settings,
    keep_atoms,
    own_device,
    precision,
    rotations,
    start_from_pretrained,
    training_images,
    with_shared_statistics,
)
from training.optim import OptimSpec
from training.recipe import Batch, Recipe, Step
from training.specs import CompileSpec


@dataclass(frozen=True)
class ViewAttackSpec(StepsSpec, group="adversarial training"):
    """The attack on views."""

    train_attack: str = flag("nfgsm", "adv_rot_trans: attack in training", choices=lambda: sorted(ATTACKS))


def build_attacked(flags: Flags, split: Split, world: World = SINGLE) -> Recipe:
    """The recipe of `adv_rot_trans`: `rot_trans` on views that are attacked, so that the score withstands attacks.

    The rotated views are what an anomaly would be: the network learns on which side of them an image within epsilon
    stays.
    """
    name = flags.of(ViewAttackSpec, only=["train_attack"]).train_attack
    own = ["num_steps", "step_size"] if ATTACKS[name].steps is None else []
    spec, eps = flags.of(ViewAttackSpec, only=["train_attack", *own]), flags.of(EpsilonSpec).epsilon
    return build(flags, split, world, partial(_attacked, ATTACKS[name], eps, spec))


# (network, views (V, 3, H, W), labels (3, V), noise's generator, shard) -> attacked views.
Attacked = Callable[[RotTransNet, Tensor, Tensor, Generator, Shard], Tensor]


def _attacked(
    attack: Attack,
    eps: float,
    spec: StepsSpec,
    net: RotTransNet,
    views: Tensor,
    labels: Tensor,
    gen: Generator,
    shard: Shard,
) -> Tensor:
    rows = shard.rows(4, views.device)
    noise = attack.noise(4 * shard.batch, views, gen)[rows]

    def losses(x: Tensor) -> Tensor:
        parts = transformation_losses(net(x), labels[:, rows], reduction="none")
        return torch.stack(list(parts.values())).sum(0)

    with evaluation_mode(net), frozen(net):
        return attack(losses, views, noise, eps, spec)


def build(flags: Flags, split: Split, world: World = SINGLE, attacked: Attacked | None = None) -> Recipe:
    """The recipe of `rot_trans`: the cross-entropies of rotation, vertical and horizontal translation, added.

    attacked: what becomes of views before the network learns from them.

    Each step sees an image, flipped at random, under all four rotations, each with translations of its own. There is no
    crop or jitter: a crop would hide the translation that is to be predicted (pictures that are cropped while they are
    loaded keep that crop).
    """
    device = own_device(flags, world)
    optim, seed = flags.of(OptimSpec), flags.seed
    crop = flags.of(AlignedSpec) if split.spec.stream else AlignedSpec()
    data, _ = training_images(split, rotations(flags), crop, device)
    net = build_net("rot_trans", flags.of(ModelSpec, only=["model"]).model, seed=seed_of(seed, "weights"))
    coding_settings(flags, net)
    start_from_pretrained(flags, net)
    net = with_shared_statistics(net.to(device), world).train()
    after_step = keep_atoms(net, data.size)
    optimizer = optim.build(list(net.parameters()))
    amp = precision(flags, world)
    micro_batch = micro_batch_size(flags)
    average = optim.average(net)
    if flags.of(CompileSpec).compile:
        net.compile()

    def losses(batch: Batch) -> Step:
        gen = generator(seed, "augment", batch.epoch, batch.step, device=device)
        views, labels = transformed(floats(batch.local_images[0]), gen, batch.shard)
        if attacked is not None:
            with amp():
                views = attacked(net, views, labels, gen, batch.shard)
        with amp():
            logits = forward_in_micro_batches(net, views, batch.shard.size, micro_batch)
        return Step(transformation_losses(Transformation(*map(batch.shard.all_gather, logits)), labels), {})

    return Recipe(net, data, losses, (optimizer,), optim.lr, after_step=after_step, average=average)


def transformed(images: Tensor, generator: Generator, shard: Shard | None = None) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) under all rotations and random translations: views (4 B, 3, H, W), rotation by rotation, and
    labels (3, 4 B) of rotation, vertical and horizontal translation.

    shard: which images of a larger batch they are; the labels are those of the whole batch.
    """
    shard = shard or Shard(len(images))
    moves = torch.randint(3, (2, 4 * shard.batch), device=images.device, generator=generator)
    own = moves[:, shard.rows(4, images.device)]
    parts = enumerate(own.unflatten(1, (4, -1)).unbind(1))
    views = torch.cat([rotate_and_translate(images, *indices, quarters=q) for q, indices in parts])
    rotation = shift_labels(4, shard.batch, 1, images.device)
    return views, torch.cat([rotation[None], moves])


def transformation_losses(logits: Transformation, labels: Tensor, reduction: str = "mean") -> dict[str, Tensor]:
    """The three cross-entropies by name; labels (3, V)."""
    return {
        name: F.cross_entropy(values, own, reduction=reduction)
        for name, values, own in zip(logits._fields, logits, labels, strict=True)
    }
