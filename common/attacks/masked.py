"""Signs that gradients are masked: that attacks fail for want of a gradient, not of images that fool (Athalye et al.
2018; Carlini et al. 2019).

What is left under an attack is an accuracy or an AUROC, a number in [0, 1]. All signs but one are functions of such
numbers; `zero_gradient_share` asks a network.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from common.attacks.objectives import cross_entropy
from common.attacks.search import ascent

# What two attacks that start at random may differ by; AutoAttack grants it the Square attack, too.
SLACK = 0.002
# Differences of shares are rounded: 0.502 - 0.5 is above 0.002.
_ROUNDING = 1e-9

HEADLINE = "MASKED GRADIENTS"


class Sign(NamedTuple):
    """number: a share, or a difference of shares. shows: whether it says that gradients are masked."""

    name: str
    number: float
    shows: bool

    def __str__(self) -> str:
        return f"{self.name} {100 * self.number:.1f} %"


def attack_above_natural(natural: float, attacked: float) -> Sign:
    """More is left under attack than without."""
    return _sign("left under attack above natural", _share(attacked) - _share(natural), 0)


def more_steps_leave_more(left: Mapping[int, float], slack: float = SLACK) -> Sign:
    """An attack of more steps leaves more than one of fewer. left: by the number of steps, two entries or more."""
    if len(left) < 2:
        raise ValueError(f"two numbers of steps are needed to compare, got {len(left)}")
    least, gain = 1.0, -1.0
    for _, share in sorted(left.items()):
        gain, least = max(gain, _share(share) - least), min(least, share)
    return _sign("more steps leave more by", gain, slack)


def one_step_stronger(one_step: float, many_steps: float, slack: float = SLACK) -> Sign:
    """One step leaves less than many."""
    return _sign("one step leaves less than many by", _share(many_steps) - _share(one_step), slack)


def gradient_free_stronger(gradients: float, gradient_free: float, slack: float = SLACK) -> Sign:
    """An attack that asks for no gradient (Square) leaves less than attacks by gradients."""
    return _sign("a gradient-free attack leaves less by", _share(gradients) - _share(gradient_free), slack)


def left_at_eps_1(left: float) -> Sign:
    """Something is left though an attack may make any image of any other."""
    return _sign("left at an unlimited radius", _share(left), 0)


def zero_gradients(share: float) -> Sign:
    """Of some images the gradient is exactly 0. share: as `zero_gradient_share` gives it."""
    return _sign("images without gradient", _share(share), 0)


def transfer_stronger(white_box: float, transfer: float, slack: float = SLACK) -> Sign:
    """Images that fool the network without the defence leave less than an attack on the network itself."""
    return _sign("transfer leaves less than the white box by", _share(white_box) - _share(transfer), slack)


def health_line(signs: Sequence[Sign]) -> str:
    """What a report says: the headline with those that show first, or that there are none; all numbers."""
    shown, others = ([str(sign) for sign in signs if sign.shows == which] for which in (True, False))
    rest = f"no sign: {', '.join(others)}" if others else ""
    return "; ".join(part for part in (f"{HEADLINE}: {', '.join(shown)}" if shown else "", rest) if part)


def zero_gradient_share(
    logits_of_x: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    micro_batch: int | None = None,
) -> float:
    """Share of the images (N, ...) that are `without_gradient`. micro_batch: so many at a time."""
    if not len(images):
        raise ValueError("a share of no images")
    size, without = micro_batch or len(images), 0
    for x, own in zip(images.split(size), labels.split(size), strict=True):
        without += int(without_gradient(logits_of_x, x, own, loss=loss).sum())
    return without / len(images)


def without_gradient(
    logits_of_x: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """Of which images (N, ...) in [0, 1] each pixel's gradient of the loss is exactly 0, or NaN, in float32: (N,) bool.

    logits_of_x: images -> (N, C), each for itself.
    """

    def loss_of_x(x: Tensor, labels: Tensor) -> Tensor:
        return loss(logits_of_x(x), labels)

    _, grad = ascent(loss_of_x, images.detach().float().clone(), [labels])
    return (grad.nan_to_num() == 0).flatten(1).all(1)


def _sign(name: str, number: float, slack: float) -> Sign:
    return Sign(name, number, number > slack + _ROUNDING)


def _share(number: float) -> float:
    if not 0 <= number <= 1:
        raise ValueError(f"what is left must be a share in [0, 1], got {number}")
    return number
