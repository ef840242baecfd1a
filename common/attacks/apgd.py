"""APGD: projected gradient descent that sets its own step size (Croce & Hein 2020, algorithm 1).

N images of any shape (N, ...), floats in [0, 1]; C classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from common.attacks.ball import per_image, replace_
from common.attacks.objectives import judged, other_classes, targeted_dlr_or_margin
from common.attacks.search import Best, Climb, LossOfX, Search, Start, ascent, value

# Share of the direction that comes from the gradient; the rest from the step before.
_ALPHA = 0.75
# A step size is halved where fewer of the steps raised the loss.
_RHO = 0.75


def apgd(
    loss_of_x: LossOfX,
    x: Tensor,
    *data: Tensor,
    eps: float,
    steps: int,
    norm: str = "linf",
    restarts: int = 1,
    start: Start = "uniform",
    generator: Generator | None = None,
    micro_batch: int | None = None,
) -> Tensor:
    """Images (N, ...) within eps of x and in [0, 1] that raise the loss: the best of all seen, the originals included.

    Each image has its own step size, which starts at 2 eps; at `checkpoints(steps)` it is halved, and the image goes
    back to where its loss was largest, if too few steps raised the loss or the largest loss did not grow.
    Arguments, what is best, and errors: as `pgd`; but every start is projected. steps + 1 forward passes and `steps`
    backward passes a restart, and one forward pass for the originals.
    """
    search = Search(eps, steps, norm, restarts, start, generator, micro_batch)
    x = x.detach()
    search.check(x, data, may_wait=True)
    return search.best(_climb(loss_of_x, search), loss_of_x, x, data) if len(x) else x.clone()


def _climb(loss_of_x: LossOfX, search: Search) -> Climb:
    eps, steps = search.eps, search.steps
    ends = set(checkpoints(steps))

    def climb(start: Tensor, x0: Tensor, data: Sequence[Tensor], best: Best) -> None:
        ball = search.ball(x0)
        x = ball.project_(start)
        found, grad = ascent(loss_of_x, x, data)
        best.update(x, found)
        loss, direction = found.loss, ball.direction(grad)
        top_x, top_direction, top_loss = x.clone(), direction.clone(), loss
        eta = torch.full_like(loss, 2 * eps, dtype=x.dtype)
        # At the last checkpoint: the largest loss, and whether eta was halved. Since then: steps that raised the loss.
        last_top, halved = top_loss, torch.zeros_like(found.fooled)
        raised, begun, before = torch.zeros_like(loss), 0, x
        for k in range(1, steps + 1):
            new = ball.project_(direction.mul_(per_image(eta, x)).add_(x))
            if k > 1:
                new = ball.project_(new.sub_(x).mul_(_ALPHA).add_(x - before, alpha=1 - _ALPHA).add_(x))
            before, x = x, new
            if k == steps:
                best.update(x, value(loss_of_x, x, data))
                return
            found, grad = ascent(loss_of_x, x, data)
            best.update(x, found)
            direction = ball.direction(grad)
            raised += found.loss > loss
            loss, up = found.loss, found.loss > top_loss
            replace_(top_x, x, up)
            replace_(top_direction, direction, up)
            top_loss = torch.maximum(top_loss, loss)
            if k in ends:
                few = raised < _RHO * (k - begun)
                halved = few | (~halved & (top_loss <= last_top))
                eta = torch.where(halved, eta / 2, eta)
                replace_(x, top_x, halved)
                replace_(direction, top_direction, halved)
                loss = torch.where(halved, top_loss, loss)
                last_top, begun = top_loss, k
                raised.zero_()

    return climb


def checkpoints(steps: int) -> list[int]:
    """After which steps the step sizes are looked at: shares 0.22, 0.41, 0.57, 0.7, ... of the steps, rounded up."""
    before, share, found = 0, 22, []  # In hundredths: a float's 0.22 * 100 lies above 22.
    while share <= 100:
        found.append(-(-share * steps // 100))
        before, share = share, share + max(share - before - 3, 6)
    return sorted(set(found))


def apgd_targeted(
    logits_of_x: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    norm: str = "linf",
    targets: int = 9,
    loss: Callable[..., Tensor] | None = None,
    start: Start = "uniform",
    generator: Generator | None = None,
    micro_batch: int | None = None,
) -> Tensor:
    """APGD on each of the `targets` likeliest other classes in turn; what is fooled drops out before the next one.

    Of all classes where there are fewer. loss: (logits, labels, targets) -> (N,), by default the targeted DLR, or the
    targeted margin for fewer than 4 classes. Arguments and errors otherwise as `apgd`.
    """
    search = Search(eps, steps, norm, 1, start, generator, micro_batch)
    x = x.detach()
    search.check(x, [labels], may_wait=True)
    if not len(x):
        return x.clone()
    with torch.no_grad():
        logits = torch.cat([logits_of_x(part) for (part,) in search.parts(x)])
    n_classes = logits.shape[1]
    loss_of_x = judged(logits_of_x, loss or targeted_dlr_or_margin(n_classes).loss)
    aims = other_classes(logits, labels, min(targets, n_classes - 1)).unbind(1)
    return search.best(_climb(loss_of_x, search), loss_of_x, x, *((labels, aim) for aim in aims))
