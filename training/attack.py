"""The attacks of adversarial training: projected gradient descent in the L-inf ball, by its last iterate.

Letters: p images of this rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from common.attacks import pgd
from common.attacks.specs import START_NOISE, StepsSpec


class Attack(NamedTuple):
    """PGD in the L-inf ball, by the last iterate. Lengths are in epsilon, but for --step_size.

    draw: the noise of a batch, `torch.randn` or `torch.rand`. start: (images, noise, epsilon) -> where it starts.
    steps: their number; None: --num_steps, each of --step_size. step: their length. reach: radius of the ball.
    """

    draw: Callable[..., Tensor]
    start: Callable[[Tensor, Tensor, float], Tensor]
    steps: int | None = None
    step: float = 0.0
    reach: float = 1.0

    def noise(self, count: int, like: Tensor, gen: Generator) -> Tensor:
        """That of `count` images: of a whole batch, so that it does not depend on the number of ranks."""
        return self.draw((count, *like.shape[1:]), generator=gen, device=like.device)

    def __call__(
        self, losses: Callable[[Tensor], Tensor], images: Tensor, noise: Tensor, eps: float, spec: StepsSpec
    ) -> Tensor:
        """losses: (p, 3, H, W) -> (p,), which the attacked images raise."""
        steps, step = (spec.num_steps, spec.step_size) if self.steps is None else (self.steps, self.step * eps)
        start = self.start(images, noise, eps)
        return pgd(losses, images, eps=self.reach * eps, steps=steps, step=step, start=start, keep="last")


PGD = Attack(torch.randn, lambda images, noise, eps: images + START_NOISE * noise)
FGSM_RS = Attack(torch.rand, lambda images, noise, eps: (images + eps * (2 * noise - 1)).clamp_(0, 1), 1, 1.25)
# From noise of twice epsilon, and with no ball but [0, 1]: from there one step reaches no farther than 3 epsilon.
N_FGSM = Attack(torch.rand, lambda images, noise, eps: images + 2 * eps * (2 * noise - 1), 1, 1.0, reach=3.0)

ATTACKS = {"pgd": PGD, "fgsm_rs": FGSM_RS, "nfgsm": N_FGSM}
