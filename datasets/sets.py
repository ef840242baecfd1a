"""Images held in memory as uint8, on the compute device where they fit, else in host memory.

They are converted to floats as late as possible. Dimension letters: see `datasets`.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor

from common.dist import SINGLE, World
from common.seed import generator
from datasets.augment import hflip
from datasets.corrupt import Noise, replaced
from datasets.loading import Loading, all_grey, pad_and_crop, to_channels

# A set may fill this share of a GPU's free memory; activations need the rest.
_DEVICE_SHARE = 0.4


@dataclass(frozen=True)
class ImageSet:
    """Images (N, channels, H, W), uint8, with labels (N,). Grey sets may have one channel, all others have three.

    indices (N,): the places of the images in the data set that they were taken from.
    paths: their files, for sets of files.
    device: where batches are delivered; `images` stays in host memory if it does not fit there.
    fingerprint: 16 hex digits that identify the data; "" if unknown.
    mask (N, 1, H, W): the pixels that noise replaced, in host memory; None without noise.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    paths: tuple[str, ...] | None = None
    device: torch.device = torch.device("cpu")
    fingerprint: str = ""
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def index_device(self) -> torch.device:
        """Where indices should be: on the device of the images, so that indexing them does not wait for a transfer."""
        return self.images.device

    @property
    def cropped(self) -> bool:
        """Whether `batches` crops at random: no, the augmentation does."""
        return False

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def channels(self) -> int:
        """1 for grey images, else 3."""
        return self.images.shape[1]

    def with_channels(self, channels: int | None) -> "ImageSet":
        """The same images in 1 or 3 channels, see `to_channels`; None: 1 where all of them are grey, else 3.

        The fingerprint is of the data, however they are read, and stays.
        """
        if channels is None:
            channels = 1 if all_grey(self.images) else 3
        if channels == self.channels:
            return self
        # In blocks: the luma is computed in integers, which take four times the memory.
        images = torch.cat([to_channels(block, channels) for block in self.images.split(1024)])
        return replace(self, images=images)

    def with_noise(self, noise: Noise, change: bytes) -> "ImageSet":
        """The same images, corrupted: values are clipped to [0, 1] and rounded to 8 bits.

        Values of one channel go into all channels. change: distinguishes this noise from others.
        """
        levels = noise._replace(values=(noise.values.clamp(0, 1) * 255).round())
        images, mask = replaced(self.images, levels)
        return replace(self, images=images, mask=mask, fingerprint=derived(self.fingerprint, change))

    def batch(self, index: Tensor) -> Tensor:
        """Images at `index` (B,) as floats in [0, 1] on `device`, (B, channels, H, W)."""
        return floats(self._pixels(index))

    def _pixels(self, index: Tensor) -> Tensor:
        return on_device(self.images[index.to(self.images.device)], self.device)

    def batches(
        self,
        parts: Sequence[Tensor],
        loading: Loading,
        *,
        seed: int,
        epoch: int,
        first: int = 0,
        world: World = SINGLE,
    ) -> Iterator[Tensor]:
        """Load one epoch: for each batch of indices (B,) in `parts`, views (V, B, channels, H, W), uint8.

        Draws follow from seed, epoch and step, and do not depend on the number of ranks.
        first: number of batches to skip. world: each of several ranks gets the images at `Shard.indices` only.
        """
        for step, index in enumerate(parts[first:], first):
            yield self._load(index, loading, (seed, epoch, step), world)

    def _load(self, index: Tensor, loading: Loading, which: tuple[int, int, int], world: World) -> Tensor:
        """One batch of `batches`; which: seed, epoch and step."""
        shape = (loading.views, len(index))
        flip = start = None
        if loading.flip:
            flip = torch.rand(shape, device=self.device, generator=self._generator("flip", which)) < 0.5
        if loading.pad:
            gen = self._generator("pad-and-crop", which)
            start = torch.randint(2 * loading.pad + 1, (*shape, 2), device=self.device, generator=gen)
        if world.size > 1:
            shard = world.shard(len(index))
            index, local = index[shard.indices(index.device)], shard.indices(self.device)
            flip, start = (draw if draw is None else draw[:, local] for draw in (flip, start))
        views = [to_channels(self._pixels(index), loading.channels or self.channels)] * loading.views
        if start is not None:
            views = [pad_and_crop(x, loading.pad, start_B) for x, start_B in zip(views, start, strict=True)]
        if flip is not None:
            views = [hflip(x, flip_B) for x, flip_B in zip(views, flip, strict=True)]
        return torch.stack(views)

    def _generator(self, purpose: str, which: tuple[int, int, int]) -> Generator:
        seed, epoch, step = which
        return generator(seed, purpose, epoch, step, device=self.device)

    def where(self, keep: Tensor) -> "ImageSet":
        """The images where `keep` (N,) is true. Where it is true everywhere, the fingerprint stays."""
        paths = self.paths and tuple(p for p, kept in zip(self.paths, keep.tolist(), strict=True) if kept)
        fingerprint = self.fingerprint if keep.all() else derived(self.fingerprint, bytes(keep.tolist()))
        columns = {name: getattr(self, name)[keep] for name in ("images", "labels", "indices")}
        mask = self.mask if self.mask is None else self.mask[keep]
        return replace(self, **columns, paths=paths, fingerprint=fingerprint, mask=mask)

    def to(self, device: torch.device) -> "ImageSet":
        """The set with batches on `device`; the images are moved there if they fit, else they stay in host memory."""
        images = self.images.to(device) if fits(self.images, device) else self.images
        return replace(self, images=images, device=device)


def fits(data: Tensor, device: torch.device) -> bool:
    """Whether a set with this data is held on the device."""
    return device.type != "cuda" or data.nbytes < _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]


def on_device(batch: Tensor, device: torch.device) -> Tensor:
    """A batch, moved to the device without waiting for it."""
    if batch.device != device and device.type == "cuda":
        batch = batch.pin_memory()  # Otherwise the host would wait for the device.
    return batch.to(device, non_blocking=True)


def combined(parts: Iterable[bytes]) -> str:
    """The fingerprint of a sequence of parts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:16]


def derived(fingerprint: str, change: bytes) -> str:
    """The fingerprint of a set after a change to it; "" for an unknown set."""
    return fingerprint and combined([fingerprint.encode(), change])


def floats(pixels: Tensor) -> Tensor:
    """Pixels of 0..255, of any shape, as floats in [0, 1]."""
    return pixels.float() / 255


def image_set(
    images: np.ndarray | Tensor, labels: np.ndarray | Tensor | list[int], paths: list[str] | None = None
) -> ImageSet:
    """An ImageSet from (N, channels, H, W) uint8 images."""
    x, y = torch.as_tensor(images), torch.as_tensor(labels).long()
    return ImageSet(x, y, torch.arange(len(x)), tuple(paths) if paths is not None else None)


def evenly(labels: Tensor, order: Tensor, count: int) -> Tensor:
    """The first `count` places of `order`, but of each label as many as of the others, up to one; in that order.

    labels: (N,); order: places (n,). Those of a smaller count are among those of a larger one.
    """
    own, turn = labels[order], torch.empty_like(order)
    for label in own.unique():
        of_label = own == label
        turn[of_label] = torch.arange(int(of_label.sum()))
    return order[turn.argsort(stable=True)[:count]]
