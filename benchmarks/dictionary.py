"""The dictionary step of stage 2: coding, loss and the gradient of the dictionaries.

Letters: K dictionaries, F feature size, M atoms, B samples of each shift, N = K B samples, T steps.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Part, distance
from models.sparse.dictionary import CodingSpec, DictionaryBank
from training.modes.cocsr_dict import DictionaryLossSpec, dictionary_step

_LAM, _RHO, _L1, _CONSTRAINT = 0.01, 1.0, 0.01, 0.1
# Draws of features and dictionaries over which rounding is compared: where a code is near the kink of the l1 norm,
# rounding turns it over or does not, and a single draw's error is luck.
_DRAWS = 5
_LOSS = DictionaryLossSpec(1.0, _L1, _CONSTRAINT, 0, 1.0, False, None)


@dataclass(frozen=True)
class Size:
    """Published: five shifts of ResNet-18 features, a batch of 128 images."""

    shifts: int = 5
    features: int = 512
    atoms: int = 512
    batch: int = 128
    steps: int = 40

    def __str__(self) -> str:
        return f"K {self.shifts}, F {self.features}, M {self.atoms}, {self.shifts} x {self.batch}, {self.steps} steps"

    def inputs(self, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Dictionaries (K, F, M) like those that training starts with, and features (K, F, B) as a ReLU leaves them.

        Atoms have norms from 0.9 to 1.1: at 1 the constraint has a kink, where any rounding turns its gradient over.
        """
        gen = torch.Generator().manual_seed(seed)
        D = F.normalize(torch.rand(self.shifts, self.features, self.atoms, generator=gen), dim=1)
        D = D * (0.9 + 0.2 * torch.rand(self.shifts, 1, self.atoms, generator=gen))
        s = F.normalize(torch.randn(self.shifts, self.features, self.batch, generator=gen).relu(), dim=1)
        return D.to(device, dtype), s.to(device, dtype)


Result = tuple[Tensor, Tensor]


def ours(bank: DictionaryBank, s_KFB: Tensor) -> Result:
    """Loss, and its gradient in the dictionaries."""
    loss = torch.stack(list(dictionary_step(bank, s_KFB, _LOSS).losses.values())).sum()
    (gradient,) = torch.autograd.grad(loss, bank.dictionary)
    return loss.detach(), gradient


def plain_autograd(D_KFM: Tensor, s_KFB: Tensor, steps: int) -> Result:
    """The same blocks and the same maps as ours, left to autograd: one inverse, then matrix products."""
    D = D_KFM.detach().requires_grad_()
    inverse = torch.linalg.inv(D.mT @ D + _RHO * torch.eye(D.shape[2], dtype=D.dtype, device=D.device))
    start = inverse @ (D.mT @ s_KFB)
    w, y = start, F.softshrink(start, _LAM / _RHO)
    for _ in range(steps - 1):
        w = start + _RHO * (inverse @ (2 * y - w)) + (w - y)
        y = F.softshrink(w, _LAM / _RHO)
    loss = (s_KFB - D @ y).square().sum() + _L1 * y.abs().sum() + _CONSTRAINT * (D.norm(dim=1) - 1).abs().sum()
    (gradient,) = torch.autograd.grad(loss, D)
    return loss.detach(), gradient


def published(D_KFM: Tensor, s_KFB: Tensor, steps: int) -> Result:
    """The published formulation: every sample in every dictionary, a solve in each step, masks for its own, and the
    loss read.

    Source: section 7 of the specification of ADMM-SRNet (Chiou et al. 2023), written from its description.
    """
    D = D_KFM.detach().requires_grad_()
    shifts, _, batch = s_KFB.shape
    s_FN = s_KFB.transpose(0, 1).flatten(1)
    y = code_in_every(D, s_FN, steps)
    error = (s_FN - D @ y).square().sum(1)
    size = y.abs().sum(1)
    mask = own_masks([k for k in range(shifts) for _ in range(batch)], D)
    norms = (D.norm(dim=1) - 1).abs().sum()
    loss = (error * mask).sum() + _L1 * (size * mask).sum() + _CONSTRAINT * norms
    (gradient,) = torch.autograd.grad(loss, D)
    loss.item()
    return loss.detach(), gradient


def own_masks(labels: Sequence[int], D_KFM: Tensor) -> Tensor:
    """(K, N), 1 where a dictionary is that of the sample, made in Python."""
    masks = torch.zeros(len(D_KFM), len(labels), dtype=D_KFM.dtype)
    for sample, label in enumerate(labels):
        masks[label, sample] = 1
    return masks.to(D_KFM.device)


def code_in_every(D_KFM: Tensor, s_FN: Tensor, steps: int, *, lam: float = _LAM, rho: float = _RHO) -> Tensor:
    """Codes (K, M, N) of samples (F, N) in all dictionaries, or (K, F, N), by the three lines of the specification."""
    eye = torch.eye(D_KFM.shape[2], dtype=D_KFM.dtype, device=D_KFM.device)
    factor = torch.linalg.cholesky(D_KFM.mT @ D_KFM + rho * eye)
    projected = D_KFM.mT @ s_FN
    y = u = torch.zeros_like(projected)
    for _ in range(steps):
        x = torch.cholesky_solve(projected + rho * (y - u), factor)
        y = F.softshrink(x + u, lam / rho)
        u = u + x - y
    return y


def bank_of(D_KFM: Tensor, steps: int) -> DictionaryBank:
    """Our dictionaries with given atoms."""
    shifts, features, atoms = D_KFM.shape
    bank = DictionaryBank(shifts, features, atoms, CodingSpec(_LAM, _RHO, steps)).to(D_KFM)
    with torch.no_grad():
        bank.dictionary.copy_(D_KFM)
    return bank


def part(device: torch.device, size: Size = Size()) -> Part:  # noqa: B008
    """One step of training the dictionaries."""
    D, s = size.inputs(device)
    bank = bank_of(D, size.steps)

    def check(found: Result, theirs: Result) -> str:
        """Agreement in float64, and no more rounding than theirs in float32, by the medians of several draws."""
        bank64, (D64, s64) = bank_of(D.double(), size.steps), (x.double() for x in (D, s))
        exact, worst = ours(bank64, s64), 0.0
        for other in (published(D64, s64, size.steps), plain_autograd(D64, s64, size.steps)):
            for a, b in zip(exact, other, strict=True):
                torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
                worst = max(worst, float((a - b).abs().max() / b.abs().max()))
        errors = [[distance(x, e) for r in (found, theirs) for x, e in zip(r, exact, strict=True)]]
        for seed in range(1, _DRAWS):
            D_, s_ = size.inputs(device, seed=seed)
            exact = ours(bank_of(D_.double(), size.steps), s_.double())
            both = ours(bank_of(D_, size.steps), s_), published(D_, s_, size.steps)
            errors.append([distance(x, e) for r in both for x, e in zip(r, exact, strict=True)])
        loss, gradient, their_loss, their_gradient = (statistics.median(column) for column in zip(*errors, strict=True))
        # A loss right to the last bits of float32 is as right as it can be.
        assert loss <= max(their_loss, 1e-6) and gradient <= max(their_gradient, 1e-6), errors
        return (
            f"float64: equal to {worst:.0e}; float32 error of loss {loss:.0e} (published {their_loss:.0e}),"
            f" of gradient {gradient:.1e} (published {their_gradient:.1e})"
        )

    return Part(
        "dictionary step",
        str(size),
        lambda: ours(bank, s),
        lambda: published(D, s, size.steps),
        check,
    )
