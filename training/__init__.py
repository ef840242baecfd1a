"""Training. `STAGE1` and `STAGE2` are the tables of modes; `training.launch` runs one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from common.dist import World
from common.flags import Flags
from datasets import ShiftSpec, Split
from training.modes import cocsr_dict, rot_trans, simclr, sup_linear
from training.modes.setup import any_shifts, no_shifts, rotations, several_shifts
from training.recipe import Recipe


@dataclass(frozen=True)
class Mode:
    """One row: how to build the recipe, which shifts it has, how many copies of an image a step sees."""

    build: Callable[[Flags, Split, ShiftSpec, World], Recipe]
    shifts: Callable[[Flags], ShiftSpec]
    copies: int


STAGE1: dict[str, Mode] = {
    "simclr": Mode(simclr.build, no_shifts, copies=2),
    "simclr_CSI": Mode(simclr.build, several_shifts, copies=2),
    "sup_simclr": Mode(partial(simclr.build, labelled=True), no_shifts, copies=2),
    "sup_simclr_CSI": Mode(partial(simclr.build, labelled=True), rotations, copies=2),
    "sup_linear": Mode(sup_linear.build, no_shifts, copies=1),
    "sup_CSI_linear": Mode(sup_linear.build, rotations, copies=1),
    "rot_trans": Mode(rot_trans.build, rotations, copies=1),
}

STAGE2: dict[str, Mode] = {
    "cocsr_dict": Mode(cocsr_dict.build, any_shifts, copies=1),
}
