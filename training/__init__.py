"""Training. `STAGE1` and `STAGE2` are the tables of modes; `training.launch` runs one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from common.dist import World
from common.flags import Flags, RunSpec, file_name, joined_name
from datasets import ShiftSpec, Split
from datasets.one_class import SplitSpec
from models import ModelSpec
from models.feature_net import FeatureTransform
from models.sparse.dictionary import SparseSpec
from training.modes import cocsr_dict, rot_trans, simclr, sup_linear
from training.modes.cocsr_dict import DictionaryTrainingSpec
from training.modes.setup import any_shifts, no_shifts, rotations, several_shifts
from training.recipe import Recipe


@dataclass(frozen=True)
class Mode:
    """One row: how to build the recipe, its part of the run's name, which shifts it has, how many copies of an image a
    step sees.

    defaults: flags that have another default in this mode. extensible: whether --resume_path trains a run of it for
    longer.
    """

    build: Callable[[Flags, Split, ShiftSpec, World], Recipe]
    name: Callable[[Flags], list[str]]
    shifts: Callable[[Flags], ShiftSpec]
    copies: int
    defaults: Mapping[str, Any] = field(default_factory=dict)
    extensible: bool = False


def _labelled(flags: Flags) -> list[str]:
    return [flags.of(RunSpec, only=["mode"]).mode]


def _unlabelled(flags: Flags) -> list[str]:
    return ["unsup", flags.of(RunSpec, only=["mode"]).mode]


def _shifted(flags: Flags) -> list[str]:
    return [*_unlabelled(flags), "shift", flags.of(ShiftSpec, only=["shift_trans_type"]).shift_trans_type]


def _coded(flags: Flags) -> list[str]:
    inverted = flags.of(FeatureTransform, only=["invert_sr_feature_norm"]).invert_sr_feature_norm
    lam = flags.of(SparseSpec, only=["sr_lambda"]).sr_lambda
    lr = flags.of(DictionaryTrainingSpec, only=["sr_lr"]).sr_lr
    return [*_shifted(flags), "cocsr", f"ld{lam}", f"lr{lr}", *(["invf"] if inverted else [])]


def run_name(flags: Flags, mode: Mode) -> str:
    """The folder name of a run: an interface, since later commands spell it out (specification, section 11).

    A class bears the number or the name that the user gave. Raises: UserError for a name too long for a folder.
    """
    split, suffix = flags.of(SplitSpec), flags.of(RunSpec, only=["suffix"]).suffix
    normal = [] if split.one_class_idx is None else ["one_class", file_name(str(split.one_class_idx))]
    network = flags.of(ModelSpec, only=["model"]).model
    return joined_name([split.dataset, network, *mode.name(flags), *normal, *([suffix] if suffix else [])])


_CONTRASTIVE: dict[str, Any] = {"copies": 2, "extensible": True}
_LABELLED: dict[str, Any] = {**_CONTRASTIVE, "defaults": {"temperature": 0.07}}

STAGE1: dict[str, Mode] = {
    "simclr": Mode(simclr.build, _unlabelled, no_shifts, **_CONTRASTIVE),
    "simclr_CSI": Mode(simclr.build, _shifted, several_shifts, **_CONTRASTIVE),
    "sup_simclr": Mode(partial(simclr.build, labelled=True), _labelled, no_shifts, **_LABELLED),
    "sup_simclr_CSI": Mode(partial(simclr.build, labelled=True), _labelled, rotations, **_LABELLED),
    "sup_linear": Mode(sup_linear.build, _labelled, no_shifts, copies=1),
    "sup_CSI_linear": Mode(sup_linear.build, _labelled, rotations, copies=1),
    "rot_trans": Mode(rot_trans.build, _unlabelled, rotations, copies=1),
}

STAGE2: dict[str, Mode] = {
    "cocsr_dict": Mode(cocsr_dict.build, _coded, any_shifts, copies=1),
}
