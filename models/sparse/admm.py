"""The lasso by unrolled ADMM, in K dictionaries at once.

Letters: K dictionaries, F feature size, M atoms, N samples.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from models.sparse.prox import lasso_gap, soft

# Steps between looks at the optimality gap, each of which waits for the device.
_LOOK_EVERY = 20


class SparseCode(NamedTuple):
    """codes (K, M, N); gap (K, N), the largest breach of the lasso's optimality conditions, without gradient.

    also: codes (K, M, N) of the earlier steps that were asked for.
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
) -> SparseCode:
    """Code samples in dictionaries: min_a 0.5 |s - D a|^2 + lam |a|_1 by `steps` steps of ADMM from zero.

    D (K, F, M). S (K, F, N): each dictionary codes its own samples; (F, N): every dictionary codes every sample.
    lam >= 0 in squared feature units, rho > 0, steps >= 1. Differentiable in D and S through all steps.
    also: earlier steps, counted from 0, whose codes are wanted too. tol: stop before `steps` where every gap is at most
    tol * lam (looked at now and then; waits for the device).

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
        D, S = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (D, S))
        start, inverse = ridge(D, S, rho)
        w, earlier = start, []
        for step in range(steps - 1):
            y = soft(w, lam / rho)
            if step in also:
                earlier.append(y)
            if tol is not None and step % _LOOK_EVERY == _LOOK_EVERY - 1 and lasso_gap(D, S, y, lam).max() <= tol * lam:
                break
            w = start + inverse(2 * y - w) + (w - y)
        codes = soft(w, lam / rho)
        if steps - 1 in also:
            earlier.append(codes)
        with torch.no_grad():
            gap = lasso_gap(D, S, codes, lam)
    return SparseCode(codes, gap, tuple(earlier))


def ridge(D: Tensor, S: Tensor, rho: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The ridge solution (D'D + rho I)^-1 D'S, and the map v -> rho (D'D + rho I)^-1 v."""
    _, features, atoms = D.shape
    if atoms <= features:
        inverse = _inverse(D.mT @ D, rho)
        return inverse @ (D.mT @ S), lambda v: rho * (inverse @ v)
    inverse = _inverse(D @ D.mT, rho)
    # (D'D + rho I)^-1 = (I - D'(DD' + rho I)^-1 D) / rho, and applied to D's it is D'(DD' + rho I)^-1 s.
    solved = inverse @ D
    return solved.mT @ S, lambda v: v - D.mT @ (solved @ v)


def _inverse(gram: Tensor, rho: float) -> Tensor:
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # The checking form would wait for the device; a failed factor becomes NaN, which the training loop tells.
    factor, failed = torch.linalg.cholesky_ex(gram + rho * eye)
    factor = factor.masked_fill((failed > 0)[:, None, None], torch.nan)
    return torch.cholesky_solve(eye.expand_as(gram), factor)
