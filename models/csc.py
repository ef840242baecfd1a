"""Convolutional sparse coding as a layer (SDNet; Dai et al., NeurIPS 2022): the output is the sparse code of the input.

Letters: B images, C channels and H, W pixels of the input x (B, C, H, W); M atoms, weight (M, C, k, k); the code z
(B, M, Hz, Wz) has the size of a convolution's output. A(z) is the transposed convolution of z with the atoms,
A*(r) the convolution of r, its exact adjoint. The layer takes K proximal gradient steps from zero towards

    argmin_z 1/2 |x - A(z)|^2 + lam |z|_1 + mu/2 |z|^2      (z >= 0 unless it is signed), for each image.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.adjoint import Frame
from models.mode import evaluation_mode

# (r, t or None for 0) -> eta A*(r) - t.
Ascend = Callable[[Tensor, Tensor | None], Tensor]
# Codes z -> x - A(z).
Residual = Callable[[Tensor], Tensor]

GRADIENTS = ("extrapolated", "iterate")
# The power iteration of a fresh start: steps at most, and the squared change of its unit vector that ends it.
_STEPS, _TOLERANCE = 50, 1e-5
# Frequencies on a side at which the bound of a fresh layer is computed, at least, and for each pixel of a kernel.
# For how many channels that is fast.
_GRID, _FINE, _FEW = 32, 8, 8
_TINY = 1e-12


class Solver(NamedTuple):
    """How a code is computed. steps: K >= 1. gradient_at: `extrapolated` is FISTA (Beck & Teboulle 2009), `iterate` the
    released program of SDNet, the same for K <= 2.

    Raises, from `checked`: ValueError for a setting out of range.
    """

    steps: int
    mu: float
    nonneg: bool
    gradient_at: str

    def checked(self) -> "Solver":
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if not self.mu >= 0:
            raise ValueError(f"mu must be >= 0, got {self.mu}")
        if self.gradient_at not in GRADIENTS:
            raise ValueError(f"gradient_at must be one of {', '.join(GRADIENTS)}, got {self.gradient_at!r}")
        return self

    def tensor(self) -> Tensor:
        """The settings as numbers, (4,) float32, as a file holds them."""
        return torch.tensor([self.steps, self.mu, self.nonneg, GRADIENTS.index(self.gradient_at)], dtype=torch.float32)

    @classmethod
    def of(cls, numbers: Tensor) -> "Solver":
        """From `tensor`. Raises: ValueError for settings out of range."""
        steps, mu, nonneg, gradient_at = numbers.tolist()
        # To the digits that a float32 keeps: 0.1 is 0.1 again.
        if not 0 <= gradient_at < len(GRADIENTS):
            raise ValueError(f"settings of a solver must be in their ranges, got {numbers.tolist()}")
        return cls(int(steps), float(f"{mu:.7g}"), bool(nonneg), GRADIENTS[int(gradient_at)]).checked()

    def solve(self, x: Tensor, ascend: Ascend, residual: Residual, eta: Tensor, t: Tensor) -> Tensor:
        """The K-th iterate; the arguments are those of `iterates`."""
        *_, (_, z) = self.iterates(x, ascend, residual, eta, t)
        return z

    def iterates(
        self, x: Tensor, ascend: Ascend, residual: Residual, eta: Tensor, t: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(r, z) of each of the K steps: z is y + eta A*(r), shrunk. In the first y = 0 and r = x.

        ascend(r, t): eta A*(r) - t, a tensor of its own. t: lam eta, one number or one for each image. The operator of
        a code that is not negative takes t off before the ReLU, so that it comes with the bias of a convolution.
        """

        def shrink(v: Tensor) -> Tensor:
            bound = t.to(v.dtype)
            shrunk = v.relu_() if self.nonneg else v - torch.clamp(v, min=-bound, max=bound)
            return shrunk / (1 + self.mu * eta) if self.mu else shrunk

        taken = t if self.nonneg else None
        zs = [shrink(ascend(x, taken))]
        yield x, zs[-1]
        for c in self.momenta():
            y = extrapolated(zs, c)
            r = residual(self.gradient_point(zs, c))
            zs = [zs[-1], shrink(ascend(r, taken).add_(y))]
            yield r, zs[-1]

    def momenta(self) -> list[float]:
        """c of each step after the first, which starts from y = z + c (z - the iterate before)."""
        found, t = [], 1.0
        for _ in range(self.steps - 1):
            t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
            found.append((last - 1) / t)
        return found

    def gradient_point(self, zs: Sequence[Tensor], c: float) -> Tensor:
        """Where the step that follows the iterates `zs` takes the gradient of the fit."""
        return extrapolated(zs, c) if self.gradient_at == "extrapolated" else zs[-1]

    def shrink_adjoint(self, gradient: Tensor, z: Tensor, eta: Tensor) -> Tensor:
        """The gradient of what was shrunk to z, from that of z."""
        if self.nonneg:
            passed = torch.ops.aten.threshold_backward(gradient, z, 0)
        else:
            passed = gradient.masked_fill(z == 0, 0)
        return passed / (1 + self.mu * eta) if self.mu else passed


