"""Data sets, augmentation and views. `DATASETS` and `SHIFTS` are the tables; `split_one_class` is the way in."""

from datasets.catalog import DATASETS, DataSource, ImageSet
from datasets.one_class import Split, split_one_class
from datasets.shifts import SHIFTS, ShiftSpec

__all__ = ["DATASETS", "SHIFTS", "DataSource", "ImageSet", "ShiftSpec", "Split", "split_one_class"]
