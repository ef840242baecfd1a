"""Views: what the network sees of an image, in training and in evaluation.

Letters: N images of a set, B of a batch, C copies, K shifts. Images come in as floats in [0, 1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from common.seed import generator
from datasets.augment import AlignedDraw, AlignedSpec, aligned, draw_aligned, hflip
from datasets.pictures import PictureSet
from datasets.sets import ImageSet
from datasets.shifts import Shift

LookDraws = tuple[AlignedDraw, AlignedDraw] | None


def train_views(copies: Tensor, shifts: Sequence[Shift], spec: AlignedSpec, generator: Generator) -> Tensor:
    """Copies of each image (C, B, 3, H, W) under all K shifts, then augmented: (C * K * B, 3, H, W).

    Order: [copy 1: shift 0 of all B images, shift 1, ...; copy 2: the same]. The mix partner of image i is image
    (i + 1) mod B of the same copy. Stage 1 takes two copies, stage 2 one.
    """
    size = (copies.shape[3], copies.shape[4])
    views = []
    for x in copies:
        partner = x.roll(-1, 0)
        looks = [_draw_looks(shift, len(x), size, generator) for shift in shifts]
        views += [apply_shift(shift, x, partner, look) for shift, look in zip(shifts, looks, strict=True)]
    draw = draw_aligned(len(copies) * len(shifts) * copies.shape[1], size, spec, generator)
    which = shift_labels(len(shifts), copies.shape[1], len(copies), copies.device)
    return aligned(torch.cat(views), _spared(draw, shifts, which))


def shift_labels(shifts: int, batch: int, copies: int, device: torch.device) -> Tensor:
    """Which shift each row of `train_views` bears, (copies * K * B,) int64."""
    return torch.arange(shifts, device=device).repeat_interleave(batch).repeat(copies)


def apply_shift(shift: Shift, x: Tensor, partner: Tensor, looks: LookDraws) -> Tensor:
    """x, partner (b, 3, H, W); looks: the draws of the b images, where the shift looks twice at an image."""
    if shift.looks is None or looks is None:
        return shift.combine(x, partner)
    return shift.combine(*(shift.looks.make(x, draw) for draw in looks))


def _draw_looks(shift: Shift, n: int, size: tuple[int, int], generator: Generator) -> LookDraws:
    if shift.looks is None:
        return None
    return draw_aligned(n, size, shift.looks.spec, generator), draw_aligned(n, size, shift.looks.spec, generator)


def _spared(draw: AlignedDraw, shifts: Sequence[Shift], which: Tensor) -> AlignedDraw:
    """Leave out of the augmentation what the shift of each view, `which` (V,), asks to be spared."""
    if all(shift.colours and shift.crop for shift in shifts):
        return draw
    kept = torch.tensor([[not s.colours, not s.crop] for s in shifts]).to(which.device, non_blocking=True)[which]
    return draw.spare(kept[:, 0], kept[:, 1])


@dataclass(frozen=True)
class DrawSpec:
    """How to look at a whole set once, without training: one draw of every image.

    aligned: None for plain views: shifted, neither flipped nor augmented.
    seed, purpose: name the random draws; draw t of image i of N is a value of (seed, purpose, t, i, N), whatever the
    batches.
    batch_size: images per batch; no result depends on it.
    """

    shifts: Sequence[Shift]
    aligned: AlignedSpec | None
    seed: int
    purpose: str = "test draw"
    batch_size: int = 100


def draw_views(
    images: ImageSet | PictureSet, spec: DrawSpec, t: int, reference: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw t of every image: yields (index (b,), views (b * K, 3, H, W), image-major) until all N are seen.

    Each shift gets its own flip with probability 0.5 before it (none at all for K = 1), then the aligned augmentation.
    The mix partner of image i is image (i + 1) mod N of the set, or `reference` (1, 3, H, W) for all.
    """
    n, device, k_shifts = len(images), images.device, len(spec.shifts)
    gen = generator(spec.seed, spec.purpose, t, device=device)
    flips = k_shifts > 1 and spec.aligned is not None
    # One row more than images: the flips of the reference.
    flip_NK = torch.rand(n + 1, k_shifts, device=device, generator=gen) < (0.5 if flips else 0.0)
    shift_index = torch.arange(k_shifts, device=device)
    mixes = any(shift.partner for shift in spec.shifts)
    draw = None
    if spec.aligned is not None:
        draw = draw_aligned(n * k_shifts, images.size, spec.aligned, gen)
        draw = _spared(draw, spec.shifts, shift_index.repeat(n))
    looks = [_draw_looks(shift, n, images.size, gen) for shift in spec.shifts]
    for index in torch.arange(n, device=device).split(spec.batch_size):
        x = images.batch(index)
        if reference is None:
            partner_index = (index + 1) % n
            partner = images.batch(partner_index) if mixes else x
        else:
            partner_index = torch.full_like(index, n)
            partner = reference.expand_as(x)
        views = []
        for k, (shift, look) in enumerate(zip(spec.shifts, looks, strict=True)):
            own, other = hflip(x, flip_NK[index, k]), hflip(partner, flip_NK[partner_index, k])
            views.append(apply_shift(shift, own, other, look and (look[0][index], look[1][index])))
        rows = (index[:, None] * k_shifts + shift_index).flatten()
        both = torch.stack(views, 1).flatten(0, 1)
        yield index, both if draw is None else aligned(both, draw[rows])
