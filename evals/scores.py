"""Scorers: fitted to outputs of the normal training images, called on those of test images. Higher = more normal.

Letters: N images, K shifts, C classes, F features, P projection, M atoms. Outputs are means over the draws of an image,
(N, K, .), so that features, codes and logits are averaged first and scored then. With one shift (K = 1) there is no
shift term. Statistics of the training images are taken with batch-mix partners from the training set even where test
images mix with a reference image: the published choice, kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.flags import Flags, Spec
from datasets.shifts import rotation_and_translation_labels
from evals.coding import CROSS, Outputs
from evals.specs import CrossSpec, KnnSpec, PartsSpec, ScoreSpec
from evals.weighing import Term
from models.level_net import LEVELS, NEIGHBOURS, SCORE, TRANSFORMATIONS, cosine_neighbours

# Entries of a block of similarities or distances, to bound their memory.
_BLOCK = 2**22
# Of the one-class SVM.
_NU = 0.1
# Of a soft maximum, in standard deviations, and of a softmax of objectives, in mean ones.
_SOFTNESS = 0.1


@dataclass(frozen=True)
class Scorer(ABC):
    """A fitted score; every field is a tensor, but for `SumScore`. needs: names of the outputs that it reads."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(self, outputs: Outputs) -> Tensor:
        """Scores (N,). Gradients flow to the outputs."""

    def smooth(self, outputs: Outputs) -> Tensor:
        """What an attacker may climb in place of the scores, (N,): of the same sign, without their kinks and plateaus.

        By default the scores.
        """
        return self(outputs)

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name: all there is to save."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def load(cls, state: Mapping[str, Tensor]) -> Self:
        """The scorer that `state` was taken from. Raises: ValueError for a state of something else."""
        names = [f.name for f in fields(cls)]
        if set(names) != set(state):
            raise ValueError(f"{cls.__name__} has the tensors {names}, got {sorted(state)}")
        return cls(**state)


@dataclass(frozen=True)
class CsiScore(Scorer):
    """mean over shifts of w_k max_m <z_k, axis_mk> + v_k logit_k[k]. axes (K, N, P) of unit norm; w, v (K,)."""

    axes: Tensor
    similarity_weight: Tensor
    shift_weight: Tensor

    needs = frozenset({"z", "shift"})

    def __call__(self, outputs: Outputs) -> Tensor:
        """z (N, K, P) projections, shift (N, K, K) logits."""
        return self._parts(outputs, lambda similarity: similarity.amax(2))

    def smooth(self, outputs: Outputs) -> Tensor:
        """With a soft maximum over the axes."""
        return self._parts(outputs, _soft_maximum)

    def _parts(self, outputs: Outputs, maximum: Callable[[Tensor], Tensor]) -> Tensor:
        z_KNP = outputs["z"].transpose(0, 1)[: len(self.axes)]
        rows = max(1, _BLOCK // self.axes.shape[:2].numel())
        nearest = torch.cat([maximum(part @ self.axes.mT) for part in z_KNP.split(rows, dim=1)], 1)
        parts = nearest * self.similarity_weight[:, None]
        parts = parts + _own_logit(outputs["shift"])[: len(self.axes)] * self.shift_weight[:, None]
        return parts.mean(0)


@dataclass(frozen=True)
class CsiSparseScore(Scorer):
    """mean over shifts of - w_k |s_k - D_k a_k|^2 + v_k logit_k[k]. w, v (K,)."""

    error_weight: Tensor
    shift_weight: Tensor

    needs = frozenset({"error", "shift"})
    output: ClassVar[str] = "error"

    def __call__(self, outputs: Outputs) -> Tensor:
        """error (N, K) of the mean features under the mean codes, shift (N, K, K) logits."""
        k = len(self.error_weight)
        error_KN = outputs[self.output].T[:k]
        parts = _own_logit(outputs["shift"])[:k] * self.shift_weight[:, None] - error_KN * self.error_weight[:, None]
        return parts.mean(0)


@dataclass(frozen=True)
class CsiObjectiveScore(CsiSparseScore):
    """The same with the lasso objective 0.5 |s_k - D_k a_k|^2 + lambda |a_k|_1 in place of the squared error.

    A residual alone says little: with a small lambda nearly everything is coded without one (Cong et al. 2011).
    """

    needs = frozenset({"objective", "shift"})
    output: ClassVar[str] = "objective"


@dataclass(frozen=True)
class CrossScore(Scorer):
    """Sparse-representation classification over the K shifts: how much better a view is coded in the dictionary of its
    own shift than in those of the others, mean over shifts. scale (K,): mean own objective of training images.

    With the objective o_j of view k in dictionary j, per view
    ratio: log(mean of o_j, j != k, / o_k); margin: (min of o_j, j != k, - o_k) / scale_k;
    softmax: the log-probability of k by a softmax of -o_j / (0.1 scale_k).
    rule (): which of `CROSS_RULES`, by number.
    """

    scale: Tensor
    rule: Tensor

    needs = frozenset({CROSS})

    def __call__(self, outputs: Outputs) -> Tensor:
        """cross (N, K, K): objectives of each view in each dictionary. Raises: UserError for K = 1."""
        cross = _several(outputs[CROSS]).clamp_min(torch.finfo(torch.float32).tiny)
        own = cross.diagonal(dim1=1, dim2=2)
        k = cross.shape[1]
        others = cross[:, ~torch.eye(k, dtype=torch.bool, device=cross.device)].view(len(cross), k, k - 1)
        return list(CROSS_RULES.values())[int(self.rule)](own, others, self.scale).mean(1)


def _softmax(own: Tensor, others: Tensor, scale: Tensor) -> Tensor:
    against = (own[..., None] - others) / (_SOFTNESS * scale[:, None])
    return -torch.cat([torch.zeros_like(own)[..., None], against], 2).logsumexp(2)


# How the own objective (N, K) is compared with those of the others (N, K, K - 1). scale (K,).
CROSS_RULES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ratio": lambda own, others, scale: (others.mean(2) / own).log(),
    "margin": lambda own, others, scale: (others.amin(2) - own) / scale,
    "softmax": _softmax,
}


