"""The table of data sets, `DATASETS`.

Most are read into memory (`datasets.sets`); the training pictures of ImageNet-30 and ImageNet-1k are decoded during
training (`datasets.pictures`).
"""

import contextlib
import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.files import in_turn
from common.flags import Flags, Spec, flag, path_flag
from datasets.augment import AlignedSpec
from datasets.decode import Reader, check_reading
from datasets.folder import (
    Layout,
    Picture,
    class_names,
    digests,
    find_pictures,
    fingerprint,
    n_train_classes,
    read_pictures,
    training_paths,
)
from datasets.npz import NpzFile
from datasets.pictures import Decoded, PictureSet, Pixels, open_cache
from datasets.sets import ImageSet, combined, image_set
from datasets.table import Table

_FOLDER = Layout()
# Below the same folder.
_IMAGENET30, _IMAGENET1K = Layout("one_class_train", "one_class_test"), Layout("train", "val")


@dataclass(frozen=True)
class DataSource(Spec, group="data"):
    """Where and how to read a data set; field names but `normal` are flag names. image_size None: the set's own.

    image_cache: folder for decoded pixels of sets that are decoded during training; None: decode each time.
    max_megapixels, value_range: see `Reader`. npz: see `NpzFile`.
    normal: reads the training pictures of the data set that a command is about; all that the command reads then has the
    same range of values. None: each data set has its own range.
    """

    data_path: str = path_flag("../Data/", "folder of the data sets", origin="place")
    download_data: bool = flag(False, "download (or unpack) the data set into --data_path")
    superclasses: str = flag(
        "published",
        "cifar100, one class: groups of the published tables (13 of 20 hold a foreign class), or CIFAR-100's own",
        choices=lambda: ("published", "standard"),
        origin="data",
    )
    image_size: int | None = flag(
        None, "pixels on a side (default: what the data set or the model is for)", type=int, at_least=8, origin="data"
    )
    num_worker: int = flag(4, "threads or processes that decode pictures", at_least=0)
    skip_bad_images: bool = flag(False, "leave out pictures that cannot be read, and count them", origin="place")
    image_cache: str | None = path_flag(None, "imagenet: folder to keep decoded training pictures in, built once")
    max_megapixels: float = flag(100.0, "larger pictures are refused", above=0, origin="place")
    value_range: Sequence[float] | None = flag(
        None,
        "16-bit and float pictures: values that become black and white (default: found from training pictures)",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        origin="data",
    )
    npz: str | None = path_flag(
        None, "a table that is no picture (.npz): arrays X and y, or X_train, y_train, X_test, y_test", origin="place"
    )
    normal: Reader | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reading(self.max_megapixels, self.value_range)

    @classmethod
    def of(cls, flags: Flags, dataset: str, *, training: bool = False) -> "DataSource":
        """From the flags; reads only those that loading `dataset` for training, or for evaluation, depends on."""
        spec = DATASETS[dataset]
        source = flags.of(cls, only=[flag for flag in spec.flags if training or flag != "image_cache"])
        return replace(source, normal=spec.reader and spec.reader(source))

    def reader(self, paths: Callable[[], Sequence[Path]]) -> Reader:
        """How to read pictures. The range of values is that of `normal`, or found from `paths` if that has none."""
        limits = {"value_range": self.value_range, "max_megapixels": self.max_megapixels}
        return Reader(paths, before=self.normal, threads=self.num_worker, **limits)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DatasetSpec:
    """One row of the table of data sets.

    load: (source, split "train" or "test", label to keep or None for all) -> ImageSet; sets that are grey by nature
    have one channel, all others three.
    classes: source -> names of the classes, in label order.
    flags: the fields of a `DataSource` that it depends on.
    n_train_classes: source -> the number of classes of the training split, the outputs of a linear head; None: all.
    stream: (source, crop, label) -> training pictures that are decoded, cropped and flipped during training; None:
    training uses `load`.
    reader: source -> the Reader of the training pictures, for sets of files.
    image_size: default pixels on a side; None: the model's.
    groups: coarse classes, name -> labels, for each value of --superclasses; one-class training uses them (CIFAR-100).
    table: (source, split) -> all rows, for sets that are no pictures; `load` is an error then, and a class is chosen by
    its name.
    """

    load: Callable[[DataSource, str, int | None], ImageSet]
    classes: Callable[[DataSource], list[str]]
    flags: tuple[str, ...]
    n_train_classes: Callable[[DataSource], int] | None = None
    stream: Callable[[DataSource, AlignedSpec, int | None], PictureSet] | None = None
    reader: Callable[[DataSource], Reader] | None = None
    image_size: int | None = 32
    groups: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None
    table: Callable[[DataSource, str], Table] | None = None


