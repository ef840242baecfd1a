"""Aligned (SimCLR) augmentation of image batches on their device: draw the parameters, then apply them.

Images are (B, 3, H, W) floats in [0, 1]; here B counts the views of a batch. Colours are computed on the three planes.
Parameters are drawn apart from their use, so that those of a whole data set can be drawn once and indexed: no view
depends on the batch it is computed in. Dimension letters: see `datasets`.
Source: SimCLR (Chen et al. 2020), as CSI (Tack et al. 2020) runs it on the device.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from common.errors import UserError
from common.flags import Spec, flag

_TRIES = 10

# Red, green and blue, (B, H, W) each: `torch.compile` fuses operations on planes, not the slicing of planes.
Planes = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class AlignedSpec(Spec, group="shifts and augmentation"):
    """Strength of the augmentation; field names are flag names.

    color_jitter_strength: s >= 0; 0 switches the jitter off.
    resize_factor: smallest share of the area that a crop keeps, in (0, 1].
    resize_fix: every crop keeps exactly that share.
    """

    # Published evaluation of ImageNet leaves the jitter at 1 where training had 2: it is compared, not inherited.
    color_jitter_strength: float = flag(1.0, "strength of the colour jitter", at_least=0, origin="compared")
    resize_factor: float = flag(0.08, "smallest share of the area that a crop keeps", above=0, at_most=1)
    resize_fix: bool = flag(False, "every crop keeps exactly --resize_factor of the area")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.color_jitter_strength == math.inf:
            raise UserError(f"--color_jitter_strength must be >= 0 and finite, got {self.color_jitter_strength}")

    @property
    def crops(self) -> bool:
        """Whether a crop can differ from the whole image."""
        return not (self.resize_fix and self.resize_factor == 1)

    def without_crop(self) -> "AlignedSpec":
        """The same colours on whole images: for images that were cropped while loading."""
        return dataclasses.replace(self, resize_factor=1.0, resize_fix=True)


@dataclass(frozen=True)
class AlignedDraw:
    """Drawn parameters of B views; `draw[index]` takes some of them."""

    jitter: Tensor  # (B,) bool: whether colours change at all
    hsv_first: Tensor  # (B,) bool: HSV jitter before contrast
    contrast: Tensor  # (B,) factor about the image's mean
    hue: Tensor  # (B,) times 255 / 360 is added to a hue in [0, 1)
    saturation: Tensor  # (B,) factor
    value: Tensor  # (B,) factor
    gray: Tensor  # (B,) bool
    box: Tensor | None  # (B, 4): width, height, centre x, centre y of the crop in half images; None: whole images

    def __getitem__(self, index: Tensor) -> "AlignedDraw":
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        chosen: dict[str, Any] = {name: None if value is None else value[index] for name, value in values.items()}
        return AlignedDraw(**chosen)

    def disable(self, colours: Tensor, crop: Tensor) -> "AlignedDraw":
        """The same draw without colour changes where `colours` (B,) is true, and without crop where `crop` is true."""
        box = self.box
        if box is not None:
            box = torch.where(crop[:, None], _whole(box), box)
        return dataclasses.replace(self, jitter=self.jitter & ~colours, gray=self.gray & ~colours, box=box)


def _whole(box: Tensor) -> Tensor:
    """The box (4,) of a whole image, made on its device: a transfer from the host would make the host wait."""
    return (torch.arange(4, device=box.device) < 2).to(box.dtype)


@dataclass(frozen=True)
class Numbers:
    """Uniform numbers in [0, 1) from which `draw_of` makes the parameters of B views.

    They are drawn first, so that no draw depends on the strength of the augmentation.
    """

    colours: Tensor  # (7, B)
    tries: Tensor | None  # (4, B, tries), of `draw_tries`; None: nothing is cropped

    def __getitem__(self, index: Tensor) -> "Numbers":
        return Numbers(self.colours[:, index], None if self.tries is None else self.tries[:, index])


def draw_numbers(n: int, spec: AlignedSpec, generator: Generator) -> Numbers:
    """For `n` views, on the generator's device."""
    colours = torch.rand(7, n, device=generator.device, generator=generator)
    return Numbers(colours, draw_tries(n, generator) if spec.crops else None)


def draw_of(numbers: Numbers, size: tuple[int, int], spec: AlignedSpec) -> AlignedDraw:
    """The parameters of B views of (H, W) = `size` that follow from the numbers."""
    s = spec.color_jitter_strength
    low, high = max(0.0, 1 - 0.4 * s), 1 + 0.4 * s
    jitter, hsv_first, contrast, hue, saturation, value, gray = numbers.colours
    return AlignedDraw(
        jitter=jitter < (0.8 if s else 0.0),
        hsv_first=hsv_first < 0.5,
        contrast=low + contrast * (high - low),
        hue=(hue - 0.5) * (0.2 * s),
        saturation=low + saturation * (high - low),
        value=low + value * (high - low),
        gray=gray < 0.2,
        box=None if numbers.tries is None else crop_boxes(numbers.tries, size, spec),
    )


