"""Noise and other corruptions of test images by level, and the arrays of CIFAR-10-C.

Unlike that of `datasets.corrupt`, which replaces a number of pixels in training and test images alike, it changes every
entry of test images, or of those that a lambda is calibrated on. Letters: n images of a block, C channels, H and W
pixels; V values of a pixel.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from common.errors import UserError
from common.flags import Flags, Spec, flag
from common.seed import seed_of
from datasets.one_class import TEST
from datasets.sets import ImageSet, combined, derived, floats, image_set

NONE = "none"
SEVERITIES = (1, 2, 3, 4, 5)


class NoiseKind(NamedTuple):
    """One row.

    apply: (images (n, C, H, W) floats in [0, 1], level, numbers (n, C, H, W)) -> noisy images, clipped to [0, 1].
    draw: fills the numbers (C, H, W), float32, of one image from a generator on the CPU; they do not depend on the
    level. None: nothing is random, and the numbers are not to be read.
    unit: what a level is. least, most: its range.
    archive: the name of this kind among the arrays of CIFAR-10-C.
    """

    apply: Callable[[Tensor, float, Tensor], Tensor]
    draw: Callable[[Tensor, Generator], Tensor] | None
    unit: str
    least: float
    most: float
    archive: str

    @property
    def limits(self) -> str:
        """A level and where it lies, for messages."""
        return f"{self.unit} in [{self.least:g}, {self.most:g}]"


def _gaussian(images: Tensor, std: float, normal: Tensor) -> Tensor:
    """x + std * n."""
    return torch.add(images, normal, alpha=std).clamp_(0, 1)


def _speckle(images: Tensor, std: float, normal: Tensor) -> Tensor:
    """x + x * std * n."""
    return torch.addcmul(images, images, normal, value=std).clamp_(0, 1)


def _impulse(images: Tensor, share: float, uniform: Tensor) -> Tensor:
    """An entry becomes 0 or 1 with probability share / 2 each.

    Channels are drawn independently of each other, as in CIFAR-10-C (scikit-image's `s&p`): most pixels that are hit
    become coloured, not black or white. Which entries are hit at a share, are so at every higher one.
    """
    return images.masked_fill(uniform < share / 2, 0.0).masked_fill_(uniform >= 1 - share / 2, 1.0)


def _shot(images: Tensor, rate: float, uniform: Tensor) -> Tensor:
    """poisson(rate * x) / rate, by inversion of the distribution function at `uniform`.

    x is taken to the nearest multiple of 1 / 510, which images of 8 bits and the mean of any two of them are. Uniform
    numbers are multiples of 2^-24; each stands for the middle of its interval.
    """
    known = _quantiles(rate)
    value = (images * _VALUES).round_().int()
    cell = value * _CELLS + (uniform * _CELLS).int()
    count = known.at_cell.to(images.device).index_select(0, cell.flatten()).int()
    split = (count < 0).nonzero()[:, 0]
    row = value.flatten()[split]
    key = row + (uniform.flatten()[split].double() + 2.0**-25)
    found = torch.searchsorted(known.bounds.to(images.device), key, right=True)
    count[split] = (found - row * known.columns).int()
    return (count.view_as(images) / rate).clamp_(max=1)


# A pixel of value v / _VALUES has the row v; uniform numbers are looked up in so many cells.
_VALUES, _CELLS = 510, 1024


class _Quantiles(NamedTuple):
    """Quantiles of the Poisson distributions of all values of a pixel.

    at_cell (V * cells,) int16: the quantile where it is the same in a whole cell, else -1. bounds (V * columns,)
    float64, ascending: v + P(count <= k) for each value v and each k below `columns`.
    """

    at_cell: Tensor
    bounds: Tensor
    columns: int


@lru_cache(maxsize=2)
def _quantiles(rate: float) -> _Quantiles:
    # Eight standard deviations: beyond what a uniform number of 24 bits can ask for.
    k = torch.arange(math.ceil(rate + 8 * math.sqrt(rate) + 20), dtype=torch.float64)
    mean = torch.arange(_VALUES + 1, dtype=torch.float64)[:, None] * (rate / _VALUES)
    below = torch.special.xlogy(k, mean).sub_(mean).sub_(torch.lgamma(k + 1)).exp_().cumsum(1).clamp_(max=1)
    edges = torch.arange(_CELLS + 1, dtype=torch.float64) / _CELLS
    first, last = (
        torch.searchsorted(below, x.expand(len(below), -1).contiguous(), right=True, out_int32=True)
        for x in (edges[:-1] + 2.0**-25, edges[1:] - 2.0**-25)
    )
    at_cell = torch.where(first == last, first, -1).short().flatten()
    return _Quantiles(at_cell, (torch.arange(len(below))[:, None] + below).flatten(), len(k))


def _normal(numbers: Tensor, generator: Generator) -> Tensor:
    return numbers.normal_(generator=generator)


def _uniform(numbers: Tensor, generator: Generator) -> Tensor:
    return numbers.uniform_(generator=generator)


def _blur(images: Tensor, std: float, numbers: Tensor) -> Tensor:
    """Convolution with a Gaussian, cut at four standard deviations; the border is repeated."""
    radius = int(4 * std + 0.5)
    if radius == 0:
        return images.clone()
    place = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = (-0.5 * (place / std) ** 2).exp()
    weights = (weights / weights.sum()).to(images)
    n, channels, height, width = images.shape
    # Beyond the border one pixel after the other is the same, however wide the Gaussian.
    rows = F.pad(images.reshape(n * channels, 1, height, width), (radius, radius, radius, radius), mode="replicate")
    blurred = F.conv2d(F.conv2d(rows, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return blurred.view_as(images).clamp_(0, 1)


def _brightness(images: Tensor, added: float, numbers: Tensor) -> Tensor:
    """V of HSV, the largest channel, raised by so much; hue and saturation stay. Black becomes grey."""
    value = images.amax(1, keepdim=True)
    raised = (value + added).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp_min(1e-12)), raised).clamp_(0, 1)


def _contrast(images: Tensor, factor: float, numbers: Tensor) -> Tensor:
    """Scaled about the mean of each channel of each image."""
    mean = images.mean((2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def _pixelate(images: Tensor, scale: float, numbers: Tensor) -> Tensor:
    """Made smaller by means over boxes, and as large again."""
    height, width = images.shape[2:]
    small = max(1, int(width * scale)), max(1, int(height * scale))
    return _by_pillow(images, lambda x: x.resize(small, Image.Resampling.BOX).resize(x.size, Image.Resampling.BOX))


def _jpeg(images: Tensor, quality: float, numbers: Tensor) -> Tensor:
    """Compressed and decompressed."""

    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=round(quality))
        return Image.open(file)

    return _by_pillow(images, compressed)


def _by_pillow(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Image by image, in 8 bits."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).squeeze(3)
    found = np.stack([np.asarray(change(Image.fromarray(image.numpy()))) for image in pixels])
    return floats(torch.from_numpy(found).view(len(images), *images.shape[2:], -1).permute(0, 3, 1, 2))


# What is drawn at random; the subject of noise x lambda.
NOISES: dict[str, NoiseKind] = {
    "gaussian": NoiseKind(_gaussian, _normal, "a standard deviation", 0, 10, "gaussian_noise"),
    "shot": NoiseKind(_shot, _uniform, "a Poisson rate", 1e-3, 1e4, "shot_noise"),
    "speckle": NoiseKind(_speckle, _normal, "a standard deviation", 0, 10, "speckle_noise"),
    "impulse": NoiseKind(_impulse, _uniform, "a share of entries", 0, 1, "impulse_noise"),
}

# All that --test_noise does.
CORRUPTIONS: dict[str, NoiseKind] = {
    **NOISES,
    "gaussian_blur": NoiseKind(_blur, None, "a standard deviation in pixels", 0, 100, "gaussian_blur"),
    "brightness": NoiseKind(_brightness, None, "what is added to V of HSV", 0, 1, "brightness"),
    "contrast": NoiseKind(_contrast, None, "a factor about the mean", 0, 1, "contrast"),
    "pixelate": NoiseKind(_pixelate, None, "a share of the side", 0.01, 1, "pixelate"),
    "jpeg": NoiseKind(_jpeg, None, "a JPEG quality", 1, 100, "jpeg_compression"),
}

# protocol -> kind -> levels, from little to much noise. `sdnet`: of the released robustness study on CIFAR-10.
# `cifar10c`, `imagenetc`: the five severities of Hendrycks & Dietterich 2019 at 32 and at 224 pixels.
LEVELS: dict[str, dict[str, tuple[float, ...]]] = {
    "sdnet": {
        "gaussian": (0.02, 0.04, 0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18, 0.20),
        "shot": (60, 54, 48, 42, 36, 30, 24, 18, 12, 6),
        "speckle": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        "impulse": (0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24, 0.27, 0.30),
    },
    "cifar10c": {
        "gaussian": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot": (500, 250, 100, 75, 50),
        "speckle": (0.06, 0.10, 0.12, 0.16, 0.20),
        "impulse": (0.01, 0.02, 0.03, 0.05, 0.07),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
        "jpeg": (80, 65, 58, 50, 40),
    },
    "imagenetc": {
        "gaussian": (0.08, 0.12, 0.18, 0.26, 0.38),
        "shot": (60, 25, 12, 5, 3),
        "speckle": (0.15, 0.2, 0.35, 0.45, 0.6),
        "impulse": (0.03, 0.06, 0.09, 0.17, 0.27),
        "gaussian_blur": (1, 2, 3, 4, 6),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
        "jpeg": (25, 18, 15, 10, 7),
    },
}
# Images with a side below this have the severities of 32 pixels.
_LARGE = 128


def level_of(kind: str, severity: int, size: tuple[int, int]) -> float:
    """The level of a kind at severity 1 to 5, for images of (H, W) = `size`."""
    return LEVELS["imagenetc" if max(size) >= _LARGE else "cifar10c"][kind][severity - 1]


# Entries of images that are held as floats at a time. No draw depends on it.
_BLOCK = 2**20


def noisy(images: ImageSet, kind: str, level: float, seed: int, *, name: str = TEST) -> ImageSet:
    """The images with noise, or corrupted otherwise, rounded to 8 bits.

    kind: of `CORRUPTIONS`. level: see there. name: of the set, each of which has draws of its own.
    What is drawn for an image follows from the seed, the kind, the name and the image's index in its data set alone. It
    does not depend on its neighbours, nor on the level: a curve over levels is of more and more of the same noise. Each
    channel has numbers of its own, those of grey images too, which become coloured; images of one channel have one
    number a pixel. The published program truncates where this rounds.
    Raises: ValueError for an unknown kind, and a level out of its range.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"kinds of noise are {', '.join(CORRUPTIONS)}, got {kind}")
    row, pixels = CORRUPTIONS[kind], images.images
    if not row.least <= level <= row.most:
        raise ValueError(f"{kind} noise takes {row.limits}, got {level}")
    found = torch.empty(pixels.shape, dtype=torch.uint8, device=pixels.device)
    size = max(1, _BLOCK // max(1, pixels.shape[1:].numel()))
    first = seed_of(seed, f"{kind} noise of {name}")
    parts = zip(pixels.split(size), images.indices.split(size), found.split(size), strict=True)
    for block, indices, out in parts:
        numbers = torch.empty(block.shape)
        if row.draw is not None:
            _draw(numbers, row.draw, [first + index for index in indices.tolist()])
        out.copy_(row.apply(floats(block.cpu()), level, numbers).mul_(255).round_())
    change = f"{kind} {float(level)!r} {seed} {name}".encode()
    return replace(images, images=found, fingerprint=derived(images.fingerprint, change))


def _draw(numbers: Tensor, draw: Callable[[Tensor, Generator], Tensor], seeds: list[int]) -> None:
    """Fill the numbers (n, C, H, W) of each image from its seed."""
    gen = Generator()
    for own, seed in zip(numbers, seeds, strict=True):
        # torch's generator for CPUs takes 32 bits of a seed: consecutive ones are distinct in these, while of 50,000
        # hashed ones two would be the same in every fourth set.
        draw(own, gen.manual_seed(seed % 2**32))


@dataclass(frozen=True)
class TestNoiseSpec(Spec, group="evaluation"):
    """Noise of all test pictures of an evaluation, those of --ood_dataset included. seed: that of the command."""

    test_noise: str = flag(
        NONE, "corruption of all test pictures, never of training ones", choices=lambda: (NONE, *CORRUPTIONS)
    )
    test_noise_level: float | None = flag(
        None,
        "std (gaussian, speckle, gaussian_blur), Poisson rate of white (shot), share of entries (impulse), and so on",
        type=float,
    )
    severity: int | None = flag(
        None,
        "in place of --test_noise_level: severity 1 to 5 of CIFAR-10-C or ImageNet-C",
        type=int,
        choices=lambda: SEVERITIES,
    )
    seed: int = field(default=0)

    @classmethod
    def of(cls, flags: Flags) -> "TestNoiseSpec":
        """From the flags; reads only those that have an effect. Raises: UserError without a level, with two, and for
        one out of its range."""
        kind = flags.of(cls, only=["test_noise"]).test_noise
        if kind == NONE:
            return cls()
        names = ["test_noise", "test_noise_level", "severity"]
        spec = replace(flags.of(cls, only=names), seed=flags.seed)
        row, level = CORRUPTIONS[kind], spec.test_noise_level
        if level is not None and spec.severity is not None:
            raise UserError(f"--severity {spec.severity}: --test_noise_level says how much already; leave one out")
        if spec.severity is not None:
            return spec
        if level is None:
            raise UserError(f"--test_noise {kind}: how much? Give --severity, or --test_noise_level, {row.limits}")
        if not row.least <= level <= row.most:
            raise UserError(f"--test_noise_level {level:g}: --test_noise {kind} takes {row.limits}")
        return spec

    def applied(self, images: ImageSet, name: str) -> ImageSet:
        """The images with this noise, if any. name: as for `noisy`.

        The fingerprint stays that of the images without it. The noise is among the settings of a result, so that
        results of several levels and seeds are of one data set.
        """
        level = self.test_noise_level
        if self.severity is not None:
            level = level_of(self.test_noise, self.severity, images.size)
        if self.test_noise == NONE or level is None:
            return images
        found = noisy(images, self.test_noise, level, self.seed, name=name)
        return replace(found, fingerprint=images.fingerprint)


# Images of each severity of CIFAR-10-C.
_IMAGES = 10_000


def cifar10c(folder: str | Path, kind: str, severity: int) -> ImageSet:
    """The test images of CIFAR-10 under one noise of CIFAR-10-C, of severity 1 to 5, in the order of the test set.

    folder: holds `<archive>.npy` for each row of `CORRUPTIONS`, uint8 (50,000, 32, 32, 3), one severity after the
    other, and `labels.npy`. Only the images of the severity are read.
    Raises: ValueError for an unknown kind or severity, UserError for a file that is missing, damaged, pickled or of
    another shape.
    """
    if kind not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(f"no severity {severity} of {kind}")
    root, count = Path(folder).expanduser(), len(SEVERITIES) * _IMAGES
    part = slice((severity - 1) * _IMAGES, severity * _IMAGES)
    pixels = _mapped(root / f"{CORRUPTIONS[kind].archive}.npy", (count, 32, 32, 3), np.uint8)[part]
    labels = np.array(_mapped(root / "labels.npy", (count,), np.integer)[part], dtype=np.int64)
    if labels.min() < 0 or labels.max() > 9:
        known = f"{labels.min()} to {labels.max()}"
        raise UserError(f"--cifar10c: {root / 'labels.npy'} has labels {known}; CIFAR-10 has 0 to 9")
    images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return replace(image_set(images, labels), fingerprint=combined([labels.tobytes(), images.tobytes()]))


def _mapped(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """The array of a file, read where it is accessed. Raises: UserError as `cifar10c`."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"--cifar10c: there is no {path}; give the folder of the arrays of CIFAR-10-C") from None
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise UserError(f"--cifar10c: {path} cannot be read ({error}); fetch it again") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"--cifar10c: {path} is an archive of arrays; give a single one, as numpy.save writes it")
    if array.shape != shape or not np.issubdtype(array.dtype, dtype):
        here, wanted = f"{_text(array.shape)} {array.dtype}", f"{_text(shape)} {dtype.__name__}"
        raise UserError(f"--cifar10c: {path} holds {here}, not {wanted}; give the arrays of CIFAR-10-C")
    return array


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
