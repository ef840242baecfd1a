"""Views: what the network sees of an image, in training and in evaluation.

Letters: N images of a set, B of a batch, K shifts. Images come in as (B, 3, H, W) floats in [0, 1].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from common.seed import generator
from datasets.augment import AlignedSpec, aligned, draw_aligned, hflip
from datasets.catalog import ImageSet
from datasets.shifts import Shift


def train_views(images: Tensor, shifts: list[Shift], spec: AlignedSpec, generator: Generator, copies: int) -> Tensor:
    """Each image as `copies` flipped copies under all K shifts, then augmented: (copies * K * B, 3, H, W).

    Order: [copy 1: shift 0 of all B images, shift 1, ...; copy 2: the same]. The mix partner of image i is image
    (i + 1) mod B of the same copy. Stage 1 takes two copies, stage 2 one.
    """
    flip = torch.rand(copies, len(images), device=images.device, generator=generator) < 0.5
    views = []
    for flip_B in flip:
        x = hflip(images, flip_B)
        partner = x.roll(-1, 0)
        views += [shift(x, partner) for shift in shifts]
    x = torch.cat(views)
    return aligned(x, draw_aligned(len(x), (x.shape[2], x.shape[3]), spec, generator))


def shift_labels(shifts: int, batch: int, copies: int, device: torch.device) -> Tensor:
    """Which shift each row of `train_views` bears, (copies * K * B,) int64."""
    return torch.arange(shifts, device=device).repeat_interleave(batch).repeat(copies)


@dataclass(frozen=True)
class DrawSpec:
    """How to look at a whole set once, without training: one draw of every image.

    seed, purpose: name the random draws; draw t of image i of N is a value of (seed, purpose, t, i, N), whatever the
    batches.
    batch_size: images per batch; no result depends on it.
    """

    shifts: list[Shift]
    aligned: AlignedSpec
    seed: int
    purpose: str = "test draw"
    batch_size: int = 100


def draw_views(
    images: ImageSet, spec: DrawSpec, t: int, reference: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw t of every image: yields (index (b,), views (b * K, 3, H, W), image-major) until all N are seen.

    Each shift gets its own flip with probability 0.5 before it (none at all for K = 1), then the aligned augmentation.
    The mix partner of image i is image (i + 1) mod N of the set, or `reference` (1, 3, H, W) for all.
    """
    n, device, k_shifts = len(images), images.device, len(spec.shifts)
    gen = generator(spec.seed, spec.purpose, t, device=device)
    # One row more than images: the flips of the reference.
    flip_NK = torch.rand(n + 1, k_shifts, device=device, generator=gen) < (0.5 if k_shifts > 1 else 0.0)
    draw = draw_aligned(n * k_shifts, images.size, spec.aligned, gen)
    shift_index = torch.arange(k_shifts, device=device)
    for index in torch.arange(n, device=device).split(spec.batch_size):
        x = images.batch(index)
        if reference is None:
            partner_index = (index + 1) % n
            partner = images.batch(partner_index)
        else:
            partner_index = torch.full_like(index, n)
            partner = reference.expand_as(x)
        views = [
            shift(hflip(x, flip_NK[index, k]), hflip(partner, flip_NK[partner_index, k]))
            for k, shift in enumerate(spec.shifts)
        ]
        rows = (index[:, None] * k_shifts + shift_index).flatten()
        yield index, aligned(torch.stack(views, 1).flatten(0, 1), draw[rows])
