"""Shifting transformations: each image gets all K of them, and the network learns to tell them apart.

A shift takes the images and each image's mix partner, both (B, 3, H, W), and returns (B, 3, H, W). Who the partner is
(the batch neighbour, a reference image) is the caller's choice; most shifts ignore it. Source: CSI (Tack et al. 2020),
ADMM-SRNet (Chiou et al. 2023).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from common.errors import UserError

Shift = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ShiftSpec:
    """Which shifts; field names are flag names. mix_alpha in [0, 1] is the partner's weight in a mix."""

    shift_trans_type: str = "none"
    mix_alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.mix_alpha <= 1:
            raise UserError(f"--mix_alpha must lie in [0, 1], got {self.mix_alpha}")

    def functions(self) -> list[Shift]:
        """The K shifts in label order."""
        return SHIFTS[self.shift_trans_type](self.mix_alpha)

    @property
    def count(self) -> int:
        return len(self.functions())

    @property
    def mixes_neighbours(self) -> bool:
        """Whether some shift needs a partner, so that one image alone cannot be shifted."""
        return "bmix" in self.shift_trans_type


def rotate(x: Tensor, partner: Tensor, *, quarters: int) -> Tensor:
    """Counter-clockwise by `quarters` right angles, as `torch.rot90` over (H, W)."""
    return torch.rot90(x, quarters, (2, 3))


def cut_permute(x: Tensor, partner: Tensor, *, index: int) -> Tensor:
    """Swap the top and bottom halves (bit 1 of `index`) and the left and right halves (bit 0)."""
    height, width = x.shape[2:]
    return x.roll((index // 2 * (height // 2), index % 2 * (width // 2)), (2, 3))


def batch_mix(x: Tensor, partner: Tensor, *, alpha: float) -> Tensor:
    """(1 - alpha) x + alpha partner."""
    return torch.lerp(x, partner, alpha)


def self_mix(x: Tensor, partner: Tensor, *, alpha: float, quarters: int) -> Tensor:
    """Mix each image with its own rotation."""
    return torch.lerp(x, torch.rot90(x, quarters, (2, 3)), alpha)


def _rotations() -> list[Shift]:
    return [partial(rotate, quarters=q) for q in range(4)]


def _cut_permutations() -> list[Shift]:
    return [partial(cut_permute, index=j) for j in range(4)]


def _batch_mix(alpha: float) -> list[Shift]:
    return [partial(batch_mix, alpha=alpha)]


def _self_mixes(alpha: float) -> list[Shift]:
    return [partial(self_mix, alpha=alpha, quarters=q) for q in (1, 2, 3)]


# name -> the K transformations in label order, given mix_alpha
SHIFTS: dict[str, Callable[[float], list[Shift]]] = {
    "none": lambda alpha: _rotations()[:1],
    "rotation": lambda alpha: _rotations(),
    "cutperm": lambda alpha: _cut_permutations(),
    "bmix": lambda alpha: _rotations()[:1] + _batch_mix(alpha),
    "rot_bmix": lambda alpha: _rotations() + _batch_mix(alpha),
    "rot_smix": lambda alpha: _rotations() + _self_mixes(alpha),
    "rot_perm": lambda alpha: _rotations() + _cut_permutations()[1:],
    "rot_perm_bmix": lambda alpha: _rotations() + _cut_permutations()[1:] + _batch_mix(alpha),
}
