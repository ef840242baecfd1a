"""The one-class split: train on one class, test on all; without a class, all training classes, unlabelled.

Training images may hold some of other classes, and all images noise.
"""

import argparse
import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.flags import Flags, Spec, class_choice, flag
from common.seed import generator
from datasets.augment import AlignedSpec
from datasets.catalog import DATASETS, DatasetSpec, DataSource
from datasets.corrupt import CorruptSpec
from datasets.loading import all_grey
from datasets.pictures import PictureSet
from datasets.sets import ImageSet, image_set
from datasets.table import Table

TABLE = "table"
# `auto`: a tenth of the images, two at least where there are five, 5,000 at most.
AUTO, _AUTO_IMAGES, _AUTO_SHARE, _AUTO_LEAST = "auto", 5000, 10, 2
# Sets with draws of noise of their own.
TRAIN, TEST, HELD_OUT = "training images", "test images", "held-out images"


def images_or_auto(value: str) -> int | str:
    """A type for `flag`: a number of images, or `auto`."""
    if value == AUTO:
        return value
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither a number nor {AUTO}") from None


@dataclass(frozen=True)
class SplitSpec(Spec, group="data"):
    """Which data set, and what of it is normal."""

    dataset: str = flag("cifar10", "data set", choices=lambda: sorted(DATASETS), origin="data")
    one_class_idx: int | str | None = flag(
        None,
        "the normal class, its number or its name; without it all classes, unlabelled",
        type=class_choice,
        origin="data",
    )
    outliers: int = flag(
        0, "training images of other classes to mix in, drawn by --data_seed", at_least=0, origin="data"
    )
    first_images: int | None = flag(
        None, "use only so many training images, the first of the data set", type=int, above=0, origin="data"
    )
    held_out: int | str = flag(
        0,
        "training images to set aside, drawn by --data_seed (supervised: auto, 5,000 or a tenth if that is less)",
        type=images_or_auto,
        at_least=0,
        origin="data",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outliers and self.one_class_idx is None:
            raise UserError("--outliers: they are images of other classes than the normal one; give --one_class_idx")


@dataclass(frozen=True)
class Split:
    """A data set with a choice of the normal class.

    one_class_idx: the normal class; None: all training classes are normal.
    n_classes: fine classes of the training split, the outputs of a linear head.
    class_names: of the classes that can be normal, then of those that only the test split has.
    outliers: how many training images of other classes are mixed into the normal ones. first_images: how many training
    images are used, the first of the data set; None: all. held_out: how many of them are set aside, or `auto`.
    corrupt: noise of all images, and the seed of the outliers and of those that are held out.
    """

    dataset: str
    spec: DatasetSpec
    source: DataSource
    one_class_idx: int | None
    n_classes: int
    class_names: list[str]
    outliers: int = 0
    first_images: int | None = None
    held_out: int | str = 0
    corrupt: CorruptSpec = CorruptSpec()

    @property
    def class_name(self) -> str | None:
        """The name of the normal class; None where all are normal."""
        return None if self.one_class_idx is None else self.class_names[self.one_class_idx]

    @property
    def normal_title(self) -> str:
        """A description of what is normal: `class 8 (ship)` or `all classes`."""
        return "all classes" if self.one_class_idx is None else f"class {self.one_class_idx} ({self.class_name})"

    @property
    def title(self) -> str:
        """What the training images are: `class 8 (ship)`, with the outliers and the noise among them."""
        parts = [self.normal_title]
        parts += [f"{self.outliers} outliers among them"] if self.outliers else []
        noise = self.corrupt
        parts += [f"{noise.corrupt} noise at {noise.corrupt_pixels} pixels"] if noise.active else []
        return ", ".join(parts)

    def facts(self, data: ImageSet | PictureSet | Table) -> dict[str, Any]:
        """What identifies the training images `data`, in types that JSON has; stored with a run and its weights."""
        names = self.class_names[: self.n_classes] if self._groups is None else self.class_names
        return {
            "dataset": self.dataset,
            "class_name": self.class_name,
            "classes": names if len(json.dumps(names)) < _LONGEST else f"sha256 {_digest(names)}",
            "images": len(data),
            "fingerprint": data.fingerprint,
        }

    def check_trained(self, trained: Mapping[str, Any], path: Path, *, flag: str) -> None:
        """Compare with the `facts` of the images that weights were trained on; empty facts are accepted.

        Prints a note where the data set differs, where one has a single normal class and the other all classes, and
        where rows of a table have other labels.
        Raises: UserError where the data set is the same and the normal class, or the set of picture classes, differs.
        """
        if not trained:
            return
        here, there = self.class_name, trained["class_name"]
        was = "all classes" if there is None else f"class {there!r}"
        if trained["dataset"] != self.dataset:
            print(f"note: {path} was trained on {trained['dataset']}, {was}; here it is {self.dataset}")
        elif (here is None) != (there is None):
            print(f"note: {path} was trained on {was}; normal here: {self.normal_title}")
        elif here != there:
            remedy = f"give another --{flag} or --data_path"
            if there in self.class_names:
                remedy = f"give --one_class_idx {shlex.quote(there)}"
            own = f"class {self.one_class_idx} is {here!r}"
            raise UserError(f"--one_class_idx: {path} was trained on {was}, and here {own}; {remedy}")
        elif here is None and trained["classes"] != self.facts(_NO_IMAGES)["classes"]:
            if self.spec.table is not None:
                # Rows that are to be scored need no labels.
                print(f"note: {path} was trained on rows of other labels ({_listed(trained['classes'])})")
                return
            raise UserError(
                f"--data_path: {path} was trained on other classes ({_listed(trained['classes'])}) than there are here"
                f" ({_listed(self.class_names[: self.n_classes])}); give it the same ones"
            )

    @property
    def _groups(self) -> tuple[tuple[int, ...], ...] | None:
        """The labels of each coarse class, where the normal class is a coarse one; else None."""
        if self.spec.groups is None or self.one_class_idx is None:
            return None
        return tuple(self.spec.groups[self.source.superclasses].values())

    def train(self, channels: int | None = 3) -> ImageSet:
        """The training images: the normal ones and the outliers among them, with noise.

        channels: 1, 3, or None for 1 where all of them are grey, else 3.
        Raises: UserError where there are fewer images, or pixels, than flags ask for.
        """
        return self.corrupted(self._train_part(self._clean_train(channels)), TRAIN)

    def held_out_images(self) -> ImageSet | PictureSet | None:
        """The training images that are set aside, with noise of their own and not augmented; None where there are none.

        Raises: UserError as `train`.
        """
        if self.spec.stream is None:
            found = self._part(self._clean_train(3), held=True)
            return found and self.corrupted(found, HELD_OUT)
        return self._part(self.spec.stream(self.source, AlignedSpec(), self.one_class_idx), held=True)

    def training_parts(self, crop: AlignedSpec) -> tuple[ImageSet | PictureSet, ImageSet | PictureSet | None]:
        """`stream(crop)` and `held_out_images()`, of files that are read once.

        Raises: UserError as both.
        """
        if self.spec.stream is None:
            whole = self._clean_train(3)
            held_out = self._part(whole, held=True)
            train = self.corrupted(self._train_part(whole), TRAIN)
            return train, held_out and self.corrupted(held_out, HELD_OUT)
        pictures = self._whole_stream(crop)
        return self._train_part(pictures), self._part(pictures, held=True)

    def _train_part(self, data: Any) -> Any:
        """Training images, or rows, without those that are held out."""
        part = self._part(data, held=False)
        return data if part is None else part

    def _part(self, data: Any, *, held: bool) -> Any:
        """The images that are held out, or the others; None where none is held out."""
        n = len(data)
        auto = min(_AUTO_IMAGES, max(n // _AUTO_SHARE, _AUTO_LEAST if n > 2 * _AUTO_LEAST else 0))
        count = auto if isinstance(self.held_out, str) else self.held_out
        if count >= n > 0:
            raise UserError(f"--held_out {count}: there are {n} training images; give fewer")
        if count == 0:
            return None
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[torch.randperm(n, generator=generator(self.corrupt.data_seed, "held-out"))[:count]] = True
        return data.where(chosen if held else ~chosen)

    def _clean_train(self, channels: int | None) -> ImageSet:
        chosen = self.outliers > 0 or self.first_images is not None
        # A coarse class is several labels, so it is chosen after loading.
        label = self.one_class_idx if self._groups is None and not chosen else None
        data = self._relabelled(self.spec.load(self.source, "train", label))
        if chosen:
            data = data.where(self._chosen(data.labels))
        elif self.one_class_idx is not None:
            data = data.where(data.labels == self.one_class_idx)
        return data.with_channels(channels)

    def _chosen(self, labels: Tensor) -> Tensor:
        """Which of all training images, whose labels are (N,), are used, (N,) bool."""
        first = len(labels) if self.first_images is None else self.first_images
        if first > len(labels):
            raise UserError(f"--first_images {first}: {self.dataset} has {len(labels)} training images; give fewer")
        normal = labels == self.one_class_idx if self.one_class_idx is not None else torch.ones_like(labels).bool()
        others = (~normal[:first]).nonzero()[:, 0]
        if self.outliers > len(others):
            raise UserError(f"--outliers {self.outliers}: there are {len(others)} images of other classes; give fewer")
        chosen = normal & (torch.arange(len(labels)) < first)
        if not chosen.any():
            raise UserError(f"--first_images {first}: none of them is of {self.normal_title}; give more")
        drawn = torch.randperm(len(others), generator=generator(self.corrupt.data_seed, "mixture"))[: self.outliers]
        chosen[others[drawn]] = True
        return chosen

    def train_table(self, channels: int | None = None) -> Table:
        """The rows of `train`, with the same noise, unclipped. channels: of images, as of `train`.

        Raises: UserError as `train`, and for rows whose entries are all equal.
        """
        if self.spec.table is None:
            table = Table.of_images(self._train_part(self._clean_train(channels)))
        else:
            table = self.spec.table(self.source, "train")
            table = self._train_part(table.where(self._chosen(table.labels)))
        if len(table) and table.rows.min() == table.rows.max():
            place = "data_path" if self.spec.table is None else "npz"
            raise UserError(f"--{place}: all entries of the training rows are equal, there is nothing to learn")
        return self._corrupted_rows(table, TRAIN)

    def test_table(self, channels: int | None = None) -> Table:
        """All test rows, as `test` and `train_table`. Of images, pass the channels that the network takes."""
        table = self.spec.table(self.source, "test") if self.spec.table else Table.of_images(self.clean_test(channels))
        return self._corrupted_rows(table, TEST)

    def corrupted(self, images: ImageSet, name: str) -> ImageSet:
        """The images with the noise of this split, if any. name: of the set, which has draws of its own.

        Grey images have the same noise in all channels. Raises: UserError for more pixels than an image has.
        """
        if not self.corrupt.active:
            return images
        channels = 1 if all_grey(images.images) else images.channels
        noise = self.corrupt.noise(len(images), channels, math.prod(images.size), name)
        return images.with_noise(noise, self.corrupt.change(name))

    def _corrupted_rows(self, table: Table, name: str) -> Table:
        """As `corrupted`."""
        if not self.corrupt.active:
            return table
        channels, positions = table.rows.shape[1] // table.positions, table.positions
        channels = 1 if all_grey(table.rows.view(-1, channels, positions, 1)) else channels
        noise = self.corrupt.noise(len(table), channels, positions, name)
        return table.with_noise(noise, self.corrupt.change(name))

    def stream(self, crop: AlignedSpec, channels: int | None = 3) -> ImageSet | PictureSet:
        """The images of `train` for training; pictures that are decoded during training are cropped by `crop`.

        Raises: UserError where one channel is asked of pictures that are decoded during training, or a change to them.
        """
        if self.spec.stream is None:
            return self.train(channels)
        return self._train_part(self._whole_stream(crop, channels))

    def _whole_stream(self, crop: AlignedSpec, channels: int | None = 3) -> PictureSet:
        """The pictures of `stream`, those that are held out among them."""
        assert self.spec.stream is not None
        changes = {"corrupt": self.corrupt.active, "outliers": self.outliers, "first_images": self.first_images}
        if asked := [name for name, value in changes.items() if value]:
            raise UserError(
                f"--{asked[0]}: the pictures of --dataset {self.dataset} are decoded during training as they are; leave"
                " the flag out, or choose another data set"
            )
        if channels == 1:
            raise UserError(
                f"--dataset {self.dataset}: its pictures are decoded during training, in three channels only; choose"
                " another data set for one channel"
            )
        return self.spec.stream(self.source, crop, self.one_class_idx)

    def test(self, channels: int | None = 3) -> ImageSet:
        """All test images, with noise; `normal(labels)` says which are normal.

        channels: as of `train`, but None depends on the test images; pass the number that the network takes.
        """
        return self.corrupted(self.clean_test(channels), TEST)

    def clean_test(self, channels: int | None = 3) -> ImageSet:
        """The images of `test`, without noise."""
        return self._relabelled(self.spec.load(self.source, "test", None)).with_channels(channels)

    def normal(self, labels: Tensor) -> Tensor:
        """Which of the labels (N,) are normal, (N,) bool."""
        return labels < self.n_classes if self.one_class_idx is None else labels == self.one_class_idx

    def _relabelled(self, data: ImageSet) -> ImageSet:
        if self._groups is None:
            return data
        group_of = torch.empty(sum(map(len, self._groups)), dtype=torch.long)
        for group, members in enumerate(self._groups):
            group_of[list(members)] = group
        return replace(data, labels=group_of[data.labels])


# Characters of class names in a checkpoint; longer lists are stored as a digest.
_LONGEST = 30_000
_NO_IMAGES = image_set(torch.empty(0, 3, 0, 0, dtype=torch.uint8), [])


def _digest(names: list[str]) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def _listed(names: list[str] | str) -> str:
    """The names; of many, the first ones and how many there are."""
    if isinstance(names, str):
        return names
    return ", ".join(names[:_SHOWN]) + (f", ... {len(names)} in all" if len(names) > _SHOWN else "")


_SHOWN = 12


def with_table(flags: Flags) -> Flags:
    """The flags, in which --npz without --dataset means a table."""
    return flags.implied({"dataset": TABLE}) if flags.given("npz") else flags


def read_split(flags: Flags, *, training: bool, model_size: int | None, fixed: bool = False) -> Split:
    """The data set that the flags name, what of it is normal, and what is changed in it.

    training: for training, and not only for evaluation. model_size, fixed: as `split_one_class`.
    Raises: UserError as `split_one_class`, and for --npz with another data set.
    """
    which = flags.of(SplitSpec)
    if flags.given("npz") and which.dataset != TABLE:
        raise UserError(f"--npz: --dataset {which.dataset} is no table; leave one of the two out")
    source = DataSource.of(flags, which.dataset, training=training)
    split = split_one_class(which.dataset, source, which.one_class_idx, model_size, fixed=fixed)
    corrupt = CorruptSpec.of(flags, mixed=which.outliers > 0 or which.held_out != 0)
    own = {name: getattr(which, name) for name in ("outliers", "first_images", "held_out")}
    return replace(split, **own, corrupt=corrupt)


def split_one_class(
    dataset: str, source: DataSource, one_class: int | str | None, model_size: int | None, *, fixed: bool = False
) -> Split:
    """Find the data set in the table and check the choice of the normal class.

    one_class: number or name of the normal class; None: all are normal.
    model_size: pixels on a side that the model takes by default; fixed: it takes no other size. None: images keep the
    size that they have in the data set, pictures of any size get 32 pixels on a side.
    Raises: UserError for an unknown class, a folder without classes, or a size that the model does not take.
    """
    spec = DATASETS[dataset]
    if fixed and source.image_size not in (None, model_size):
        raise UserError(f"--image_size {source.image_size}: the model takes images of {model_size} pixels only")
    usual = None if model_size is None else spec.image_size or model_size
    wanted = model_size if fixed else source.image_size or usual
    source = replace(source, image_size=wanted)
    names = spec.classes(source)
    # A folder that only the test split has is never normal.
    n_classes = spec.n_train_classes(source) if spec.n_train_classes else len(names)
    choices = n_classes
    if spec.groups is not None and one_class is not None:
        names = list(spec.groups[source.superclasses])
        choices = len(names)
    # The names of a table's classes are its labels.
    choice = str(one_class) if spec.table is not None and one_class is not None else one_class
    return Split(dataset, spec, source, _index_of(choice, names[:choices], dataset), n_classes, names)


def _index_of(choice: int | str | None, names: list[str], dataset: str) -> int | None:
    """The number of the class. Raises: UserError for one that cannot be normal."""
    if isinstance(choice, str):
        if choice not in names:
            raise UserError(f"--one_class_idx {choice}: {dataset} has no such training class, but {_listed(names)}")
        return names.index(choice)
    if choice is not None and not 0 <= choice < len(names):
        raise UserError(f"--one_class_idx must lie in 0..{len(names) - 1} for {dataset}, got {choice}")
    return choice
