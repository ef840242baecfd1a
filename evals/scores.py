"""Scores: fitted on training features, applied to test features. Higher = more normal, everywhere.

Letters: N images, T test draws, K shifts, F feature size, P projection size, M atoms. All arrays are (N, T, K, .),
numpy or torch, and what comes back is of the kind that went in. Features, codes and logits are averaged over the draws
first; then comes the score. With one shift (K = 1) there is no shift term. Statistics of the training images are taken
with batch-mix partners from the training set even where test images mix with a reference image: the published choice,
kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.baselines import nearest_neighbour, one_class_svm
from evals.features import Outputs

Array = np.ndarray | Tensor

# Entries of a block of similarities, or of reconstructions, to bound their memory.
_BLOCK = 2**22


def _mean_draws(x: Array) -> Tensor:
    """(N, T, K, .) -> (K, N, .), without a copy where there is one draw, or their mean already."""
    x = torch.as_tensor(x)
    return (x[:, 0] if x.shape[1] == 1 else x.mean(1)).transpose(0, 1)


def _own_logit(shift: Array) -> Tensor:
    """(N, T, K, K) -> (K, N): the mean logit of each shift for the view that bears it."""
    return _mean_draws(shift).diagonal(dim1=0, dim2=2).T


def _like(x: Array, value: Tensor) -> Any:
    return value.numpy() if isinstance(x, np.ndarray) else value


@dataclass(frozen=True)
class CsiScore:
    """mean over shifts of w_k max_m <z_k, axis_mk> + v_k logit_k[k]. axes (K, N, P) of unit norm; w, v (K,)."""

    axes: Tensor
    similarity_weight: Tensor
    shift_weight: Tensor

    def __call__(self, z: Array, shift: Array) -> Any:
        """z (N, T, K, P) projections, shift (N, T, K, K) logits -> (N,)."""
        z_KNP = _mean_draws(z)[: len(self.axes)]
        rows = max(1, _BLOCK // self.axes.shape[:2].numel())
        nearest = torch.cat([(part @ self.axes.mT).amax(2) for part in z_KNP.split(rows, dim=1)], 1)
        parts = nearest * self.similarity_weight[:, None]
        parts = parts + _own_logit(shift)[: len(self.axes)] * self.shift_weight[:, None]
        return _like(z, parts.mean(0))


@dataclass(frozen=True)
class CsiSparseScore:
    """mean over shifts of - w_k |s_k - D_k a_k|^2 + v_k logit_k[k]. D (K, F, M); w, v (K,)."""

    D: Tensor
    error_weight: Tensor
    shift_weight: Tensor

    def __call__(self, s: Array, codes: Array, shift: Array) -> Any:
        """s (N, T, K, F), codes (N, T, K, M), shift (N, T, K, K) -> (N,)."""
        error = _reconstruction_error(self.D, s, codes)
        parts = _own_logit(shift)[: len(self.D)] * self.shift_weight[:, None] - error * self.error_weight[:, None]
        return _like(s, parts.mean(0))


def _reconstruction_error(D_KFM: Tensor, s: Array, codes: Array) -> Tensor:
    """(K, N) squared error of the mean feature under the mean code."""
    k = len(D_KFM)
    s_KNF, a_KNM = _mean_draws(s)[:k], _mean_draws(codes)[:k]
    rows = max(1, _BLOCK // s_KNF[:, 0].numel())
    parts = zip(s_KNF.split(rows, 1), a_KNM.split(rows, 1), strict=True)
    return torch.cat([(s - a @ D_KFM.mT).square_().sum(2) for s, a in parts], 1)


def _weights(mean_K: Tensor, *, on: bool) -> Tensor:
    """1 / mean, or zeros for a part that is left out."""
    return 1 / mean_K if on else torch.zeros_like(mean_K)


def _shift_weights(shift_train: Array, first_shift_only: bool, *, on: bool) -> Tensor:
    """v_k; zero where there is one shift only, since its classifier has had nothing to learn."""
    mean_K = _own_logit(shift_train).mean(1)
    return _weights(mean_K[:1] if first_shift_only else mean_K, on=on and not first_shift_only and len(mean_K) > 1)


def fit_csi(
    z_train: Array, shift_train: Array, *, first_shift_only: bool = False, similarity: bool = True, shift: bool = True
) -> CsiScore:
    """The `CSI` score: z_train (N, T, K, P) projections, shift_train (N, T, K, K) logits of training images.

    w_k = 1 / mean |z_mk|, v_k = 1 / mean logit_mk[k]. first_shift_only: the `simclr` score, only k = 0, with w = 1 and
    no shift term. similarity, shift: False leaves that part out. Source: CSI (Tack et al. 2020), section 2.3.
    """
    z_KNP = _mean_draws(z_train)[: 1 if first_shift_only else None]
    size = z_KNP.norm(dim=2).mean(1)
    w = _weights(torch.ones_like(size) if first_shift_only else size, on=similarity)
    return CsiScore(F.normalize(z_KNP, dim=2), w, _shift_weights(shift_train, first_shift_only, on=shift))


def fit_csi_sr(
    D: Array,
    s_train: Array,
    codes_train: Array,
    shift_train: Array,
    *,
    first_shift_only: bool = False,
    similarity: bool = True,
    shift: bool = True,
) -> CsiSparseScore:
    """The `CSI_sr` score: D (K, F, M), s_train (N, T, K, F), codes_train (N, T, K, M), shift_train (N, T, K, K).

    w_k = 1 / mean training error, v_k = 1 / mean logit_mk[k]. first_shift_only: the `simclr_sr` score, only k = 0, with
    w = 1 and no shift term. similarity, shift: False leaves that part out. Source: ADMM-SRNet (Chiou et al. 2023).
    """
    D_KFM = torch.as_tensor(D)[: 1 if first_shift_only else None]
    error = _reconstruction_error(D_KFM, s_train, codes_train).mean(1)
    w = _weights(torch.ones_like(error) if first_shift_only else error, on=similarity)
    return CsiSparseScore(D_KFM, w, _shift_weights(shift_train, first_shift_only, on=shift))


def label_probabilities(outputs: Outputs, *, marginalized: bool) -> Tensor:
    """(N, C) class probabilities of plain views, linear (N, 1, K, C) and joint (N, 1, 4, 4 C).

    Marginalised: the softmax of the mean over the four rotations i of the joint logits of class + C * i (CSI, section
    2.3 of Tack et al. 2020), else that of the linear head on the unrotated view.
    """
    if not marginalized:
        return outputs["linear"][:, 0, 0].softmax(1)
    joint = outputs["joint"].mean(1)
    classes = joint.shape[2] // 4
    own = [joint[:, i, i * classes : (i + 1) * classes] for i in range(4)]
    return torch.stack(own).mean(0).softmax(1)


def transformation_score(outputs: Outputs) -> Tensor:
    """The Rot+Trans score (N,): softmax probabilities of the true rotation and translations, summed over all 36 views.

    rotation (N, T, 36, 4), vertical and horizontal (N, T, 36, 3); view k is rotation * 9 + vertical * 3 + horizontal.
    The sum of probabilities is the paper's choice (Hendrycks et al. 2019), not of their logarithms.
    """
    k = torch.arange(36)
    truth = {"rotation": k // 9, "vertical": k // 3 % 3, "horizontal": k % 3}
    parts = [outputs[name].mean(1).softmax(2)[:, k, index] for name, index in truth.items()]
    return torch.stack(parts).sum((0, 2))


def _unit_features(outputs: Outputs) -> np.ndarray:
    """h of the unshifted view, of unit norm, (N, F)."""
    return F.normalize(outputs["h"][:, :, 0].mean(1), dim=1).numpy()


Score = Callable[[Outputs], Tensor]


def _csi(
    train: Outputs, D: Tensor | None, *, disable_sim_score: bool, disable_shi_score: bool, first_shift_only: bool
) -> Score:
    parts = {"similarity": not disable_sim_score, "shift": not disable_shi_score, "first_shift_only": first_shift_only}
    if D is None:
        csi = fit_csi(train["z"], train["shift"], **parts)
        return lambda x: csi(x["z"], x["shift"])
    csi_sr = fit_csi_sr(D, train["s"], train["codes"], train["shift"], **parts)
    return lambda x: csi_sr(x["s"], x["codes"], x["shift"])


def _knn(train: Outputs, D: Tensor | None, *, knn_k: int) -> Score:
    known = _unit_features(train)
    return lambda x: torch.from_numpy(nearest_neighbour(known, _unit_features(x), k=knn_k))


def _ocsvm(train: Outputs, D: Tensor | None) -> Score:
    known = _unit_features(train)
    return lambda x: torch.from_numpy(one_class_svm(known, _unit_features(x)))


def _baseline(train: Outputs, D: Tensor | None, *, marginalized: bool) -> Score:
    return lambda x: label_probabilities(x, marginalized=marginalized).amax(1)


@dataclass(frozen=True)
class ScoreSpec:
    """One row. fit: (outputs of the normal training images, dictionaries (K, F, M) or None, **flags) -> score.

    flags: names of the flags that `fit` takes. trained_by: the only modes of training that make a head it looks at.
    """

    fit: Callable[..., Score]
    flags: tuple[str, ...] = ()
    trained_by: tuple[str, ...] | None = None


_PARTS = ("disable_sim_score", "disable_shi_score")

SCORES: dict[str, ScoreSpec] = {
    "simclr": ScoreSpec(partial(_csi, first_shift_only=True), _PARTS),
    "CSI": ScoreSpec(partial(_csi, first_shift_only=False), _PARTS),
    "simclr_sr": ScoreSpec(partial(_csi, first_shift_only=True), _PARTS),
    "CSI_sr": ScoreSpec(partial(_csi, first_shift_only=False), _PARTS),
    "knn": ScoreSpec(_knn, ("knn_k",)),
    "ocsvm": ScoreSpec(_ocsvm),
    "baseline": ScoreSpec(partial(_baseline, marginalized=False)),
    "baseline_marginalized": ScoreSpec(partial(_baseline, marginalized=True), trained_by=("sup_CSI_linear",)),
    "rot_trans": ScoreSpec(lambda train, D: transformation_score),
}
