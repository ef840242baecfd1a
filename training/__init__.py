"""Training. `STAGE1` and `STAGE2` are the tables of modes; `training.launch` runs one."""

from collections.abc import Callable
from dataclasses import dataclass

from common.flags import Flags
from datasets import ShiftSpec, Split
from training.modes import cocsr_dict, simclr
from training.recipe import Recipe


@dataclass(frozen=True)
class Mode:
    """One row: how to build the recipe, which shifts it has, how many copies of an image a step sees."""

    build: Callable[[Flags, Split, ShiftSpec], Recipe]
    shifts: Callable[[Flags], ShiftSpec]
    copies: int


STAGE1: dict[str, Mode] = {
    "simclr": Mode(simclr.build, simclr.no_shifts, copies=2),
    "simclr_CSI": Mode(simclr.build, simclr.several_shifts, copies=2),
}

STAGE2: dict[str, Mode] = {
    "cocsr_dict": Mode(cocsr_dict.build, simclr.any_shifts, copies=1),
}
