"""Noise of test images: Gaussian, shot, speckle and impulse noise by level, and the arrays of CIFAR-10-C.

Unlike that of `datasets.corrupt`, which replaces a number of pixels in training and test images alike, it changes every
entry of test images, or of those that a lambda is calibrated on. Letters: n images of a block, C channels, H and W
pixels; V values of a pixel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from common.errors import UserError
from common.flags import Flags, Spec, flag
from common.seed import seed_of
from datasets.one_class import TEST
from datasets.sets import ImageSet, combined, derived, floats, image_set

NONE = "none"


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


NOISES: dict[str, NoiseKind] = {
    "gaussian": NoiseKind(_gaussian, _normal, "a standard deviation", 0, 10, "gaussian_noise"),
    "shot": NoiseKind(_shot, _uniform, "a Poisson rate", 1e-3, 1e4, "shot_noise"),
    "speckle": NoiseKind(_speckle, _normal, "a standard deviation", 0, 10, "speckle_noise"),
    "impulse": NoiseKind(_impulse, _uniform, "a share of entries", 0, 1, "impulse_noise"),
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
    },
    "imagenetc": {
        "gaussian": (0.08, 0.12, 0.18, 0.26, 0.38),
        "shot": (60, 25, 12, 5, 3),
        "speckle": (0.15, 0.2, 0.35, 0.45, 0.6),
        "impulse": (0.03, 0.06, 0.09, 0.17, 0.27),
    },
}

# Entries of images that are held as floats at a time. No draw depends on it.
_BLOCK = 2**20


def noisy(images: ImageSet, kind: str, level: float, seed: int, *, name: str = TEST) -> ImageSet:
    """The images with noise, rounded to 8 bits.

    kind: of `NOISES`. level: see there. name: of the set, each of which has draws of its own.
    What is drawn for an image follows from the seed, the kind, the name and the image's index in its data set alone. It
    does not depend on its neighbours, nor on the level: a curve over levels is of more and more of the same noise. Each
    channel has numbers of its own, those of grey images too, which become coloured; images of one channel have one
    number a pixel. The published program truncates where this rounds.
    Raises: ValueError for an unknown kind, and a level out of its range.
    """
    if kind not in NOISES:
        raise ValueError(f"kinds of noise are {', '.join(NOISES)}, got {kind}")
    row, pixels = NOISES[kind], images.images
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

    test_noise: str = flag(NONE, "noise of all test pictures, never of training ones", choices=lambda: (NONE, *NOISES))
    test_noise_level: float | None = flag(
        None, "std (gaussian, speckle), Poisson rate of white (shot) or share of entries (impulse)", type=float
    )
    seed: int = field(default=0)

    @classmethod
    def of(cls, flags: Flags) -> "TestNoiseSpec":
        """From the flags; reads only those that have an effect. Raises: UserError without a level, and for one out of
        its range."""
        kind = flags.of(cls, only=["test_noise"]).test_noise
        if kind == NONE:
            return cls()
        spec = replace(flags.of(cls, only=["test_noise", "test_noise_level"]), seed=flags.seed)
        row, level = NOISES[kind], spec.test_noise_level
        if level is None:
            raise UserError(f"--test_noise {kind}: how much? Give --test_noise_level, {row.limits}")
        if not row.least <= level <= row.most:
            raise UserError(f"--test_noise_level {level:g}: --test_noise {kind} takes {row.limits}")
        return spec

    def applied(self, images: ImageSet, name: str) -> ImageSet:
        """The images with this noise, if any. name: as for `noisy`.

        The fingerprint stays that of the images without it. The noise is among the settings of a result, so that
        results of several levels and seeds are of one data set.
        """
        if self.test_noise == NONE or self.test_noise_level is None:
            return images
        found = noisy(images, self.test_noise, self.test_noise_level, self.seed, name=name)
        return replace(found, fingerprint=images.fingerprint)


# Images of each severity of CIFAR-10-C, and its severities.
_IMAGES, _SEVERITIES = 10_000, 5


def cifar10c(folder: str | Path, kind: str, severity: int) -> ImageSet:
    """The test images of CIFAR-10 under one noise of CIFAR-10-C, of severity 1 to 5, in the order of the test set.

    folder: holds `<archive>.npy` for each row of `NOISES`, uint8 (50,000, 32, 32, 3), one severity after the other, and
    `labels.npy`. Only the images of the severity are read.
    Raises: ValueError for an unknown kind or severity, UserError for a file that is missing, damaged, pickled or of
    another shape.
    """
    if kind not in NOISES or severity not in range(1, _SEVERITIES + 1):
        raise ValueError(f"no severity {severity} of {kind}")
    root, count = Path(folder).expanduser(), _SEVERITIES * _IMAGES
    part = slice((severity - 1) * _IMAGES, severity * _IMAGES)
    pixels = _mapped(root / f"{NOISES[kind].archive}.npy", (count, 32, 32, 3), np.uint8)[part]
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
