"""MeanSparse (Amini et al. 2024, arXiv 2406.05927): values close to the mean of their channel become that mean.

Operators are put into a network that is trained already; nothing is trained. `insert` puts them in, `collect` gives
them the means and variances of their channels, `sparsify` sets how close is close. Letters: N images, C channels.
"""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.flags import Spec, flag
from models.insert import BeforeActivation
from models.mode import evaluation_mode
from models.placements import PLACEMENTS, Site, put, sites, take_out

BACKWARD = ("plain", "straight_through")
# Buffers of an operator in a state dict, with the names of the published files.
BUFFERS = ("running_mean", "running_var", "threshold", "flag_update_statistics", "batch_num")
# Two more that some of those have, and that nothing reads.
_UNUSED = ("momentum", "epsilon")
_LARGEST = 100.0


@dataclass(frozen=True)
class AlphaSpec(Spec, group="MeanSparse"):
    """How close to its mean a value is replaced."""

    ms_alpha: float | None = flag(
        None,
        "MeanSparse: values within so many standard deviations of their channel's mean become that mean (default: as"
        " the weights have it; meansparse: 0)",
        type=float,
        at_least=0,
        at_most=_LARGEST,
    )


def mean_sparse(x: Tensor, mean: Tensor, var: Tensor, alpha: float, *, dim: int = 1, backward: str = "plain") -> Tensor:
    """mean where |x - mean| < alpha sqrt(var), else x: hard thresholding around the mean of each channel.

    x: of any shape, finite, channels in dimension `dim`. mean, var: (C,). alpha: >= 0; 0 is the identity.
    backward: `plain`, the gradient is 0 where x is replaced; `straight_through`, it passes as if x were not.
    """
    if backward not in BACKWARD:
        raise ValueError(f"backward must be {' or '.join(BACKWARD)}, got {backward!r}")
    if alpha == 0:
        return x
    mean = _along(mean, x, dim)
    passes = _passes(x, mean, _along(alpha * var.sqrt(), x, dim)).to(x.dtype)
    if backward == "straight_through":
        return _StraightThrough.apply(x, mean.to(x.dtype), passes)
    return torch.lerp(mean.to(x.dtype), x, passes)


def _along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """values (C,), to be broadcast over x."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return values.view(shape)


@torch.no_grad()
def _passes(x: Tensor, mean: Tensor, limit: Tensor) -> Tensor:
    """1 where x stays, 0 where it is replaced. Not bool: on CPUs torch does not vectorise selection by that, and
    the operator takes 4 times as long. `torch.lerp` gives both ends exactly."""
    distance = (x - mean).abs_()
    return torch.ge(distance, limit, out=distance)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, passes: Tensor) -> Tensor:
        return torch.lerp(mean, x, passes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


class MeanSparse(nn.Module):
    """`mean_sparse` with the statistics of its channels. dim: where the channels are.

    alpha is kept as a number beside the buffer `threshold`, so that no forward pass waits for a device.
    """

    running_mean: Tensor
    running_var: Tensor
    threshold: Tensor
    flag_update_statistics: Tensor
    batch_num: Tensor

    def __init__(self, channels: int, dim: int = 1, *, backward: str = "plain"):
        super().__init__()
        self.channels, self.dim, self.backward, self._alpha = channels, dim, backward, 0.0
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.zeros(channels))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("flag_update_statistics", torch.zeros((), dtype=torch.long))
        self.register_buffer("batch_num", torch.zeros((), dtype=torch.long))

    @property
    def alpha(self) -> float:
        """How many standard deviations around the mean are replaced."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"alpha must be a finite number >= 0, got {value}")
        self._alpha = float(value)
        self.threshold.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[self.dim] != self.channels:
            raise ValueError(
                f"the operator is of {self.channels} channels in dimension {self.dim}, got {tuple(x.shape)}"
            )
        return mean_sparse(x, self.running_mean, self.running_var, self._alpha, dim=self.dim, backward=self.backward)

    def blocked(self, x: Tensor) -> Tensor:
        """Which values are replaced, bool of the shape of x."""
        limit = _along(self._alpha * self.running_var.sqrt(), x, self.dim)
        return _passes(x, _along(self.running_mean, x, self.dim), limit) == 0

    def extra_repr(self) -> str:
        return f"{self.channels}, dim={self.dim}, alpha={self._alpha:g}, backward={self.backward}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        alpha, var = float(self.threshold), self.running_var
        if not 0 <= alpha < math.inf or bool((var < 0).any()):
            raise ValueError(f"{prefix}threshold or {prefix}running_var is negative or no number")
        if alpha > 0 and not bool((var > 0).any()):
            raise ValueError(f"{prefix}threshold is above 0, and there are no statistics")
        self._alpha = float(f"{alpha:.7g}")  # The buffer is float32.


