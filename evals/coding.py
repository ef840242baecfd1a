"""Coders: what an extractor makes of averaged network outputs, and the dictionaries that it does it with.

Letters: N images, K shifts, F features, M atoms.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from common.dist import SINGLE, World
from common.seed import generator
from models.feature_net import Features, FeatureTransform
from models.sparse.admm import RidgeSystem
from models.sparse.dictionary import CodingSpec, DictionaryBank, SparseSpec
from models.sparse.learn import learn_dictionary, starting_dictionary
from models.sparse.prox import lambda_max, lasso_objective

Outputs = dict[str, Tensor]

# The output of lasso objectives of every view in every dictionary.
CROSS = "cross"
# Codes in fitted dictionaries: at most so many ADMM steps, or to this gap relative to lambda (ICS 2020).
_FITTED_STEPS, _FITTED_TOL = 500, 1e-3
# Images that are coded at a time.
_TOGETHER = 4096
# Entries of a block of reconstructions, to bound their memory.
_BLOCK = 2**22


def code_outputs(bank: DictionaryBank, s: Tensor, system: RidgeSystem) -> Outputs:
    """Features s (N, K, F), each coded in the dictionary of its shift: s, codes (N, K, M), `CODE_FACTS` (N, K, 1)."""
    s_KFN = s.permute(1, 2, 0)
    code = bank.code(s_KFN, system=system)
    facts = {name: value.T[..., None] for name, value in bank.facts(s_KFN, code).items()}
    return {"s": s, "codes": code.codes.permute(2, 0, 1), **facts}


def reconstruction_error(D_KFM: Tensor, s: Tensor, codes: Tensor) -> Tensor:
    """|s - D a|^2 of features s (N, K, F) under codes (N, K, M): (N, K)."""
    s_KNF, a_KNM = s.transpose(0, 1), codes.transpose(0, 1)
    rows = max(1, _BLOCK // s_KNF[:, 0].numel())
    parts = zip(s_KNF.split(rows, 1), a_KNM.split(rows, 1), strict=True)
    return torch.cat([(s - a @ D_KFM.mT).square_().sum(2) for s, a in parts], 1).T


def with_costs(outputs: Outputs, D_KFM: Tensor, lam: float) -> Outputs:
    """Outputs s (N, K, F) and codes (N, K, M) with `error` and `objective` (N, K), of their lasso problem."""
    error = reconstruction_error(D_KFM, outputs["s"], outputs["codes"])
    return {**outputs, "error": error, "objective": 0.5 * error + lam * outputs["codes"].abs().sum(2)}


class CrossCodes(NamedTuple):
    """Of every view in every dictionary, (N, K, K): entry [n, k, j] is that of view k coded in dictionary j. gap: the
    optimality gap relative to lambda."""

    objective: Tensor
    gap: Tensor

    @property
    def outputs(self) -> Outputs:
        """`CROSS`, and as the gap of a view the mean over dictionaries, (N, K, 1)."""
        return {CROSS: self.objective, "gap": self.gap.mean(2, keepdim=True)}


def code_in_all(bank: DictionaryBank, s: Tensor, system: RidgeSystem) -> CrossCodes:
    """Code features s (N, K, F) in all dictionaries."""
    parts = []
    with torch.no_grad() if not s.requires_grad else nullcontext():
        for block in s.split(max(1, _TOGETHER // s.shape[1])):
            s_FV = block.flatten(0, 1).T
            code = bank.code(s_FV, system=system)
            cost_KV = lasso_objective(bank.dictionary, s_FV, code.codes, bank.coding.lam)
            both = (cost_KV, code.gap / bank.coding.lam)
            parts.append([x.unflatten(1, block.shape[:2]).permute(1, 2, 0) for x in both])
    return CrossCodes(*(torch.cat(x) for x in zip(*parts, strict=True)))


class Coder:
    """Leaves averaged outputs as they are. Subclasses add `error` (N, K), the squared error of features under codes,
    and `objective` (N, K), that of the lasso problem.

    lam: the l1 weight of the codes, None without any.
    """

    lam: float | None = None

    def __call__(self, outputs: Outputs) -> Outputs:
        return outputs

    def cross(self, outputs: Outputs) -> Outputs:
        """`CrossCodes` of what it has made of outputs: K times the codes."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name: with its flags, all there is to save."""
        return {}