def draw_aligned(n: int, size: tuple[int, int], spec: AlignedSpec, generator: Generator) -> AlignedDraw:
    """Parameters of `n` views of (H, W) = `size`, on the generator's device."""
    return draw_of(draw_numbers(n, spec, generator), size, spec)


def draw_tries(n: int, generator: Generator) -> Tensor:
    """Uniform numbers in [0, 1) for `crop_boxes`, (4, n, tries); they do not depend on the size of the images."""
    return torch.rand(4, n, _TRIES, device=generator.device, generator=generator)


def crop_boxes(tries: Tensor, size: tuple[int, int], spec: AlignedSpec) -> Tensor:
    """Random resized crops (n, 4) of images of (H, W) = `size`: width and height as a share, centre in half images.

    Area uniform in [resize_factor, 1] (or fixed), log ratio uniform in 3/4 .. 4/3, whole-pixel sizes, half-pixel
    offsets; the first of the tries (4, n, tries) that fits, else the whole image.
    """
    height, width = size
    area, ratio, right, down = tries
    scale = (
        torch.full_like(area, spec.resize_factor)
        if spec.resize_fix
        else spec.resize_factor + area * (1 - spec.resize_factor)
    )
    root = (scale * (height * width)).sqrt()
    stretch = torch.exp((ratio - 0.5) * math.log(4 / 3))  # the root of a log-uniform ratio in 3/4 .. 4/3
    w, h = (root * stretch).round(), (root / stretch).round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)

    def chosen(values: Tensor, fallback: float) -> Tensor:
        return torch.where(fits.any(1), values.gather(1, first).squeeze(1), fallback)

    w, h = chosen(w, width), chosen(h, height)
    right, down = chosen(right, 0.5), chosen(down, 0.5)
    # A centre between -(W - w) and W - w half pixels, each equally likely.
    x = (right * (2 * (width - w) + 1)).floor().clamp(max=2 * (width - w)) - (width - w)
    y = (down * (2 * (height - h) + 1)).floor().clamp(max=2 * (height - h)) - (height - h)
    return torch.stack([w / width, h / height, x / width, y / height], 1)


def aligned(x: Tensor, draw: AlignedDraw) -> Tensor:
    """Jitter, grey and crop the views (B, 3, H, W) by their draws. Flips come before the shift, so they are not here.

    Raises: ValueError for other than three channels.
    """
    if x.shape[1] != 3:
        raise ValueError(f"the augmentation changes colours: it takes three channels, got {x.shape[1]}")
    red, green, blue = x.unbind(1)
    return crop_only(torch.stack(gray(jitter((red, green, blue), draw), draw.gray), 1), draw)


def crop_only(x: Tensor, draw: AlignedDraw) -> Tensor:
    """The crop of `aligned` alone."""
    return x if draw.box is None else crop(x, draw.box)


def hflip(x: Tensor, flip: Tensor) -> Tensor:
    """Mirror the images where `flip` (B,) is true."""
    return torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)