def operators(net: nn.Module) -> dict[str, MeanSparse]:
    """The operators of a network by name, in the order in which they are registered."""
    return {name: module for name, module in net.named_modules() if isinstance(module, MeanSparse)}


def _some(net: nn.Module) -> dict[str, MeanSparse]:
    found = operators(net)
    if not found:
        raise ValueError("the network has no MeanSparse operators; insert them first")
    return found


def sparsify(net: nn.Module, alpha: float) -> None:
    """Set alpha of all operators. Raises: ValueError where there is none, and for operators without statistics."""
    found = _some(net)
    if alpha > 0:
        check_statistics(found)
    for operator in found.values():
        operator.alpha = alpha


def check_statistics(found: Mapping[str, MeanSparse]) -> None:
    """Raises: ValueError where an operator has seen no values: its variances are all 0."""
    for name, operator in found.items():
        if not bool((operator.running_var > 0).any()):
            raise ValueError(f"{name} has no statistics of its channels; collect them first")


def alpha_of(net: nn.Module) -> float:
    """alpha of the operators of a network; 0 without any. Raises: ValueError where they have several."""
    values = {operator.alpha for operator in operators(net).values()}
    if len(values) > 1:
        raise ValueError(f"operators have different alpha: {', '.join(f'{value:g}' for value in sorted(values))}")
    return values.pop() if values else 0.0


@contextlib.contextmanager
def with_alpha(net: nn.Module, alpha: float) -> Iterator[None]:
    """The operators with this alpha for a while."""
    before = {operator: operator.alpha for operator in operators(net).values()}
    try:
        if before:
            sparsify(net, alpha)
        yield
    finally:
        for operator, value in before.items():
            operator.alpha = value


@contextlib.contextmanager
def with_backward(net: nn.Module, backward: str) -> Iterator[None]:
    """The operators with this gradient for a while; outputs stay as they are."""
    before = {operator: operator.backward for operator in operators(net).values()}
    for operator in before:
        operator.backward = backward
    try:
        yield
    finally:
        for operator, value in before.items():
            operator.backward = value


# ------------------------------------------------------------------------------------------------------- placements


def insert(net: nn.Module, placement: str, *, layout: str | None = None) -> nn.Module:
    """Put an operator with alpha 0, which changes nothing, at each site of a placement, in place; returns `net`.

    placement: of `placements.PLACEMENTS`. layout: as `placements.sites`.
    Raises: ValueError where there is no site, and where operators have been inserted before.
    """
    part = _part(net)
    if operators(part) or any(isinstance(module, BeforeActivation) for module in part.modules()):
        raise ValueError("operators have already been inserted into this network")
    _put_all(part, sites(part, placement, layout=layout))
    return net


def insert_as(net: nn.Module, names: Collection[str]) -> None:
    """Insert at the placement whose operators have these names, those of a state dict.

    Raises: ValueError where there is none.
    """
    part, known = _part(net), {}
    for placement in PLACEMENTS:
        with contextlib.suppress(ValueError):
            known[placement] = sites(part, placement)
    for found in known.values():
        if {site.name for site in found} == set(names):
            _put_all(part, found)
            return
    counts = ", ".join(f"{len(found)} ({placement})" for placement, found in known.items()) or "none"
    raise ValueError(f"has {len(names)} MeanSparse operators, {min(names)} for one; a network like this has {counts}")


def operator_names(keys: Iterable[str]) -> list[str]:
    """Names of the operators in a state dict, without the prefix that `insert` does not know."""
    tail = f".{BUFFERS[3]}"
    return [key.removesuffix(tail) for key in keys if key.endswith(tail)]


