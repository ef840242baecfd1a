"""Views: what the network sees of an image, in training and in evaluation.

In training, `train_views` takes the loaded images of a batch (uint8). In evaluation, `draw_views` takes whole sets.
Views are floats in [0, 1]. Dimension letters: see `datasets`.
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

# Of the two sub-views that a shift mixes; None for shifts without.
SubViewDraws = tuple[AlignedDraw, AlignedDraw] | None
SubViewNumbers = tuple[Numbers, Numbers] | None


def render_views(
    images: Tensor,
    shifts: Sequence[Shift],
    sub_views: Sequence[Sequence[SubViewNumbers]],
    numbers: Numbers,
    spec: AlignedSpec,
    batch: int,
) -> Tensor:
    """Images (V, B, 3, H, W), uint8, under all K shifts, then augmented: (V * K * B, 3, H, W), floats.

    sub_views: drawn numbers for each view and shift. numbers: those of the augmentation, for all V * K * B views.
    batch: B. The mix partner of an image is the next one; of the last, the first, or image B where there is one more.
    It neither draws nor reads values on the host, so `torch.compile` fuses it into a few passes.
    """
    size = (images.shape[3], images.shape[4])
    rendered = []
    for view, of_shifts in zip(floats(images), sub_views, strict=True):
        x, partner = (view, view.roll(-1, 0)) if len(view) == batch else (view[:-1], view[1:])
        for shift, drawn in zip(shifts, of_shifts, strict=True):
            rendered.append(apply_shift(shift, x, partner, _sub_view_draws(shift, drawn, size)))
    labels = shift_labels(len(shifts), batch, len(images), images.device)
    return aligned(torch.cat(rendered), _disabled(draw_of(numbers, size, spec), shifts, labels))


def train_views(
    images: Tensor,
    shifts: Sequence[Shift],
    spec: AlignedSpec,
    generator: Generator,
    render: Callable[..., Tensor] = render_views,
    shard: Shard | None = None,
) -> Tensor:
    """Images (V, B, 3, H, W), uint8, under all K shifts, then augmented: (V * K * B, 3, H, W), floats.

    Order: [view 0: shift 0 of all B images, shift 1, ...; view 1: the same]. The mix partner of image i is the same
    view of image (i + 1) mod B. render: `render_views`, or that compiled.
    shard: `images` has those at its `indices` in a larger batch. Parameters are drawn for the whole batch, so that they
    do not depend on the number of ranks; the views are those of the shard.
    """
    rows = len(images) * len(shifts)
    shard = shard or Shard(images.shape[1])
    sub_views = [[_sub_view_numbers(shift, shard.batch, generator) for shift in shifts] for _ in images]
    numbers = draw_numbers(rows * shard.batch, spec, generator)
    if shard.world.size > 1:
        local = shard.indices(images.device)[: shard.size]
        sub_views = [[drawn and (drawn[0][local], drawn[1][local]) for drawn in of_view] for of_view in sub_views]
        numbers = numbers[shard.rows(rows, images.device)]
    return render(images, shifts, sub_views, numbers, spec, shard.size)


def shift_labels(shifts: int, batch: int, views: int, device: torch.device) -> Tensor:
    """The shift of each row of `train_views`, (V * K * B,) int64."""
    return torch.arange(shifts, device=device).repeat_interleave(batch).repeat(views)


def apply_shift(shift: Shift, x: Tensor, partner: Tensor, sub_views: SubViewDraws) -> Tensor:
    """One shift of images x (B, channels, H, W) with their mix partners.

    sub_views: drawn parameters of the B images, where the shift mixes two sub-views of an image.
    """
    if shift.sub_views is None or sub_views is None:
        return shift.combine(x, partner)
    return shift.combine(*(shift.sub_views.make(x, draw) for draw in sub_views))


def _sub_view_numbers(shift: Shift, n: int, generator: Generator) -> SubViewNumbers:
    if shift.sub_views is None:
        return None
    return draw_numbers(n, shift.sub_views.spec, generator), draw_numbers(n, shift.sub_views.spec, generator)


def _sub_view_draws(shift: Shift, numbers: SubViewNumbers, size: tuple[int, int]) -> SubViewDraws:
    if shift.sub_views is None or numbers is None:
        return None
    return draw_of(numbers[0], size, shift.sub_views.spec), draw_of(numbers[1], size, shift.sub_views.spec)


def _disabled(draw: AlignedDraw, shifts: Sequence[Shift], labels: Tensor) -> AlignedDraw:
    """The draw without what the shift of each row, `labels` (rows,), switches off in the augmentation after it."""
    if all(shift.colours and shift.crop for shift in shifts):
        return draw
    off = torch.tensor([[not s.colours, not s.crop] for s in shifts]).to(labels.device, non_blocking=True)[labels]
    return draw.disable(off[:, 0], off[:, 1])


@dataclass(frozen=True)
class PassSpec(Spec, group="evaluation"):
    """A pass over a whole set."""

    ood_batch_size: int = flag(100, "images per batch of evaluation", above=0)


@dataclass(frozen=True)
class DrawSpec:
    """How draws of a whole set are made for evaluation.

    aligned: the augmentation after the shifts. None: plain views, neither flipped nor augmented.
    seed, purpose: draw t of image i of N is a function of (seed, purpose, t, i, N), whatever the batches.
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
    """Draw t of all N images: yields (index (B,), views (B * K, channels, H, W), image-major), batch by batch.

    For each shift, an image is flipped with probability 0.5 (never for K = 1), shifted, and augmented. The mix partner
    of image i is image (i + 1) mod N of the set, or `reference` (1, channels, H, W) for all. world: each of several
    ranks yields some of the batches.
    """
    draw = draw_set(images, spec, t)
    for index in world.shard_list(batches_of(images, spec)):
        yield index, set_views(images, spec, draw, index, reference)


