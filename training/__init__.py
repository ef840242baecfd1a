"""Training. `STAGE1` and `STAGE2` are the tables of modes; `training.launch` runs one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from common.dist import World
from common.flags import Flags
from datasets import ShiftSpec, Split
from training.modes import cocsr_dict, rot_trans, simclr, sup_linear
from training.modes.setup import any_shifts, no_shifts, rotations, several_shifts
from training.recipe import Recipe


@dataclass(frozen=True)
class Mode:
    """One row: how to build the recipe, which shifts it has, how many views of an image a step loads (for --dry_run).

    defaults: flags that have another default in this mode. extensible: whether --resume_path trains a run of it for
    longer.
    """

    build: Callable[[Flags, Split, ShiftSpec, World], Recipe]
    shifts: Callable[[Flags], ShiftSpec]
    views: int = 1
    defaults: Mapping[str, Any] = field(default_factory=dict)
    extensible: bool = False


_CONTRASTIVE: dict[str, Any] = {"views": 2, "extensible": True}
_LABELLED = {"temperature": 0.07}

STAGE1: dict[str, Mode] = {
    "simclr": Mode(simclr.build, no_shifts, **_CONTRASTIVE),
    "simclr_CSI": Mode(simclr.build, several_shifts, **_CONTRASTIVE),
    "sup_simclr": Mode(partial(simclr.build, labelled=True), no_shifts, **_CONTRASTIVE, defaults=_LABELLED),
    "sup_simclr_CSI": Mode(partial(simclr.build, labelled=True), rotations, **_CONTRASTIVE, defaults=_LABELLED),
    "sup_linear": Mode(sup_linear.build, no_shifts),
    "sup_CSI_linear": Mode(sup_linear.build, rotations),
    "rot_trans": Mode(rot_trans.build, rotations),
}

STAGE2: dict[str, Mode] = {
    "cocsr_dict": Mode(cocsr_dict.build, any_shifts),
}
