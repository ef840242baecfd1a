"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import UserError
from common.flags import Spec, flag


class Lars(Optimizer):
    """SGD with momentum under layer-wise adaptive rates.

    For each tensor, biases and batch-norm included, with w, g its value and gradient and wd the weight decay:
    scale = trust |w| / (|g| + wd |w| + eps) where both norms are positive, else 1; then scale (g + wd w) enters
    SGD with momentum. Source: You et al. 2017, in the form of the torchlars package.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        eps: float = 1e-8,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(weights, [p.grad for p in weights], group)
        return loss

    def _update(self, weights: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        # Lists of tensors in few launches, but for the scales, one for each; the norms stay on the device.
        buffers = []
        for p in weights:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        w_norm = torch.stack(torch._foreach_norm(weights))
        g_norm = torch.stack(torch._foreach_norm(grads))
        scale = group["trust"] * w_norm / (g_norm + group["weight_decay"] * w_norm + group["eps"])
        scale = torch.where((w_norm > 0) & (g_norm > 0), scale, 1.0)
        steps = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
        torch._foreach_mul_(steps, list(scale.unbind()))
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps)
        torch._foreach_add_(weights, buffers, alpha=-group["lr"])


def _torchlars(params: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    try:
        from torchlars import LARS
    except ImportError:
        raise UserError(
            "--optimizer torchlars: the package torchlars is not installed; --optimizer lars has the same rule"
        ) from None
    return LARS(torch.optim.SGD(params, lr, momentum=0.9, weight_decay=weight_decay), eps=1e-8, trust_coef=0.001)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float, float], Optimizer]] = {
    "lars": lambda params, lr, wd: Lars(params, lr, momentum=0.9, weight_decay=wd),
    "sgd": lambda params, lr, wd: torch.optim.SGD(params, lr, momentum=0.9, weight_decay=wd, fused=True),
    "adam": lambda params, lr, wd: torch.optim.Adam(params, lr, weight_decay=wd, fused=True),
    "torchlars": _torchlars,
}


@dataclass(frozen=True)
class LengthSpec(Spec, group="training"):
    """How long to train."""

    epochs: int = flag(1000, "last epoch (stage 2 counts on from stage 1)", at_least=0, aliases=("--epoch",))


@dataclass(frozen=True)
class RateSpec(Spec, group="training"):
    """Learning rate and weight decay."""

    lr_init: float = flag(0.1, "learning rate before warm-up", above=0)
    weight_decay: float = flag(1e-6, "stage 1", at_least=0)


@dataclass(frozen=True)
class OptimSpec(RateSpec, LengthSpec):
    """Optimiser and schedule of stage 1; field names are flag names. epochs is the cosine's length."""

    optimizer: str = flag("lars", "stage 1", choices=lambda: OPTIMIZERS)
    lr_scheduler: str = flag(
        "cosine",
        "stage 1; cosine_to_zero: zero at the last epoch, where cosine (as published) ends --warmup epochs short of it",
        choices=lambda: ("cosine", "cosine_to_zero", "step_decay"),
    )
    warmup: int = flag(10, "epochs of warm-up, from --lr_init to ten times that", at_least=0)
    warmup_share: float | None = flag(
        None, "warm-up as a share of --epochs, in place of --warmup", type=float, at_least=0, at_most=0.5
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise UserError(f"--epochs must be > 0, got {self.epochs}")
        if self.lr_scheduler == "cosine_to_zero" and self.warmup_epochs >= self.epochs:
            raise UserError(
                f"--lr_scheduler cosine_to_zero: --warmup {self.warmup} leaves nothing of {self.epochs} epochs"
            )

    def build(self, params: list[nn.Parameter]) -> Optimizer:
        return OPTIMIZERS[self.optimizer](params, self.lr_init, self.weight_decay)

    @property
    def warmup_epochs(self) -> float:
        return self.warmup if self.warmup_share is None else self.warmup_share * self.epochs

    def lr(self, epoch: float) -> float:
        """The learning rate after `epoch` (fractional) epochs."""
        decay = 0.3 if self.optimizer == "adam" else 0.1
        left = self.epochs - self.warmup_epochs
        after = {
            "cosine": lambda e: 0.5 * (1 + math.cos(math.pi * e / self.epochs)),
            "cosine_to_zero": lambda e: 0.5 * (1 + math.cos(math.pi * min(1.0, e / left))),
            "step_decay": lambda e: decay ** ((e >= 0.5 * self.epochs) + (e >= 0.75 * self.epochs)),
        }[self.lr_scheduler]
        return self.lr_init * warm_up(epoch, self.warmup_epochs, after)


def warm_up(epoch: float, warmup: float, after: Callable[[float], float], peak: float = 10.0) -> float:
    """Linear from 1 to `peak` over `warmup` epochs, then peak * after(epochs since the end of warm-up)."""
    if epoch <= warmup and warmup > 0:
        return 1 + (peak - 1) * epoch / warmup
    return peak * after(epoch - warmup)
