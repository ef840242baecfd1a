"""Evaluation. `EVALS` and `TSNES` are the tables of modes; scores are in `evals.scores`, extractors in `evals.extract`.

Data goes one way: load (`trained`) -> views and outputs (`extract`) -> scores -> results (`detect`, `classify`,
`embed`) -> writer (`report`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common.attacks.specs import EpsilonSpec, StepsSpec
from common.dist import SINGLE, World
from common.files import readable
from common.flags import DeviceSpec, Flags, RunSpec, Spec, WeightsSpec, flags_of
from common.negatives import RANDOM, StrategySpec
from common.run import recorded_flags
from datasets import DataSource
from datasets.corrupt import CorruptSpec
from datasets.noise import TestNoiseSpec
from datasets.one_class import SplitSpec
from datasets.outliers import OutlierSpec, TestBatchSpec
from datasets.views import PassSpec
from evals import alpha_scan, attack, classify, detect, distance, embed, inside, noise_lambda, robust, sparse_inside
from evals.alpha_scan_report import write_alpha_scan
from evals.attack_report import write_attack
from evals.distance_report import write_feature_distance
from evals.extract import (
    AUTOENCODER,
    BACKBONE,
    CLASSIFIER,
    CONTRASTIVE,
    FITTED_SPARSE,
    LABELLED,
    LEVELS,
    PLAIN_ROT_TRANS,
    ROT_TRANS,
    SPARSE,
    Extractor,
)
from evals.inside_report import write_inside
from evals.noise_lambda_report import write_noise_lambda
from evals.report import Write, write_classification, write_detection, write_picture
from evals.result import Result
from evals.robust_report import write_separation
from evals.scores import LEVEL_SCORES, SCORES, chosen_scores
from evals.sparse_inside_report import write_sparse_inside
from evals.specs import (
    AlphaScanSpec,
    AttackSpec,
    CorruptionsSpec,
    DetectorAttackSpec,
    DistanceSpec,
    ImagesSpec,
    InsideSpec,
    NoiseLambdaSpec,
    PlaceSpec,
    ReferenceSpec,
    ScoreSpec,
    StemSpec,
    SumSpec,
    TsneSpec,
)
from evals.stem_lambda import with_stem_lambda
from evals.trained import Trained, load_trained, weights_of, with_ms_alpha
from models import ModelSpec
from models.autoencoder.specs import SeparationSpec
from models.mean_sparse import AlphaSpec


@dataclass(frozen=True)
class Eval:
    """One row.

    measure: trained network -> results. It reads its flags and loads its data when it is called.
    write: prints and writes one of them.
    specs: whose flags it reads. extractor: which network is loaded. needs: flags -> names of the outputs that are read.
    trained_by: training modes whose weights fit. default_for: those whose runs are evaluated by this row where no
    --mode is given. scores: what --ood_score chooses from, the default first. defaults: flags that have another default
    in this row.
    """

    measure: Callable[[Trained], Iterator[Result]]
    write: Write
    specs: tuple[type[Spec], ...]
    extractor: Extractor
    needs: Callable[[Flags], frozenset[str]]
    trained_by: tuple[str, ...]
    default_for: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def views(self, flags: Flags) -> int:
        """K, how many views of an image a draw has."""
        return len(self.extractor.shifts(flags, self.needs(flags)))

    def inherited(self, flags: Flags) -> Flags:
        """The flags, those that were not given as the weights of --load_path have recorded them."""
        path = weights_of(flags, self.extractor.files)
        own = {name for spec in self.extractor.own for name in flags_of(spec)}
        recorded = {name: value for name, value in recorded_flags(path).items() if name not in own}
        return flags.inherited(recorded, path, flag="load_path")

    def load(self, flags: Flags, world: World = SINGLE) -> Trained:
        """The network of --load_path, with alpha of --ms_alpha, and lambda of --stem_lambda where the row takes it.

        Raises: UserError as `load_trained` and `with_stem_lambda`, and for a score that is not offered.
        """
        names = chosen_scores(flags, self.scores) if self.scores else []
        own = [SCORES[name].trained_by or self.trained_by for name in names]
        trained = load_trained(
            flags,
            world,
            files=self.extractor.files,
            read=partial(self.extractor.load, shifts=self.views(flags)),
            trained_by=[mode for mode in self.trained_by if all(mode in modes for modes in own)],
            scores=names,
            backbone=self.extractor.backbone,
        )
        for name in names:
            SCORES[name].check(trained.net)
        trained = with_ms_alpha(trained)
        return with_stem_lambda(trained) if StemSpec in self.specs else trained


# A stage-2 file holds the stage-1 network; linear heads leave it as it was.
_CONTRASTIVE = ("simclr", "simclr_CSI", "sup_simclr", "sup_simclr_CSI", "sup_linear", "sup_CSI_linear", "cocsr_dict")
_LABELLED = ("sup_linear", "sup_CSI_linear")
# Their linear head is a probe on detached features, trained beside the contrastive loss.
_PROBED = ("sup_simclr", "sup_simclr_CSI")
_ADVERSARIAL = ("adv_pgd", "adv_trades", "adv_mart", "adv_fgsm_rs", "adv_nfgsm")
# Of a network that was trained to classify.
_CLASSIFIERS = ("supervised", *_ADVERSARIAL)
_ROT_TRANS = ("rot_trans", "adv_rot_trans")
# Scores of features and of the classifier of the shift.
_FEATURE = ("knn_cosine", "feature_norm", "shift_logit", "shift_logsoftmax")
_CSI = ("CSI", "simclr", "knn", "ocsvm", *_FEATURE)
_CSI_SR = ("CSI_sr", "simclr_sr", "CSI_src", "CSI_srm", *_FEATURE)


_DATA = (SplitSpec, CorruptSpec, DataSource)
_COMMON = (RunSpec, WeightsSpec, *_DATA, ModelSpec, DeviceSpec, PassSpec, PlaceSpec, StemSpec, AlphaSpec)
# Of evaluations that look at test pictures.
_TESTED = (*_COMMON, TestNoiseSpec)


def _partners(partner: str) -> tuple[type[Spec], ...]:
    """What says which images test images mix with."""
    return (ReferenceSpec,) if partner == "reference" else ()


def _detection(
    extractor: Extractor,
    scores: tuple[str, ...],
    trained_by: tuple[str, ...],
    partner: str = "neighbour",
    default_for: tuple[str, ...] = (),
) -> Eval:
    def needs(flags: Flags) -> frozenset[str]:
        return frozenset[str]().union(*(SCORES[name].scorer.needs for name in chosen_scores(flags, scores)))

    measure = partial(detect.detect, extractor=extractor, scores=scores, partner=partner)
    options = [SCORES[name].options for name in scores]
    specs = (*_TESTED, *extractor.specs, ScoreSpec, SumSpec, ImagesSpec, *options, OutlierSpec, TestBatchSpec)
    specs = (*specs, *_partners(partner), CorruptionsSpec, EpsilonSpec, AttackSpec, DetectorAttackSpec)
    return Eval(measure, write_detection, specs, extractor, needs, trained_by, default_for, scores)


def _classification(marginal: bool, trained_by: tuple[str, ...], default_for: tuple[str, ...]) -> Eval:
    measure = partial(classify.classify, predict=classify.marginalized_logits if marginal else classify.linear_logits)
    needs = frozenset({"joint" if marginal else "linear"})
    specs = (*_TESTED, ImagesSpec)
    return Eval(measure, write_classification, specs, LABELLED, lambda flags: needs, trained_by, default_for)


def _attack(trained_by: tuple[str, ...]) -> Eval:
    specs = (*_TESTED, ImagesSpec, EpsilonSpec, AttackSpec)
    needs = frozenset({"linear"})
    defaults = {"attack_steps": 25}
    return Eval(attack.attack, write_attack, specs, LABELLED, lambda flags: needs, trained_by, defaults=defaults)


def _alpha_scan(trained_by: tuple[str, ...]) -> Eval:
    needs = frozenset({"linear"})
    return Eval(
        alpha_scan.alpha_scan,
        write_alpha_scan,
        (*_COMMON, EpsilonSpec, AttackSpec, AlphaScanSpec),
        LABELLED,
        lambda flags: needs,
        trained_by,
        defaults={"attack_steps": 100},
    )


def _feature_distance(trained_by: tuple[str, ...]) -> Eval:
    specs = (*_TESTED, EpsilonSpec, StepsSpec, StrategySpec, DistanceSpec, ImagesSpec)
    return Eval(
        distance.feature_distance,
        write_feature_distance,
        specs,
        CLASSIFIER,
        lambda flags: frozenset(),
        trained_by,
        defaults={"strategy": RANDOM},
    )


def _picture(
    extractor: Extractor,
    trained_by: tuple[str, ...],
    output: str | None = None,
    *,
    layers: Mapping[str, str] = embed.LAYERS,
    partner: str = "neighbour",
    default_for: tuple[str, ...] = (),
    by_class: bool = False,
) -> Eval:
    def needs(flags: Flags) -> frozenset[str]:
        return frozenset(embed.shown_outputs(flags, output, layers).values())

    settings: dict[str, Any] = {"output": output, "layers": layers, "partner": partner, "by_class": by_class}
    measure = partial(embed.embed, extractor=extractor, **settings)
    specs = (*_TESTED, *extractor.specs, TsneSpec, *_partners(partner))
    defaults = {"projection": "auto"} if by_class else {}
    return Eval(measure, write_picture, specs, extractor, needs, trained_by, default_for, defaults=defaults)


def _separation(
    measure: Callable[[Trained], Iterator[Result]], trained_by: tuple[str, ...], default_for: tuple[str, ...] = ()
) -> Eval:
    specs = (*_COMMON, *AUTOENCODER.specs, SeparationSpec)
    return Eval(measure, write_separation, specs, AUTOENCODER, lambda flags: frozenset(), trained_by, default_for)


def _sparse_inside(trained_by: tuple[str, ...]) -> Eval:
    return Eval(
        sparse_inside.sparse_inside, write_sparse_inside, _COMMON, BACKBONE, lambda flags: frozenset(), trained_by
    )


def _inside(trained_by: tuple[str, ...]) -> Eval:
    specs = (*_COMMON, InsideSpec)
    return Eval(inside.inside, write_inside, specs, BACKBONE, lambda flags: frozenset(), trained_by)


def _noise_lambda(task: noise_lambda.Task, trained_by: tuple[str, ...]) -> Eval:
    measure = partial(noise_lambda.noise_lambda, task=task)
    # It is about lambda itself, hence without --stem_lambda.
    specs = (*(spec for spec in _COMMON if spec is not StemSpec), *task.extractor.specs, NoiseLambdaSpec)
    return Eval(measure, write_noise_lambda, specs, task.extractor, lambda flags: frozenset(), trained_by)


_AUTOENCODERS = ("rdae", "dae", "vae")

EVALS: dict[str, Eval] = {
    "ood_pre": _detection(CONTRASTIVE, _CSI, _CONTRASTIVE, default_for=("simclr", "simclr_CSI")),
    "ood_pre_refmix": _detection(CONTRASTIVE, _CSI, _CONTRASTIVE, "reference"),
    "ood_pre_cocsr": _detection(SPARSE, _CSI_SR, ("cocsr_dict",), default_for=("cocsr_dict",)),
    "ood_pre_cocsr_refmix": _detection(SPARSE, _CSI_SR, ("cocsr_dict",), "reference"),
    "ood_pre_multi_sr": _detection(FITTED_SPARSE, _CSI_SR, _CONTRASTIVE),
    "ood_pre_multi_sr_refmix": _detection(FITTED_SPARSE, _CSI_SR, _CONTRASTIVE, "reference"),
    "ood": _detection(LABELLED, ("baseline", "baseline_marginalized"), (*_CLASSIFIERS, *_LABELLED)),
    "rot_trans": _detection(ROT_TRANS, ("rot_trans",), _ROT_TRANS, default_for=_ROT_TRANS),
    "ood_levels": _detection(LEVELS, tuple(LEVEL_SCORES), ("level_dict",), default_for=("level_dict",)),
    "ood_reconstruction": _detection(AUTOENCODER, ("reconstruction", "knn", "ocsvm"), _AUTOENCODERS),
    "rdae_outliers": _separation(robust.outliers, _AUTOENCODERS, default_for=_AUTOENCODERS),
    "rdae_denoise": _separation(robust.denoise, _AUTOENCODERS),
    "rdae_features": _separation(robust.features, ("rdae",)),
    "test_acc": _classification(False, (*_PROBED, *_LABELLED, *_CLASSIFIERS), (*_PROBED, "sup_linear", *_CLASSIFIERS)),
    "test_marginalized_acc": _classification(True, ("sup_CSI_linear",), ("sup_CSI_linear",)),
    "attack": _attack(("sup_linear", *_CLASSIFIERS)),
    "alpha_scan": _alpha_scan(_CLASSIFIERS),
    "feature_distance": _feature_distance(_CLASSIFIERS),
    "noise_lambda": _noise_lambda(noise_lambda.CLASSES, _CLASSIFIERS),
    "noise_lambda_shift": _noise_lambda(noise_lambda.SHIFTS, ("simclr_CSI", "cocsr_dict")),
    "noise_lambda_rot_trans": _noise_lambda(noise_lambda.ROTATIONS, _ROT_TRANS),
}

TSNES: dict[str, Eval] = {
    "ood_pre_tsne": _picture(
        CONTRASTIVE, _CONTRASTIVE, default_for=tuple(mode for mode in _CONTRASTIVE if mode != "cocsr_dict")
    ),
    "ood_pre_tsne_shi": _picture(CONTRASTIVE, _CONTRASTIVE, "shift"),
    "ood_pre_tsne_sr": _picture(SPARSE, ("cocsr_dict",), "codes"),
    "ood_pre_tsne_dict": _picture(SPARSE, ("cocsr_dict",), "s", default_for=("cocsr_dict",)),
    "ood_pre_tsne_dict_refmix": _picture(SPARSE, ("cocsr_dict",), "s", partner="reference"),
    "ood_tsne_codes": _picture(AUTOENCODER, _AUTOENCODERS, layers={"penultimate": "h"}, default_for=_AUTOENCODERS),
    "supervised_tsne": _picture(CLASSIFIER, _CLASSIFIERS, layers={"penultimate": "h"}, default_for=_CLASSIFIERS),
    "feature_umap": _picture(CLASSIFIER, _CLASSIFIERS, layers={"penultimate": "h"}, by_class=True),
    "rot_trans_tsne": _picture(PLAIN_ROT_TRANS, _ROT_TRANS, layers={"penultimate": "h"}, default_for=_ROT_TRANS),
    "levels_tsne": _picture(LEVELS, ("level_dict",), layers={"penultimate": "h"}, default_for=("level_dict",)),
    "meansparse_inside": _sparse_inside((*_CLASSIFIERS, *_CONTRASTIVE, *_ROT_TRANS)),
    "sdnet_inside": _inside((*_CLASSIFIERS, *_CONTRASTIVE, *_ROT_TRANS)),
}


def mode_of_run(evals: Mapping[str, Eval], load_path: str | None) -> str | None:
    """The row for the weights, or the run folder, of --load_path; None where their training mode is not known."""
    if not load_path:
        return None
    place = Path(load_path)
    with readable(place, "load_path"):
        # What weights say comes before args.json beside them: of their training, MeanSparse was but the end.
        files = [place / name for name in ("last.cocsr_model", "last.model") if (place / name).is_file()]
        weights = next(iter(files), place / "args.json") if place.is_dir() else place
        mode = recorded_flags(weights).get("mode")
    return next((name for name, row in evals.items() if mode in row.default_for), None)
