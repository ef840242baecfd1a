"""The one-class split: train on one class, test on all; without a class, all training classes, unlabelled."""

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.flags import Spec, class_choice, flag
from datasets.augment import AlignedSpec
from datasets.catalog import DATASETS, DatasetSpec, DataSource
from datasets.pictures import PictureSet
from datasets.sets import ImageSet, image_set


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


@dataclass(frozen=True)
class Split:
    """A data set with a choice of the normal class.

    one_class_idx: the normal class; None: all training classes are normal.
    n_classes: fine classes of the training split, the outputs of a linear head.
    class_names: of the classes that can be normal, then of those that only the test split has.
    """

    dataset: str
    spec: DatasetSpec
    source: DataSource
    one_class_idx: int | None
    n_classes: int
    class_names: list[str]

    @property
    def class_name(self) -> str | None:
        """The name of the normal class; None where all are normal."""
        return None if self.one_class_idx is None else self.class_names[self.one_class_idx]

    @property
    def normal_title(self) -> str:
        """A description of what is normal: `class 8 (ship)` or `all classes`."""
        return "all classes" if self.one_class_idx is None else f"class {self.one_class_idx} ({self.class_name})"

    def facts(self, data: ImageSet | PictureSet) -> dict[str, Any]:
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

        Prints a note where the data set differs, and where one has a single normal class and the other all classes.
        Raises: UserError where the data set is the same and the normal class, or the set of classes, differs.
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
        """The normal training images. channels: 1, 3, or None for 1 where all of them are grey, else 3."""
        # A coarse class is several labels, so it is chosen after loading.
        label = self.one_class_idx if self._groups is None else None
        data = self._relabelled(self.spec.load(self.source, "train", label))
        if self.one_class_idx is not None:
            data = data.where(data.labels == self.one_class_idx)
        return data.with_channels(channels)

    def stream(self, crop: AlignedSpec, channels: int | None = 3) -> ImageSet | PictureSet:
        """The images of `train` for training; pictures that are decoded during training are cropped by `crop`.

        Raises: UserError where one channel is asked of pictures that are decoded during training.
        """
        if self.spec.stream is None:
            return self.train(channels)
        if channels == 1:
            raise UserError(
                f"--dataset {self.dataset}: its pictures are decoded during training, in three channels only; choose"
                " another data set for one channel"
            )
        return self.spec.stream(self.source, crop, self.one_class_idx)

    def test(self, channels: int | None = 3) -> ImageSet:
        """All test images; `normal(labels)` says which are normal.

        channels: as of `train`, but None depends on the test images; pass the number that the network takes.
        """
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


def split_one_class(
    dataset: str, source: DataSource, one_class: int | str | None, model_size: int, *, fixed: bool = False
) -> Split:
    """Find the data set in the table and check the choice of the normal class.

    one_class: number or name of the normal class; None: all are normal.
    model_size: pixels on a side that the model takes by default; fixed: it takes no other size.
    Raises: UserError for an unknown class, a folder without classes, or a size that the model does not take.
    """
    spec = DATASETS[dataset]
    if fixed and source.image_size not in (None, model_size):
        raise UserError(f"--image_size {source.image_size}: the model takes images of {model_size} pixels only")
    wanted = model_size if fixed else source.image_size or spec.image_size or model_size
    source = replace(source, image_size=wanted)
    names = spec.classes(source)
    # A folder that only the test split has is never normal.
    n_classes = spec.n_train_classes(source) if spec.n_train_classes else len(names)
    choices = n_classes
    if spec.groups is not None and one_class is not None:
        names = list(spec.groups[source.superclasses])
        choices = len(names)
    return Split(dataset, spec, source, _index_of(one_class, names[:choices], dataset), n_classes, names)


def _index_of(choice: int | str | None, names: list[str], dataset: str) -> int | None:
    """The number of the class. Raises: UserError for one that cannot be normal."""
    if isinstance(choice, str):
        if choice not in names:
            raise UserError(f"--one_class_idx {choice}: {dataset} has no such training class, but {_listed(names)}")
        return names.index(choice)
    if choice is not None and not 0 <= choice < len(names):
        raise UserError(f"--one_class_idx must lie in 0..{len(names) - 1} for {dataset}, got {choice}")
    return choice
