"""Views: what the network sees of an image, in training and in evaluation.

Letters: N images of a set, B of a batch, C copies, K shifts. Images come in as floats in [0, 1].
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from common.dist import SINGLE, Shard, World
from common.flags import Spec, flag
from common.seed import generator
from datasets.augment import AlignedDraw, AlignedSpec, Numbers, aligned, draw_aligned, draw_numbers, draw_of, hflip
from datasets.pictures import PictureSet
from datasets.sets import ImageSet, floats
from datasets.shifts import Shift

LookDraws = tuple[AlignedDraw, AlignedDraw] | None
LookNumbers = tuple[Numbers, Numbers] | None


def render_views(
    copies: Tensor,
    shifts: Sequence[Shift],
    looks: Sequence[Sequence[LookNumbers]],
    numbers: Numbers,
    spec: AlignedSpec,
    batch: int,
) -> Tensor:
    """Copies (C, B, 3, H, W), uint8, by what was drawn: for the looks of each copy under each shift, and for all
    C * K * B views.

    batch: B. Each image is mixed with the next one, and the last with the first, or with one more that is there for it.
    It draws nothing and calls on no device, so that `torch.compile` makes a few fused passes of it.
    """
    size = (copies.shape[3], copies.shape[4])
    views = []
    for x, looks_of_copy in zip(floats(copies), looks, strict=True):
        own, partner = (x, x.roll(-1, 0)) if len(x) == batch else (x[:-1], x[1:])
        for shift, look in zip(shifts, looks_of_copy, strict=True):
            views.append(apply_shift(shift, own, partner, _look_draws(shift, look, size)))
    which = shift_labels(len(shifts), batch, len(copies), copies.device)
    return aligned(torch.cat(views), _spared(draw_of(numbers, size, spec), shifts, which))


def train_views(
    copies: Tensor,
    shifts: Sequence[Shift],
    spec: AlignedSpec,
    generator: Generator,
    render: Callable[..., Tensor] = render_views,
    shard: Shard | None = None,
) -> Tensor:
    """Copies of each image (C, B, 3, H, W), uint8, under all K shifts, then augmented: (C * K * B, 3, H, W), floats.

    Order: [copy 1: shift 0 of all B images, shift 1, ...; copy 2: the same]. The mix partner of image i is image
    (i + 1) mod B of the same copy. Stage 1 takes two copies, stage 2 one. render: `render_views`, or that compiled.
    shard: copies are of the images at its `indices` in a larger batch, for all of which parameters are drawn; the
    views are those of its p images.
    """
    rows = len(copies) * len(shifts)
    shard = shard or Shard(copies.shape[1])
    looks = [[_look_numbers(shift, shard.batch, generator) for shift in shifts] for _ in copies]
    numbers = draw_numbers(rows * shard.batch, spec, generator)
    if shard.world.size > 1:
        own = shard.indices(copies.device)[: shard.size]
        looks = [[look and (look[0][own], look[1][own]) for look in of_copy] for of_copy in looks]
        numbers = numbers[shard.rows(rows, copies.device)]
    return render(copies, shifts, looks, numbers, spec, shard.size)


def shift_labels(shifts: int, batch: int, copies: int, device: torch.device) -> Tensor:
    """Which shift each row of `train_views` bears, (copies * K * B,) int64."""
    return torch.arange(shifts, device=device).repeat_interleave(batch).repeat(copies)


def apply_shift(shift: Shift, x: Tensor, partner: Tensor, looks: LookDraws) -> Tensor:
    """x, partner (b, 3, H, W); looks: the draws of the b images, where the shift looks twice at an image."""
    if shift.looks is None or looks is None:
        return shift.combine(x, partner)
    return shift.combine(*(shift.looks.make(x, draw) for draw in looks))


def _look_numbers(shift: Shift, n: int, generator: Generator) -> LookNumbers:
    if shift.looks is None:
        return None
    return draw_numbers(n, shift.looks.spec, generator), draw_numbers(n, shift.looks.spec, generator)


def _look_draws(shift: Shift, numbers: LookNumbers, size: tuple[int, int]) -> LookDraws:
    if shift.looks is None or numbers is None:
        return None
    return draw_of(numbers[0], size, shift.looks.spec), draw_of(numbers[1], size, shift.looks.spec)


def _spared(draw: AlignedDraw, shifts: Sequence[Shift], which: Tensor) -> AlignedDraw:
    """Leave out of the augmentation what the shift of each view, `which` (V,), asks to be spared."""
    if all(shift.colours and shift.crop for shift in shifts):
        return draw
    kept = torch.tensor([[not s.colours, not s.crop] for s in shifts]).to(which.device, non_blocking=True)[which]
    return draw.spare(kept[:, 0], kept[:, 1])


@dataclass(frozen=True)
class PassSpec(Spec, group="evaluation"):
    """A pass over a whole set."""

    ood_batch_size: int = flag(100, "images per batch of evaluation", above=0)


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
    images: ImageSet | PictureSet, spec: DrawSpec, t: int, reference: Tensor | None = None, world: World = SINGLE
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw t of every image: yields (index (b,), views (b * K, 3, H, W), image-major) until all N are seen.

    Each shift gets its own flip with probability 0.5 before it (none at all for K = 1), then the aligned augmentation.
    The mix partner of image i is image (i + 1) mod N of the set, or `reference` (1, 3, H, W) for all. world: of several
    processes each takes some of the batches.
    """
    draw = draw_set(images, spec, t)
    for index in world.shard_list(batches_of(images, spec)):
        yield index, set_views(images, spec, draw, index, reference)


