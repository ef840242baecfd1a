"""Pictures that are decoded during training by worker processes, which also crop and flip them.

For sets that are too large to be held in memory, or whose pictures differ in shape (ImageNet-30). Such a run waits for
decoding. The cache keeps decoded pixels in one file on disk; `python -m benchmarks.decoding` measures what that saves.

Pixels of a picture are (height, width, 3) uint8, each in its own size; H = W = side are those of a crop. Dimension
letters: see `datasets`.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.dist import SINGLE, World
from common.errors import RunStopped, UserError
from common.files import in_turn, remove_leftovers, write_json, write_whole
from common.progress import progress
from common.seed import generator
from common.signals import obey_later, start_workers
from datasets.augment import AlignedSpec, crop_boxes, draw_tries
from datasets.decode import Reader, centre, read_upright, reason, unreadable
from datasets.folder import digests, report_skipped
from datasets.listing import common_folder, printable
from datasets.loading import Loading
from datasets.sets import ImageSet, derived, floats, image_set


class Pixels(Protocol):
    """A sequence of pictures as (H, W, 3) uint8."""

    def __len__(self) -> int: ...

    def __getitem__(self, n: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Decoded:
    """Pictures read from their files each time, the short side resized to `short_side`. reader: see `read_upright`."""

    paths: Sequence[Path]
    short_side: int
    reader: Reader | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, n: int) -> np.ndarray:
        """Raises: UserError for a picture that cannot be read."""
        found = self.read(n)
        if isinstance(found, str):
            raise unreadable(self.paths[n], found)
        return found

    def read(self, n: int) -> np.ndarray | str:
        """Pixels, or why the picture cannot be read."""
        try:
            return np.asarray(read_upright(self.paths[n], self.short_side, self.reader))
        except Exception as error:  # Pillow raises many types for corrupt files
            return reason(self.paths[n], error)


@dataclass(frozen=True)
class Cached:
    """Pictures in one file of pixels, one after another; sizes (N, 2) are their heights and widths."""

    file: Path
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, n: int) -> np.ndarray:
        height, width = self.sizes[n]
        start = self._starts[n]
        return self._pixels[start : start + height * width * 3].reshape(height, width, 3)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.sizes.astype(np.int64).prod(1) * 3)])

    @cached_property
    def _pixels(self) -> np.ndarray:
        return np.memmap(self.file, np.uint8, "r")


def open_cache(
    decoded: Decoded, folder: Path, *, workers: int, skip_bad: bool
) -> tuple[Cached, list[int], list[bytes]]:
    """The cache of these pictures in `folder`, the places of those that it holds, and the `digest` of each of their
    files. It is built if it does not exist.

    Its name follows from the pictures' paths, sizes and dates and from how they are read: changed pictures get a new
    cache.
    Raises: UserError for a picture that cannot be read, unless `skip_bad`, and where the cache cannot be written.
    """
    paths = decoded.paths
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    how = decoded.reader.settings() if decoded.reader else None
    key = hashlib.sha256(json.dumps([decoded.short_side, how, facts]).encode()).hexdigest()[:16]
    file, index = folder / f"pixels_{key}.u8", folder / f"pixels_{key}.json"
    try:
        with in_turn(folder):
            remove_leftovers(folder)
            if not _whole(file, index):
                held: dict[str, Any] = {"sizes": [], "places": [], "bad": {}}
                write_whole(file, lambda out: _write_pixels(out, held, decoded, workers, skip_bad))
                held["digests"] = [found.hex() for found in digests([paths[n] for n in held["places"]], workers)]
                write_json(index, held)
    except OSError as error:
        raise UserError(f"--image_cache: cannot write {printable(file)} ({error.strerror})") from None
    held = json.loads(index.read_text())
    bad = {paths[int(n)]: why for n, why in held["bad"].items()}
    if bad and not skip_bad:
        raise unreadable(*next(iter(bad.items())))
    report_skipped(bad, len(paths), common_folder(paths))
    return Cached(file, np.array(held["sizes"], np.int64)), held["places"], [*map(bytes.fromhex, held["digests"])]


def _whole(file: Path, index: Path) -> bool:
    """Whether the cache is there and as long as its index says."""
    try:
        sizes = np.array(json.loads(index.read_text())["sizes"], np.int64)
        return file.stat().st_size == int(sizes.prod(1).sum()) * 3
    except (OSError, ValueError, KeyError):
        return False


def _write_pixels(out: BinaryIO, held: dict[str, Any], decoded: Decoded, workers: int, skip_bad: bool) -> None:
    loader = DataLoader(
        _OrReason(decoded),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=obey_later,
    )
    items = start_workers(lambda: iter(loader))
    try:
        for n, item in enumerate(progress(items, total=len(decoded), label="decoding into --image_cache")):
            if isinstance(item, str):
                if not skip_bad:
                    raise unreadable(decoded.paths[n], item)
                held["bad"][n] = item
                continue
            held["sizes"].append(item.shape[:2])
            held["places"].append(n)
            out.write(item.tobytes())
    finally:
        del items  # Its processes end with it.


_SMALL = (
    "--num_worker: processes that load pictures need more shared memory than /dev/shm has; give --num_worker 0, or make"
    " it larger (docker run --shm-size 2g)"
)
# Batches that torch's loader prefetches in each process.
_AHEAD = 2


def _check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Raises: RunStopped where the prefetched batches do not fit /dev/shm: torch would hang or be killed."""
    with contextlib.suppress(OSError):
        if workers and shutil.disk_usage("/dev/shm").free < (_AHEAD * workers + 1) * batch_bytes:
            raise RunStopped(_SMALL)