def resize(images: Tensor, size: int | None) -> Tensor:
    """(N, channels, H, W) uint8 images to (N, channels, size, size), bilinear."""
    if size is not None and images.shape[2:] != (size, size):
        # In blocks: floats of the whole set would take four times its memory at the new size.
        shrinks = size < images.shape[2]
        blocks = [
            F.interpolate(block.float(), (size, size), mode="bilinear", antialias=shrinks, align_corners=False)
            .round_()
            .clamp_(0, 255)
            .to(torch.uint8)
            for block in images.split(1024)
        ]
        images = torch.cat(blocks)
    return images.contiguous()


def _resized(images: Tensor, labels: np.ndarray | list[int], size: int | None, label: int | None) -> ImageSet:
    """An ImageSet of the images with `label` (None: all), resized."""
    data = image_set(images, labels)
    if label is not None:
        data = data.where(data.labels == label)
    # In blocks: bytes of the whole set would take its memory once more.
    parts = [data.labels, *data.images.split(1024)]
    found = combined(part.contiguous().numpy().tobytes() for part in parts)
    return replace(data, images=resize(data.images, size), fingerprint=found)


def _digits(source: DataSource, split: str, label: int | None) -> ImageSet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(x)), train_size=2 / 3, stratify=y, random_state=0)
    index = np.sort(parts[0] if split == "train" else parts[1])
    images = torch.from_numpy(np.round(x[index] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    return _resized(images, y[index], source.image_size, label)


def _torchvision(name: str, by_split: bool = False) -> Callable[[DataSource, str, int | None], ImageSet]:
    """A loader of the data set `name` of torchvision; by_split: its argument is split=, not train=."""

    def load(source: DataSource, split: str, label: int | None) -> ImageSet:
        import torchvision.datasets

        which = {"split": split} if by_split else {"train": split == "train"}
        turn = in_turn(Path(source.data_path)) if source.download_data else contextlib.nullcontext()
        try:
            with turn:
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
    """A loader of MNIST or a set in its format: reads the compressed files in place, or else uses torchvision."""
    through_torchvision = _torchvision(name)

    def load(source: DataSource, split: str, label: int | None) -> ImageSet:
        stem = Path(source.data_path) / name / "raw" / ("train" if split == "train" else "t10k")
        files = [stem.with_name(f"{stem.name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")]
        if not all(file.is_file() for file in files):
            return through_torchvision(source, split, label)
        # torchvision accepts only files with known checksums, and unpacks them into the folder, which may be read-only.
        images, labels = (_read_idx(file) for file in files)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise UserError(f"--data_path: {files[0]} and {files[1].name} do not belong together")
        return _resized(torch.from_numpy(images)[:, None], labels, source.image_size, label)

    return load


def _read_idx(path: Path) -> np.ndarray:
    """Read a compressed file of unsigned bytes in MNIST's format: two zeros, type 8, number of axes, sizes, data."""
    try:
        with gzip.open(path) as file:
            data = file.read()
        axes = np.frombuffer(data, ">i4", data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(axes)).reshape(axes).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error):
        raise UserError(f"--data_path: {path} is corrupt; remove it and add --download_data") from None


def _names(*names: str) -> Callable[[DataSource], list[str]]:
    return lambda source: list(names)


def pictures_in_memory(pictures: list[Picture], source: DataSource, short_side: int | None = None) -> ImageSet:
    """Pictures as an ImageSet: centre crops of `source.image_size` pixels, the short side resized to `short_side`."""
    reader = source.reader(lambda: [picture.path for picture in pictures])
    size, skip_bad = source.image_size or 32, source.skip_bad_images
    images, good, found = read_pictures(
        pictures, reader, size=size, short_side=short_side, threads=source.num_worker, skip_bad=skip_bad
    )
    labels, paths = [pictures[n].label for n in good], [str(pictures[n].path) for n in good]
    return replace(image_set(images, labels, paths), fingerprint=found)


def _of_training(source: DataSource, root: Path, layout: Layout = _FOLDER) -> Reader:
    """A reader with the range of values of the training split."""
    return source.normal or source.reader(partial(training_paths, root, layout))


def _folder(source: DataSource, split: str, label: int | None) -> ImageSet:
    root = Path(source.data_path)
    pictures = find_pictures(root, split, label=label)
    return pictures_in_memory(pictures, replace(source, normal=_of_training(source, root)))


def _imagenet_root(source: DataSource) -> Path:
    return Path(source.data_path) / "ImageNet"


def imagenet_short_side(side: int) -> int:
    """The length to which the short side is resized before a crop of `side` pixels: 256 for 224."""
    return round(side * 8 / 7)


def _imagenet(source: DataSource, split: str, label: int | None, *, layout: Layout) -> ImageSet:
    root = _imagenet_root(source)
    pictures = find_pictures(root, split, label=label, layout=layout)
    source = replace(source, normal=_of_training(source, root, layout))
    return pictures_in_memory(pictures, source, imagenet_short_side(source.image_size or 224))


def _imagenet_stream(source: DataSource, crop: AlignedSpec, label: int | None, *, layout: Layout) -> PictureSet:
    root = _imagenet_root(source)
    pictures = find_pictures(root, "train", label=label, layout=layout)
    reader = _of_training(source, root, layout)
    if any(picture.path.suffix.lower() not in (".jpg", ".jpeg") for picture in pictures):
        reader.find_range()  # Otherwise each process that decodes would find it again.
    side, workers, skip_bad = source.image_size or 224, source.num_worker, source.skip_bad_images
    short_side = imagenet_short_side(side)
    paths = [picture.path for picture in pictures]
    pixels: Pixels
    if source.image_cache is not None:
        decoded, cache = Decoded(paths, short_side, reader), Path(source.image_cache)
        pixels, good, of_files = open_cache(decoded, cache, workers=workers, skip_bad=skip_bad)
        found = fingerprint([pictures[n] for n in good], of_files)
    else:
        good, found = list(range(len(paths))), ""
        if skip_bad:  # Only decoding shows which can be read.
            _, good, found = read_pictures(pictures, reader, size=1, threads=workers, skip_bad=True)
        pixels = Decoded([paths[n] for n in good], short_side, reader)
        found = found or fingerprint(pictures, digests(paths, workers))
    return PictureSet(pixels, torch.tensor([pictures[n].label for n in good]), crop, side, workers, fingerprint=found)


def _no_pictures(source: DataSource, split: str, label: int | None) -> ImageSet:
    raise UserError(
        "--npz: rows of a table are no pictures; the modes for tables are rdae, dae and vae, evaluated by"
        " rdae_outliers, rdae_denoise and rdae_features"
    )


_TEN = _names(*"0123456789")
_CIFAR10 = _names(*"airplane automobile bird cat deer dog frog horse ship truck".split())
_FASHION = _names("T-shirt/top", *"trouser pullover dress coat sandal shirt sneaker bag".split(), "ankle boot")

_CIFAR100 = _names(
    *"apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel".split(),
    *"can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur".split(),
    *"dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion".split(),
    *"lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree".split(),
    *"pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea".split(),
    *"seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table".split(),
    *"tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman".split(),
    "worm",
)

# The 20 superclasses of CIFAR-100 (Krizhevsky 2009) as fine labels.
_STANDARD = {
    "aquatic mammals": (4, 30, 55, 72, 95),
    "fish": (1, 32, 67, 73, 91),
    "flowers": (54, 62, 70, 82, 92),
    "food containers": (9, 10, 16, 28, 61),
    "fruit and vegetables": (0, 51, 53, 57, 83),
    "household electrical devices": (22, 39, 40, 86, 87),
    "household furniture": (5, 20, 25, 84, 94),
    "insects": (6, 7, 14, 18, 24),
    "large carnivores": (3, 42, 43, 88, 97),
    "large man-made outdoor things": (12, 17, 37, 68, 76),
    "large natural outdoor scenes": (23, 33, 49, 60, 71),
    "large omnivores and herbivores": (15, 19, 21, 31, 38),
    "medium mammals": (34, 63, 64, 66, 75),
    "non-insect invertebrates": (26, 45, 77, 79, 99),
    "people": (2, 11, 35, 46, 98),
    "reptiles": (27, 29, 44, 78, 93),
    "small mammals": (36, 50, 65, 74, 80),
    "trees": (47, 52, 56, 59, 96),
    "vehicles 1": (8, 13, 48, 58, 90),
    "vehicles 2": (41, 69, 81, 85, 89),
}


def _as_published(labels: tuple[int, ...]) -> tuple[int, ...]:
    """A superclass in the tables of CSI and its successors, where the labels 25 to 38 are one too high, and 39 is 25.

    They sort `keyboard` (39) as `computer_keyboard`. It is kept because published results were made with it.
    """
    return tuple(sorted(25 if n == 39 else n + 1 if 25 <= n < 39 else n for n in labels))


_PUBLISHED = {
    name if _as_published(labels) == labels else f"{name} (published)": _as_published(labels)
    for name, labels in _STANDARD.items()
}
CIFAR100_GROUPS: dict[str, Mapping[str, tuple[int, ...]]] = {"published": _PUBLISHED, "standard": _STANDARD}

_FILES = ("data_path", "download_data", "image_size")
PICTURE_FLAGS = ("num_worker", "skip_bad_images", "max_megapixels", "value_range")
_PICTURES = ("data_path", "image_size", *PICTURE_FLAGS)


def _imagenet_spec(layout: Layout) -> DatasetSpec:
    """The row of a set of pictures of many sizes, of which those of training are decoded during training."""
    return DatasetSpec(
        partial(_imagenet, layout=layout),
        lambda source: class_names(_imagenet_root(source), layout),
        (*_PICTURES, "image_cache"),
        n_train_classes=lambda source: n_train_classes(_imagenet_root(source), layout),
        stream=partial(_imagenet_stream, layout=layout),
        reader=lambda source: _of_training(source, _imagenet_root(source), layout),
        image_size=None,
    )


DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(_digits, _TEN, ("image_size",)),
    "cifar10": DatasetSpec(_torchvision("CIFAR10"), _CIFAR10, _FILES),
    "cifar100": DatasetSpec(_torchvision("CIFAR100"), _CIFAR100, (*_FILES, "superclasses"), groups=CIFAR100_GROUPS),
    "mnist": DatasetSpec(_mnist("MNIST"), _TEN, _FILES),
    "fashion_mnist": DatasetSpec(_mnist("FashionMNIST"), _FASHION, _FILES),
    "svhn": DatasetSpec(_torchvision("SVHN", by_split=True), _TEN, _FILES),
    "imagenet": _imagenet_spec(_IMAGENET30),
    "imagenet1k": _imagenet_spec(_IMAGENET1K),
    "folder": DatasetSpec(
        _folder,
        lambda source: class_names(Path(source.data_path)),
        _PICTURES,
        n_train_classes=lambda source: n_train_classes(Path(source.data_path)),
        reader=lambda source: _of_training(source, Path(source.data_path)),
        image_size=None,
    ),
    "table": DatasetSpec(
        _no_pictures,
        lambda source: NpzFile.open(source.npz).classes()[0],
        ("npz",),
        n_train_classes=lambda source: NpzFile.open(source.npz).classes()[1],
        image_size=None,
        table=lambda source, split: NpzFile.open(source.npz).table(split),
    ),
}