@dataclass(frozen=True)
class TrainedDictionaries(Coder):
    """Dictionaries of stage 2, in which the network has coded every view: the error is that of averaged codes."""

    bank: DictionaryBank

    @property
    def lam(self) -> float:  # type: ignore[override]
        return self.bank.coding.lam

    def __call__(self, outputs: Outputs) -> Outputs:
        """s (N, K, F), codes (N, K, M) and others."""
        return with_costs(outputs, self.bank.dictionary.detach(), self.lam)

    @cached_property
    def _system(self) -> RidgeSystem:
        return self.bank.system()

    def cross(self, outputs: Outputs) -> Outputs:
        """Of averaged features, which are coded once more."""
        return code_in_all(self.bank, outputs["s"], self._system).outputs

    def state(self) -> dict[str, Tensor]:
        return self.bank.state_dict()


@dataclass(frozen=True)
class FittedDictionaries(Coder):
    """Dictionaries fitted after stage 1 (Lee et al., ICS 2020): features are averaged, transformed, then coded."""

    bank: DictionaryBank
    transform: FeatureTransform

    @classmethod
    def fit(
        cls,
        outputs: Outputs,
        transform: FeatureTransform,
        spec: SparseSpec,
        *,
        rounds: int,
        seed: int,
        world: World = SINGLE,
    ) -> "FittedDictionaries":
        """Dictionaries for the averaged outputs of the training images, the same in all ranks.

        rounds: of fitting, at most. spec: its number of ADMM steps is not read.
        """
        s_KFN = sparse_features(outputs, transform).permute(1, 2, 0)
        shifts, features, images = s_KFN.shape
        atoms, lam = spec.sr_dict_size, spec.sr_lambda
        if spec.sr_lambda_rel is not None:
            D = starting_dictionary(s_KFN, atoms, generator(seed, "multi_sr"))
            lam = spec.sr_lambda_rel * lambda_max(D, s_KFN).cpu().median().item()
        print(f"fitting {atoms} atoms for each of {shifts} shifts to {images} images", flush=True)
        coding = CodingSpec(lam, spec.sr_rho, _FITTED_STEPS, tol=_FITTED_TOL)
        bank = DictionaryBank(shifts, features, atoms, coding).requires_grad_(False).to(s_KFN.device)
        if world.is_main:
            gen = generator(seed, "multi_sr")
            D = learn_dictionary(s_KFN, atoms, lam=lam, rho=spec.sr_rho, steps=rounds, generator=gen)
            bank.dictionary.copy_(D)
            if spec.sr_lambda_rel is not None:  # Of these atoms; they were learned with that of the first ones.
                bank.set_lambda(spec.sr_lambda_rel * lambda_max(D, s_KFN).cpu().median().item())
            if spec.sr_rho_auto:
                print(bank.choose_rho(s_KFN), flush=True)
        world.broadcast(bank.state_dict().values())
        bank.follow_buffers()
        return cls(bank, transform)

    @classmethod
    def load(cls, state: Mapping[str, Tensor], transform: FeatureTransform) -> "FittedDictionaries":
        """The coder that `state` was taken from."""
        coding = CodingSpec(float(state["lambdaV"]), float(state["rho"]), _FITTED_STEPS, tol=_FITTED_TOL)
        dictionaries, features, atoms = state["dictionary"].shape
        bank = DictionaryBank(dictionaries, features, atoms, coding).requires_grad_(False)
        bank.load_state_dict(dict(state))
        return cls(bank.to(state["dictionary"].device), transform)

    @property
    def lam(self) -> float:  # type: ignore[override]
        return self.bank.coding.lam

    @cached_property
    def _system(self) -> RidgeSystem:
        return self.bank.system()

    def __call__(self, outputs: Outputs) -> Outputs:
        """h (N, K, F), z (N, K, P), shift (N, K, K) -> these, s, codes, `CODE_FACTS`, error and objective."""
        blocks = sparse_features(outputs, self.transform).split(_TOGETHER)
        parts = [code_outputs(self.bank, block, self._system) for block in blocks]
        coded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {**outputs, **with_costs(coded, self.bank.dictionary, self.lam)}

    def cross(self, outputs: Outputs) -> Outputs:
        return code_in_all(self.bank, outputs["s"], self._system).outputs

    def state(self) -> dict[str, Tensor]:
        return self.bank.state_dict()


def sparse_features(outputs: Outputs, transform: FeatureTransform) -> Tensor:
    """s (N, K, F): the features of averaged outputs that are coded."""
    rows = [outputs[name].flatten(0, 1) for name in ("h", "z", "shift")]
    return transform(Features(*rows)).unflatten(0, (len(outputs["h"]), -1))
