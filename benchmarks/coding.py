"""Coding draws of images in fixed dictionaries, and the CSI_sr score.

Letters: N images, T draws, K shifts, F feature size, M atoms.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Part
from benchmarks.dictionary import bank_of, code_in_every, own_masks
from evals.coding import Outputs, code_in_all, code_outputs, reconstruction_error
from evals.extract import add_outputs, mean_outputs
from evals.scores import CsiSparseScore, fit_csi_sr
from models.sparse.dictionary import DictionaryBank
from models.sparse.prox import lasso_objective

_STEPS, _TRAINING, _BATCH = 40, 100, 50


@dataclass(frozen=True)
class Given:
    """What both sides start from: features s (T, N, K, F) and logits (T, N, K, K) of all draws, and weights (K,)."""

    D_KFM: Tensor
    s_TNKF: Tensor
    shift_TNKK: Tensor
    error_weight_K: Tensor
    shift_weight_K: Tensor


@dataclass(frozen=True)
class Size:
    """Published: ten draws of 1000 images under five shifts, in batches of 50 images."""

    images: int = 1000
    draws: int = 10
    shifts: int = 5
    features: int = 512
    atoms: int = 512

    def __str__(self) -> str:
        return f"{self.images} images x {self.draws} draws x {self.shifts} shifts, F {self.features}, M {self.atoms}"

    def given(self, device: torch.device) -> Given:
        """Random dictionaries, features as a ReLU leaves them that differ a little by draw, and logits."""
        gen = torch.Generator().manual_seed(0)
        D = F.normalize(torch.rand(self.shifts, self.features, self.atoms, generator=gen), dim=1).to(device)
        shape = (self.images, self.shifts, self.features)
        image = torch.randn(shape, generator=gen)
        noise = (torch.randn(shape, generator=gen) for _ in range(self.draws))
        s = torch.stack([F.normalize((image + 0.3 * x).relu(), dim=2) for x in noise]).to(device)
        shift = torch.randn(self.draws, self.images, self.shifts, self.shifts, generator=gen).to(device)
        shift = shift + 3 * torch.eye(self.shifts, device=device)
        # The score's weights, of some images taken for the training set.
        bank = bank_of(D, _STEPS).requires_grad_(False)
        train = code_outputs(bank, s[0, :_TRAINING], bank.system())
        error = reconstruction_error(D, train["s"], train["codes"])
        fitted = fit_csi_sr({"error": error, "shift": shift[0, :_TRAINING]})
        return Given(D, s, shift, fitted.error_weight, fitted.shift_weight)


def ours(bank: DictionaryBank, given: Given) -> Tensor:
    """Scores (N,), as the evaluation makes them: in its own dictionary each, and batch by batch of the images."""
    score = CsiSparseScore(given.error_weight_K, given.shift_weight_K)
    scores = []
    with torch.no_grad():
        system = bank.system()
        for s_TBKF, shift_TBKK in zip(given.s_TNKF.split(_BATCH, 1), given.shift_TNKK.split(_BATCH, 1), strict=True):
            sums: Outputs = {}
            for s, shift in zip(s_TBKF, shift_TBKK, strict=True):
                add_outputs(sums, {**code_outputs(bank, s, system), "shift": shift})
            means = mean_outputs(sums, len(s_TBKF))
            error = reconstruction_error(given.D_KFM, means["s"], means["codes"])
            scores.append(score({"error": error, "shift": means["shift"]}))
    return torch.cat(scores)


def published(given: Given) -> Tensor:
    """Scores (N,) by the published formulation: every view in all K dictionaries with a solve in each step, what comes
    of every draw kept as five dense tensors on the CPU, and a loop over images for the scores.

    Source: section 8 of the specification of ADMM-SRNet (Chiou et al. 2023), written from its description.
    """
    with torch.no_grad():
        kept = [torch.cat(x) for x in zip(*_coded_batches(given), strict=True)]
        s_NTKF, codes_NTKM, shift_NTKK, _, _ = kept
        D, error_weight, shift_weight = (x.cpu() for x in (given.D_KFM, given.error_weight_K, given.shift_weight_K))
        scores = []
        for s, codes, shift in zip(s_NTKF, codes_NTKM, shift_NTKK, strict=True):
            s, codes, shift = s.mean(0), codes.mean(0), shift.mean(0)
            score = torch.zeros(())
            for k in range(len(s)):
                error = (s[k] - D[k] @ codes[k]).square().sum()
                score = score - error * error_weight[k] + shift[k, k] * shift_weight[k]
            scores.append(score / len(s))
        return torch.stack(scores)


def _coded_batches(given: Given) -> Iterator[tuple[Tensor, ...]]:
    """Of each batch of images the features, own codes, logits, reconstructions and errors of all its draws."""
    shifts = len(given.D_KFM)
    for s_TBKF, shift_TBKK in zip(given.s_TNKF.split(_BATCH, 1), given.shift_TNKK.split(_BATCH, 1), strict=True):
        of_draws = []
        for s_BKF, shift_BKK in zip(s_TBKF, shift_TBKK, strict=True):
            s_FV = s_BKF.flatten(0, 1).T
            codes_KMV = code_in_every(given.D_KFM, s_FV, _STEPS)
            rebuilt_KFV = given.D_KFM @ codes_KMV
            mask_KV = own_masks([k for _ in s_BKF for k in range(shifts)], given.D_KFM)
            codes_VM, rebuilt_VF = ((x * mask_KV[:, None]).sum(0).T for x in (codes_KMV, rebuilt_KFV))
            error_VF = (s_FV.T - rebuilt_VF).square()
            blocks = (x.unflatten(0, (-1, shifts)) for x in (s_FV.T, codes_VM, rebuilt_VF, error_VF))
            s, codes, rebuilt, error = blocks
            of_draws.append([x.cpu() for x in (s, codes, shift_BKK, rebuilt, error)])
        yield tuple(torch.stack(x, 1) for x in zip(*of_draws, strict=True))


def part(device: torch.device, size: Size = Size()) -> Part:  # noqa: B008
    """Coding and scores of an evaluation with features given; the published side goes in the same batches."""
    given = size.given(device)
    bank = bank_of(given.D_KFM, _STEPS).requires_grad_(False)

    def check(found: Tensor, theirs: Tensor) -> str:
        found = found.cpu()
        torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4)
        return f"scores equal to {float((found - theirs).abs().max() / theirs.abs().max()):.0e}, float32"

    return Part(
        "coding and scores",
        f"{size}, {_STEPS} steps",
        lambda: ours(bank, given),
        lambda: published(given),
        check,
    )


def cross_draws_part(device: torch.device, size: Size = Size(images=200)) -> Part:  # noqa: B008
    """What `CSI_srm` takes of an evaluation, all draws: objectives (N, K, K).

    Ours codes each draw in its own dictionary, as every score has it, and the average of the draws in every one. The
    published formulation codes each draw in every dictionary, then takes the objectives of averaged codes, which are
    larger where codes are optimal, since an average of codes is not the best code of the average.
    """
    given = size.given(device)
    bank = bank_of(given.D_KFM, _STEPS).requires_grad_(False)

    def ours() -> Tensor:
        system, parts = bank.system(), []
        with torch.no_grad():
            for s_TBKF in given.s_TNKF.split(_BATCH, 1):
                sums: Outputs = {}
                for s in s_TBKF:
                    add_outputs(sums, code_outputs(bank, s, system))
                parts.append(code_in_all(bank, mean_outputs(sums, len(s_TBKF))["s"], system).objective)
        return torch.cat(parts)

    def published() -> Tensor:
        parts = []
        with torch.no_grad():
            for s_TBKF in given.s_TNKF.split(_BATCH, 1):
                codes = [code_in_every(given.D_KFM, s.flatten(0, 1).T, _STEPS) for s in s_TBKF]
                s_FV = s_TBKF.mean(0).flatten(0, 1).T
                cost_KV = lasso_objective(given.D_KFM, s_FV, torch.stack(codes).mean(0), bank.coding.lam)
                parts.append(cost_KV.unflatten(1, s_TBKF.shape[1:3]).permute(1, 2, 0))
        return torch.cat(parts)

    def check(found: Tensor, theirs: Tensor) -> str:
        more = theirs / found - 1
        assert more.abs().mean() < 0.1, more
        return f"objectives of averaged codes larger by {100 * float(more.mean()):.1f} % in the mean"

    return Part(
        "own codes of all draws, averages in every dictionary", f"{size}, {_STEPS} steps", ours, published, check
    )


def cross_part(device: torch.device, size: Size = Size(draws=1)) -> Part:  # noqa: B008
    """Every view coded in every dictionary, for sparse-representation classification: objectives (N, K, K)."""
    given = size.given(device)
    bank = bank_of(given.D_KFM, _STEPS).requires_grad_(False)
    s_NKF = given.s_TNKF[0]

    def ours() -> Tensor:
        return code_in_all(bank, s_NKF, bank.system()).objective

    def published() -> Tensor:
        parts = []
        for s_BKF in s_NKF.split(_BATCH):
            s_FV = s_BKF.flatten(0, 1).T
            codes_KMV = code_in_every(given.D_KFM, s_FV, _STEPS)
            cost_KV = lasso_objective(given.D_KFM, s_FV, codes_KMV, bank.coding.lam)
            parts.append(cost_KV.unflatten(1, s_BKF.shape[:2]).permute(1, 2, 0))
        return torch.cat(parts)

    def check(found: Tensor, theirs: Tensor) -> str:
        torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4)
        return f"objectives equal to {float((found - theirs).abs().max() / theirs.abs().max()):.0e}, float32"

    return Part("every view in every dictionary", f"{size}, {_STEPS} steps", ours, published, check)
