"""What a mode hands to the training loop."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from common.dist import Shard
from common.run import Run
from datasets import ImageSet, Loading, PictureSet
from datasets.table import Table
from training.average import MovingAverage


@dataclass(frozen=True)
class Batch:
    """What the losses of one step are computed from; epoch counts from 1, step from 0.

    images (V, B, channels, H, W): uint8, loaded as the recipe's `loading` says; of a table rows (1, B, n).
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


def no_step(batch: Batch) -> Step:
    """The `losses` of modes that train nothing."""
    return Step({}, {})


class EpochEnd(NamedTuple):
    """values: further ones to record, by tag. converged: there is nothing left to train. select: the tag of a value;
    the weights of the epoch where it is largest, the first of equals, are kept as `best.model`."""

    values: dict[str, float] = {}
    converged: bool = False
    select: str | None = None


class Shown(NamedTuple):
    """What TensorBoard gets to see now and then: images (3, H, W) in [0, 1] and values for histograms, by tag."""

    images: dict[str, Tensor]
    histograms: dict[str, Tensor]


class Check(NamedTuple):
    """A text, what is wrong and what to try: a warning after an epoch whose mean of `tag` is out of bounds."""

    tag: str
    text: str
    below: float = -math.inf
    above: float = math.inf

    def triggered(self, values: dict[str, float]) -> bool:
        return self.tag in values and not self.below <= values[self.tag] <= self.above


def show_nothing(epoch: int) -> Shown:
    """A `show` for modes without pictures."""
    return Shown({}, {})


def do_nothing(*_: Any) -> None:
    """A hook for modes that need none."""


def go_on(epoch: int) -> EpochEnd:
    """An `end_epoch` for modes that train all their epochs and have nothing more to record."""
    return EpochEnd()


@dataclass(frozen=True)
class Recipe:
    """A mode, ready to train. Hooks are called on all ranks, unless it says otherwise.

    model: every tensor that must survive a restart is a parameter or buffer of it.
    loading: how images of `data` become those of a batch.
    losses: batch -> Step. The same values on all ranks, with gradients by way of the rank's own images only.
    optimizers: all of them step on each batch; each has parameters of its own. None: nothing is trained by gradients.
    lr: fractional epochs -> learning rate of the first optimizer; the others keep theirs.
    begin: once, on a fresh start only, before the first epoch.
    after_step: after the optimizers' step on each batch: projections, step sizes.
    end_epoch: epoch -> what to record, and whether training has converged; the same on all ranks.
    show: epoch -> pictures and histograms; after the first epoch and with checkpoints made by --save_step. Main rank.
    checks: signs of a collapse, looked for after every epoch.
    finish: once, after the last epoch and before it is saved: an error it raises leaves the run unfinished. Main rank.
    first_epoch: epochs that came before, in the run this one starts from.
    average: a moving average of `model`, which takes part in every step, and whose weights are what the run makes.
    recorded: flags that the weights say they were trained with in place of the run's own, where another run has.
    """

    model: nn.Module
    data: ImageSet | PictureSet | Table
    losses: Callable[[Batch], Step]
    optimizers: tuple[Optimizer, ...] = ()
    lr: Callable[[float], float] | None = None
    loading: Loading = Loading()
    begin: Callable[[Run], None] = do_nothing
    after_step: Callable[[], None] = do_nothing
    end_epoch: Callable[[int], EpochEnd] = go_on
    show: Callable[[int], Shown] = show_nothing
    checks: tuple[Check, ...] = ()
    finish: Callable[[Run], None] = do_nothing
    first_epoch: int = 0
    recorded: Mapping[str, Any] = field(default_factory=dict)
    average: MovingAverage | None = None

    @property
    def result(self) -> nn.Module:
        """The network whose weights are kept: the moving average where there is one."""
        return self.model if self.average is None else self.average.net
