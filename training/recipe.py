"""What a mode hands to the training loop."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from common.dist import Shard
from common.run import Run
from datasets import ImageSet, Loading, PictureSet


@dataclass(frozen=True)
class Batch:
    """What the losses of one step are computed from; epoch counts from 1, step from 0.

    images (V, B, channels, H, W): uint8, loaded as the recipe's `loading` says.
    labels, index (B,): int64, the label of each image and its place in the training set.
    shard: where several ranks share the batch, `images` has those at `shard.indices` only; labels and index are of all.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    epoch: int
    step: int
    shard: Shard

    @property
    def local_images(self) -> Tensor:
        """`images` without the one past the end of the shard, which is only the mix partner of the last."""
        return self.images[:, : self.shard.size]


class Step(NamedTuple):
    """losses: named terms, already weighted, to be summed and descended. watch: values worth a curve, by tag."""

    losses: dict[str, Tensor]
    watch: dict[str, Tensor]


class Shown(NamedTuple):
    """What TensorBoard gets to see now and then: images (3, H, W) in [0, 1] and values for histograms, by tag."""

    images: dict[str, Tensor]
    histograms: dict[str, Tensor]


class Check(NamedTuple):
    """A text, what is wrong and what to try, told after an epoch whose mean of `tag` is out of bounds."""

    tag: str
    text: str
    below: float = -math.inf
    above: float = math.inf

    def triggered(self, values: dict[str, float]) -> bool:
        return self.tag in values and not self.below <= values[self.tag] <= self.above


def show_nothing(epoch: int) -> Shown:
    """A `show` for modes without pictures."""
    return Shown({}, {})


def do_nothing(run: Run) -> None:
    """A hook for modes that need none."""


def no_values(epoch: int) -> dict[str, float]:
    """An `end_epoch` for modes that have nothing more to record."""
    return {}


@dataclass(frozen=True)
class Recipe:
    """A mode, ready to train.

    model: every tensor that must survive a restart is a parameter or buffer of it.
    losses: batch -> Step. The same values in all processes of a run, with gradients by way of the own images only.
    optimizers: all of them step on each batch; each has parameters of its own.
    begin: once, on a fresh start only, before the first epoch; like `losses` in all processes, the others in the first.
    before_step: (fractional epochs) -> learning rate to report.
    end_epoch: (epoch) -> further values to record, by tag.
    show: (epoch) -> pictures and histograms; after the first epoch and with checkpoints made by --save_step.
    checks: signs of a collapse, looked for after every epoch.
    finish: once, after the last epoch and before it is saved: what it finds wrong is never a finished run.
    first_epoch: epochs that came before, in the run this one starts from.
    loading: how the images of a batch are loaded.
    """

    model: nn.Module
    data: ImageSet | PictureSet
    losses: Callable[[Batch], Step]
    optimizers: tuple[Optimizer, ...]
    before_step: Callable[[float], float]
    begin: Callable[[Run], None] = do_nothing
    end_epoch: Callable[[int], dict[str, float]] = no_values
    show: Callable[[int], Shown] = show_nothing
    checks: tuple[Check, ...] = ()
    finish: Callable[[Run], None] = do_nothing
    first_epoch: int = 0
    loading: Loading = Loading()
