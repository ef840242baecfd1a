"""Outlier sets, which are only evaluated: data sets of `DATASETS`, pictures in folders, `interp`, `folder:<path>`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.errors import UserError
from common.flags import Spec, flag, path_flag
from common.seed import generator
from datasets.catalog import DATASETS, PICTURE_FLAGS, DataSource, imagenet_short_side, pictures_in_memory
from datasets.folder import Picture
from datasets.listing import list_pictures, printable
from datasets.one_class import split_one_class
from datasets.sets import ImageSet, derived

FOLDER = "folder:"


def _outlier_set(value: str) -> str:
    """A type for `flag`: ~ in the path of `folder:<path>` is the home folder."""
    kind, colon, path = value.partition(":")
    return f"{kind}{colon}{os.path.expanduser(path)}"


@dataclass(frozen=True)
class OutlierSpec(Spec, group="evaluation"):
    """What a data set is compared with."""

    ood_dataset: Sequence[str] | None = flag(
        None,
        "other data sets to detect as anomalous",
        type=_outlier_set,
        choices=lambda: outlier_names(),
        prefix=FOLDER,
        placeholder="<path>",
        nargs="+",
    )
    ood_data_path: str | None = path_flag(None, "folder of those data sets (default: --data_path)")


@dataclass(frozen=True)
class TestBatchSpec(Spec, group="training"):
    """Test images at a time."""

    test_batch_size: int = flag(100, "images per batch of the linear probe's test, and of interp", above=0)


# name -> folder below --ood_data_path, and how many pictures are drawn of it (None: all).
PICTURE_SETS: dict[str, tuple[str, int | None]] = {
    "lsun_resize": ("LSUN_resize", None),
    "lsun_fix": ("LSUN_fix", None),
    "imagenet_resize": ("Imagenet_resize", None),
    "imagenet_fix": ("Imagenet_fix", None),
    "cub": ("cub200", 3000),
    "stanford_dogs": ("stanford_dogs", 3000),
    "flowers102": ("flowers102", 3000),
    "places365": ("places365", 3000),
    "food_101": ("food-101/images", 3000),
    "caltech_256": ("caltech-256", 3000),
    "dtd": ("dtd/images", 3000),
    "pets": ("pets", 3000),
}
INTERP = "interp"
OUTLIERS = (*PICTURE_SETS, INTERP)

# Default of --ood_dataset where all classes of a data set are normal.
MULTI_CLASS = {
    "cifar10": ("svhn", "lsun_resize", "imagenet_resize", "lsun_fix", "imagenet_fix", "cifar100", INTERP),
    "imagenet": ("cub", "stanford_dogs", "flowers102", "places365", "food_101", "caltech_256", "dtd", "pets"),
}


def find_outliers(
    names: Sequence[str], source: DataSource, normal: Callable[[], ImageSet], *, lag: int, channels: int = 3
) -> dict[str, Callable[[], ImageSet]]:
    """Loaders of the named sets, by name; images have `source.image_size` pixels on a side.

    normal: loads the normal test images, of which `interp` is made; lag: see `interpolated`.
    channels: 1 or 3, as the normal images have.
    Raises: UserError that names every missing set, before a picture is decoded.
    """
    loaders: dict[str, Callable[[], ImageSet]] = {}
    missing = []
    for name in names:
        try:
            loaders[name] = _find(name, source, normal, lag, channels)
        except UserError as error:
            missing.append(f"{name} ({str(error).removeprefix('--data_path: ')})")
    if missing:
        raise UserError(
            f"--ood_dataset: not found: {'; '.join(missing)}. Put them there, say where with --ood_data_path, or"
            " choose others with --ood_dataset"
        )
    return loaders


def outlier_flags(name: str) -> tuple[str, ...]:
    """The fields of a `DataSource` that the set depends on, besides the size of the images."""
    if name == INTERP:
        return ()
    if name in DATASETS:
        return tuple(flag for flag in DATASETS[name].flags if flag not in ("image_size", "image_cache", "superclasses"))
    return PICTURE_FLAGS + (("data_path",) if name in PICTURE_SETS else ())


def _find(
    name: str, source: DataSource, normal: Callable[[], ImageSet], lag: int, channels: int
) -> Callable[[], ImageSet]:
    if name == INTERP:
        images = normal()
        if len(images) <= lag:
            raise UserError(f"{len(images)} normal test images cannot be mixed {lag} apart; lower --test_batch_size")
        return lambda: interpolated(images, lag)
    if name in ("folder", FOLDER):
        raise UserError(f"give its path: {FOLDER}<path>")
    if name in DATASETS:
        data = split_one_class(name, source, None, source.image_size or 32).test(channels)
        return lambda: data
    if name.startswith(FOLDER):
        folder, count = Path(name.removeprefix(FOLDER)), None
    else:
        below, count = PICTURE_SETS[name]
        folder = Path(source.data_path) / below
    paths = list_pictures(folder)
    if not paths:
        raise UserError(f"no pictures in {printable(folder)}")
    if count is not None and len(paths) > count:
        # The same pictures for every seed of the run, so that runs are comparable.
        chosen = torch.randperm(len(paths), generator=generator(0, "outliers"))[:count].sort().values
        paths = [paths[n] for n in chosen.tolist()]
    # Large pictures are cropped as those of ImageNet-30; the small sets are used in their size.
    short_side = imagenet_short_side(source.image_size) if count is not None and source.image_size else None
    pictures = [Picture(path, 0, "", str(path.relative_to(folder))) for path in paths]
    return lambda: pictures_in_memory(pictures, source, short_side).with_channels(channels)


def interpolated(images: ImageSet, lag: int) -> ImageSet:
    """The mean of each image and the one `lag` places before it; the first `lag` images are unchanged.

    Held in half precision, which represents every such mean exactly.
    """
    earlier = torch.arange(len(images)) - lag
    partner = torch.where(earlier < 0, torch.arange(len(images)), earlier)
    pixels = images.images.half()
    found = derived(images.fingerprint, f"{INTERP} {lag}".encode())
    return replace(images, images=(pixels + pixels[partner]) / 2, fingerprint=found, mask=None)


def outlier_names() -> set[str]:
    """What --ood_dataset knows by name."""
    return {*(name for name, spec in DATASETS.items() if spec.table is None), *OUTLIERS}
