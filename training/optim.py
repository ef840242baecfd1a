"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adam import adam

from common.errors import UserError
from common.flags import Spec, flag
from models.csc import csc_layers
from training.average import MovingAverage


class _Grouped(Optimizer):
    """An optimiser that changes all tensors of a group that have a gradient at once, by `_update`."""

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
        raise NotImplementedError


class Lars(_Grouped):
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


class Muon(_Grouped):
    """Orthogonalised momentum for convolution filters, Adam for every other tensor.

    The filters of a convolution are a matrix, outputs x (inputs x height x width). Its step is lr |w| o / |o|, where o
    is the Nesterov momentum of the gradient with all singular values moved near 1; afterwards the matrix has the norm
    that it had before, so that lr is the relative change of a step. Batch normalisation behind a convolution takes no
    notice of that norm. The rest has Adam at `ratio` lr. There is no weight decay of filters, whose norm is kept.
    Source: Jordan et al. 2024 (the iteration), with the kept norm of their CIFAR-10 speed records.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.6,
        weight_decay: float = 0.0,
        ratio: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        params = list(params)
        filters, rest = [p for p in params if p.ndim == 4], [p for p in params if p.ndim != 4]
        groups = [{"params": filters, "filters": True}, {"params": rest, "filters": False}]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ratio": ratio}
        super().__init__([group for group in groups if group["params"]], {**defaults, "betas": betas, "eps": eps})

    def _update(self, weights: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        (self._turn if group["filters"] else self._adam)(weights, grads, group)

    def _turn(self, weights: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for w, gradient in zip(weights, grads, strict=True):
            state = self.state[w]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(w)
            buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            turn = orthogonalised(gradient.lerp(buffer, group["momentum"]).flatten(1)).view_as(w)
            norm = w.norm()
            w.sub_(turn.mul_(group["lr"] * norm / turn.norm().clamp_min(group["eps"])))
            w.mul_(norm / w.norm().clamp_min(group["eps"]))

    def _adam(self, weights: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for w in weights:
            if not self.state[w]:
                # As torch has it: the count stays on the host, under this name.
                zeros = {name: torch.zeros_like(w) for name in ("exp_avg", "exp_avg_sq")}
                self.state[w].update(step=torch.zeros(()), **zeros)
        means, squares, steps = ([self.state[w][n] for w in weights] for n in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adam(
            weights,
            grads,
            means,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["ratio"] * group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


# Coefficients of one step of the quintic Newton-Schulz iteration, which lead singular values near 1 fast, and how many.
_QUINTIC, _STEPS = (3.4445, -4.7750, 2.0315), 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix (rows, columns) with its singular values moved near 1, between 0.6 and 1.3 unless they are tiny."""
    x = matrix if len(matrix) <= matrix.shape[1] else matrix.mT
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if len(matrix) <= matrix.shape[1] else x.mT


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
    "muon": lambda params, lr, wd: Muon(params, lr, weight_decay=wd),
    "torchlars": _torchlars,
}


@dataclass(frozen=True)
class LengthSpec(Spec, group="training"):
    """How long to train."""

    epochs: int = flag(1000, "last epoch (stage 2 counts on from stage 1)", at_least=0, aliases=("--epoch",))


@dataclass(frozen=True)
class RateSpec(Spec, group="training"):
    """Learning rate and weight decay."""

    lr_init: float = flag(0.1, "learning rate before warm-up (adam, muon: far lower, see docs/usage.md)", above=0)
    weight_decay: float = flag(1e-6, "stage 1", at_least=0)


@dataclass(frozen=True)
class OptimSpec(RateSpec, LengthSpec):
    """Optimiser and schedule of stage 1; field names are flag names. epochs is the cosine's length."""

    optimizer: str = flag("lars", "stage 1", choices=lambda: OPTIMIZERS)
    ema_decay: float | None = flag(
        None,
        "stage 1: keep a moving average of the weights over steps, of this decay",
        type=float,
        above=0,
        at_most=1,
        origin="compared",
    )
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

    def average(self, net: nn.Module) -> MovingAverage | None:
        """The moving average of a network that --ema_decay asks for.

        Raises: UserError for a network with sparse coding layers: their atoms have unit norm, and a mean has not.
        """
        if self.ema_decay is None:
            return None
        if csc_layers(net):
            raise UserError("--ema_decay: not for networks with sparse coding layers; leave it out")
        return MovingAverage(net, self.ema_decay)

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
