"""The dictionaries of stage 2: one per shift, with the settings their codes depend on.

Letters: K dictionaries, F feature size, M atoms, N samples.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.flags import Spec, flag
from models.sparse.admm import RidgeSystem, SparseCode, admm_lasso


@dataclass(frozen=True)
class CodingSpec:
    """lam: l1 weight; rho: ADMM penalty; steps: unrolled ADMM steps, or at most so many until the gap is tol * lam."""

    lam: float
    rho: float
    steps: int
    tol: float | None = None


@dataclass(frozen=True)
class SparseSpec(Spec, group="stage 2: dictionaries"):
    """Dictionaries and their coding; field names are flag names."""

    sr_dict_size: int = flag(512, "atoms of each dictionary (M)", above=0, origin="fixed")
    sr_lambda: float = flag(0.01, "l1 weight inside the coding problem", above=0, origin="network")
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

    Starts from atoms uniform in [0, 1), scaled to unit norm. `rho` and `lambdaV` are kept in the state dict, under
    their published names, since codes mean nothing without them.
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

    def code(self, s_KFN: Tensor, also: Collection[int] = (), system: RidgeSystem | None = None) -> SparseCode:
        """Code each sample in its own shift's dictionary: s (K, F, N) -> codes (K, M, N).

        also, system: as `admm_lasso`.
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
        """The system of the dictionaries as they are now, to code several batches with."""
        return RidgeSystem.of(self.dictionary, self.coding.rho)

    @torch.no_grad()
    def set_atoms(self, atoms_KFM: Tensor, norm: float) -> None:
        """Copy atoms into the live parameter (an optimiser keeps training it), scaled to `norm`; a zero atom stays."""
        self.dictionary.copy_(F.normalize(atoms_KFM, dim=1) * norm)
