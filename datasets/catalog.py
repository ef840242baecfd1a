"""The data sets the project knows, read into memory as uint8.

Letters: N images. Images are (N, 3, H, W) uint8, labels (N,) int64. A set is held on the compute device where it fits
there, else in host memory, and only batches become floats.
"""

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from datasets.folder import class_names as folder_class_names
from datasets.folder import read_folder

# A set may fill this share of a GPU's free memory; activations need the rest.
_DEVICE_SHARE = 0.4


@dataclass(frozen=True)
class ImageSet:
    """Images with labels; `indices` are their places in the data set they were taken from.

    device: where batches are wanted; `images` itself may stay in host memory if it does not fit there.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    paths: tuple[str, ...] | None = None
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.images.shape[2], self.images.shape[3]

    def batch(self, index: Tensor) -> Tensor:
        """Images at `index` (b,) as floats in [0, 1] on `device`."""
        # Callers keep `index` where the images are, so that nothing waits for the device here.
        chosen = self.images[index.to(self.images.device)]
        return chosen.to(self.device, non_blocking=True).float().div_(255)

    def where(self, keep: Tensor) -> "ImageSet":
        """The images where `keep` (N,) is true."""
        paths = self.paths and tuple(p for p, kept in zip(self.paths, keep.tolist(), strict=True) if kept)
        return replace(
            self, images=self.images[keep], labels=self.labels[keep], indices=self.indices[keep], paths=paths
        )

    def to(self, device: torch.device) -> "ImageSet":
        """Hold the set on `device` if it fits there, else leave it in host memory."""
        images = self.images
        if device.type != "cuda" or images.nbytes < _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            images = images.to(device)
        return replace(self, images=images, device=device)


@dataclass(frozen=True)
class DataSource:
    """Where and how to read a data set; field names are flag names. image_size None: the set's own."""

    data_path: str = "../Data/"
    image_size: int | None = None
    download_data: bool = False
    num_worker: int = 4
    skip_bad_images: bool = False

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 8:
            raise UserError(f"--image_size must be at least 8, got {self.image_size}")
        if self.num_worker < 0:
            raise UserError(f"--num_worker must be >= 0, got {self.num_worker}")


@dataclass(frozen=True)
class DatasetSpec:
    """One row of the table of data sets.

    load: (source, split "train" or "test", label to keep or None for all) -> ImageSet.
    classes: source -> names of the classes, in label order; the linear head has one output for each.
    groups: coarse classes as tuples of labels, where one-class training takes those instead (CIFAR-100).
    image_size: pixels on a side where the flag does not say otherwise; None: the model's.
    """

    load: Callable[[DataSource, str, int | None], ImageSet]
    classes: Callable[[DataSource], list[str]]
    image_size: int | None = 32
    groups: tuple[tuple[int, ...], ...] | None = None


def image_set(
    images: np.ndarray | Tensor, labels: np.ndarray | Tensor | list[int], paths: list[str] | None = None
) -> ImageSet:
    """An ImageSet from (N, 3, H, W) uint8 images."""
    x, y = torch.as_tensor(images), torch.as_tensor(labels).long()
    return ImageSet(x, y, torch.arange(len(x)), tuple(paths) if paths is not None else None)


def resize(images: Tensor, size: int | None) -> Tensor:
    """(N, C, H, W) uint8 images to (N, 3, size, size), bilinear; one channel becomes three equal ones."""
    if size is not None and images.shape[2:] != (size, size):
        # In blocks: floats of a whole set would take four times its memory at the new size.
        shrinks = size < images.shape[2]
        blocks = [
            F.interpolate(block.float(), (size, size), mode="bilinear", antialias=shrinks, align_corners=False)
            .round_()
            .clamp_(0, 255)
            .to(torch.uint8)
            for block in images.split(1024)
        ]
        images = torch.cat(blocks)
    return images.expand(-1, 3, -1, -1).contiguous()


def _resized(images: Tensor, labels: np.ndarray | list[int], size: int | None, label: int | None) -> ImageSet:
    """An ImageSet of the images with `label` (None: all), resized."""
    data = image_set(images, labels)
    if label is not None:
        data = data.where(data.labels == label)
    return replace(data, images=resize(data.images, size))


