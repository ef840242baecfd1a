"""Images held in memory as uint8, and floats made of them as late as can be.

Letters: N images, B of a batch, C copies. Images are (N, 3, H, W) uint8, labels (N,) int64. A set is held on the
compute device where it fits there, else in host memory.
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
from datasets.loading import Loading, all_grey, pad_and_crop, to_channels

# A set may fill this share of a GPU's free memory; activations need the rest.
_DEVICE_SHARE = 0.4


@dataclass(frozen=True)
class ImageSet:
    """Images with labels; `indices` are their places in the data set they were taken from.

    device: where batches are wanted; `images` itself may stay in host memory if it does not fit there.
    fingerprint: 16 hex digits that tell the data from others, "" where it is not known.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    paths: tuple[str, ...] | None = None
    device: torch.device = torch.device("cpu")
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def index_device(self) -> torch.device:
        """Where indices are wanted: where the images are, so that nothing waits for the device."""
        return self.images.device

    @property
    def cropped(self) -> bool:
        """Whether copies come cropped: no, that is the augmentation's business."""
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

    def batch(self, index: Tensor) -> Tensor:
        """Images at `index` (b,) as floats in [0, 1] on `device`."""
        return floats(self._pixels(index))

    def _pixels(self, index: Tensor) -> Tensor:
        found = self.images[index.to(self.images.device)]
        if found.device != self.device and self.device.type == "cuda":
            found = found.pin_memory()  # Else the host would wait until the device has come so far.
        return found.to(self.device, non_blocking=True)

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
        """One batch; which: seed, epoch and step."""
        shape = (loading.views, len(index))
        local: Tensor | slice = slice(None)
        if world.size > 1:
            shard = world.shard(len(index))
            index, local = index[shard.indices(index.device)], shard.indices(self.device)
        x = self._pixels(index)
        views = [to_channels(x, loading.channels or self.channels)] * loading.views
        if loading.pad:
            gen = self._generator("pad-and-crop", which)
            start = torch.randint(2 * loading.pad + 1, (*shape, 2), device=self.device, generator=gen)[:, local]
            views = [pad_and_crop(x, loading.pad, start_B) for x, start_B in zip(views, start, strict=True)]
        if loading.flip:
            flip = torch.rand(shape, device=self.device, generator=self._generator("flip", which))[:, local] < 0.5
            views = [hflip(x, flip_B) for x, flip_B in zip(views, flip, strict=True)]
        return torch.stack(views)

    def _generator(self, purpose: str, which: tuple[int, int, int]) -> Generator:
        seed, epoch, step = which
        return generator(seed, purpose, epoch, step, device=self.device)

    def where(self, keep: Tensor) -> "ImageSet":
        """The images where `keep` (N,) is true; all of them have the fingerprint of this set."""
        paths = self.paths and tuple(p for p, kept in zip(self.paths, keep.tolist(), strict=True) if kept)
        mark = self.fingerprint if keep.all() else derived(self.fingerprint, bytes(keep.tolist()))
        images, labels, indices = self.images[keep], self.labels[keep], self.indices[keep]
        return replace(self, images=images, labels=labels, indices=indices, paths=paths, fingerprint=mark)

    def to(self, device: torch.device) -> "ImageSet":
        """Hold the set on `device` if it fits there, else leave it in host memory."""
        images = self.images
        if device.type != "cuda" or images.nbytes < _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            images = images.to(device)
        return replace(self, images=images, device=device)


def combined(parts: Iterable[bytes]) -> str:
    """The fingerprint of a sequence of parts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:16]


def derived(fingerprint: str, change: bytes) -> str:
    """The fingerprint of what a change makes of a set; "" stays so."""
    return fingerprint and combined([fingerprint.encode(), change])


def floats(pixels: Tensor) -> Tensor:
    """Of bytes, of any shape, floats in [0, 1]."""
    return pixels.float() / 255


def image_set(
    images: np.ndarray | Tensor, labels: np.ndarray | Tensor | list[int], paths: list[str] | None = None
) -> ImageSet:
    """An ImageSet from (N, channels, H, W) uint8 images."""
    x, y = torch.as_tensor(images), torch.as_tensor(labels).long()
    return ImageSet(x, y, torch.arange(len(x)), tuple(paths) if paths is not None else None)
