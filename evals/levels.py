"""How a stage-2 network of several depths looks at images."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from common.errors import UserError
from datasets import ShiftSpec
from datasets.shifts import rotation_and_translation_labels, rotations_and_translations
from models.feature_net import FeatureNet, RotTransNet
from models.level_net import SCORE, LevelNet, Transformations

# Of the 36 views of Rot+Trans the one that is not rotated; it is not moved, either.
_UPRIGHT = 4


def transformations_of(net: FeatureNet | RotTransNet, shifts: ShiftSpec) -> Transformations:
    """The transformations that stage 1 has learned to tell apart: those of Rot+Trans, or the rotations.

    Raises: UserError for a network of other shifts.
    """
    if isinstance(net, RotTransNet):
        truth = rotation_and_translation_labels()
        found, rotations = rotations_and_translations(), range(_UPRIGHT, 36, 9)
    elif shifts.shift_trans_type in ("none", "rotation"):
        found = shifts.functions()
        truth, rotations = {"shift": torch.arange(len(found))}, range(len(found))
    else:
        raise UserError(
            f"--shift_trans_type {shifts.shift_trans_type}: several depths are for stage 1 with --mode rot_trans, or"
            " with --shift_trans_type rotation or none"
        )
    return Transformations([partial(_alone, shift.combine) for shift in found], tuple(rotations), truth)


def _alone(combine: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """A transformation that looks at no other image."""
    return combine(x, x)


def level_outputs(net: LevelNet, views: Transformations) -> Callable[[Tensor], dict[str, Tensor]]:
    """Of images (b, 1, 3, H, W): the terms of the score, the score itself and `CODE_FACTS`, (b, 1, 1) each, and
    h (b, 1, F), features of the image as it is."""

    def outputs(images: Tensor) -> dict[str, Tensor]:
        reading = net.read(images[:, 0], views)
        values = net.values(reading, views)
        found = {**values, SCORE: net.score(values)}
        return {**{name: value[:, None, None] for name, value in found.items()}, "h": reading.h[:, :1]}

    return outputs
