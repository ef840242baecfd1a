"""Projected gradient descent on images (Madry et al. 2018) and the fast gradient sign method (Goodfellow et al. 2015).

N images of any shape (N, ...), floats in [0, 1].
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from common.attacks.ball import per_image
from common.attacks.search import Best, LossOfX, Search, Start, ascent, value

KEEP = ("best", "last")


def pgd(
    loss_of_x: LossOfX,
    x: Tensor,
    *data: Tensor,
    eps: float,
    steps: int,
    step: float | None = None,
    norm: str = "linf",
    restarts: int = 1,
    start: Start = "uniform",
    generator: Generator | None = None,
    micro_batch: int | None = None,
    keep: str = "best",
    momentum: float = 0.0,
) -> Tensor:
    """Images (N, ...) within eps of x and in [0, 1] that raise the loss: `steps` steps, each projected back.

    loss_of_x: (x, *data) -> one number an image (N,), or that and which images are fooled (N,) bool. It must treat each
    image for itself, so a network has to be in evaluation mode. Only x gets a gradient.
    data: tensors with one entry an image, labels say. Where there are none, the loss always sees all N images.
    eps, step: in the norm `linf` or `l2`; step: eps / 4 by default.
    start: `uniform` in the ball, `none`, the standard deviation of normal noise, or images. The last two are projected
    after the first step only, and what lies outside is not kept.
    generator: on the images' device; None: one that is seeded alike in each call.
    keep: `best`: of all images seen, the originals included, one that fools before one that does not, then the one with
    the largest loss; what is fooled drops out before the next restart. It takes steps + 1 forward passes a restart, and
    one more; the host waits for the device once a restart, and once to check that images lie in [0, 1]. `last`: the
    last image, judged by nobody: `steps` forward passes, and the host waits for nothing.
    micro_batch: at most so many images at a time.
    momentum: what a step keeps of the direction before, in [0, 1]: gradients of mean 1 add up (Dong et al. 2018), which
    averages over the draws of a loss that is random.
    Raises: ValueError for arguments that no attack can use.
    """
    search = Search(eps, steps, norm, restarts, start, generator, micro_batch)
    step = eps / 4 if step is None else step
    if not 0 <= step < math.inf:
        raise ValueError(f"step must be a number >= 0, got {step}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
    if keep not in KEEP:
        raise ValueError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
    if restarts > 1 and keep == "last":
        raise ValueError("restarts > 1 need keep='best'")
    x = x.detach()
    search.check(x, data, may_wait=keep == "best")
    if not len(x):
        return x.clone()

    def climb(start: Tensor, x0: Tensor, data: Sequence[Tensor], best: Best | None = None) -> Tensor:
        x, ball, before = start, search.ball(x0), torch.zeros((), device=x0.device)
        for k in range(steps):
            found, grad = ascent(loss_of_x, x, data)
            if best is not None:
                # Of what the projection has not yet seen only images that it would leave alone.
                best.update(x, found if k else found.among(ball.contains(x)))
            if momentum:
                grad = before = _of_mean_1(grad).add(before, alpha=momentum)
            x = ball.project_(x.add_(ball.direction(grad), alpha=step))
        if best is not None:
            best.update(x, value(loss_of_x, x, data))
        return x

    if keep == "best":
        return search.best(climb, loss_of_x, x, data)
    parts = search.parts(search.starts(x)(), x, *data)
    return torch.cat([climb(start, x0, rest) for start, x0, *rest in parts])


def _of_mean_1(grad: Tensor) -> Tensor:
    """Gradients (N, ...) whose absolute values have the mean 1 in each image; 0 where they are 0 or NaN."""
    grad = grad.nan_to_num()
    return grad / per_image(grad.abs().flatten(1).mean(1).clamp_min(torch.finfo(grad.dtype).tiny), grad)


def fgsm(loss_of_x: LossOfX, x: Tensor, *data: Tensor, eps: float, norm: str = "linf", **settings: Any) -> Tensor:
    """One step of length eps from the images themselves; its end, whether it fools or not.

    settings: `micro_batch`, `keep`. The rest as `pgd`, whose start at random would make it another attack.
    """
    settings = {"keep": "last", **settings}
    return pgd(loss_of_x, x, *data, eps=eps, steps=1, step=eps, norm=norm, start="none", **settings)
