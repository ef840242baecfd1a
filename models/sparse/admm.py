"""The lasso by unrolled ADMM, in K dictionaries at once.

Dimension letters: see `models`.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.sparse.prox import lasso_gap, soft, soft_adjoint

# Steps between looks at the optimality gap, each of which waits for the device.
_LOOK_EVERY = 20
# For the gradient every so many steps are kept; those between are made again, which costs a tenth more time.
_KEEP_EVERY = 4
_HALF = (torch.float16, torch.bfloat16)


class SparseCode(NamedTuple):
    """codes (K, M, N); gap (K, N): largest violation of the lasso's optimality conditions, without gradient.

    also: codes (K, M, N) of the requested earlier steps.
    """

    codes: Tensor
    gap: Tensor
    also: tuple[Tensor, ...] = ()


def admm_lasso(
    D: Tensor,
    S: Tensor,
    *,
    lam: float,
    rho: float = 1.0,
    steps: int = 40,
    also: Collection[int] = (),
    tol: float | None = None,
    system: "RidgeSystem | None" = None,
) -> SparseCode:
    """Code samples in dictionaries: min_a 0.5 |s - D a|^2 + lam |a|_1 by `steps` steps of ADMM from zero.

    D (K, F, M). S (K, F, N): each dictionary codes its own samples; (F, N): every dictionary codes every sample.
    lam >= 0 in squared feature units, rho > 0, steps >= 1. Differentiable once in D and S, through all steps.
    also: earlier steps, counted from 0, whose codes are returned too.
    tol: a sample stops before `steps` once its gap is at most tol * lam, independently of the others. The gap is
    computed every `_LOOK_EVERY` steps, and reading it waits for the device.
    system: `RidgeSystem.of(D, rho)`, if it has been computed before.

    One step is x = (D'D + rho I)^-1 (D's + rho (y - u)); y = soft(x + u, lam / rho); u = u + x - y; the answer is the
    last y. All that a step hands to the next is w = x + u, since y = soft(w) and u = w - y. The system is solved once,
    M x M or, by Woodbury's identity, F x F, whichever is smaller.

    Raises: ValueError for shapes that do not fit and parameters out of range.
    Source: Boyd et al. 2011, section 6.4; ADMM-SRNet (Chiou et al. 2023), section 7 of the specification.
    """
    if D.ndim != 3 or S.ndim not in (2, 3) or S.shape[-2] != D.shape[1] or (S.ndim == 3 and len(S) != len(D)):
        raise ValueError(f"D must be (K, F, M) and S (K, F, N) or (F, N), got {tuple(D.shape)} and {tuple(S.shape)}")
    if not rho > 0 or not lam >= 0 or steps < 1:
        raise ValueError(f"need rho > 0, lam >= 0, steps >= 1, got {rho}, {lam}, {steps}")
    if not all(0 <= step < steps for step in also):
        raise ValueError(f"further steps must lie in 0..{steps - 1}, got {sorted(also)}")
    # The inverse of an ill-conditioned system needs more digits than half precision has.
    with torch.autocast(D.device.type, enabled=False):
        D, S = (x.float() if x.dtype in _HALF else x for x in (D, S))
        S = S.expand(len(D), -1, -1)
        system = system or RidgeSystem.of(D, rho)
        plan = _Plan(lam, rho, steps, frozenset(also), tol)
        if torch.is_grad_enabled() and (D.requires_grad or S.requires_grad):
            codes, *earlier = _Unrolled.apply(D, S, system, plan)
        else:
            with torch.no_grad():
                last, earlier, _ = _iterate(system, system.solve(S), S, plan, keep=None)
                codes = soft(last, plan.threshold)
        with torch.no_grad():
            gap = lasso_gap(D, S, codes, lam)
    return SparseCode(codes, gap, tuple(earlier))


@dataclass(frozen=True)
class RidgeSystem:
    """The linear system of the ADMM steps, without gradient: A = rho (D'D + rho I)^-1 in its cheapest form.

    A (K, M, M), or where M >= 2 F, so that two thin products cost less than one with A, its factors: A = I - back @
    thin, thin = (D D' + rho I)^-1 D and back = D'. inverse: (D D' + rho I)^-1, where M > F.
    """

    D: Tensor
    rho: float
    A: Tensor | None
    inverse: Tensor | None = None
    thin: Tensor | None = None
    back: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, D: Tensor, rho: float) -> "RidgeSystem":
        """Factorise the system of each dictionary of D (K, F, M). Half precision is converted to float32."""
        D = D.detach()
        D = D.float() if D.dtype in _HALF else D
        # A CPU factorises one at a time anyway; this way it needs the memory of one.
        parts = D.split(1) if D.device.type == "cpu" else (D,)
        with torch.autocast(D.device.type, enabled=False):
            formed = [torch.cat(x) if len(x) > 1 else x[0] for x in zip(*(_formed(d, rho) for d in parts), strict=True)]
        if len(formed) == 1:
            return cls(D, rho, formed[0])
        if D.shape[2] >= 2 * D.shape[1]:
            return cls(D, rho, None, formed[0], formed[1], D.mT.contiguous())
        return cls(D, rho, formed[1], formed[0])

    def solve(self, S: Tensor) -> Tensor:
        """The ridge solution (D'D + rho I)^-1 D's = D'(DD' + rho I)^-1 s, (K, M, N)."""
        if self.inverse is not None:
            return _product(self.D.mT, _product(self.inverse, S))
        x = self.small_inverse(_product(self.D.mT, S))
        # One refinement: where D'D is large, rounding of the inverse is a hundred times all other rounding.
        left = _product(self.D.mT, S - _product(self.D, x))
        return x.add_(self.small_inverse(left.sub_(x, alpha=self.rho)))

    def small_inverse(self, V: Tensor) -> Tensor:
        """(D'D + rho I)^-1 v for v (K, M, N), where M <= F."""
        assert self.A is not None
        return _product(self.A, V).div_(self.rho)

    def step(
        self, start: Tensor, w: Tensor, threshold: float, *, out: Tensor | None = None, v: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step from w, where `start` is the ridge solution, without gradient: w of the next step, in `out`, and v.

        With c = clamp(w) = w - y and v = w - 2 c, in the buffer `v`, which may be w, it is start + c + A v.
        """
        after = torch.clamp(w, -threshold, threshold, out=out)
        v = torch.sub(w, after, alpha=2, out=v)
        return self.add_shrunk(after.add_(start), v), v

    def add_shrunk(self, sum_: Tensor, V: Tensor) -> Tensor:
        """sum_ + A v, in place."""
        if self.A is not None:
            return _add_product(sum_, self.A, V)
        assert self.thin is not None and self.back is not None
        return sum_.add_(V).sub_(_product(self.back, _product(self.thin, V)))

    def reflect(self) -> Callable[[Tensor], Tensor]:
        """The map v -> v - 2 A v."""
        if self.A is not None:
            matrix = _eye(self.D) - 2 * self.A
            return lambda V: _product(matrix, V)
        thin, back = self.thin, self.back
        assert thin is not None and back is not None
        return lambda V: _product(back, _product(thin, V)).mul_(2).sub_(V)


def _eye(D: Tensor) -> Tensor:
    return torch.eye(D.shape[2], dtype=D.dtype, device=D.device)


def _formed(D: Tensor, rho: float) -> tuple[Tensor, ...]:
    """Of dictionaries (K, F, M): A where M <= F; else (D D' + rho I)^-1, and A or, where M >= 2 F, the thin factor."""
    # In float64, at little more cost: what is lost in a nearly singular system is lost in every step.
    D64 = D if D.device.type == "mps" else D.double()  # Apple's GPUs have none
    _, features, atoms = D.shape
    if atoms <= features:
        return (_inverse(D64.mT @ D64, rho).mul_(rho).to(D),)
    # Woodbury: (D'D + rho I)^-1 = (I - D'(DD' + rho I)^-1 D) / rho.
    inverse = _inverse(D64 @ D64.mT, rho)
    thin = inverse @ D64
    return inverse.to(D), (thin if atoms >= 2 * features else _eye(D64) - D64.mT @ thin).to(D)


def _inverse(gram: Tensor, rho: float) -> Tensor:
    """(gram + rho I)^-1; changes gram."""
    gram.diagonal(dim1=1, dim2=2).add_(rho)
    # `cholesky` would wait for the device; a failed factor becomes NaN, which the training loop reports.
    factor, failed = torch.linalg.cholesky_ex(gram)
    factor.masked_fill_((failed > 0)[:, None, None], torch.nan)
    # It comes column by column; products would copy it at every step.
    return torch.cholesky_inverse(factor).contiguous()


def _product(A: Tensor, V: Tensor) -> Tensor:
    """A @ V for (K, ., .), without gradient."""
    return _as_convolution(A, V) if _convolves(A) else A @ V


def _add_product(sum_: Tensor, A: Tensor, V: Tensor) -> Tensor:
    """sum_ + A @ V, in place."""
    return sum_.add_(_as_convolution(A, V)) if _convolves(A) else sum_.baddbmm_(A, V)


def _convolves(A: Tensor) -> bool:
    """Whether products go to oneDNN: twice as fast as MKL, which lies under `bmm`, on an AMD processor with AVX-512.

    torch calls it for convolutions only, those of width 1 with more than one thread; a transposed A would be copied.
    """
    fits = A.device.type == "cpu" and A.dtype == torch.float32 and A.is_contiguous() and torch.get_num_threads() > 1
    return fits and torch.backends.mkldnn.is_available()


def _as_convolution(A: Tensor, V: Tensor) -> Tensor:
    """A @ V for (K, ., .) as a convolution of width 1 in K groups."""
    groups, rows, inner = A.shape
    product = F.conv1d(V.reshape(1, groups * inner, -1), A.reshape(groups * rows, inner, 1), groups=groups)
    return product.view(groups, rows, -1)


@dataclass(frozen=True)
class _Plan:
    lam: float
    rho: float
    steps: int
    also: frozenset[int]
    tol: float | None

    @property
    def threshold(self) -> float:
        return self.lam / self.rho


# Step at which samples end, and which they are, (K, 1, N); None for all.
_End = tuple[int, Tensor | None]


def _iterate(
    system: RidgeSystem, start: Tensor, S: Tensor, plan: _Plan, keep: list[Tensor] | None
) -> tuple[Tensor, list[Tensor], list[_End]]:
    """w of each sample's last step, the codes of the steps in `also`, and where samples ended.

    keep: gets w of every `_KEEP_EVERY`th step.
    """
    threshold, last = plan.threshold, plan.steps - 1
    w, earlier = start, []
    ends: list[_End] = []
    v = final = running = None
    for step in range(plan.steps):
        kept = keep is not None and step % _KEEP_EVERY == 0
        if keep is not None and kept:
            keep.append(w)
        if step in plan.also:
            earlier.append(soft(w, threshold))
        if step == last:
            break
        if plan.tol is not None and step % _LOOK_EVERY == _LOOK_EVERY - 1:
            done = (lasso_gap(system.D, S, soft(w, threshold), plan.lam) <= plan.tol * plan.lam)[:, None]
            if running is None or final is None:
                running, final = torch.ones_like(done), w.clone()
            final = torch.where(running, w, final)
            ends.append((step, running & done))
            running = running & ~done
            if not running.any():
                return final, earlier, ends
        if kept or w is start:
            w, v = system.step(start, w, threshold, v=v)
        else:
            w, v = system.step(start, w, threshold, out=v, v=w)
    ends.append((last, running))
    return w if running is None or final is None else torch.where(running, w, final), earlier, ends


class _Unrolled(torch.autograd.Function):
    """(D, S) -> codes, then those of the earlier steps asked for. Keeps w of some steps and nothing else of its size.

    Where |w| is at most the threshold, y = 0, so c = w and v = -w; elsewhere c is constant and v = w - 2 c. With m = 1
    there and 0 elsewhere, the adjoint g of w therefore goes from a step to the one before as

        g <- m g + (1 - 2 m) A g = (g + r) / 2 - (1 - m) r,    r = g - 2 A g,

    that of the ridge solution is the sum of all g, and that of A the sum of g v' with the g after and the v before.
    """

    @staticmethod
    def forward(ctx: Any, D: Tensor, S: Tensor, system: RidgeSystem, plan: _Plan) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        last, earlier, ctx.ends = _iterate(system, system.solve(S), S, plan, kept)
        ctx.save_for_backward(D, S, *kept)
        ctx.system, ctx.plan = system, plan
        ctx.set_materialize_grads(False)
        return soft(last, plan.threshold), *earlier

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_codes: Tensor | None, *of_earlier: Tensor | None) -> tuple[Tensor | None, ...]:
        D, S, *kept = ctx.saved_tensors
        threshold, last = ctx.plan.threshold, ctx.ends[-1][0]
        arriving = list(zip(sorted(ctx.plan.also), of_earlier, strict=False))
        if of_codes is not None:
            arriving += [(step, of_codes if which is None else of_codes * which) for step, which in ctx.ends]
        with torch.autocast(D.device.type, enabled=False):
            reflect = ctx.system.reflect()
            of_map = _MapGradient(ctx.system) if ctx.needs_input_grad[0] else None
            g, of_start, v = (torch.zeros_like(kept[0]) for _ in range(3))
            for step, w in _backwards(ctx.system, kept, threshold, last, v):
                if step < last:
                    if of_map is not None:
                        torch.sub(w, w.clamp(-threshold, threshold), alpha=2, out=v)
                        of_map.add(g, v)
                    r = reflect(g)
                    g = g.lerp_(r, 0.5).sub_(soft_adjoint(r, w, threshold))
                for at, gradient in arriving:
                    if at == step and gradient is not None:
                        g += soft_adjoint(gradient, w, threshold)
                of_start += g
            of_D, of_S = _system_gradients(ctx.system, D, S, kept[0], of_start, of_map)
        return of_D, of_S if ctx.needs_input_grad[1] else None, None, None


def _backwards(
    system: RidgeSystem, kept: list[Tensor], threshold: float, last: int, v: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """(step, w) from step `last` to 0, those between the kept ones made again; v: a buffer."""
    start = kept[0]
    for first in range(last - last % _KEEP_EVERY, -1, -_KEEP_EVERY):
        found = [kept[first // _KEEP_EVERY]]
        while len(found) < _KEEP_EVERY and first + len(found) <= last:
            found.append(system.step(start, found[-1], threshold, v=v)[0])
        while found:
            yield first + len(found) - 1, found.pop()


class _MapGradient:
    """Gathers E = sum of g v' + v g' over steps, whose half is the gradient of the symmetric map A."""

    def __init__(self, system: RidgeSystem):
        self._system = system
        shape = system.D.shape if system.A is None else system.A.shape
        self._sum = system.D.new_zeros(shape)

    def add(self, g: Tensor, v: Tensor) -> None:
        thin = self._system.thin
        if thin is None:
            _add_product(self._sum, g, v.mT)
        else:
            _add_product(self._sum, _product(thin, g), v.mT)
            _add_product(self._sum, _product(thin, v), g.mT)

    def seen_through(self, ridge_map: Tensor) -> Tensor:
        """ridge_map @ E @ A, for ridge_map = D (D'D + rho I)^-1."""
        A, D = self._system.A, self._system.D
        if A is not None:
            return _product(_product(ridge_map, self._sum + self._sum.mT), A)
        return self._sum - _product(_product(self._sum, D.mT), ridge_map)


def _system_gradients(
    system: RidgeSystem, D: Tensor, S: Tensor, start: Tensor, of_start: Tensor, of_map: _MapGradient | None
) -> tuple[Tensor | None, Tensor]:
    """Gradients of D, unless of_map is None, and S, from those of the ridge solution `start` and of the map A.

    With R = (D'D + rho I)^-1, dR = -R (dD'D + D'dD) R. So the ridge solution R D's hands (s - D start) (R g)' - (D R g)
    start' to D and D R g to s; and A = rho R hands -D R E A to D. For M > F, (s - D start) = rho (DD' + rho I)^-1 s.
    """
    if system.inverse is None:
        solved = system.small_inverse(of_start)
        of_S = _product(D, solved)
        if of_map is None:
            return None, of_S
        assert system.A is not None
        ridge_map = _product(D, system.A).div_(system.rho)
        of_D = _product(S - _product(D, start), solved.mT)
    else:
        ridge_map = _product(system.inverse, D) if system.thin is None else system.thin
        of_S = _product(ridge_map, of_start)
        if of_map is None:
            return None, of_S
        of_D = _product(_product(system.inverse, S), system.add_shrunk(torch.zeros_like(of_start), of_start).mT)
    return of_D - _product(of_S, start.mT) - of_map.seen_through(ridge_map), of_S
