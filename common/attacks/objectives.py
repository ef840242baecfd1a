"""What an attacker raises: one number an image, from logits.

N images, C classes; logits (N, C), labels (N,) the images' own classes, targets (N,) others. Losses are computed in
float32, or in float64 where the logits are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Keeps quotients finite where the leading logits are equal.
_SMALL = 1e-12


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the log-probability of the own class."""
    return F.cross_entropy(_full(logits), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest logit of another class minus that of the own: positive where the image is classified wrongly."""
    logits = _full(logits)
    return _largest_other(logits, labels) - _of_class(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over the gap between the largest and the third largest logit.

    It is the same for logits times a constant, hence not blind where the cross-entropy saturates.
    Raises: ValueError for fewer than 3 classes; `dlr_or_margin` picks what there is.
    """
    logits = _full(logits)
    top = _top(logits, 3, "DLR")
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + _SMALL)


def targeted_cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of the target."""
    return -cross_entropy(logits, targets)


def targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The logit of the target minus that of the own class."""
    logits = _full(logits)
    return _of_class(logits, targets) - _of_class(logits, labels)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The targeted margin over the gap between the largest logit and the mean of the third and the fourth.

    Raises: ValueError for fewer than 4 classes; `targeted_dlr_or_margin` picks what there is.
    """
    logits = _full(logits)
    top = _top(logits, 4, "targeted DLR")
    return targeted_margin(logits, labels, targets) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _SMALL)


def kl(logits: Tensor, given: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the class probabilities from given ones: sum of P (log P - log Q).

    given (N, C): the logits of P, those of the unchanged images as a rule.
    """
    log_p, log_q = _full(given).log_softmax(1), _full(logits).log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


class Objective(NamedTuple):
    """name: what reports call it. loss: (logits, labels) or, if targeted, (logits, labels, targets) -> (N,)."""

    name: str
    loss: Callable[..., Tensor]


def dlr_or_margin(n_classes: int) -> Objective:
    """DLR where there are 3 classes or more, else the margin; the name says which."""
    return Objective("DLR", dlr) if n_classes >= 3 else Objective("margin", margin)


def targeted_dlr_or_margin(n_classes: int) -> Objective:
    """Targeted DLR where there are 4 classes or more, else the targeted margin; the name says which."""
    if n_classes >= 4:
        return Objective("targeted DLR", targeted_dlr)
    return Objective("targeted margin", targeted_margin)


def judged(
    logits_of_x: Callable[[Tensor], Tensor], loss: Callable[..., Tensor] = cross_entropy
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A loss for `pgd` and `apgd` that says which images are classified wrongly: (x, labels, *more) -> (loss, fooled).

    logits_of_x: images -> logits, which are judged as they are. loss: (logits, labels, *more) -> (N,), of this module.
    """

    def loss_of_x(x: Tensor, labels: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        logits = logits_of_x(x)
        return loss(logits, labels, *more), logits.detach().argmax(1) != labels

    return loss_of_x


def other_classes(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Per image the `count` classes with the largest logits besides its own, the largest first: (N, count)."""
    return logits.masked_fill(_mask(logits, labels), -torch.inf).topk(count, dim=1).indices


def _full(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _mask(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, C) bool: where the classes of `labels` stand. By comparison: indexing would add up gradients in any order."""
    return torch.arange(logits.shape[1], device=logits.device) == labels[:, None]


def _of_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.masked_fill(~_mask(logits, labels), 0).sum(1)


def _largest_other(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.masked_fill(_mask(logits, labels), -torch.inf).amax(1)


def _top(logits: Tensor, count: int, name: str) -> Tensor:
    if logits.shape[1] < count:
        raise ValueError(f"{name} needs {count} classes or more, got {logits.shape[1]}; use the margin")
    return logits.topk(count, dim=1).values
