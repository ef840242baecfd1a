"""A batch in micro-batches: the losses and gradients of the whole, with the memory of one micro-batch.

Contrastive losses need the projections of all views at once, so gradients cannot simply be added up over micro-batches.
Instead each piece goes through the network without keeping its activations, the losses see the outputs of all, and the
backward pass computes each piece's activations again (gradient caching: Gao et al. 2021; checkpointing: Chen et al.
2016). One more forward pass is the price.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from common.flags import Flags, Spec, flag


@dataclass(frozen=True)
class MicroBatchSpec(Spec, group="training"):
    """Images of a step that go through the network at a time; None: all."""

    micro_batch: int | None = flag(
        None,
        "images per micro-batch of a step: gradient of the whole, batch norm by micro-batch; less memory, more time",
        type=int,
        above=0,
    )


def micro_batch_size(flags: Flags) -> int | None:
    """--micro_batch."""
    return flags.of(MicroBatchSpec).micro_batch


def forward_in_micro_batches(net: Callable[[Tensor], Any], views: Tensor, images: int, size: int | None) -> Any:
    """net(views), a (V, .) tensor or a named tuple of them, computed from `size` images at a time.

    views (R * images, ...): R blocks of all images, as `train_views` has them; a piece takes its images of every block.
    size: None, or at least `images`: in one piece, as net(views). Normalisation over the batch sees one piece at a
    time, as it would on several GPUs, and keeps its running statistics once; all else is the same to rounding.
    """
    if size is None or size >= images:
        return net(views)
    blocks = views.unflatten(0, (-1, images))
    parts = [checkpointed(net, piece.flatten(0, 1)) for piece in blocks.split(size, 1)]

    def join(*found: Tensor) -> Tensor:
        return torch.cat([x.unflatten(0, (len(blocks), -1)) for x in found], 1).flatten(0, 1)

    if isinstance(parts[0], Tensor):
        return join(*parts)
    return type(parts[0])(*map(join, *parts))


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), whose activations are computed again in the backward pass instead of being kept."""
    if not torch.is_grad_enabled():
        return function(*args)
    contexts = partial(_first_and_again, function)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def _first_and_again(function: Any) -> tuple[AbstractContextManager, AbstractContextManager]:
    return contextlib.nullcontext(), _still_statistics(function)


@contextlib.contextmanager
def _still_statistics(function: Any) -> Iterator[None]:
    """Running statistics and their counts stay as they are: the second pass shows them nothing new."""
    modules = function.modules() if isinstance(function, nn.Module) else ()
    norms = [m for m in modules if isinstance(m, _BatchNorm) and m.training]
    counts = [count for m in norms if (count := m.num_batches_tracked) is not None]
    before = [norm.momentum for norm in norms], [count.clone() for count in counts]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before[0], strict=True):
            norm.momentum = momentum
        for count, was in zip(counts, before[1], strict=True):
            count.copy_(was)
