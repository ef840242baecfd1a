"""Data sets, augmentation and views. `DATASETS` and `SHIFTS` are the tables; `split_one_class` is the entry point.

Dimension letters, in shapes and in names such as `flip_NK`: N images of a set, B images of a batch, V views of each
image that a step loads (`Loading`), K shifts, T draws, H and W pixels. Labels and indices are int64. Images are uint8
until they reach the compute device, then floats in [0, 1].
"""

from datasets.catalog import DATASETS, DataSource
from datasets.loading import Loading
from datasets.one_class import Split, split_one_class
from datasets.pictures import PictureSet
from datasets.sets import ImageSet
from datasets.shifts import SHIFTS, ShiftSpec
from datasets.table import Table

__all__ = [
    "DATASETS",
    "SHIFTS",
    "DataSource",
    "ImageSet",
    "Loading",
    "PictureSet",
    "ShiftSpec",
    "Split",
    "Table",
    "split_one_class",
]