def fit_cross(train: Outputs, rule: str) -> CrossScore:
    """The `CSI_srm` score of training outputs cross (N, K, K)."""
    return CrossScore(train[CROSS].diagonal(dim1=1, dim2=2).mean(0), torch.tensor(list(CROSS_RULES).index(rule)))


@dataclass(frozen=True)
class NearestScore(Scorer):
    """Minus the Euclidean distance to the k-th nearest training vector, or the last there is. known (N, F), k ()."""

    known: Tensor
    k: Tensor

    needs = frozenset({"h"})

    @classmethod
    def of(cls, vectors: Tensor, k: int = 1) -> "NearestScore":
        return cls(vectors, torch.tensor(min(k, len(vectors))))

    def __call__(self, outputs: Outputs) -> Tensor:
        """h (N, K, F) features."""
        return self.of_vectors(_unit_features(outputs))

    def smooth(self, outputs: Outputs) -> Tensor:
        """Minus a soft minimum of the distances to all."""
        return torch.cat([_soft_maximum(-part) for part in self._distances(_unit_features(outputs))])

    def of_vectors(self, x: Tensor) -> Tensor:
        """x (N, F) -> (N,), in float64: a distance near zero has no digits left in float32."""
        return -torch.cat([part.kthvalue(int(self.k), 1).values for part in self._distances(x)])

    def _distances(self, x: Tensor) -> Iterator[Tensor]:
        """Of x (N, F) to all training vectors, in blocks of rows, float64."""
        rows = max(1, _BLOCK // len(self.known))
        known = self.known.double()
        return (torch.cdist(part.double(), known, compute_mode=_BY_PRODUCTS) for part in x.split(rows))


_BY_PRODUCTS = "use_mm_for_euclid_dist"


@dataclass(frozen=True)
class OneClassSvmScore(Scorer):
    """The one-class SVM with an RBF kernel: sum over support vectors of c_v exp(-gamma |x - s_v|^2), minus the offset.

    support (V, F), coefficients (V,), offset () and gamma (), all float64.
    """

    support: Tensor
    coefficients: Tensor
    offset: Tensor
    gamma: Tensor

    needs = frozenset({"h"})

    @classmethod
    def of(cls, vectors: Tensor) -> "OneClassSvmScore":
        """Fitted to vectors (N, F) by scikit-learn, nu 0.1, gamma 1 / (F * variance), its "scale"."""
        from sklearn.svm import OneClassSVM

        x = vectors.double().numpy()
        gamma = 1 / (x.shape[1] * variance) if (variance := float(x.var())) else 1.0
        svm = OneClassSVM(kernel="rbf", gamma=gamma, nu=_NU, cache_size=1000).fit(x)
        found = (svm.support_vectors_, svm.dual_coef_[0], svm.offset_[0], gamma)
        return cls(*(torch.as_tensor(value, dtype=torch.float64) for value in found))

    def __call__(self, outputs: Outputs) -> Tensor:
        """h (N, K, F) features."""
        return self.of_vectors(_unit_features(outputs))

    def of_vectors(self, x: Tensor) -> Tensor:
        """x (N, F) -> (N,) float64."""
        rows = max(1, _BLOCK // len(self.support))
        parts = [torch.cdist(part.double(), self.support, compute_mode=_BY_PRODUCTS) for part in x.split(rows)]
        return torch.cat([(-self.gamma * part.square()).exp() @ self.coefficients for part in parts]) - self.offset


@dataclass(frozen=True)
class ShiftScore(Scorer):
    """The classifier of the shift alone: the mean over shifts k of logit_k[k]."""

    needs = frozenset({"shift"})

    def __call__(self, outputs: Outputs) -> Tensor:
        """shift (N, K, K) logits. Raises: UserError for K = 1, where there is nothing to classify."""
        return _own_logit(_several(outputs["shift"])).mean(0)


@dataclass(frozen=True)
class FeatureNormScore(Scorer):
    """The length of the features: the mean over shifts of |h|, which coding at unit norm leaves out."""

    needs = frozenset({"h"})

    def __call__(self, outputs: Outputs) -> Tensor:
        """h (N, K, F)."""
        return outputs["h"].norm(dim=2).mean(1)


@dataclass(frozen=True)
class ShiftProbabilityScore(Scorer):
    """The mean over shifts k of the log-probability of k, of the view that bears it."""

    needs = frozenset({"shift"})

    def __call__(self, outputs: Outputs) -> Tensor:
        """shift (N, K, K) logits. Raises: UserError for K = 1."""
        return _own_logit(_several(outputs["shift"]).log_softmax(2)).mean(0)

    def smooth(self, outputs: Outputs) -> Tensor:
        """The mean of their log-odds, which do not saturate."""
        shift = _several(outputs["shift"])
        return _log_odds(shift, torch.arange(shift.shape[1], device=shift.device).expand(shift.shape[:2])).mean(1)


@dataclass(frozen=True)
class CosineNeighboursScore(Scorer):
    """The mean over shifts of the mean cosine to the k nearest training features under the same shift.

    known (K, N, F) of unit norm, k (). Source: FIRM, UniCon-HA (Wang et al., ICCV 2023), as their programs score.
    """

    known: Tensor
    k: Tensor

    needs = frozenset({"h"})

    @classmethod
    def of(cls, h: Tensor, k: int) -> "CosineNeighboursScore":
        """Of features (N, K, F)."""
        return cls(F.normalize(h, dim=2).transpose(0, 1).contiguous(), torch.tensor(min(k, len(h))))

    def __call__(self, outputs: Outputs) -> Tensor:
        """h (N, K, F) features."""
        return cosine_neighbours(self.known, outputs["h"], int(self.k))


@dataclass(frozen=True)
class LabelScore(Scorer):
    """The largest class probability of the linear head on the unrotated view."""

    needs = frozenset({"linear"})

    def __call__(self, outputs: Outputs) -> Tensor:
        """linear (N, K, C) logits."""
        return outputs["linear"][:, 0].softmax(1).amax(1)

    def smooth(self, outputs: Outputs) -> Tensor:
        """The log-odds of that probability."""
        logits = outputs["linear"][:, 0]
        return _log_odds(logits, logits.argmax(1))


@dataclass(frozen=True)
class MarginalizedLabelScore(Scorer):
    """The largest class probability of the joint head, averaged over the four rotations."""

    needs = frozenset({"joint"})

    def __call__(self, outputs: Outputs) -> Tensor:
        """joint (N, 4, 4 C) logits."""
        return marginalized(outputs["joint"]).softmax(1).amax(1)

    def smooth(self, outputs: Outputs) -> Tensor:
        """The log-odds of that probability."""
        logits = marginalized(outputs["joint"])
        return _log_odds(logits, logits.argmax(1))


@dataclass(frozen=True)
class TransformationScore(Scorer):
    """The Rot+Trans score: softmax probabilities of the true rotation and translations, summed over all 36 views.

    View k is rotation * 9 + vertical * 3 + horizontal. The sum of probabilities is the paper's choice (Hendrycks et al.
    2019), not of their logarithms.
    """

    needs = frozenset({"rotation", "vertical", "horizontal"})

    def __call__(self, outputs: Outputs) -> Tensor:
        """rotation (N, 36, 4), vertical and horizontal (N, 36, 3) logits."""
        k = torch.arange(36)
        parts = [outputs[name].softmax(2)[:, k, index] for name, index in rotation_and_translation_labels().items()]
        return torch.stack(parts).sum((0, 2))

    def smooth(self, outputs: Outputs) -> Tensor:
        """The sum of the log-odds of these probabilities."""
        parts = [
            _log_odds(outputs[name], index.to(outputs[name].device))
            for name, index in rotation_and_translation_labels().items()
        ]
        return torch.stack(parts).sum((0, 2))


@dataclass(frozen=True)
class ReconstructionScore(Scorer):
    """Minus the norm of an autoencoder's reconstruction error."""

    needs = frozenset({"error"})

    def __call__(self, outputs: Outputs) -> Tensor:
        """error (N, 1, 1)."""
        return -outputs["error"].flatten(1)[:, 0]


@dataclass(frozen=True)
class TermScore(Scorer):
    """A number that the network has made of the image itself, by the name of the output."""

    name: ClassVar[str] = ""

    def __call__(self, outputs: Outputs) -> Tensor:
        """outputs[name] (N, 1, 1). Raises: UserError where the network has no such output."""
        if self.name not in outputs:
            raise UserError(f"--ood_score: the weights have no dictionary of {self.name}; see --sr_layer")
        return outputs[self.name].flatten(1)[:, 0]


def term_score(output: str) -> type[TermScore]:
    """The score that is the output of this name."""
    return type("TermScore", (TermScore,), {"name": output, "needs": frozenset({output})})


def marginalized(joint: Tensor) -> Tensor:
    """Class logits (N, C) of joint logits (N, 4, 4 C): the mean over the rotations i of those of class + C * i.

    Source: CSI (Tack et al. 2020), section 2.3.
    """
    classes = joint.shape[2] // 4
    own = [joint[:, i, i * classes : (i + 1) * classes] for i in range(4)]
    return torch.stack(own).mean(0)


def _soft_maximum(x: Tensor) -> Tensor:
    """Along the last axis: the log of a sum of exponentials, in units of a tenth of the standard deviation."""
    # Of equal entries the standard deviation has no gradient.
    scale = _SOFTNESS * (x.var(-1, keepdim=True, correction=0) + torch.finfo(x.dtype).tiny).sqrt()
    return (x / scale).logsumexp(-1) * scale[..., 0]


def _log_odds(logits: Tensor, own: Tensor) -> Tensor:
    """log p / (1 - p) of the probability of classes `own` (...) by logits (..., C). It grows with p and saturates
    nowhere."""
    which = torch.arange(logits.shape[-1], device=logits.device) == own[..., None]
    others = logits.masked_fill(which, -torch.inf).logsumexp(-1)
    return logits.masked_fill(~which, 0).sum(-1) - others


def _own_logit(shift: Tensor) -> Tensor:
    """(N, K, K) -> (K, N): the logit of each shift for the view that bears it."""
    return shift.diagonal(dim1=1, dim2=2).T


def _several(shift: Tensor) -> Tensor:
    """Logits (N, K, K) of several shifts. Raises: UserError for a single one."""
    if shift.shape[1] < 2:
        raise UserError("--ood_score: the network was trained under one shift; there is nothing to tell it from")
    return shift


def _unit_features(outputs: Outputs) -> Tensor:
    """h of the unshifted view, of unit norm, (N, F)."""
    return F.normalize(outputs["h"][:, 0], dim=1)


def _weights(mean_K: Tensor, *, on: bool) -> Tensor:
    """1 / mean, or zeros for a part that is left out, and for a mean of 0, of a classifier that was not trained."""
    return torch.where(mean_K == 0, 0.0, 1 / mean_K) if on else torch.zeros_like(mean_K)


def _shift_weights(shift_train: Tensor, first_shift_only: bool, *, on: bool) -> Tensor:
    """v_k; zero where there is one shift only, since its classifier has had nothing to learn."""
    mean_K = _own_logit(shift_train).mean(1)
    return _weights(mean_K[:1] if first_shift_only else mean_K, on=on and not first_shift_only and len(mean_K) > 1)


def fit_csi(train: Outputs, *, first_shift_only: bool = False, similarity: bool = True, shift: bool = True) -> CsiScore:
    """The `CSI` score of training outputs z (N, K, P) and shift (N, K, K).

    w_k = 1 / mean |z_mk|, v_k = 1 / mean logit_mk[k]. first_shift_only: the `simclr` score, only k = 0, with w = 1 and
    no shift term. similarity, shift: False leaves that part out. Source: CSI (Tack et al. 2020), section 2.3.
    """
    z_KNP = train["z"].transpose(0, 1)[: 1 if first_shift_only else None]
    size = z_KNP.norm(dim=2).mean(1)
    w = _weights(torch.ones_like(size) if first_shift_only else size, on=similarity)
    return CsiScore(F.normalize(z_KNP, dim=2), w, _shift_weights(train["shift"], first_shift_only, on=shift))


def fit_csi_sr(
    train: Outputs,
    *,
    first_shift_only: bool = False,
    similarity: bool = True,
    shift: bool = True,
    scorer: type[CsiSparseScore] = CsiSparseScore,
) -> CsiSparseScore:
    """The `CSI_sr` score of training outputs error (N, K) and shift (N, K, K).

    w_k = 1 / mean training error, v_k = 1 / mean logit_mk[k]. first_shift_only: the `simclr_sr` score, only k = 0, with
    w = 1 and no shift term. similarity, shift: False leaves that part out. scorer: `CsiObjectiveScore` takes the
    objective in place of the error: `CSI_src`. Source: ADMM-SRNet (Chiou et al. 2023).
    """
    error = train[scorer.output].T[: 1 if first_shift_only else None].mean(1)
    w = _weights(torch.ones_like(error) if first_shift_only else error, on=similarity)
    return scorer(w, _shift_weights(train["shift"], first_shift_only, on=shift))


@dataclass(frozen=True)
class SumScore(Scorer):
    """The sum over scores of weight * (score - mean) / deviation. It is made for an evaluation, and not saved."""

    parts: Mapping[str, Scorer]
    terms: Mapping[str, Term]

    def __call__(self, outputs: Outputs) -> Tensor:
        return self._sum({name: part(outputs) for name, part in self.parts.items()})

    def smooth(self, outputs: Outputs) -> Tensor:
        """The same sum of what an attacker climbs in place of each."""
        return self._sum({name: part.smooth(outputs) for name, part in self.parts.items()})

    def _sum(self, values: Mapping[str, Tensor]) -> Tensor:
        parts = [t.weight / t.deviation * (values[name].double() - t.mean) for name, t in self.terms.items()]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class NoOptions(Spec):
    """A score without flags."""


@dataclass(frozen=True)
class ScoreRow:
    """One row. fit: (outputs of the normal training images, options) -> scorer. options: the flags that it reads.

    fitted: whether it looks at training images at all. trained_by: the only training modes whose networks it is for.
    probability: whether it is a mean log-probability of transformations, which has a weight of its own in sums.
    check: raises UserError for a network that it says nothing of.
    """

    scorer: type[Scorer]
    fit: Callable[[Outputs, Any], Scorer]
    options: type[Spec] = NoOptions
    fitted: bool = True
    trained_by: tuple[str, ...] | None = None
    probability: bool = False
    check: Callable[[nn.Module], None] = lambda net: None


def _parts(options: PartsSpec) -> dict[str, bool]:
    return {"similarity": not options.disable_sim_score, "shift": not options.disable_shi_score}


def _csi(first_shift_only: bool) -> ScoreRow:
    fit = partial(fit_csi, first_shift_only=first_shift_only)
    return ScoreRow(CsiScore, lambda train, options: fit(train, **_parts(options)), PartsSpec)


def _csi_sr(first_shift_only: bool, scorer: type[CsiSparseScore] = CsiSparseScore) -> ScoreRow:
    def fit(train: Outputs, options: PartsSpec) -> CsiSparseScore:
        return fit_csi_sr(train, first_shift_only=first_shift_only, scorer=scorer, **_parts(options))

    return ScoreRow(scorer, fit, PartsSpec)


def _given(scorer: type[Scorer], trained_by: tuple[str, ...] | None = None, **more: Any) -> ScoreRow:
    """A score with nothing to fit."""
    return ScoreRow(scorer, lambda train, options: scorer(), fitted=False, trained_by=trained_by, **more)


def check_shift_classifier(net: nn.Module) -> None:
    """net: of stage 1 or 2. Raises: UserError where its classifier of the shift was not trained: its weights are 0."""
    stage1: Any = getattr(net, "feature_net", net)
    if not stage1.shift_cls_layer.weight.any():
        raise UserError("--ood_score: the classifier of the shift was not trained (--shift_lambda 0); choose another")


# Modes that train the classifier of the shift.
_SHIFTED = ("simclr_CSI", "cocsr_dict")

# Scores of several depths: the sum, and each of its terms. Score -> output.
LEVEL_SCORES = {"levels": SCORE, **{f"levels_{name}": name for name in (TRANSFORMATIONS, NEIGHBOURS, *LEVELS)}}

SCORES: dict[str, ScoreRow] = {
    "simclr": _csi(first_shift_only=True),
    "CSI": _csi(first_shift_only=False),
    "simclr_sr": _csi_sr(first_shift_only=True),
    "CSI_sr": _csi_sr(first_shift_only=False),
    "CSI_src": _csi_sr(first_shift_only=False, scorer=CsiObjectiveScore),
    "CSI_srm": ScoreRow(
        CrossScore,
        lambda train, o: fit_cross(train, o.srm_rule),
        CrossSpec,
        trained_by=(*_SHIFTED, "sup_simclr_CSI", "sup_CSI_linear"),
    ),
    "knn": ScoreRow(NearestScore, lambda train, o: NearestScore.of(_unit_features(train), o.knn_k), KnnSpec),
    "ocsvm": ScoreRow(OneClassSvmScore, lambda train, o: OneClassSvmScore.of(_unit_features(train))),
    "knn_cosine": ScoreRow(
        CosineNeighboursScore, lambda train, o: CosineNeighboursScore.of(train["h"], o.knn_k), KnnSpec
    ),
    "feature_norm": _given(FeatureNormScore),
    "shift_logit": _given(ShiftScore, _SHIFTED, check=check_shift_classifier),
    "shift_logsoftmax": _given(ShiftProbabilityScore, _SHIFTED, check=check_shift_classifier, probability=True),
    "baseline": _given(LabelScore),
    "baseline_marginalized": _given(MarginalizedLabelScore, trained_by=("sup_CSI_linear",)),
    "rot_trans": _given(TransformationScore),
    "reconstruction": _given(ReconstructionScore),
    **{score: _given(term_score(output)) for score, output in LEVEL_SCORES.items()},
}


def chosen_scores(flags: Flags, offered: Sequence[str]) -> list[str]:
    """The scores of --ood_score, or the first that is offered. Raises: UserError for one that is not offered."""
    names = list(flags.of(ScoreSpec).ood_score or offered[:1])
    for name in names:
        if name not in offered:
            raise UserError(f"--ood_score {name}: --mode {flags.mode} offers {', '.join(offered)}")
    return names
