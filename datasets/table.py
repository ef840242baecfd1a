"""Data as a matrix: images whose pixels are the entries of a row, or tables that are no pictures (`datasets.npz`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.dist import SINGLE, World
from datasets.corrupt import Noise, replaced
from datasets.loading import Loading
from datasets.sets import ImageSet, derived, fits, floats, on_device


@dataclass(frozen=True)
class Table:
    """Rows (N, n), float32, with labels (N,). For training, it has the interface of an `ImageSet`.

    Rows of images have [0, 1] floats, flattened channel by channel; noise is not clipped.
    indices (N,): the places of the rows in the data set that they were taken from. shape: (channels, H, W) of an image,
    None for tables. clean, mask (N, n): the rows before noise, and the entries that noise replaced; None without noise.
    paths: the files of pictures. device: where batches are delivered. fingerprint: 16 hex digits; "" if unknown.
    """

    rows: Tensor
    labels: Tensor
    indices: Tensor
    shape: tuple[int, int, int] | None = None
    clean: Tensor | None = None
    mask: Tensor | None = None
    paths: tuple[str, ...] | None = None
    device: torch.device = torch.device("cpu")
    fingerprint: str = ""

    @classmethod
    def of_images(cls, data: ImageSet) -> "Table":
        """The images, which have no noise, as rows."""
        n, *shape = data.images.shape
        channels, height, width = shape
        rows = torch.empty(n, channels * height * width)
        for part, block in zip(rows.split(1024), data.images.split(1024), strict=True):
            part.copy_(floats(block).flatten(1))
        return cls(rows, data.labels, data.indices, (channels, height, width), None, None, data.paths, data.device,
                   data.fingerprint)  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def index_device(self) -> torch.device:
        """Where indices should be."""
        return self.rows.device

    @property
    def cropped(self) -> bool:
        """Whether `batches` crops at random: no."""
        return False

    @property
    def positions(self) -> int:
        """How many places of a row can be replaced by noise: pixels of an image, entries of a table."""
        return self.rows.shape[1] // (self.shape[0] if self.shape else 1)

    def with_noise(self, noise: Noise, change: bytes) -> "Table":
        """The same rows, corrupted. change: distinguishes this noise from others."""
        if self.shape is None:
            rows, mask = replaced(self.rows, noise)
        else:
            images, pixels = replaced(self.rows.view(-1, *self.shape), noise)
            rows, mask = images.flatten(1), pixels.expand(images.shape).flatten(1)
        return replace(self, rows=rows, clean=self.rows, mask=mask, fingerprint=derived(self.fingerprint, change))

    def batch(self, index: Tensor) -> Tensor:
        """Rows at `index` (B,) on `device`, (B, n)."""
        return on_device(self.rows[index.to(self.rows.device)], self.device)

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
        """Load one epoch: for each batch of indices (B,) in `parts`, rows (1, B, n).

        Nothing is drawn: seed and epoch are those of other kinds of sets. first: number of batches to skip.
        world: each of several ranks gets the rows at `Shard.indices` only.
        Raises: ValueError for a `loading` that changes images.
        """
        if loading.views != 1 or loading.flip or loading.pad:
            raise ValueError(f"rows are loaded as they are, got {loading}")
        for index in parts[first:]:
            yield self.batch(index[world.shard(len(index)).indices(index.device)] if world.size > 1 else index)[None]

    def where(self, keep: Tensor) -> "Table":
        """The rows where `keep` (N,) is true. Where it is true everywhere, this very table."""
        if keep.all():
            return self

        def kept(x: Tensor) -> Tensor:
            return x[keep.to(x.device)]

        return replace(
            self,
            rows=kept(self.rows),
            labels=kept(self.labels),
            indices=kept(self.indices),
            clean=None if self.clean is None else kept(self.clean),
            mask=None if self.mask is None else kept(self.mask),
            paths=self.paths and tuple(p for p, k in zip(self.paths, keep.tolist(), strict=True) if k),
            fingerprint=derived(self.fingerprint, bytes(keep.tolist())),
        )

    def to(self, device: torch.device) -> "Table":
        """The table with batches on `device`; rows, clean and mask are moved there if the rows fit."""
        if not fits(self.rows, device):
            return replace(self, device=device)
        clean = None if self.clean is None else self.clean.to(device)
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, rows=self.rows.to(device), clean=clean, mask=mask, device=device)
