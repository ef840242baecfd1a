"""Linear heads on a frozen stage-1 network: classes, and with the four rotations also shift and class by shift.

Letters: B images, C classes, K shifts, V = K B views, F feature size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.dist import SINGLE, Shard, World
from common.errors import UserError
from common.files import load_state_dict, read_facts
from common.flags import Flags, WeightsSpec
from common.seed import generator
from datasets import ShiftSpec, Split
from datasets.augment import AlignedSpec
from datasets.views import shift_labels, train_views
from models import ModelSpec
from models.checkpoint import find_weights, load_net
from models.feature_net import FeatureNet, full_precision
from training.micro_batch import forward_in_micro_batches, micro_batch_size
from training.modes.setup import (
    all_classes,
    own_device,
    precision,
    same_classes,
    training_images,
    view_renderer,
)
from training.optim import LengthSpec, RateSpec
from training.recipe import Batch, Recipe, Step
from training.specs import CompileSpec

_MILESTONES = (0.6, 0.75, 0.9)


def build(flags: Flags, split: Split, world: World = SINGLE, *, shifts: Callable[[Flags], ShiftSpec]) -> Recipe:
    """The recipe of `sup_linear` (K = 1) and `sup_CSI_linear` (K = 4): SGD, a tenth of the rate at 60, 75 and 90 %.

    Raises: UserError for weights of other classes or shifts; where there is but one class.
    """
    all_classes(flags, split)
    device, shift_spec = own_device(flags, world), shifts(flags)
    load_path = flags.of(WeightsSpec, only=["load_path"]).load_path
    if not load_path:
        raise UserError(f"--load_path: --mode {flags.mode} puts heads on a trained network; give its run folder")
    file = find_weights(load_path, ("last.model",), flag="load_path")
    net: FeatureNet = load_net(
        "feature",
        load_state_dict(file, flag="load_path"),
        model=flags.of(ModelSpec, only=["model"]).model,
        n_shifts=shift_spec.count if shift_spec.count > 1 else None,
        path=file,
        flag="load_path",
        strict=not flags.of(WeightsSpec, only=["no_strict"]).no_strict,
    )
    same_classes(net, split, file, flag="load_path")
    split.check_trained(read_facts(file).get("data", {}), file, flag="load_path")
    data, aligned = training_images(split, shift_spec, flags.of(AlignedSpec), device)
    functions, amp, seed = shift_spec.functions(aligned), precision(flags, world), flags.seed
    net.to(device).requires_grad_(False).eval()
    heads = [net.linear, *([net.shift_cls_layer, net.joint_distribution_layer] if len(functions) > 1 else [])]
    params = [p.requires_grad_() for head in heads for p in head.parameters()]
    rates, epochs = flags.of(RateSpec), flags.of(LengthSpec).epochs
    optimizer = torch.optim.SGD(params, rates.lr_init, weight_decay=rates.weight_decay)
    render, micro_batch = view_renderer(flags), micro_batch_size(flags)
    if flags.of(CompileSpec).compile:
        net.backbone.compile()

    def losses(batch: Batch) -> Step:
        gen = generator(seed, "augment", batch.epoch, batch.step, device=device)
        views = train_views(batch.images, functions, aligned, gen, render, batch.shard)
        with amp(), torch.no_grad():
            h = forward_in_micro_batches(net.features, views, batch.shard.size, micro_batch)
        return Step(head_losses(net, full_precision(h), batch.labels, n_shifts=len(functions), shard=batch.shard), {})

    return Recipe(net, data, losses, (optimizer,), lambda epoch: rate(rates.lr_init, epoch, epochs))


def rate(lr_init: float, epoch: float, epochs: int) -> float:
    """The learning rate after `epoch` of `epochs` epochs."""
    return lr_init * 0.1 ** sum(epoch >= share * epochs for share in _MILESTONES)


def head_losses(
    net: FeatureNet, h: Tensor, labels: Tensor, *, n_shifts: int, shard: Shard | None = None
) -> dict[str, Tensor]:
    """Cross-entropies on features h (V, F), shift by shift; labels (B,).

    `cls`: the class, on unshifted views. With several shifts also `shift` and `joint` (class + C * shift) on all views.
    shard: whose images h is of, where other ranks have the others of the batch.
    """
    shard = shard or Shard(len(labels))
    terms = {"cls": F.cross_entropy(shard.all_gather(net.linear(h[: shard.size])), labels)}
    if n_shifts > 1:
        shift = shift_labels(n_shifts, len(labels), 1, h.device)
        joint = labels.repeat(n_shifts) + net.linear.out_features * shift
        terms["shift"] = F.cross_entropy(shard.all_gather(net.shift_cls_layer(h)), shift)
        terms["joint"] = F.cross_entropy(shard.all_gather(net.joint_distribution_layer(h)), joint)
    return terms
