"""Data sets, augmentation and views. `DATASETS` and `SHIFTS` are the tables; `split_one_class` is the way in."""

from datasets.catalog import DATASETS, DataSource
from datasets.loading import Loading
from datasets.one_class import Split, split_one_class
from datasets.pictures import PictureSet
from datasets.sets import ImageSet
from datasets.shifts import SHIFTS, ShiftSpec

__all__ = [
    "DATASETS",
    "SHIFTS",
    "DataSource",
    "ImageSet",
    "Loading",
    "PictureSet",
    "ShiftSpec",
    "Split",
    "split_one_class",
]
