"""Noise at an exact number of positions of every image, whose places are kept.

Letters: N images, C channels, P positions, K of them replaced. A position is a pixel with all its channels, or an entry
of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from common.errors import UserError
from common.flags import Flags, Spec, flag
from common.seed import generator as generator_for

NONE = "none"


class Noise(NamedTuple):
    """What is put where: positions (N, K) int64, distinct in each row; values (N, C, K) float32, (N, 1, K) where all
    channels get the same."""

    positions: Tensor
    values: Tensor


# kind -> (N, C, K, generator) -> values (N, C or 1, K) float32.
KINDS: dict[str, Callable[[int, int, int, Generator], Tensor]] = {
    "normal": lambda n, channels, count, gen: torch.randn(n, channels, count, generator=gen),
    "uniform": lambda n, channels, count, gen: torch.rand(n, channels, count, generator=gen),
    "salt_pepper": lambda n, channels, count, gen: torch.randint(2, (n, 1, count), generator=gen).float(),
}

# Random numbers that are drawn at a time. Draws depend on it.
_BLOCK = 2**21


def draw_noise(
    n: int,
    channels: int,
    positions: int,
    count: int,
    kind: str,
    generator: Generator,
    *,
    per_image: bool = True,
    places: Generator | None = None,
) -> Noise:
    """Draw noise for n images of `positions` positions, `count` of them replaced in each.

    kind: of `KINDS`. generator: on the CPU. per_image: False, the same positions in every image. places: draws the
    positions; None: `generator`.
    Raises: ValueError for a count that is negative or larger than the number of positions.
    """
    if not 0 <= count <= positions:
        raise ValueError(f"cannot replace {count} of {positions} positions")
    places = places or generator
    if per_image:
        block = max(1, _BLOCK // max(1, positions))
        sizes = [block] * (n // block) + [n % block]
        found = torch.cat([_positions(size, positions, count, places) for size in sizes])
    else:
        found = _positions(1, positions, count, places).expand(n, -1)
    return Noise(found, KINDS[kind](n, channels, count, generator))


def _positions(n: int, positions: int, count: int, gen: Generator) -> Tensor:
    """(n, count) distinct positions in each row."""
    # In double precision no two draws are equal in practice, so that there is one answer on every machine.
    return torch.rand(n, positions, generator=gen, dtype=torch.float64).topk(count, dim=1).indices


def replaced(images: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W), or rows (N, n), with the values at the positions of `noise`, and the mask.

    Copies. Values are cast to the type of the images. mask: bool, of the images' shape, with a single channel.
    """
    index, values = noise.positions.to(images.device), noise.values.to(images)
    noisy = images.clone(memory_format=torch.contiguous_format)
    flat = noisy.flatten(2) if images.ndim == 4 else noisy[:, None]
    flat.scatter_(2, index[:, None].expand(-1, flat.shape[1], -1), values.expand(-1, flat.shape[1], -1))
    mask = torch.zeros_like(flat[:, 0], dtype=torch.bool).scatter_(1, index, True)
    return noisy, mask.view(len(images), 1, *images.shape[2:]) if images.ndim == 4 else mask


def corrupt_pixels(
    images: Tensor,
    count: int,
    kind: str,
    generator: Generator,
    *,
    clip: tuple[float, float] | None = None,
    per_image: bool = True,
) -> tuple[Tensor, Tensor]:
    """Replace `count` distinct positions of each image by noise; others stay as they are. Returns copies and mask.

    images: (N, C, H, W), or rows (N, n), floats in [0, 1]. A position is a pixel with all its channels, or an entry of
    a row. kind: `normal`, standard normal draws; `uniform`, in [0, 1]; `salt_pepper`, 0 or 1 alike, the same in all
    channels. generator: on the CPU, so that the noise does not depend on the images' device.
    clip: range to which drawn values are clipped. per_image: False, the same positions in every image.
    mask: bool, of the images' shape, true where an entry was replaced.
    Raises: ValueError for a count that is negative or larger than the number of positions, an unknown kind, and images
    of another shape or type.
    """
    if kind not in KINDS:
        raise ValueError(f"kinds of noise are {', '.join(KINDS)}, got {kind}")
    if images.ndim not in (2, 4) or not images.is_floating_point():
        raise ValueError(f"images are (N, C, H, W) or (N, n) floats, got {tuple(images.shape)} {images.dtype}")
    channels, positions = (images.shape[1], images.shape[2:].numel()) if images.ndim == 4 else (1, images.shape[1])
    noise = draw_noise(len(images), channels, positions, count, kind, generator, per_image=per_image)
    if clip is not None:
        noise = noise._replace(values=noise.values.clamp(*clip))
    noisy, mask = replaced(images, noise)
    return noisy, mask.expand_as(images).clone()


@dataclass(frozen=True)
class CorruptSpec(Spec, group="data"):
    """Noise of all images that a command loads, and the seed of what is drawn once for a data set."""

    corrupt: str = flag(
        NONE,
        "noise in place of some pixels, in training and test images",
        choices=lambda: (NONE, *KINDS),
        origin="data",
    )
    corrupt_pixels: int = flag(10, "pixels of each image that --corrupt replaces", at_least=1, origin="data")
    corrupt_fixed: bool = flag(False, "replace the same pixels in every image (corrupted features)", origin="data")
    data_seed: int = flag(0, "draws the noise of --corrupt and the images of --outliers and --held_out", origin="data")

    @classmethod
    def of(cls, flags: Flags, *, mixed: bool = False) -> "CorruptSpec":
        """From the flags; reads only those that have an effect. mixed: images are drawn, those of
        other classes or to be held out."""
        noisy = flags.of(cls, only=["corrupt"]).corrupt != NONE
        more = ["corrupt_pixels", "corrupt_fixed"] if noisy else []
        return flags.of(cls, only=["corrupt", *more, *(["data_seed"] if noisy or mixed else [])])

    @property
    def active(self) -> bool:
        """Whether there is noise."""
        return self.corrupt != NONE

    def noise(self, n: int, channels: int, positions: int, name: str) -> Noise:
        """The noise of a set of n images. name: of the set, each of which has draws of its own.

        With --corrupt_fixed the positions are those of all sets. Raises: UserError for more than there are.
        """
        if self.corrupt_pixels > positions:
            raise UserError(
                f"--corrupt_pixels {self.corrupt_pixels}: there are {positions} in an image (or row); give fewer"
            )
        gen = generator_for(self.data_seed, f"noise of {name}")
        places = generator_for(self.data_seed, "corrupted features") if self.corrupt_fixed else None
        per_image, count = not self.corrupt_fixed, self.corrupt_pixels
        return draw_noise(n, channels, positions, count, self.corrupt, gen, per_image=per_image, places=places)

    def change(self, name: str) -> bytes:
        """What distinguishes a set with this noise from the set without it."""
        return f"{self.corrupt} {self.corrupt_pixels} {self.corrupt_fixed} {self.data_seed} {name}".encode()
