"""Dictionary learning on given features, without training a network.

Dimension letters: see `models`.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.sparse.admm import RidgeSystem
from models.sparse.prox import lasso_objective, soft

# ADMM steps on the codes between two updates of the dictionary; they go on from where the last ones stopped.
_CODE_STEPS = 10
_LOOK_EVERY = 10


def learn_dictionary(
    S: Tensor, atoms: int, *, lam: float, rho: float, steps: int, generator: Generator, tol: float = 1e-4
) -> Tensor:
    """Minimise sum 0.5 |s - D a|^2 + lam |a|_1 over codes and dictionaries of atoms no longer than 1: D (K, F, M).

    S (K, F, N). Alternates ADMM steps on the codes with one round of block coordinate descent over the atoms, which
    solves the least-squares problem of each atom exactly with the others fixed. The initial atoms are samples chosen by
    `generator`, a CPU generator. An atom that no sample uses is replaced by the sample with the largest residual.
    Stops after `steps` rounds, or when ten rounds lower the objective by less than the fraction `tol`.
    Source: in place of the BPDN dictionary learning of Lee et al. (ICS 2020); the update is that of Mairal et al.
    (JMLR 2010).
    """
    D = starting_dictionary(S, atoms, generator)
    w, before = None, torch.inf
    for step in range(steps):
        system = RidgeSystem.of(D, rho)
        solution = system.solve(S)
        w = solution if w is None else w
        v = None
        for _ in range(_CODE_STEPS):
            w, v = system.step(solution, w, lam / rho, out=v, v=None if w is solution else w)
        codes = soft(w, lam / rho)
        D = update_atoms(D, S, codes)
        if step % _LOOK_EVERY == _LOOK_EVERY - 1:
            now = float(objective(D, S, codes, lam).sum())
            if before - now < tol * now:
                break
            before = now
    return D


def objective(D: Tensor, S: Tensor, codes: Tensor, lam: float) -> Tensor:
    """0.5 |S - D A|^2 + lam |A|_1 of each dictionary, (K,)."""
    return lasso_objective(D, S, codes, lam).sum(1)


def update_atoms(D: Tensor, S: Tensor, codes: Tensor) -> Tensor:
    """New dictionaries (K, F, M), one round over the atoms: least squares with the others fixed, norm at most 1."""
    A = codes @ codes.mT
    used = A.diagonal(dim1=1, dim2=2)
    # The n-th unused atom gets the sample with the n-th largest residual.
    worst = (S - D @ codes).square().sum(1).argsort(dim=1, descending=True)
    rank = ((used <= 0).cumsum(1) - 1).clamp_min(0) % S.shape[2]
    spare = F.normalize(S.gather(2, worst.gather(1, rank)[:, None, :].expand(-1, S.shape[1], -1)), dim=1).mT
    # Atoms as rows; `left` is the residual times codes', updated after each atom by one outer product.
    rows = D.mT.clone()
    left = codes @ S.mT - A @ rows
    for j in range(D.shape[2]):
        atom = rows[:, j] + left[:, j] / used[:, j, None].clamp_min(1e-12)
        atom = atom / atom.norm(dim=1, keepdim=True).clamp_min(1)
        atom = torch.where(used[:, j, None] > 0, atom, spare[:, j])
        left.baddbmm_(A[:, :, j, None], (atom - rows[:, j])[:, None], alpha=-1)
        rows[:, j] = atom
    return rows.mT.contiguous()


def starting_dictionary(S: Tensor, atoms: int, generator: Generator) -> Tensor:
    """Initial atoms: samples of unit norm with a little noise, which keeps atoms distinct where samples repeat."""
    k, features, n = S.shape
    chosen = torch.stack([torch.randperm(max(n, atoms), generator=generator)[:atoms] % n for _ in range(k)])
    D = S.gather(2, chosen.to(S.device)[:, None, :].expand(-1, features, -1))
    D = F.normalize(D, dim=1)
    noise = torch.randn(k, features, atoms, generator=generator).to(S)
    return F.normalize(D + 0.1 * F.normalize(noise, dim=1), dim=1)