def batches_of(images: ImageSet | PictureSet, spec: DrawSpec) -> list[Tensor]:
    """All indices of the images, batch by batch."""
    return list(torch.arange(len(images), device=images.device).split(spec.batch_size))


@dataclass(frozen=True)
class SetDraw:
    """What is drawn for one look at a whole set: about 35 bytes a view."""

    flip: Tensor  # (N + 1, K) bool; the last row are the flips of the reference
    looks: Sequence[LookDraws]  # by shift, of all N images
    aligned: AlignedDraw | None  # of all N * K views, image-major


def draw_set(images: ImageSet | PictureSet, spec: DrawSpec, t: int) -> SetDraw:
    """The parameters of draw t of every image."""
    n, k_shifts = len(images), len(spec.shifts)
    gen = generator(spec.seed, spec.purpose, t, device=images.device)
    flips = k_shifts > 1 and spec.aligned is not None
    flip_NK = torch.rand(n + 1, k_shifts, device=images.device, generator=gen) < (0.5 if flips else 0.0)
    draw = None
    if spec.aligned is not None:
        draw = draw_aligned(n * k_shifts, images.size, spec.aligned, gen)
        draw = _spared(draw, spec.shifts, torch.arange(k_shifts, device=images.device).repeat(n))
    looks = [_look_draws(shift, _look_numbers(shift, n, gen), images.size) for shift in spec.shifts]
    return SetDraw(flip_NK, looks, draw)


def set_views(
    images: ImageSet | PictureSet, spec: DrawSpec, draw: SetDraw, index: Tensor, reference: Tensor | None = None
) -> Tensor:
    """The views (b * K, 3, H, W) of the images at `index` (b,) by their draw, as `draw_views` says."""
    n, k_shifts = len(images), len(spec.shifts)
    x = images.batch(index)
    if reference is None:
        partner_index = (index + 1) % n
        partner = images.batch(partner_index) if any(shift.partner for shift in spec.shifts) else x
    else:
        partner_index = torch.full_like(index, n)
        partner = reference.expand_as(x)
    views = []
    for k, (shift, look) in enumerate(zip(spec.shifts, draw.looks, strict=True)):
        own, other = hflip(x, draw.flip[index, k]), hflip(partner, draw.flip[partner_index, k])
        views.append(apply_shift(shift, own, other, look and (look[0][index], look[1][index])))
    both = torch.stack(views, 1).flatten(0, 1)
    if draw.aligned is None:
        return both
    rows = index[:, None] * k_shifts + torch.arange(k_shifts, device=index.device)
    return aligned(both, draw.aligned[rows.flatten()])