def _digits(source: DataSource, split: str, label: int | None) -> ImageSet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(x)), train_size=2 / 3, stratify=y, random_state=0)
    index = np.sort(parts[0] if split == "train" else parts[1])
    images = torch.from_numpy(np.round(x[index] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    return _resized(images, y[index], source.image_size, label)


def _torchvision(name: str, by_split: bool = False) -> Callable[[DataSource, str, int | None], ImageSet]:
    """A loader of torchvision's data set `name`; by_split: it takes split=, not train=."""

    def load(source: DataSource, split: str, label: int | None) -> ImageSet:
        import torchvision.datasets

        which = {"split": split} if by_split else {"train": split == "train"}
        try:
            data = getattr(torchvision.datasets, name)(source.data_path, download=source.download_data, **which)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            if source.download_data:
                reason = f"could not download or unpack {name} into {source.data_path} ({error})"
                raise UserError(f"--download_data: {reason}") from None
            raise UserError(
                f"--data_path: no complete {name} in {source.data_path}; put its files there or add --download_data"
            ) from None
        images = torch.as_tensor(data.data)
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        labels = data.labels if by_split else data.targets
        return _resized(images, labels, source.image_size, label)

    return load


def _mnist(name: str) -> Callable[[DataSource, str, int | None], ImageSet]:
    """A loader of MNIST or a set of its format: the packed files where they lie, else through torchvision."""
    through_torchvision = _torchvision(name)

    def load(source: DataSource, split: str, label: int | None) -> ImageSet:
        stem = Path(source.data_path) / name / "raw" / ("train" if split == "train" else "t10k")
        files = [stem.with_name(f"{stem.name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")]
        if not all(file.is_file() for file in files):
            return through_torchvision(source, split, label)
        # torchvision takes packed files only with its own checksums and unpacks them beside; data may be read-only.
        images, labels = (_read_idx(file) for file in files)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise UserError(f"--data_path: {files[0]} and {files[1].name} do not belong together")
        return _resized(torch.from_numpy(images)[:, None], labels, source.image_size, label)

    return load


def _read_idx(path: Path) -> np.ndarray:
    """A packed file of unsigned bytes in MNIST's format: two zeros, type 8, the number of axes, their sizes, data."""
    try:
        with gzip.open(path) as file:
            data = file.read()
        axes = np.frombuffer(data, ">i4", data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(axes)).reshape(axes).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error):
        raise UserError(f"--data_path: {path} is damaged; remove it and add --download_data") from None


def _names(*names: str) -> Callable[[DataSource], list[str]]:
    return lambda source: list(names)


def _folder(source: DataSource, split: str, label: int | None) -> ImageSet:
    images, labels, paths = read_folder(
        Path(source.data_path),
        split,
        size=source.image_size or 32,
        label=label,
        threads=max(1, source.num_worker),
        skip_bad=source.skip_bad_images,
    )
    return image_set(images, labels, paths)


_TEN = _names(*"0123456789")
_CIFAR10 = _names(*"airplane automobile bird cat deer dog frog horse ship truck".split())
_FASHION = _names("T-shirt/top", *"trouser pullover dress coat sandal shirt sneaker bag".split(), "ankle boot")

# Fine labels of the 20 superclasses of CIFAR-100, and their names.
CIFAR100_GROUPS = (
    (4, 31, 55, 72, 95),
    (1, 33, 67, 73, 91),
    (54, 62, 70, 82, 92),
    (9, 10, 16, 29, 61),
    (0, 51, 53, 57, 83),
    (22, 25, 40, 86, 87),
    (5, 20, 26, 84, 94),
    (6, 7, 14, 18, 24),
    (3, 42, 43, 88, 97),
    (12, 17, 38, 68, 76),
    (23, 34, 49, 60, 71),
    (15, 19, 21, 32, 39),
    (35, 63, 64, 66, 75),
    (27, 45, 77, 79, 99),
    (2, 11, 36, 46, 98),
    (28, 30, 44, 78, 93),
    (37, 50, 65, 74, 80),
    (47, 52, 56, 59, 96),
    (8, 13, 48, 58, 90),
    (41, 69, 81, 85, 89),
)

DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(_digits, _TEN),
    "cifar10": DatasetSpec(_torchvision("CIFAR10"), _CIFAR10),
    "cifar100": DatasetSpec(_torchvision("CIFAR100"), _names(*map(str, range(100))), groups=CIFAR100_GROUPS),
    "mnist": DatasetSpec(_mnist("MNIST"), _TEN),
    "fashion_mnist": DatasetSpec(_mnist("FashionMNIST"), _FASHION),
    "svhn": DatasetSpec(_torchvision("SVHN", by_split=True), _TEN),
    "folder": DatasetSpec(_folder, lambda source: folder_class_names(Path(source.data_path)), image_size=None),
}
