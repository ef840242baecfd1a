"""The one-class split: train on one class, test on all; without a class, all training classes, unlabelled."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import UserError
from datasets.augment import AlignedSpec
from datasets.catalog import DATASETS, DatasetSpec, DataSource
from datasets.pictures import PictureSet
from datasets.sets import ImageSet


@dataclass(frozen=True)
class Split:
    """A data set under a choice of the normal class.

    n_classes: outputs of the linear head (fine classes). class_names: of the classes one chooses from.
    one_class_idx None: all training classes are normal.
    """

    spec: DatasetSpec
    source: DataSource
    one_class_idx: int | None
    n_classes: int
    class_names: list[str]

    def train(self) -> ImageSet:
        """The normal training images."""
        # A coarse class is several labels, so it is chosen after loading.
        label = self.one_class_idx if self.spec.groups is None else None
        data = self._relabelled(self.spec.load(self.source, "train", label))
        return data if self.one_class_idx is None else data.where(data.labels == self.one_class_idx)

    def stream(self, crop: AlignedSpec) -> ImageSet | PictureSet:
        """The normal training images as training looks at them; pictures decoded meanwhile are cropped by `crop`."""
        if self.spec.stream is None:
            return self.train()
        return self.spec.stream(self.source, crop, self.one_class_idx)

    def test(self) -> ImageSet:
        """All test images; `normal(labels)` tells which are normal."""
        return self._relabelled(self.spec.load(self.source, "test", None))

    def normal(self, labels: Tensor) -> Tensor:
        """(N,) bool."""
        return labels < self.n_classes if self.one_class_idx is None else labels == self.one_class_idx

    def _relabelled(self, data: ImageSet) -> ImageSet:
        if self.spec.groups is None or self.one_class_idx is None:
            return data
        group_of = torch.empty(sum(map(len, self.spec.groups)), dtype=torch.long)
        for group, members in enumerate(self.spec.groups):
            group_of[list(members)] = group
        return replace(data, labels=group_of[data.labels])


def split_one_class(
    dataset: str, source: DataSource, one_class_idx: int | None, model_size: int, *, fixed: bool = False
) -> Split:
    """Look the data set up and check the class.

    model_size: pixels the model is for, where nothing else says; fixed: it takes no other.
    Raises: UserError for a class out of range, a folder that holds no classes, or a size that the model does not take.
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
    if spec.groups is not None and one_class_idx is not None:
        names, choices = [f"superclass {i}" for i in range(len(spec.groups))], len(spec.groups)
    if one_class_idx is not None and not 0 <= one_class_idx < choices:
        raise UserError(f"--one_class_idx must lie in 0..{choices - 1} for {dataset}, got {one_class_idx}")
    return Split(spec, source, one_class_idx, n_classes, names)