def extrapolated(zs: Sequence[Tensor], c: float) -> Tensor:
    """z + c (z - the iterate before), for the last z."""
    return zs[-1] + c * (zs[-1] - zs[-2]) if c else zs[-1]


class _Coding(nn.Module):
    """What `CSC2d` and `CSC1d` share: atoms of unit norm, a step size from a power iteration, lambda.

    step: eta, a buffer; 0.9 over the largest eigenvalue of A* A. power: the unit vector of the power iteration, empty
    before the first. settings: those of the solver. All are saved, and so is lambda. Evaluation changes none of them.
    """

    step: Tensor
    power: Tensor
    lam: Tensor
    settings: Tensor

    def __init__(self, shape: Sequence[int], solver: Solver, *, lam: float, step_ratio: float) -> None:
        super().__init__()
        self.solver, self.step_ratio = solver.checked(), step_ratio
        self.weight = nn.Parameter(torch.empty(*shape))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.register_buffer("step", torch.zeros(()))
        self.register_buffer("power", torch.zeros(0))
        self.register_buffer("lam", torch.zeros(()))
        self.register_buffer("settings", solver.tensor())
        self.set_lambda(lam)
        self.project_()

    def set_solver(self, solver: Solver) -> None:
        """Compute codes in another way. Raises: ValueError for a setting out of range."""
        self.solver = solver.checked()
        self.settings = solver.tensor().to(self.settings.device)

    @torch.no_grad()
    def project_(self) -> None:
        """Give every atom the norm 1, in place; after each step of an optimizer."""
        norms = torch.linalg.vector_norm(self.weight, dim=tuple(range(1, self.weight.ndim)), keepdim=True)
        self.weight.div_(norms.clamp_min_(_TINY))

    def set_lambda(self, value: float | Tensor) -> None:
        """One lambda >= 0 for all images, or one for each image of the batches to come, (B,).

        It acts at once. Raises: ValueError for a negative or non-finite one; of a tensor on a GPU that is not looked
        at, since it would wait for the device.
        """
        if isinstance(value, Tensor):
            lam = value.to(self.lam)
            valid = lam.ndim <= 1 and (lam.is_cuda or bool(((lam >= 0) & lam.isfinite()).all()))
        else:
            lam, valid = self.lam.new_full((), value), 0 <= value < math.inf
        if not valid:
            raise ValueError(f"lambda must be >= 0, one or one for each image, got {value}")
        self.lam = lam

    @staticmethod
    def _over_codes(lam: Tensor, ndim: int) -> Tensor:
        """Lambda in a shape that broadcasts with codes of so many dimensions."""
        return lam if lam.ndim == 0 else lam.view(-1, *[1] * (ndim - 1))

    @torch.no_grad()
    def _refresh(
        self,
        start: Sequence[int],
        synthesise: Callable[[Tensor], Tensor],
        analyse: Callable[[Tensor], Tensor],
        fresh: bool,
    ) -> None:
        """The power iteration of A* A. start: shape of its vector. A fresh one ends by itself, which waits for the
        device; a warm one is a single step."""
        v = self.power
        if tuple(v.shape) != tuple(start):
            gen = torch.Generator().manual_seed(0)
            v, fresh = torch.randn(*start, generator=gen, dtype=torch.float64).to(self.weight), True
            v = v / v.norm()
        for _ in range(_STEPS if fresh else 1):
            image = analyse(synthesise(v))
            last, v = v, image / image.norm().clamp_min(_TINY)
            if fresh and float((v - last).square().sum()) <= _TOLERANCE:
                break
        self.power = v
        self.step.copy_(self.step_ratio / synthesise(v).square().sum())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take sizes from the file: the power iteration's is that of its images, lambda may be one an image."""
        for name in ("power", "lam"):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}settings" in state_dict:
            self.solver = Solver.of(self.settings)