def batches_of(images: ImageSet | PictureSet, spec: DrawSpec) -> list[Tensor]:
    """The indices 0..N-1, batch by batch."""
    return list(torch.arange(len(images), device=images.device).split(spec.batch_size))


@dataclass(frozen=True)
class SetDraw:
    """The drawn parameters of one draw of a whole set: about 35 bytes for each view."""

    flip: Tensor  # (N + 1, K) bool; the last row is for the reference
    sub_views: Sequence[SubViewDraws]  # for each shift, of all N images
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
        draw = _disabled(draw, spec.shifts, torch.arange(k_shifts, device=images.device).repeat(n))
    sub_views = [_sub_view_draws(shift, _sub_view_numbers(shift, n, gen), images.size) for shift in spec.shifts]
    return SetDraw(flip_NK, sub_views, draw)


def set_views(
    images: ImageSet | PictureSet,
    spec: DrawSpec,
    draw: SetDraw,
    index: Tensor,
    reference: Tensor | None = None,
    pixels: Tensor | None = None,
) -> Tensor:
    """The views (B * K, channels, H, W) that `draw_views` yields for the images at `index` (B,).

    pixels (B, channels, H, W) in [0, 1]: what is seen in place of these images. Mix partners stay as they are in the
    set. Gradients flow to the pixels.
    """
    n, k_shifts = len(images), len(spec.shifts)
    x = images.batch(index) if pixels is None else pixels
    if reference is None:
        partner_index = (index + 1) % n
        partner = images.batch(partner_index).to(x) if any(shift.partner for shift in spec.shifts) else x
    else:
        partner_index = torch.full_like(index, n)
        partner = reference.to(x).expand_as(x)
    views = []
    for k, (shift, drawn) in enumerate(zip(spec.shifts, draw.sub_views, strict=True)):
        flipped, other = hflip(x, draw.flip[index, k]), hflip(partner, draw.flip[partner_index, k])
        views.append(apply_shift(shift, flipped, other, drawn and (drawn[0][index], drawn[1][index])))
    shifted = torch.stack(views, 1).flatten(0, 1)
    if draw.aligned is None:
        return shifted
    rows = index[:, None] * k_shifts + torch.arange(k_shifts, device=index.device)
    return aligned(shifted, draw.aligned[rows.flatten()])
