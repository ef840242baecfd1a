"""Training. `STAGE1` and `STAGE2` are the tables of modes; `train.py` shows how one is carried out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from common.attacks.specs import EpsilonSpec
from common.dist import World
from common.flags import DeviceSpec, Flags, RunSpec, Spec, WeightsSpec, file_name, joined_name
from datasets import DataSource, ShiftSpec, Split
from datasets.augment import AlignedSpec
from datasets.corrupt import CorruptSpec
from datasets.one_class import SplitSpec
from datasets.outliers import TestBatchSpec
from datasets.views import PassSpec
from models import ModelSpec
from models.autoencoder.networks import AutoencoderSpec
from models.autoencoder.specs import RoundsSpec, SeparationSpec
from models.feature_net import FeatureTransform
from models.mean_sparse import AlphaSpec
from models.sdnet import CSCSpec
from models.sparse.dictionary import SparseSpec
from training.micro_batch import MicroBatchSpec
from training.modes import (
    adversarial,
    cocsr_dict,
    level_dict,
    mean_sparse,
    rdae,
    rot_trans,
    simclr,
    sup_linear,
    supervised,
)
from training.modes.cocsr_dict import DictionaryLossSpec, DictionaryTrainingSpec
from training.modes.setup import any_shifts, no_shifts, rotations, several_shifts
from training.named import NamedSpec
from training.optim import LengthSpec, OptimSpec, RateSpec
from training.recipe import Recipe
from training.specs import CompileSpec, ContrastiveSpec, ProbeSpec, StepSpec


class Start(NamedTuple):
    """Weights that a mode starts from. flag: names them. files: which of a run folder are taken, the first there is.

    What they have recorded of their training decides flags that were not given. more_epochs: default of --epochs, as a
    number of epochs after theirs; None: --epochs has its usual default.
    """

    flag: str
    files: tuple[str, ...]
    more_epochs: int | None = None


@dataclass(frozen=True)
class Mode:
    """One row.

    build: (flags, split, world) -> what `fit` trains. specs: whose flags it reads. name: its part of the run's name.
    shifts: of each image (K); views: flags -> how many random views of an image a step loads. Both are for --dry_run
    and logs.
    defaults: flags that have another default in this mode. start: weights it starts from, where there are any.
    extensible: whether --resume_path trains a finished run of it for longer. length: flags -> --epochs, where other
    flags decide it. backbone: whether the network has that of --model, which decides the size of images and is part of
    the run's name.
    """

    build: Callable[[Flags, Split, World], Recipe]
    specs: tuple[type[Spec], ...]
    name: Callable[[Flags], Sequence[str]]
    shifts: Callable[[Flags], ShiftSpec] = no_shifts
    views: Callable[[Flags], int] = lambda flags: 1
    defaults: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    extensible: bool = False
    length: Callable[[Flags], int] | None = None
    backbone: bool = True


def _labelled(flags: Flags) -> list[str]:
    return [flags.mode]


def _unlabelled(flags: Flags) -> list[str]:
    return ["unsup", flags.mode]


def _shifted(flags: Flags) -> list[str]:
    return [*_unlabelled(flags), "shift", flags.of(ShiftSpec, only=["shift_trans_type"]).shift_trans_type]


def _coded(flags: Flags) -> list[str]:
    inverted = flags.of(FeatureTransform, only=["invert_sr_feature_norm"]).invert_sr_feature_norm
    sparse = flags.of(SparseSpec, only=["sr_lambda", "sr_lambda_rel"])
    lam = f"ld{sparse.sr_lambda}" if sparse.sr_lambda_rel is None else f"ldrel{sparse.sr_lambda_rel}"
    lr = flags.of(DictionaryTrainingSpec, only=["sr_lr"]).sr_lr
    return [*_shifted(flags), "cocsr", lam, f"lr{lr}", *(["invf"] if inverted else [])]


def run_name(flags: Flags, mode: Mode) -> str:
    """The folder name of a run: an interface, since later commands spell it out (specification, section 11).

    A class bears the number or the name that the user gave. Raises: UserError for a name too long for a folder.
    """
    split, suffix = flags.of(SplitSpec), flags.of(RunSpec, only=["suffix"]).suffix
    normal = [] if split.one_class_idx is None else ["one_class", file_name(str(split.one_class_idx))]
    normal += ["outliers", str(split.outliers)] if split.outliers else []
    corrupt = CorruptSpec.of(flags, mixed=split.outliers > 0 or split.held_out != 0)
    noise = ["corrupt", f"{corrupt.corrupt}{corrupt.corrupt_pixels}"] if corrupt.active else []
    network = [flags.of(ModelSpec, only=["model"]).model] if mode.backbone else []
    return joined_name([split.dataset, *network, *mode.name(flags), *normal, *noise, *([suffix] if suffix else [])])


COMMON = (
    *(RunSpec, NamedSpec, WeightsSpec, SplitSpec, CorruptSpec, DataSource),
    *(ModelSpec, DeviceSpec, CompileSpec, LengthSpec, StepSpec),
)
_VIEWS = (ShiftSpec, AlignedSpec, MicroBatchSpec)


def _contrastive(
    shifts: Callable[[Flags], ShiftSpec],
    name: Callable[[Flags], Sequence[str]],
    *,
    labelled: bool = False,
    defaults: Mapping[str, Any] = {},
) -> Mode:
    return Mode(
        partial(simclr.build, shifts=shifts, labelled=labelled),
        (*COMMON, *_VIEWS, OptimSpec, CSCSpec, ContrastiveSpec, ProbeSpec, TestBatchSpec),
        name,
        shifts,
        views=lambda flags: flags.of(ContrastiveSpec, only=["copies"]).copies,
        defaults=defaults,
        start=Start("resume_path", ("last.resume", "last.model")),
        extensible=True,
    )


def _linear(shifts: Callable[[Flags], ShiftSpec], defaults: Mapping[str, Any] = {}) -> Mode:
    build, specs = partial(sup_linear.build, shifts=shifts), (*COMMON, *_VIEWS, RateSpec)
    start = Start("load_path", ("last.model",))
    return Mode(build, specs, _labelled, shifts, defaults=defaults, start=start)


def _mode_alone(flags: Flags) -> list[str]:
    return [flags.mode]


def _autoencoder(
    build: Callable[[Flags, Split, World], Recipe],
    name: Callable[[Flags], Sequence[str]],
    defaults: Mapping[str, Any] = {},
    *,
    length: Callable[[Flags], int] | None = None,
) -> Mode:
    specs = (*COMMON, RateSpec, AutoencoderSpec, SeparationSpec, RoundsSpec)
    own = {"lr_init": 1e-3, "weight_decay": 0.0, "epochs": 200, **defaults}
    return Mode(build, specs, name, defaults=own, backbone=False, length=length)


def _adversarial(defaults: Mapping[str, Any] = {}) -> Mode:
    own = {"lr_init": 0.01, "weight_decay": 2e-4, "epochs": 120, "held_out": "auto"}
    schedule = {"lr_drops": [74, 89, 99], "no_nesterov": True}
    return Mode(
        adversarial.build,
        (*COMMON, RateSpec, supervised.SupervisedSpec, AlignedSpec, CSCSpec, EpsilonSpec, adversarial.AdversarialSpec),
        adversarial.run_parts,
        defaults={**own, **schedule, **defaults},
    )


_CYCLE = {"lr_schedule": "cycle", "lr_init": 0.2, "epochs": 30}
_VARIATIONAL = {"autoencoder": "vae", "layers": [400, 20]}
_TEMPERATURE = {"temperature": 0.07}
_ROTATION = {"shift_trans_type": "rotation"}

STAGE1: dict[str, Mode] = {
    "simclr": _contrastive(no_shifts, _unlabelled),
    "simclr_CSI": _contrastive(several_shifts, _shifted),
    "sup_simclr": _contrastive(no_shifts, _labelled, labelled=True, defaults=_TEMPERATURE),
    "sup_simclr_CSI": _contrastive(rotations, _labelled, labelled=True, defaults=_TEMPERATURE | _ROTATION),
    "sup_linear": _linear(no_shifts),
    "sup_CSI_linear": _linear(rotations, _ROTATION),
    "rot_trans": Mode(
        rot_trans.build,
        (*COMMON, *_VIEWS, OptimSpec, CSCSpec),
        _unlabelled,
        rotations,
        defaults=_ROTATION,
    ),
    "adv_rot_trans": Mode(
        rot_trans.build_attacked,
        (*COMMON, *_VIEWS, OptimSpec, CSCSpec, EpsilonSpec, rot_trans.ViewAttackSpec),
        _unlabelled,
        rotations,
        defaults=_ROTATION,
    ),
    "supervised": Mode(
        supervised.build,
        (*COMMON, RateSpec, supervised.SupervisedSpec, AlignedSpec, CSCSpec),
        _mode_alone,
        defaults={"lr_init": 0.1, "weight_decay": 5e-4, "epochs": 220, "held_out": "auto"},
    ),
    "adv_pgd": _adversarial(),
    "adv_trades": _adversarial(),
    "adv_mart": _adversarial({"robust_weight": 5.0}),
    "adv_fgsm_rs": _adversarial(_CYCLE),
    "adv_nfgsm": _adversarial(_CYCLE),
    "meansparse": Mode(
        mean_sparse.build,
        (*COMMON, ShiftSpec, mean_sparse.PlacementSpec, AlphaSpec),
        mean_sparse.name,
        ShiftSpec.of,
        defaults={"epochs": 0, "batch_size": 512},
        start=Start("load_path", mean_sparse.FILES),
    ),
    "rdae": _autoencoder(rdae.build, rdae.robust_name, length=rdae.rounds_and_epochs),
    "dae": _autoencoder(rdae.build_plain, rdae.plain_name),
    "vae": _autoencoder(rdae.build_plain, _mode_alone, _VARIATIONAL),
}

STAGE2: dict[str, Mode] = {
    "cocsr_dict": Mode(
        cocsr_dict.build,
        (*COMMON, *_VIEWS, PassSpec, SparseSpec, FeatureTransform, DictionaryTrainingSpec, DictionaryLossSpec),
        _coded,
        any_shifts,
        start=Start("resume_path", ("last.model",), more_epochs=300),
    ),
    "level_dict": Mode(
        level_dict.build,
        (*COMMON, ShiftSpec, PassSpec, SparseSpec, FeatureTransform),
        _unlabelled,
        ShiftSpec.of,
        defaults={"sr_layer": ["pixels", "stages"], "sr_dict_size": 256, "sr_lambda_rel": 0.1},
        start=Start("resume_path", ("last.model",), more_epochs=0),
    ),
}