class _Operators:
    """eta A*(r) - t and x - A(z) of one call. dtype: what to compute in; None leaves it to autocast."""

    def __init__(self, x: Tensor, weight: Tensor, eta: Tensor, frame: Frame, dtype: torch.dtype | None = None) -> None:
        self.x, self.frame, self.dtype = x, frame, dtype
        self.scaled, self.minus = self.cast(eta * weight), self.cast(-weight)
        self.minus_synthesis = frame.synthesis(self.minus)  # By which x - A(z) is an addition in place.

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def ascend(self, r: Tensor, t: Tensor | None) -> Tensor:
        bias = self.cast(-t.expand(len(self.scaled))) if t is not None and t.ndim == 0 else None
        found = self.frame.analyse(self.cast(r), self.scaled, bias)
        return found if t is None or bias is not None else found - t.to(found.dtype)

    def residual(self, z: Tensor) -> Tensor:
        image = self.minus_synthesis(z)
        return image.add_(self.x) if image.dtype == self.x.dtype else image + self.x


class _Unrolled(torch.autograd.Function):
    """(x, weight, eta, t) -> the K-th iterate, with the gradient of all steps for all of these but eta.

    Of a step v = y + eta A*(r), r = x - A(point), with the gradient g of v: that of y is g, that of r, and of x by it,
    eta A(g), that of the point -A*(eta A(g)); that of the weight is eta times the correlation of r with g, less that of
    eta A(g) with the point; that of t is less the sum of g times the sign of the code.
    The output is kept, as it mostly is by what reads it. Of the earlier iterates and the residuals all are kept; with
    `recompute` only the residuals, where they are small: iterates follow by A* alone.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eta: Tensor, t: Tensor, solver: Solver, frame: Frame, recompute: bool
    ) -> Tensor:
        operators = _Operators(x, weight, eta, frame)
        residuals, iterates = [], []
        for r, z in solver.iterates(x, operators.ascend, operators.residual, eta, t):
            if not recompute or (solver.steps - 1) * x.numel() < z.numel():
                residuals.append(r)
            if not recompute:
                iterates.append(z)
        ctx.save_for_backward(x, weight, eta, t, z, *residuals[1:], *iterates[:-1])
        ctx.n_residuals, ctx.solver, ctx.frame = len(residuals[1:]), solver, frame
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(g.device.type, enabled=False):  # As the forward pass has chosen, wherever this one runs.
            return _Unrolled._gradients(ctx, g)

    @staticmethod
    def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, eta, t, code, *kept = ctx.saved_tensors
        solver: Solver = ctx.solver
        frame: Frame = ctx.frame
        operators = _Operators(x, weight, eta, frame, code.dtype)
        rs, zs = _trace(operators, solver, eta, t, kept[: ctx.n_residuals], [*kept[ctx.n_residuals :], code])
        wants_x, wants_weight, _, wants_t = ctx.needs_input_grad[:4]

        synthesise_scaled = frame.synthesis(operators.scaled)

        def correlation(image: Tensor, z: Tensor) -> Tensor:
            return frame.correlate(operators.cast(image), z, operators.scaled).to(weight.dtype)

        of_x = of_scaled = of_minus = of_t = of_before = None
        for k, c in reversed(list(enumerate([0.0, *solver.momenta()]))):
            g = solver.shrink_adjoint(g, zs[k], eta)
            if wants_t:
                signed = g if solver.nonneg else g * zs[k].sign()
                of_t = _added(of_t, signed.flatten(1).sum(1, dtype=t.dtype).view(-1, 1, 1, 1).sum_to_size(t.shape))
            if wants_weight:
                of_scaled = _added(of_scaled, correlation(rs[k], g))
            if k or wants_x:
                of_r = synthesise_scaled(g)
            if k:
                if wants_weight:
                    of_minus = _added(of_minus, correlation(of_r, solver.gradient_point(zs[:k], c)))
                of_z = frame.analyse(of_r, operators.minus).add_(g)
                momentum = c * (of_z if solver.gradient_at == "extrapolated" else g) if c else None
                g = _added(_added(of_z, momentum), of_before)
                of_before = None if momentum is None else -momentum
            if wants_x:
                of_x = _added(of_x, of_r)
        of_weight = _added(of_scaled.mul_(eta), of_minus, -1) if of_scaled is not None else None
        of_x = of_x.to(x.dtype) if of_x is not None else None
        return of_x, of_weight, None, -of_t if of_t is not None else None, *[None] * 3


def _added(total: Tensor | None, part: Tensor | None, factor: float = 1) -> Any:
    """total + factor * part in place of `total`, which may be None for 0 where the factor is 1, as `part` may."""
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part, alpha=factor)


def _trace(
    operators: _Operators, solver: Solver, eta: Tensor, t: Tensor, residuals: list[Tensor], iterates: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """r and z of all steps, from those residuals after the first and those iterates that were kept, the last one at
    least; the others are computed again."""
    x = operators.x
    if len(iterates) == solver.steps:
        return [x, *residuals], iterates
    known = iter(residuals)

    def residual(z: Tensor) -> Tensor:
        return next(known) if residuals else operators.residual(z)

    again = islice(solver.iterates(x, operators.ascend, residual, eta, t), solver.steps - 1)
    rs, zs = map(list, zip(*again, strict=True))
    return [*rs, residual(solver.gradient_point(zs, solver.momenta()[-1]))], [*zs, *iterates]


class CSC2d(_Coding):
    """Images (B, C, H, W) to codes (B, M, Hz, Wz), in place of a convolution without bias.

    recompute: iterates before the last are not kept for the gradient but computed again, which costs K - 1
    convolutions, and as many transposed ones where the residuals of these steps are larger than a code.
    step_ratio: of eta to 1 / the largest eigenvalue. The power iteration estimates that a little too low, by some 10 %
    while weights move fast, hence 0.9 and not 1; the objective falls for eta below 2 / the eigenvalue.
    A fresh layer has a step that is safe for every size, if short; `refresh_step` finds that of one size.
    """

    def __init__(
        self,
        in_channels: int,
        atoms: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        lam: float = 0.1,
        steps: int = 2,
        mu: float = 0.0,
        nonneg: bool = True,
        step_ratio: float = 0.9,
        gradient_at: str = "extrapolated",
        recompute: bool = True,
    ) -> None:
        self.stride, self.padding, self.kernel_size = stride, padding, kernel_size
        shape = (atoms, in_channels, kernel_size, kernel_size)
        super().__init__(shape, Solver(steps, mu, nonneg, gradient_at), lam=lam, step_ratio=step_ratio)
        self.recompute = recompute
        self.step.fill_(step_ratio / self._bound())

    def analyse(self, r: Tensor) -> Tensor:
        """A*(r), (B, M, Hz, Wz)."""
        return F.conv2d(r, self.weight, None, self.stride, self.padding)

    def synthesise(self, z: Tensor, size: Sequence[int]) -> Tensor:
        """A(z), images (B, C, H, W) of `size` (H, W)."""
        return F.conv_transpose2d(z, self.weight, None, self.stride, self.padding, self._frame(size).rest)

    def _frame(self, size: Sequence[int]) -> Frame:
        return Frame(tuple(size), self.stride, self.padding, self.kernel_size)

    def code_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """(Hz, Wz) for images of `size` (H, W). Raises: ValueError for images smaller than the kernel."""
        sides = tuple((side + 2 * self.padding - self.kernel_size) // self.stride + 1 for side in size)
        if min(sides) < 1:
            raise ValueError(f"images of {size[0]} x {size[1]} pixels are smaller than atoms of {self.kernel_size}")
        return sides

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        self.code_size(size)
        eta, t = self.step, self._over_codes(self.lam, 4) * self.step
        frame = self._frame(size)
        if torch.is_grad_enabled() and any(part.requires_grad for part in (x, self.weight, t)):
            return _Unrolled.apply(x, self.weight, eta, t, self.solver, frame, self.recompute)
        operators = _Operators(x, self.weight, eta, frame)
        return self.solver.solve(x, operators.ascend, operators.residual, eta, t)

    def objective(self, x: Tensor, z: Tensor) -> Tensor:
        """1/2 |x - A(z)|^2 + lam |z|_1 + mu/2 |z|^2 of each image, (B,)."""
        residual = x - self.synthesise(z, x.shape[2:])
        fit, l1, l2 = (part.flatten(1).sum(1) for part in (residual.square(), z.abs(), z.square()))
        return fit / 2 + self.lam * l1 + self.solver.mu / 2 * l2

    def refresh_step(self, size: Sequence[int], *, fresh: bool = False) -> None:
        """Follow the weights with the step for images of `size` (H, W).

        One step of the power iteration from where the last one ended; where the size is new up to 50 from a random
        vector, with `fresh` up to 50 from there.
        """
        start = (1, len(self.weight), *self.code_size(size))
        self._refresh(start, lambda v: self.synthesise(v, size), self.analyse, fresh)

    @torch.no_grad()
    def _bound(self) -> Tensor:
        """Of the largest eigenvalue of A* A, for all sizes of images.

        For few channels the largest at the frequencies of a fine grid, of an endless image of stride 1. Else that
        of atoms which do not overlap, times the number of those that overlap in a pixel: up to four times too large.
        """
        W, n = self.weight.double(), max(_GRID, _FINE * self.kernel_size)
        if min(W.shape[:2]) <= _FEW:
            symbols = torch.fft.fft2(W, s=(n, n)).permute(2, 3, 0, 1)  # (n, n, M, C)
            return torch.linalg.matrix_norm(symbols, ord=2).square().max()
        rows = W.flatten(1)
        return math.ceil(self.kernel_size / self.stride) ** 2 * torch.linalg.matrix_norm(rows @ rows.T, ord=2)


def csc_layers(net: nn.Module) -> dict[str, CSC2d]:
    """The layers of a network by name, in the order of its modules."""
    return {name: module for name, module in net.named_modules() if isinstance(module, CSC2d)}


def stem_of(net: nn.Module) -> CSC2d | None:
    """The layer that codes images, the first of a network; None for one without."""
    return next(iter(csc_layers(net).values()), None)


@torch.no_grad()
def input_sizes(backbone: nn.Module, channels: int, size: Sequence[int]) -> dict[CSC2d, tuple[int, int]]:
    """(H, W) of what each layer codes when the network gets images (N, channels, H, W) of `size`.

    Raises: ValueError for images that are smaller than a kernel.
    """
    found: dict[CSC2d, tuple[int, int]] = {}

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[layer] = tuple(inputs[0].shape[2:])  # type: ignore[index, assignment]

    layers = csc_layers(backbone)
    hooks = [layer.register_forward_pre_hook(look) for layer in layers.values()]
    try:
        with evaluation_mode(backbone):  # Batch normalisation must not count an image that is none.
            backbone(next(iter(layers.values())).weight.new_zeros(1, channels, *size))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def follow_weights(sizes: Mapping[CSC2d, tuple[int, int]], *, fresh: bool = False) -> None:
    """What has to be done after each step of an optimizer: atoms of norm 1, and the step of the solver that fits them.

    fresh: see `CSC2d.refresh_step`.
    """
    for layer, size in sizes.items():
        layer.project_()
        layer.refresh_step(size, fresh=fresh)


class CSC1d(_Coding):
    """The same with A(z) = z W for rows: x (B, C) or (B, T, C), each of T tokens by itself; weight (M, C)."""

    def __init__(
        self,
        in_features: int,
        atoms: int,
        *,
        lam: float = 0.1,
        steps: int = 2,
        mu: float = 0.0,
        nonneg: bool = True,
        step_ratio: float = 0.9,
        gradient_at: str = "extrapolated",
    ) -> None:
        solver = Solver(steps, mu, nonneg, gradient_at)
        super().__init__((atoms, in_features), solver, lam=lam, step_ratio=step_ratio)
        with torch.no_grad():
            self.step.fill_(step_ratio / torch.linalg.matrix_norm(self.weight.double(), ord=2).square())

    def analyse(self, r: Tensor) -> Tensor:
        """A*(r), (..., M)."""
        return r @ self.weight.T

    def synthesise(self, z: Tensor) -> Tensor:
        """A(z), (..., C)."""
        return z @ self.weight

    def forward(self, x: Tensor) -> Tensor:
        eta = self.step
        t, scaled = self._over_codes(self.lam, x.ndim) * eta, eta * self.weight

        def ascend(r: Tensor, t: Tensor | None) -> Tensor:
            return r @ scaled.T if t is None else r @ scaled.T - t

        return self.solver.solve(x, ascend, lambda z: x - self.synthesise(z), eta, t)

    def objective(self, x: Tensor, z: Tensor) -> Tensor:
        """1/2 |x - A(z)|^2 + lam |z|_1 + mu/2 |z|^2 of each row."""
        fit = (x - self.synthesise(z)).square().sum(-1) / 2
        return fit + self._over_codes(self.lam, x.ndim - 1) * z.abs().sum(-1) + self.solver.mu / 2 * z.square().sum(-1)

    def refresh_step(self, *, fresh: bool = False) -> None:
        """Follow the weights with the step, as `CSC2d.refresh_step`."""
        self._refresh((1, len(self.weight)), self.synthesise, self.analyse, fresh)
