"""Convolutional sparse coding as a layer (SDNet; Dai et al., NeurIPS 2022): the output is the sparse code of the input.

Letters: B images, C channels and H, W pixels of the input x (B, C, H, W); M atoms, weight (M, C, k, k); the code z
(B, M, Hz, Wz) has the size of a convolution's output. A(z) is the transposed convolution of z with the atoms,
A*(r) the convolution of r, its exact adjoint. The layer takes K proximal gradient steps from zero towards

    argmin_z 1/2 |x - A(z)|^2 + lam |z|_1 + mu/2 |z|^2      (z >= 0 unless it is signed), for each image.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GRADIENTS = ("extrapolated", "iterate")
# The power iteration of a fresh start: steps at most, and the squared change of its unit vector that ends it.
_STEPS, _TOLERANCE = 50, 1e-5
# Frequencies on a side at which the bound of a fresh layer is computed.
_GRID = 32
_TINY = 1e-12


class Solver(NamedTuple):
    """How a code is computed. steps: K >= 1. gradient_at: `extrapolated` is FISTA (Beck & Teboulle 2009), `iterate` the
    released program of SDNet, the same for K <= 2."""

    steps: int
    mu: float
    nonneg: bool
    gradient_at: str

    def prox(self, v: Tensor, eta: Tensor, lam: Tensor) -> Tensor:
        """The proximal operator of eta (lam |z|_1 + mu/2 |z|^2)."""
        shrunk = torch.relu(v - lam * eta) if self.nonneg else v - torch.clamp(v, min=-lam * eta, max=lam * eta)
        return shrunk / (1 + self.mu * eta) if self.mu else shrunk

    def solve(
        self,
        x: Tensor,
        analyse: Callable[[Tensor], Tensor],
        synthesise: Callable[[Tensor], Tensor],
        eta: Tensor,
        lam: Tensor,
    ) -> Tensor:
        """The K-th iterate."""
        z = self.prox(eta * analyse(x), eta, lam)
        before, t = torch.zeros_like(z), 1.0
        for _ in range(self.steps - 1):
            t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
            y = z if last == 1 else z + (last - 1) / t * (z - before)
            at = y if self.gradient_at == "extrapolated" else z
            before, z = z, self.prox(y + eta * analyse(x - synthesise(at)), eta, lam)
        return z


class _Coding(nn.Module):
    """What `CSC2d` and `CSC1d` share: atoms of unit norm, a step size from a power iteration, lambda.

    step: eta, a buffer; 0.9 over the largest eigenvalue of A* A. power: the unit vector of the power iteration, empty
    before the first. Both are saved. Evaluation changes neither.
    """

    step: Tensor
    power: Tensor
    lam: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        lam: float,
        steps: int,
        mu: float,
        nonneg: bool,
        step_ratio: float,
        gradient_at: str,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        if not mu >= 0:
            raise ValueError(f"mu must be >= 0, got {mu}")
        if gradient_at not in GRADIENTS:
            raise ValueError(f"gradient_at must be one of {', '.join(GRADIENTS)}, got {gradient_at!r}")
        self.solver, self.step_ratio = Solver(steps, mu, nonneg, gradient_at), step_ratio
        self.weight = nn.Parameter(torch.empty(*shape))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.register_buffer("step", torch.zeros(()))
        self.register_buffer("power", torch.zeros(0))
        self.register_buffer("lam", torch.zeros(()))
        self.set_lambda(lam)
        self.project_()

    @torch.no_grad()
    def project_(self) -> None:
        """Give every atom the norm 1, in place; after each step of an optimizer."""
        norms = self.weight.flatten(1).norm(dim=1).clamp_min(_TINY)
        self.weight.div_(norms.view(-1, *[1] * (self.weight.ndim - 1)))

    def set_lambda(self, value: float | Tensor) -> None:
        """One lambda >= 0 for all images, or one for each image of the batches to come, (B,).

        It acts at once. Raises: ValueError for a negative or non-finite one.
        """
        lam = torch.as_tensor(value, dtype=self.lam.dtype, device=self.lam.device)
        if lam.ndim > 1 or not bool((lam >= 0).all()) or not bool(lam.isfinite().all()):
            raise ValueError(f"lambda must be >= 0, one or one for each image, got {value}")
        self.lam = lam

    def _lambda(self, ndim: int) -> Tensor:
        return self.lam if self.lam.ndim == 0 else self.lam.view(-1, *[1] * (ndim - 1))

    @torch.no_grad()
    def _refresh(self, start: Sequence[int], square: Callable[[Tensor], Tensor], fresh: bool) -> None:
        """The power iteration of A* A. start: shape of its vector. A fresh one ends by itself, which waits for the
        device; a warm one is a single step."""
        v = self.power
        if tuple(v.shape) != tuple(start):
            gen = torch.Generator().manual_seed(0)
            v, fresh = torch.randn(*start, generator=gen, dtype=torch.float64).to(self.weight), True
            v = v / v.norm()
        value = v.new_ones(())
        for _ in range(_STEPS if fresh else 1):
            image = square(v)
            new = image / image.norm().clamp_min(_TINY)
            change, v = (new - v).square().sum(), new
            if fresh and float(change) <= _TOLERANCE:
                break
        value = (v * square(v)).sum()
        self.power = v
        self.step.copy_(self.step_ratio / value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take sizes from the file: the power iteration's is that of its images, lambda may be one an image."""
        for name in ("power", "lam"):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class CSC2d(_Coding):
    """Images (B, C, H, W) to codes (B, M, Hz, Wz), in place of a convolution without bias.

    recompute: the iterates are not kept for the gradient but computed again, which costs one more forward pass.
    step_ratio: of eta to 1 / the largest eigenvalue; that is estimated a little too low, hence 0.9 and not 1.
    A fresh layer has a step that is safe for every size, from the largest singular value over frequencies.
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
        super().__init__(
            (atoms, in_channels, kernel_size, kernel_size),
            lam=lam,
            steps=steps,
            mu=mu,
            nonneg=nonneg,
            step_ratio=step_ratio,
            gradient_at=gradient_at,
        )
        self.recompute = recompute
        self.step.fill_(step_ratio / self._bound())

    def analyse(self, r: Tensor) -> Tensor:
        """A*(r), (B, M, Hz, Wz)."""
        return F.conv2d(r, self.weight, None, self.stride, self.padding)

    def synthesise(self, z: Tensor, size: Sequence[int]) -> Tensor:
        """A(z), images (B, C, H, W) of `size` (H, W)."""
        # What a convolution of this stride leaves over at the end of an image.
        rest = [(side + 2 * self.padding - self.kernel_size) % self.stride for side in size]
        return F.conv_transpose2d(z, self.weight, None, self.stride, self.padding, rest)

    def code_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """(Hz, Wz) for images of `size` (H, W). Raises: ValueError for images smaller than the kernel."""
        sides = tuple((side + 2 * self.padding - self.kernel_size) // self.stride + 1 for side in size)
        if min(sides) < 1:
            raise ValueError(f"images of {size[0]} x {size[1]} pixels are smaller than atoms of {self.kernel_size}")
        return sides

    def forward(self, x: Tensor) -> Tensor:
        lam = self._lambda(4)
        size = x.shape[2:]
        self.code_size(size)

        def solve(x: Tensor, weight: Tensor) -> Tensor:
            return self.solver.solve(x, self.analyse, lambda z: self.synthesise(z, size), self.step, lam)

        if self.recompute and self.solver.steps > 1 and torch.is_grad_enabled():
            return checkpoint(solve, x, self.weight, use_reentrant=False, preserve_rng_state=False)
        return solve(x, self.weight)

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
        self._refresh(start, lambda v: self.analyse(self.synthesise(v, size)), fresh)

    @torch.no_grad()
    def _bound(self) -> Tensor:
        """The largest eigenvalue of A* A on an endless image of stride 1, which no other exceeds."""
        n = max(_GRID, self.kernel_size)
        symbols = torch.fft.fft2(self.weight.double(), s=(n, n)).permute(2, 3, 0, 1)  # (n, n, M, C)
        return torch.linalg.matrix_norm(symbols, ord=2).square().max()


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
        super().__init__(
            (atoms, in_features),
            lam=lam,
            steps=steps,
            mu=mu,
            nonneg=nonneg,
            step_ratio=step_ratio,
            gradient_at=gradient_at,
        )
        with torch.no_grad():
            self.step.fill_(step_ratio / torch.linalg.matrix_norm(self.weight.double(), ord=2).square())

    def analyse(self, r: Tensor) -> Tensor:
        """A*(r), (..., M)."""
        return r @ self.weight.T

    def synthesise(self, z: Tensor) -> Tensor:
        """A(z), (..., C)."""
        return z @ self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.solver.solve(x, self.analyse, self.synthesise, self.step, self._lambda(x.ndim))

    def objective(self, x: Tensor, z: Tensor) -> Tensor:
        """1/2 |x - A(z)|^2 + lam |z|_1 + mu/2 |z|^2 of each row."""
        fit = (x - self.synthesise(z)).square().sum(-1) / 2
        return fit + self._lambda(x.ndim - 1) * z.abs().sum(-1) + self.solver.mu / 2 * z.square().sum(-1)

    def refresh_step(self, *, fresh: bool = False) -> None:
        """Follow the weights with the step, as `CSC2d.refresh_step`."""
        self._refresh((1, len(self.weight)), lambda v: self.analyse(self.synthesise(v)), fresh)
