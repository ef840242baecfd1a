"""The dictionaries of stage 2, one per shift, and the settings of the coding.

Dimension letters: see `models`.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.flags import Spec, flag
from models.sparse.admm import RidgeSystem, SparseCode, admm_lasso
from models.sparse.prox import lambda_max

# What is told of codes: the optimality gap relative to lambda, the share of zeros, lambda as a share of lambda_max.
CODE_FACTS = ("gap", "zeros", "lambda_share")
# Mean optimality gap relative to lambda, above which codes are said to be far from optimal.
FAR = 0.1
# Multiples of rho among which `choose_rho` chooses; samples of each dictionary that it codes, and steps, at most; and
# how many times as many steps it tries where these are too few.
_MULTIPLES, _SAMPLES, _STEPS, _TIMES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), 500, 100, (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class CodingSpec:
    """Settings of `admm_lasso`.

    lam: l1 weight. rho: ADMM penalty. steps: unrolled ADMM steps. tol: a sample stops earlier once its gap is at most
    tol * lam.
    """

    lam: float
    rho: float
    steps: int
    tol: float | None = None


@dataclass(frozen=True)
class SparseSpec(Spec, group="stage 2: dictionaries"):
    """Dictionaries and their coding; field names are flag names."""

    sr_dict_size: int = flag(512, "atoms of each dictionary (M)", above=0, origin="fixed")
    sr_lambda: float = flag(0.01, "l1 weight inside the coding problem", above=0, origin="network")
    sr_lambda_rel: float | None = flag(
        None,
        "in place of --sr_lambda: a share of the median |D's|_inf of training features, where codes become zero",
        type=float,
        above=0,
        at_most=1,
    )
    sr_rho: float = flag(1.0, "ADMM penalty", above=0, origin="network")
    sr_rho_auto: bool = flag(
        False, "choose the penalty, among multiples of --sr_rho, by the gap of codes of training features"
    )
    sr_admm_stage: int = flag(40, "unrolled ADMM steps", above=0, origin="network")

    @property
    def coding(self) -> CodingSpec:
        return CodingSpec(lam=self.sr_lambda, rho=self.sr_rho, steps=self.sr_admm_stage)


@dataclass(frozen=True)
class ToleranceSpec(Spec, group="stage 2: dictionaries"):
    """When to stop coding before the last step."""

    sr_tol: float | None = flag(
        None, "evaluation: stop coding at this optimality gap, relative to lambda", type=float, above=0
    )


class DictionaryBank(nn.Module):
    """K dictionaries of M atoms for features of size F; parameter `dictionary` (K, F, M).

    The initial atoms are uniform in [0, 1), scaled to unit norm. The buffers `rho` and `lambdaV`, named as published,
    store the settings on which the codes depend in the state dict.
    """

    rho: Tensor
    lambdaV: Tensor

    def __init__(
        self, dictionaries: int, features: int, atoms: int, coding: CodingSpec, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.coding = coding
        atoms_KFM = torch.rand(dictionaries, features, atoms, generator=generator)
        self.dictionary = nn.Parameter(F.normalize(atoms_KFM, dim=1))
        self.register_buffer("rho", torch.tensor(float(coding.rho)))
        self.register_buffer("lambdaV", torch.tensor(float(coding.lam)))
        self.register_load_state_dict_post_hook(_take_settings)

    def code(self, s_KFN: Tensor, also: Collection[int] = (), system: RidgeSystem | None = None) -> SparseCode:
        """Code each sample in the dictionary of its shift: s (K, F, N) -> codes (K, M, N).

        also, system: as in `admm_lasso`.
        """
        spec = self.coding
        return admm_lasso(
            self.dictionary,
            s_KFN,
            lam=spec.lam,
            rho=spec.rho,
            steps=spec.steps,
            also=also,
            tol=spec.tol,
            system=system,
        )

    def system(self) -> RidgeSystem:
        """The system of the current dictionaries, for coding several batches."""
        return RidgeSystem.of(self.dictionary, self.coding.rho)

    def facts(self, s: Tensor, code: SparseCode) -> dict[str, Tensor]:
        """`CODE_FACTS` of codes of samples s (K, F, N), (K, N) each. lambda is at most 1 / eps of lambda_max."""
        lam = self.coding.lam
        with torch.autocast(s.device.type, enabled=False):
            largest = lambda_max(self.dictionary, s.to(self.dictionary)).clamp_min(
                lam * torch.finfo(code.gap.dtype).eps
            )
        values = code.gap / lam, (code.codes == 0).to(code.gap).mean(1), lam / largest
        return dict(zip(CODE_FACTS, values, strict=True))

    def set_lambda(self, lam: float) -> None:
        """Code with another l1 weight from now on."""
        self.lambdaV.fill_(lam)
        self.follow_buffers()

    @torch.no_grad()
    def choose_rho(self, s_KFN: Tensor) -> str:
        """Code from now on with the multiple of rho by which codes of samples s come nearest to optimal, in as many
        steps as they have, or 100. Returns a line on it, with the number of steps that would do, where these do not.
        """
        before, s_KFN = self.coding, s_KFN[:, :, :: -(-s_KFN.shape[2] // _SAMPLES)]
        steps = min(before.steps, _STEPS)
        gaps = {rho: self._gap(s_KFN, rho, steps) for rho in (multiple * before.rho for multiple in _MULTIPLES)}
        rho = min(gaps, key=gaps.__getitem__)
        self.rho.fill_(rho)
        self.follow_buffers()
        was = f"{before.rho:.3g} gives {gaps[before.rho]:.2g}"
        line = f"rho {rho:.3g}: mean optimality gap {gaps[rho]:.2g} lambda in {steps} steps, where {was}"
        if gaps[rho] <= FAR or before.tol is not None:  # With a tolerance there are more steps than are taken.
            return line
        for times in _TIMES:
            more = times * before.steps
            if (gap := self._gap(s_KFN, rho, more)) <= FAR:
                return f"{line}; {more} steps (--sr_admm_stage) give {gap:.2g}" if times > 1 else line
        return f"{line}; {more} steps (--sr_admm_stage) still give {gap:.2g}"

    def _gap(self, s_KFN: Tensor, rho: float, steps: int) -> float:
        """The mean optimality gap of codes relative to lambda, after so many steps with this rho."""
        lam = self.coding.lam
        return (admm_lasso(self.dictionary, s_KFN, lam=lam, rho=rho, steps=steps).gap.mean() / lam).item()

    def follow_buffers(self) -> None:
        """Code with the lambda and rho of the buffers; what a float32 has rounded stays as it was."""
        coding, lam, rho = self.coding, float(self.lambdaV), float(self.rho)
        lam = coding.lam if isclose(lam, coding.lam, rel_tol=1e-6) else lam
        rho = coding.rho if isclose(rho, coding.rho, rel_tol=1e-6) else rho
        self.coding = replace(coding, lam=lam, rho=rho)

    @torch.no_grad()
    def set_atoms(self, atoms_KFM: Tensor, norm: float) -> None:
        """Copy atoms (K, F, M), scaled to `norm`, into the existing parameter, so that optimisers keep training it.

        Zero atoms stay zero.
        """
        self.dictionary.copy_(F.normalize(atoms_KFM, dim=1) * norm)


def _take_settings(bank: DictionaryBank, keys: Any) -> None:
    """Code with the settings of a state dict that was loaded."""
    bank.follow_buffers()
