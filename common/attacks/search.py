"""What attacks have in common: the loss they climb, the best image seen, restarts and parts of a batch.

N images of any shape (N, ...), floats in [0, 1].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from common import seed
from common.attacks.ball import NORMS, Ball, replace_

# (x, *data) -> what the attacker raises (N,), or that and which images are fooled (N,) bool.
LossOfX = Callable[..., Any]
# `uniform` in the ball; `none`: the image itself; a number: standard deviation of normal noise; images as they are.
Start = str | float | Tensor
STARTS = ("uniform", "none")


class Value(NamedTuple):
    """Of images: loss (N,), -inf for one that is NaN; fooled (N,) bool, False where the loss does not judge."""

    loss: Tensor
    fooled: Tensor

    def among(self, allowed: Tensor) -> "Value":
        """Only of images that are allowed (N,) bool: the others are no better than any."""
        return Value(self.loss.masked_fill(~allowed, -torch.inf), self.fooled & allowed)


def value(loss_of_x: LossOfX, x: Tensor, data: Sequence[Tensor]) -> Value:
    """One forward pass without gradient."""
    with torch.no_grad():
        return _value(*_call(loss_of_x, x, data))


def ascent(loss_of_x: LossOfX, x: Tensor, data: Sequence[Tensor]) -> tuple[Value, Tensor]:
    """One forward and one backward pass: the value and the gradient (N, ...), for x alone and nothing else."""
    x.requires_grad_(True)
    with torch.enable_grad():
        loss, fooled = _call(loss_of_x, x, data)
        (grad,) = torch.autograd.grad(loss.sum(), x)
    x.requires_grad_(False)
    return _value(loss.detach(), fooled), grad


def _call(loss_of_x: LossOfX, x: Tensor, data: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    found = loss_of_x(x, *data)
    loss, fooled = (
        found if isinstance(found, tuple) else (found, torch.zeros(len(x), dtype=torch.bool, device=x.device))
    )
    if loss.shape != (len(x),) or fooled.shape != (len(x),):
        shapes = f"{tuple(loss.shape)} and {tuple(fooled.shape)}"
        raise ValueError(f"a loss must be one number an image, ({len(x)},), and so must what it fools; got {shapes}")
    return loss if loss.dtype == torch.float64 else loss.float(), fooled


def _value(loss: Tensor, fooled: Tensor) -> Value:
    return Value(loss, fooled).among(~loss.isnan())


class Best:
    """The best of the images seen, each for itself: one that fools before one that does not, then the larger loss."""

    def __init__(self, images: Tensor, value: Value):
        self.images, self.loss, self.fooled = images, value.loss, value.fooled
        # Images that are fooled stay as they are.
        self.open = torch.ones_like(value.fooled)

    def update(self, images: Tensor, value: Value) -> None:
        better = (value.fooled & ~self.fooled) | ((value.fooled == self.fooled) & (value.loss > self.loss))
        better &= self.open
        replace_(self.images, images, better)
        self.loss = torch.where(better, value.loss, self.loss)
        self.fooled = torch.where(better, value.fooled, self.fooled)

    def close(self) -> None:
        """Keep what fools."""
        self.open = ~self.fooled

    def part(self, index: Tensor) -> "Best":
        """A copy of some of them."""
        return Best(self.images[index], Value(self.loss[index], self.fooled[index]))

    def put(self, index: Tensor, part: "Best") -> None:
        """Write a part back."""
        self.images.index_copy_(0, index, part.images)
        self.loss.index_copy_(0, index, part.loss)
        self.fooled.index_copy_(0, index, part.fooled)


# (images to start from, which it may change, originals, data, best of those so far, which it updates).
Climb = Callable[[Tensor, Tensor, Sequence[Tensor], Best], Any]


@dataclass(frozen=True)
class Search:
    """What all attacks take. Raises: ValueError for what no attack can use.

    generator: None: one that is seeded alike in each attack.
    """

    eps: float
    steps: int
    norm: str
    restarts: int
    start: Start
    generator: Generator | None
    micro_batch: int | None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be a number >= 0, got {self.eps}")
        for name in ("steps", "restarts", "micro_batch"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be > 0, got {number}")
        if isinstance(self.start, str):
            if self.start not in STARTS:
                raise ValueError(f"start must be {', '.join(STARTS)}, a number or images, got {self.start!r}")
        elif not isinstance(self.start, Tensor) and not 0 <= self.start < math.inf:
            raise ValueError(f"start must be a standard deviation >= 0, got {self.start}")
        if self.restarts > 1 and (isinstance(self.start, Tensor) or self.start in ("none", 0)):
            raise ValueError("restarts > 1 from one and the same start find the same; use start='uniform'")

    def check(self, x: Tensor, data: Sequence[Tensor], *, may_wait: bool) -> None:
        """Raises: ValueError for images and data that do not fit. may_wait: whether a device may be read."""
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"images must be float32 or float64, got {x.dtype}")
        if isinstance(self.start, Tensor) and self.start.shape != x.shape:
            raise ValueError(f"start must have the images' shape {tuple(x.shape)}, got {tuple(self.start.shape)}")
        if any(not isinstance(values, Tensor) or len(values) != len(x) for values in data):
            raise ValueError(f"data must be tensors with one entry for each of the {len(x)} images")
        if self.micro_batch is not None and not data:
            raise ValueError("micro_batch: without data the loss knows the batch as a whole; give labels or indices")
        if (may_wait or x.device.type == "cpu") and not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError(f"images must lie in [0, 1], got {float(x.min()):g} to {float(x.max()):g}")

    def ball(self, x: Tensor) -> Ball:
        return NORMS[self.norm](x, self.eps)

    def starts(self, x: Tensor) -> Callable[[], Tensor]:
        """What makes images to climb from, in memory of their own. Normal noise and given images are not projected."""
        gen = self.generator or seed.generator(0, "attack", device=x.device)

        def draw() -> Tensor:
            match self.start:
                case Tensor():
                    return self.start.to(x.dtype, copy=True)
                case "none":
                    return x.clone()
                case "uniform":
                    ball = self.ball(x)
                    return ball.project_(ball.noise(gen).add_(x))
                case std:
                    noise = torch.randn(x.shape, generator=gen, dtype=x.dtype, device=x.device)
                    return noise.mul_(float(std)).add_(x)

        return draw

    def parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tensors, in micro-batches."""
        return zip(*(tensor.split(self.micro_batch or len(tensor)) for tensor in tensors), strict=True)

    def best(self, climb: Climb, loss_of_x: LossOfX, x: Tensor, *rounds: Sequence[Tensor]) -> Tensor:
        """The best images of all restarts of all rounds, the originals among them.

        rounds: the data of each. What is fooled drops out before the next climb, for which the host waits for the
        device. Starts are drawn for all images, so that no draw depends on which are left.
        """
        first = [value(loss_of_x, part, rest) for part, *rest in self.parts(x, *rounds[0])]
        best, draw = Best(x.clone(), Value(*map(torch.cat, zip(*first, strict=True)))), self.starts(x)
        for data in [data for data in rounds for _ in range(self.restarts)]:
            start, left = draw(), (~best.fooled).nonzero()[:, 0]
            if not len(left):
                break
            if not data:  # The loss knows the whole batch and no part of it.
                best.close()
                climb(start, x, data, best)
                continue
            for (index,) in self.parts(left):
                part = best.part(index)
                climb(start[index], x[index], [values[index] for values in data], part)
                best.put(index, part)
        return best.images
