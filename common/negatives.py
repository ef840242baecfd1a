"""Which image of the batch is the negative of which (ANCRA, arXiv 2310.03358): by tensors, without loops over images.

Letters: N images, C classes, m negatives of each image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from common.flags import Spec, flag

NONE = -1

# (names of classes (N,) that the network gives, labels (N,)) -> candidates (N, N): whether j may be a negative of i,
# among images of other classes.
_CANDIDATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "soft": lambda named, labels: named == named[:, None],
    "hard": lambda named, labels: named == labels[:, None],
    "easy": lambda named, labels: (named != labels[:, None]) & (named != named[:, None]),
}
RANDOM = "random"
STRATEGIES = (RANDOM, *_CANDIDATES)
_ATTACKED = "_adv"


@dataclass(frozen=True)
class StrategySpec(Spec, group="adversarial training"):
    """How negatives are chosen, and whether they are used as they are."""

    strategy: str = flag(
        f"{RANDOM}{_ATTACKED}",
        "--anc, feature_distance: which images are negatives; _adv: they are attacked, too",
        choices=lambda: [f"{name}{tail}" for name in STRATEGIES for tail in ("", _ATTACKED)],
    )

    @property
    def rule(self) -> str:
        """Of `STRATEGIES`."""
        return self.strategy.removesuffix(_ATTACKED)

    @property
    def attacked(self) -> bool:
        """Whether negatives are moved towards the class of their anchors."""
        return self.strategy.endswith(_ATTACKED)


def pick_negatives(
    logits: Tensor, labels: Tensor, *, strategy: str, count: int = 1, per_class: int = 1, generator: Generator
) -> Tensor:
    """Places in the batch (N, m = count) of the negatives of each image, all of other classes; -1: none.

    logits: (N, C) of the natural images, in evaluation mode; `random` does not read them.
    `random`: `per_class` images of each of `count / per_class` classes, drawn among the classes that have as many.
    `soft`, `hard`, `easy`: of the images of other classes that are taken for the class that the anchor is taken for,
    for the anchor's own class, or for neither, those with the largest logit of the anchor's class; for an anchor
    without any, as `random`.
    generator: on the device of the labels. Nothing waits for the device.
    Raises: ValueError for an unknown strategy, and a count that `per_class` does not divide.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategies are {', '.join(STRATEGIES)}, got {strategy!r}")
    if count < 1 or per_class < 1 or count % per_class:
        raise ValueError(f"{per_class} negatives of a class do not make {count}")
    drawn = _random(labels, logits.shape[1], count // per_class, per_class, generator)
    if strategy == RANDOM:
        return drawn
    allowed = _CANDIDATES[strategy](logits.argmax(1), labels) & (labels != labels[:, None])
    found = _largest(logits.T[labels], allowed, count)
    return torch.where((found == NONE).all(1, keepdim=True), drawn, found)


def _random(labels: Tensor, n_classes: int, classes: int, per_class: int, generator: Generator) -> Tensor:
    """(N, classes * per_class)."""
    n, device = len(labels), labels.device
    others = torch.arange(n_classes, device=device) != labels[:, None]
    members = (~others).sum(0)
    chance = torch.rand(n, n_classes, generator=generator, device=device)
    chosen = _largest(chance, others & (members >= per_class), classes)
    chance = torch.rand(n, n, generator=generator, device=device)
    parts = [_largest(chance, labels == one[:, None], per_class) for one in chosen.unbind(1)]
    return torch.cat(parts, 1)


def _largest(values: Tensor, allowed: Tensor, count: int) -> Tensor:
    """Columns (N, count) of the largest allowed values of each row, falling; -1 where there are fewer."""
    kept = min(count, values.shape[1])
    found = values.masked_fill(~allowed, -torch.inf).topk(kept, 1)
    places = found.indices.masked_fill(found.values == -torch.inf, NONE)
    return torch.nn.functional.pad(places, (0, count - kept), value=NONE)
