"""Shifting transformations: each image gets all K of them, and the network learns to classify them.

A shift combines two images (B, channels, H, W) into one: an image and its mix partner (the next one in the batch or a
reference image: the caller's choice), or two random sub-views of the image itself. Most shifts ignore the second.
Source: CSI (Tack et al. 2020), ADMM-SRNet (Chiou et al. 2023).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from common.flags import Flags, Spec, flag
from datasets.augment import AlignedDraw, AlignedSpec, aligned, crop_only


@dataclass(frozen=True)
class SubViews:
    """Two random sub-views of an image, crops or augmented versions of it: drawn by `spec`, made by `make`."""

    spec: AlignedSpec
    make: Callable[[Tensor, AlignedDraw], Tensor]


@dataclass(frozen=True)
class Shift:
    """One transformation. combine: (x, other) -> x', all (B, channels, H, W).

    partner: whether the result depends on `other`, the mix partner.
    sub_views: None, or the two sub-views of the image that `combine` gets in place of x and other.
    colours, crop: whether the aligned augmentation after the shift changes colours, and crops.
    """

    combine: Callable[[Tensor, Tensor], Tensor]
    partner: bool = False
    sub_views: SubViews | None = None
    colours: bool = True
    crop: bool = True


_FLIPMIX = "no published command uses it; rot_smix mixes an image with its own rotations"
_REFUSED = {"flipmix": _FLIPMIX, "rot_flipmix": _FLIPMIX}


@dataclass(frozen=True)
class ShiftSpec(Spec, group="shifts and augmentation"):
    """Which shifts; field names are flag names.

    mix_alpha in [0, 1]: the weight of the other image in a mix.
    cropmix_resize_factor, cropmix_resize_fix: as in `AlignedSpec`, of the crops that `rot_cropmix` mixes.
    cropmix_crop_aug: whether the augmentation crops the mixed image again.
    """

    shift_trans_type: str = flag(
        "none", "shifting transformations", choices=lambda: SHIFTS, refused=_REFUSED, origin="network"
    )
    mix_alpha: float = flag(0.5, "weight of the partner in a mixed image", at_least=0, at_most=1, origin="network")
    cropmix_resize_factor: float = flag(0.08, "rot_cropmix: as --resize_factor", above=0, at_most=1, origin="network")
    cropmix_resize_fix: bool = flag(False, "rot_cropmix: as --resize_fix", origin="network")
    cropmix_crop_aug: bool = flag(False, "rot_cropmix: crop the mixed image once more", origin="network")

    @classmethod
    def of(cls, flags: Flags) -> "ShiftSpec":
        """From the flags; reads only those that the type of shift depends on."""
        name = flags.of(cls, only=("shift_trans_type",)).shift_trans_type
        return flags.of(cls, only=("shift_trans_type", *SHIFTS[name].flags))

    def functions(self, spec: AlignedSpec | None = None) -> list[Shift]:
        """The K shifts in label order. spec: the aligned augmentation, which the sub-views of `rot_augmix` use too."""
        return SHIFTS[self.shift_trans_type].make(self, spec or AlignedSpec())

    @property
    def count(self) -> int:
        """K."""
        return len(self.functions())

    @property
    def mixes_neighbours(self) -> bool:
        """Whether a shift needs a mix partner, so that a single image cannot be shifted."""
        return any(shift.partner for shift in self.functions())


def rotate(x: Tensor, other: Tensor, *, quarters: int) -> Tensor:
    """Counter-clockwise by `quarters` right angles, as `torch.rot90` over (H, W)."""
    return torch.rot90(x, quarters, (2, 3))


def translate(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Translate each image by `down` and `right` (B,) whole pixels; the border is filled by reflection."""

    def sources(size: int, offset: Tensor) -> Tensor:
        index = (torch.arange(size, device=x.device) - offset[:, None]).abs()
        return (size - 1) - (size - 1 - index).abs()

    rows, columns = sources(x.shape[2], down), sources(x.shape[3], right)
    images, channels = torch.arange(len(x), device=x.device), torch.arange(x.shape[1], device=x.device)
    return x[images[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def cut_permute(x: Tensor, other: Tensor, *, index: int) -> Tensor:
    """Swap the top and bottom halves (bit 1 of `index`) and the left and right halves (bit 0)."""
    height, width = x.shape[2:]
    return x.roll((index // 2 * (height // 2), index % 2 * (width // 2)), (2, 3))


def mix(x: Tensor, other: Tensor, *, alpha: float) -> Tensor:
    """(1 - alpha) x + alpha other."""
    return torch.lerp(x, other, alpha)


def self_mix(x: Tensor, other: Tensor, *, alpha: float, quarters: int) -> Tensor:
    """Mix each image with its own rotation."""
    return torch.lerp(x, torch.rot90(x, quarters, (2, 3)), alpha)


def _rotations() -> list[Shift]:
    return [Shift(partial(rotate, quarters=q)) for q in range(4)]


def _cut_permutations() -> list[Shift]:
    return [Shift(partial(cut_permute, index=j)) for j in range(4)]


def _batch_mix(s: ShiftSpec) -> list[Shift]:
    return [Shift(partial(mix, alpha=s.mix_alpha), partner=True)]


def _self_mixes(s: ShiftSpec) -> list[Shift]:
    return [Shift(partial(self_mix, alpha=s.mix_alpha, quarters=q)) for q in (1, 2, 3)]


def _crop_mix(s: ShiftSpec) -> list[Shift]:
    crops = AlignedSpec(0.0, s.cropmix_resize_factor, s.cropmix_resize_fix)
    return [Shift(partial(mix, alpha=s.mix_alpha), sub_views=SubViews(crops, crop_only), crop=s.cropmix_crop_aug)]


def _augment_mix(s: ShiftSpec, spec: AlignedSpec) -> list[Shift]:
    return [Shift(partial(mix, alpha=s.mix_alpha), sub_views=SubViews(spec, aligned), colours=False, crop=False)]


@dataclass(frozen=True)
class ShiftRow:
    """make: the K transformations in label order. flags: what they depend on."""

    make: Callable[[ShiftSpec, AlignedSpec], list[Shift]]
    flags: tuple[str, ...] = ()


_MIX = ("mix_alpha",)
_CROP_MIX = ("mix_alpha", "cropmix_resize_factor", "cropmix_resize_fix", "cropmix_crop_aug")

SHIFTS: dict[str, ShiftRow] = {
    "none": ShiftRow(lambda s, a: _rotations()[:1]),
    "rotation": ShiftRow(lambda s, a: _rotations()),
    "cutperm": ShiftRow(lambda s, a: _cut_permutations()),
    "bmix": ShiftRow(lambda s, a: _rotations()[:1] + _batch_mix(s), _MIX),
    "rot_bmix": ShiftRow(lambda s, a: _rotations() + _batch_mix(s), _MIX),
    "rot_smix": ShiftRow(lambda s, a: _rotations() + _self_mixes(s), _MIX),
    "rot_perm": ShiftRow(lambda s, a: _rotations() + _cut_permutations()[1:]),
    "rot_perm_bmix": ShiftRow(lambda s, a: _rotations() + _cut_permutations()[1:] + _batch_mix(s), _MIX),
    "rot_cropmix": ShiftRow(lambda s, a: _rotations() + _crop_mix(s), _CROP_MIX),
    "rot_augmix": ShiftRow(lambda s, a: _rotations() + _augment_mix(s, a), _MIX),
}


def rotate_and_translate(x: Tensor, vertical: Tensor, horizontal: Tensor, *, quarters: int) -> Tensor:
    """Rotate, then translate by a quarter of the image (8 of 32 pixels) times index - 1; indices (B,) in 0..2."""
    step = x.shape[2] // 4
    return translate(torch.rot90(x, quarters, (2, 3)), (vertical - 1) * step, (horizontal - 1) * step)


def _rotate_and_translate_all(x: Tensor, other: Tensor, *, quarters: int, vertical: int, horizontal: int) -> Tensor:
    index = torch.zeros(len(x), dtype=torch.long, device=x.device)
    return rotate_and_translate(x, index + vertical, index + horizontal, quarters=quarters)


def rotation_and_translation_labels() -> dict[str, Tensor]:
    """The classes of the 36 transformations of Rot+Trans, (36,) each, by head."""
    k = torch.arange(36)
    return {"rotation": k // 9, "vertical": k // 3 % 3, "horizontal": k % 3}


def rotations_and_translations() -> list[Shift]:
    """The 36 transformations of Rot+Trans (Hendrycks et al. 2019), rotation * 9 + vertical * 3 + horizontal."""
    return [
        Shift(partial(_rotate_and_translate_all, quarters=q, vertical=v, horizontal=h))
        for q in range(4)
        for v in range(3)
        for h in range(3)
    ]