def with_own_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what published operators have beside their buffers, and with scalars as scalars."""
    names = operator_names(state)
    unused = {f"{name}.{buffer}" for name in names for buffer in _UNUSED}
    scalars = {f"{name}.{buffer}" for name in names for buffer in BUFFERS[2:]}
    found = {key: value for key, value in state.items() if key not in unused}
    return {k: v.reshape(()) if k in scalars and v.numel() == 1 else v for k, v in found.items()}


def remove(net: nn.Module) -> nn.Module:
    """Take all operators out, in place; returns `net`, with the keys that it had."""
    part = _part(net)
    for name, operator in _some(part).items():
        take_out(part, Site(name, operator.channels, operator.dim))
    return net


def _part(net: nn.Module) -> nn.Module:
    """What of a network has operators: its backbone, if it has one, and no head."""
    for name in ("feature_net", "backbone"):
        net = getattr(net, name, net)
    return net


def _put_all(net: nn.Module, found: Sequence[Site]) -> None:
    device = next(net.parameters()).device
    for site in found:
        put(net, site, MeanSparse(site.channels, site.dim).to(device).train(net.training))


# ------------------------------------------------------------------------------------------------------- statistics

STATISTICS = ("exact", "batchwise")


@dataclass(frozen=True)
class Moments:
    """Of the values of each channel so far, float64: their number, means (C,) and sums of squared deviations (C,)."""

    count: float
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor, dim: int) -> "Moments":
        """Of the values x."""
        # torch.var_mean takes 10 times as long on CPUs. torch.sum adds in pairs: float32 loses next to nothing.
        rows = x.movedim(dim, -1).reshape(-1, x.shape[dim])
        count = len(rows)
        mean = rows.sum(0).double() / count
        rest = rows - mean.to(x.dtype)
        left = rest.sum(0).double()
        return cls(count, mean + left / count, rest.square_().sum(0).double() - left**2 / count)

    def cpu(self) -> "Moments":
        return Moments(self.count, self.mean.cpu(), self.squares.cpu())

    def merged(self, other: "Moments") -> "Moments":
        """Of both together (Chan, Golub & LeVeque 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.squares + other.squares + delta**2 * (self.count * other.count / count))


@dataclass(frozen=True)
class Batchwise:
    """Sums over batches of the means (C,) and of the unbiased variances (C,) of each channel, and their number."""

    count: float
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor, dim: int) -> "Batchwise":
        """Of one batch. Raises: ValueError where it has one value of a channel, which has no such variance."""
        batch = Moments.of(x, dim)
        if batch.count < 2:
            raise ValueError("a batch of one value in each channel has no variance; give another batch size")
        return cls(1, batch.mean, batch.squares / (batch.count - 1))

    def cpu(self) -> "Batchwise":
        return Batchwise(self.count, self.mean.cpu(), self.squares.cpu())

    def merged(self, other: "Batchwise") -> "Batchwise":
        return Batchwise(self.count + other.count, self.mean + other.mean, self.squares + other.squares)


_RULES: dict[str, Any] = {"exact": Moments, "batchwise": Batchwise}
# By the name of an operator.
Found = dict[str, Any]


def gather(net: nn.Module, batches: Iterable[Tensor], *, rule: str = "exact") -> Found:
    """What the operators of a network see in batches of its inputs: `Moments`, or with `batchwise`, as published, sums
    over batches; on the CPU. In evaluation mode, without gradients, with alpha 0; the network stays as it is.

    Raises: ValueError for a network without operators, and an unknown rule.
    """
    if rule not in _RULES:
        raise ValueError(f"statistics are {' or '.join(STATISTICS)}, got {rule!r}")
    kind, found = _RULES[rule], _some(net)
    seen: Found = {}

    def look(name: str, operator: MeanSparse, x: Tensor) -> None:
        part = kind.of(x.detach().float(), operator.dim)
        seen[name] = seen[name].merged(part) if name in seen else part

    handles = [
        operator.register_forward_pre_hook(lambda module, args, name=name: look(name, module, args[0]))
        for name, operator in found.items()
    ]
    try:
        with evaluation_mode(net), with_alpha(net, 0), torch.no_grad():
            for batch in batches:
                net(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: part.cpu() for name, part in seen.items()}


def merged(parts: Iterable[Found]) -> Found:
    """Of several processes, in order."""
    total: Found = {}
    for part in parts:
        total |= {name: total[name].merged(value) if name in total else value for name, value in part.items()}
    return total


def put_statistics(net: nn.Module, found: Found) -> None:
    """Give the operators what `gather` found; what they had is replaced.

    The variance is that of the population; with `batchwise` the mean of the batches'.
    Raises: ValueError, and nothing changes, where an operator has seen nothing.
    """
    if missing := [name for name in operators(net) if name not in found]:
        raise ValueError(f"{missing[0]} saw no values: there was no batch, or the network does not use it")
    for name, operator in operators(net).items():
        seen = found[name]
        batchwise = isinstance(seen, Batchwise)
        operator.running_mean.copy_(seen.mean / seen.count if batchwise else seen.mean)
        operator.running_var.copy_(seen.squares / seen.count)
        operator.batch_num.fill_(int(seen.count) if batchwise else 0)


def collect(net: nn.Module, batches: Iterable[Tensor], *, rule: str = "exact") -> None:
    """Means and variances of the channels, from batches of the network's inputs. Raises: ValueError as `gather`."""
    put_statistics(net, gather(net, batches, rule=rule))
