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

    def set_lambda(self, lam: float) -> None:
        """Code with another l1 weight from now on."""
        self.coding = replace(self.coding, lam=lam)
        self.lambdaV.fill_(lam)

    @torch.no_grad()
    def set_atoms(self, atoms_KFM: Tensor, norm: float) -> None:
        """Copy atoms (K, F, M), scaled to `norm`, into the existing parameter, so that optimisers keep training it.

        Zero atoms stay zero.
        """
        self.dictionary.copy_(F.normalize(atoms_KFM, dim=1) * norm)


def _take_settings(bank: DictionaryBank, keys: Any) -> None:
    """Code with the lambda and rho of a state dict that was loaded; what a float32 has rounded stays as it was."""
    coding, lam, rho = bank.coding, float(bank.lambdaV), float(bank.rho)
    lam = coding.lam if isclose(lam, coding.lam, rel_tol=1e-6) else lam
    rho = coding.rho if isclose(rho, coding.rho, rel_tol=1e-6) else rho
    bank.coding = replace(coding, lam=lam, rho=rho)