def _per_plane(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def jitter(x: Planes, draw: AlignedDraw) -> Planes:
    """Contrast and HSV jitter in the drawn order; images whose `jitter` is false stay as they are."""
    one = torch.ones_like(draw.contrast)
    y = contrast(x, torch.where(draw.hsv_first, one, draw.contrast))
    y = hsv_jitter(y, draw.hue, draw.saturation, draw.value)
    y = contrast(y, torch.where(draw.hsv_first, draw.contrast, one))
    return _choose(draw.jitter, y, x)


def _choose(chosen: Tensor, yes: Planes, no: Planes) -> Planes:
    """Exactly `yes` for the images where `chosen` (B,) is true, and `no` for the others.

    Multiplying by 0 and 1 takes half the time of `torch.where` on a CPU, which reads its condition pixel by pixel.
    """
    weight = _per_plane(chosen.to(yes[0].dtype))
    red, green, blue = ((a * weight).add_(b * (1 - weight)) for a, b in zip(yes, no, strict=True))
    return red, green, blue


def contrast(x: Planes, factor: Tensor) -> Planes:
    """Scale each image about the mean of each of its planes by `factor` (B,); clamped to [0, 1]."""
    scale = _per_plane(factor)
    # Not `lerp`, which a CPU computes pixel by pixel where a weight stands for an image.
    red, green, blue = (
        (plane * scale).add_(plane.mean((1, 2), keepdim=True) * (1 - scale)).clamp_(0, 1) for plane in x
    )
    return red, green, blue


def rgb_to_hsv(x: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] to hue in [0, 1), saturation and value in [0, 1].

    The hue is the angle in the colour circle, as in the published code, while `hsv_to_rgb` inverts the hexagonal hue:
    a round trip moves a hue by up to 1.1 degrees.
    """
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    hue = torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b) / (2 * math.pi)
    saturation = chroma / torch.where(value > 0, value, 1.0)
    return torch.stack([hue % 1, saturation, value], 1)


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """Hexagonal HSV to RGB: channel n is v - v s max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6, n = 5, 3, 1."""
    hue, saturation, value = hsv.unbind(1)
    return torch.stack(_from_hexagon((6 * hue).remainder_(6), value * saturation, value), 1)


def _from_hexagon(hue6: Tensor, chroma: Tensor, value: Tensor) -> Planes:
    """RGB of hue6 in [0, 6), chroma and value, (B, H, W) each.

    Red is v - c + c clamp(|h - 3| - 1, 0, 1), green and blue v - c + c clamp(2 - |h - 2|, 0, 1) and the same with 4:
    the hexagonal wave of `hsv_to_rgb`, written so that it takes few passes over memory.
    """
    base = value - chroma

    def plane(place: int, sign: int, offset: int) -> Tensor:
        wave = (hue6 - place).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        return wave.mul_(chroma).add_(base)

    return plane(3, 1, -1), plane(2, -1, 2), plane(4, -1, 2)


def hsv_jitter(x: Planes, hue: Tensor, saturation: Tensor, value: Tensor) -> Planes:
    """Add `hue` * 255 / 360 to the hue, scale saturation and value, each (B,); clamped to [0, 1].

    The same as `hsv_to_rgb` of changed `rgb_to_hsv`, without the planes in between: half the time on a CPU, where the
    remainder by `floor` takes a sixth of the time of `remainder`.
    """
    r, g, b = x
    top = torch.maximum(torch.maximum(r, g), b)
    chroma = top - torch.minimum(torch.minimum(r, g), b)
    # 2 r - g - b and g - b, the coordinates of the colour circle.
    hue6 = torch.atan2((g - b).mul_(math.sqrt(3)), (r - g).add_(r).sub_(b)).mul_(6 / (2 * math.pi))
    hue6 = hue6.add_(_per_plane(hue * (6 * 255 / 360)))
    hue6 = hue6.sub_((hue6 * (1 / 6)).floor_(), alpha=6)
    chroma = chroma.div_(top.clamp_min(1e-12)).mul_(_per_plane(saturation)).clamp_(0, 1)
    top = (top * _per_plane(value)).clamp_(0, 1)  # Not in place: the gradient of the quotient needs it as it was.
    return _from_hexagon(hue6, chroma.mul_(top), top)


def gray(x: Planes, chosen: Tensor) -> Planes:
    """Replace the images where `chosen` (B,) is true by their luminance in three equal planes."""
    r, g, b = x
    luminance = (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)
    return _choose(chosen, (luminance, luminance, luminance), x)


def crop(x: Tensor, box: Tensor) -> Tensor:
    """Crop each image to its box (B, 4), which must lie within it, and resize to full size by bilinear sampling."""
    if x.device.type == "cpu":
        return _crop_by_rows(x, box)
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = box[:, 0], box[:, 1]
    theta[:, 0, 2], theta[:, 1, 2] = box[:, 2], box[:, 3]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _crop_by_rows(x: Tensor, box: Tensor) -> Tensor:
    """`crop`, first along the width, then along the height: a fourth of the time of `grid_sample` on a CPU.

    Pixels along one direction become rows of a table, and each new row is a weighted sum of two of them. The result has
    channels-last memory format, as the networks.
    """
    views, channels, height, width = x.shape
    columns = x.permute(0, 3, 1, 2).reshape(views, width, channels * height)
    across = _resample(columns, box[:, 0], box[:, 2]).view(views, width, channels, height)
    rows = across.permute(0, 3, 1, 2).reshape(views, height, width * channels)
    return _resample(rows, box[:, 1], box[:, 3]).view(views, height, width, channels).permute(0, 3, 1, 2)


def _resample(x: Tensor, scale: Tensor, centre: Tensor) -> Tensor:
    """Rows of x (B, n, .) at n places spread over `scale` of its length about `centre` in half lengths, (B,) each."""
    views, n, _ = x.shape
    place = torch.arange(1, 2 * n, 2, device=x.device) / n - 1
    place = (((place * scale[:, None] + centre[:, None] + 1) * n - 1) / 2).clamp(0, n - 1)
    below = place.long()
    share = place - below
    rows = (
        torch.stack([below, (below + 1).clamp(max=n - 1)], 2) + n * torch.arange(views, device=x.device)[:, None, None]
    )
    weights = torch.stack([1 - share, share], 2).to(x.dtype)
    return F.embedding_bag(
        rows.view(-1, 2), x.flatten(0, 1), mode="sum", per_sample_weights=weights.view(-1, 2)
    ).view_as(x)