@contextlib.contextmanager
def loading_errors() -> Iterator[None]:
    """Turn the death of a process that loads pictures, and a /dev/shm too small for its batches, into RunStopped.

    Use it around the whole run: torch raises the first from a signal handler, wherever the main process is.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        text = str(error)
        if "shared memory" in text or "torch_" in text and "No space left" in text:
            raise RunStopped(_SMALL) from None
        if "DataLoader worker" in text:
            raise RunStopped(f"a process that loads pictures has ended ({text.strip().splitlines()[0]})") from None
        raise


@dataclass(frozen=True)
class _Chosen:
    """Some pictures of a sequence."""

    pixels: Pixels
    places: list[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, n: int) -> np.ndarray:
        return self.pixels[self.places[n]]


class _OrError(Dataset):
    """Items of a sequence, or the text of the UserError that one raised: exceptions may not survive pickling."""

    def __init__(self, items: Any):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, n: int) -> Any:
        try:
            return self.items[n]
        except UserError as error:
            return str(error)


class _OrReason(_OrError):
    """Decoded pictures, or the reason why one cannot be read."""

    def __getitem__(self, n: int) -> Any:
        return self.items.read(n)


@dataclass(frozen=True)
class _Crops:
    """Views of each picture under drawn crops and flips, (V, 3, H, W) uint8.

    tries (4, N, V, tries): of `draw_tries`. flips (N, V).
    """

    pixels: Pixels
    tries: Tensor
    flips: Tensor
    spec: AlignedSpec
    side: int

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, n: int) -> Tensor:
        pixels = torch.tensor(self.pixels[n]).permute(2, 0, 1)[None]
        height, width = pixels.shape[2:]
        boxes = crop_boxes(self.tries[:, n], (height, width), self.spec)
        # From shares and half images to whole pixels; offsets are multiples of half a pixel, up to rounding.
        pixels_per_share = torch.tensor([width, height])
        size = (boxes[:, :2] * pixels_per_share).round().int()
        start = ((boxes[:, 2:] + 1 - boxes[:, :2]) / 2 * pixels_per_share + 0.1).floor().int()
        views = []
        for (w, h), (left, top), flip in zip(size.tolist(), start.tolist(), self.flips[n].tolist(), strict=True):
            crop = pixels[:, :, top : top + h, left : left + w]
            # On bytes: 2.5 times as fast as Pillow, and within one level of it.
            crop = F.interpolate(crop, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
            views.append(crop.flip(-1) if flip else crop)
        return torch.cat(views)


def _stack(items: list[Tensor | str]) -> Tensor | str:
    """A batch (V, B, 3, H, W), or the text of the first error."""
    return next((item for item in items if isinstance(item, str)), None) or torch.stack(items, 1)  # type: ignore[arg-type]


def _as_it_is(item: Any) -> Any:
    return item


def check_loading(loading: Loading) -> None:
    """Raises: UserError for pad-and-crop and for one channel, which pictures decoded during training do not have."""
    if loading.pad:
        raise UserError("--dataset: pictures that are decoded during training are cropped, not padded; choose another")
    if loading.channels == 1:
        raise UserError("--dataset: pictures that are decoded during training have three channels; choose another")


@dataclass(frozen=True)
class PictureSet:
    """Pictures with labels (N,), decoded on demand. For training, it has the interface of an `ImageSet`.

    spec: how crops are drawn. side: pixels on each side of a crop. workers: processes that decode.
    device, fingerprint: as of an `ImageSet`.
    """

    pixels: Pixels
    labels: Tensor
    spec: AlignedSpec
    side: int
    workers: int
    device: torch.device = torch.device("cpu")
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of a crop."""
        return self.side, self.side

    @property
    def channels(self) -> int:
        """Of a crop."""
        return 3

    @property
    def cropped(self) -> bool:
        """Whether `batches` crops at random: yes."""
        return True

    @property
    def index_device(self) -> torch.device:
        """Where indices should be."""
        return torch.device("cpu")

    def batch(self, index: Tensor) -> Tensor:
        """The centre crops of the pictures at `index` (B,) as floats in [0, 1] on `device`, (B, 3, H, W)."""
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            middles = list(pool.map(lambda n: centre(self.pixels[n], self.side), index.tolist()))
        return floats(torch.from_numpy(np.stack(middles)).to(self.device, non_blocking=True))

    def loaded(self) -> ImageSet:
        """The centre crops of all pictures, in memory."""
        parts = [self.batch(index).mul(255).round().byte().cpu() for index in torch.arange(len(self)).split(64)]
        return replace(image_set(torch.cat(parts), self.labels.cpu()), fingerprint=self.fingerprint)

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
        """Load one epoch: for each batch of indices (B,) in `parts`, cropped views (V, B, 3, H, W), uint8.

        Draws follow from seed and epoch; those of a picture depend on its index and on the size of the set.
        first: number of batches to skip. world: each of several ranks gets the pictures at `Shard.indices` only.
        Raises: UserError for a picture that cannot be read, and for a `loading` with pad or one channel.
        """
        check_loading(loading)
        gen = generator(seed, "crop", epoch)
        tries = draw_tries(len(self) * loading.views, gen).unflatten(1, (len(self), loading.views))
        flips = torch.zeros(len(self), loading.views, dtype=torch.bool)
        if loading.flip:
            flips = torch.rand(flips.shape, generator=gen) < 0.5
        loader = DataLoader(
            _OrError(_Crops(self.pixels, tries, flips, self.spec, self.side)),
            batch_sampler=[part[world.shard(len(part)).indices()].tolist() for part in parts[first:]],
            num_workers=self.workers,
            collate_fn=_stack,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=obey_later,
        )
        images = max((world.shard(len(part)).size for part in parts), default=0)
        _check_shared_memory(loading.views * images * 3 * self.side**2, self.workers)
        found = start_workers(lambda: iter(loader))
        try:
            for batch in found:
                if isinstance(batch, str):
                    raise UserError(batch)
                yield batch.to(self.device, non_blocking=True)
        finally:
            del found  # Ends its processes now; a traceback that refers to it would keep them.

    def where(self, keep: Tensor) -> "PictureSet":
        """The pictures where `keep` (N,) is true. Where it is true everywhere, the fingerprint stays."""
        if keep.all():
            return self
        places = keep.nonzero()[:, 0].tolist()
        fingerprint = derived(self.fingerprint, bytes(keep.tolist()))
        return replace(self, pixels=_Chosen(self.pixels, places), labels=self.labels[keep], fingerprint=fingerprint)

    def to(self, device: torch.device) -> "PictureSet":
        """Deliver batches on `device`."""
        return replace(self, device=device)
