"""Pictures in folders: `<root>/{train,test}/<class>/*`, read as a person would expect to see them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.errors import UserError
from common.progress import progress

ENDINGS = frozenset(".jpg .jpeg .png .bmp .webp .tif .tiff".split())


@dataclass(frozen=True)
class Layout:
    """Names of the folders of the two splits."""

    train: str = "train"
    test: str = "test"


def class_names(root: Path, layout: Layout = Layout()) -> list[str]:
    """Names of the classes of the training split, sorted, then of those found only in the test split.

    Raises: UserError where there is no training split with a class folder in it.
    """
    train = _folders(root / layout.train)
    if not train:
        raise UserError(f"--data_path: no folder {root / layout.train} with one folder of pictures per class")
    outliers = [name for name in _folders(root / layout.test) if name not in train]
    for name in outliers:
        twins = [other for other in train if other.casefold() == name.casefold()]
        if twins:
            there = f"{root}/{layout.train}/{twins[0]} and {root}/{layout.test}/{name}"
            raise UserError(f"--data_path: {there} differ in case; rename one")
    return train + outliers


def n_train_classes(root: Path, layout: Layout = Layout()) -> int:
    """How many of `class_names(root)` are in the training split; the others are outliers."""
    return len(_folders(root / layout.train))


def _folders(path: Path) -> list[str]:
    """Names of the class folders; what begins with . or __ is other programs' (.ipynb_checkpoints, __MACOSX)."""
    names = [p.name for p in path.iterdir() if p.is_dir()] if path.is_dir() else []
    return sorted(name for name in names if not name.startswith((".", "__")))


def list_pictures(folder: Path) -> list[Path]:
    """All pictures below `folder`, sorted; none where there is no such folder."""
    return (
        sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file()) if folder.is_dir() else []
    )


def find_pictures(
    root: Path, split: str, *, label: int | None = None, layout: Layout = Layout()
) -> tuple[list[Path], list[int]]:
    """Paths and labels of the pictures of a split ("train" or "test"), or of its class `label`.

    Raises: UserError where there is none.
    """
    names = class_names(root, layout)
    folder = root / getattr(layout, split)
    found = [
        (path, index)
        for index, name in enumerate(names)
        if label is None or index == label
        for path in list_pictures(folder / name)
    ]
    if not found:
        which = f"{names[label]!r} of " if label is not None and label < len(names) else ""
        raise UserError(f"--data_path: no pictures ({' '.join(sorted(ENDINGS))}) for {which}{folder}")
    return [path for path, _ in found], [index for _, index in found]


def read_pictures(
    paths: Sequence[Path], read: Callable[[Path], np.ndarray], *, size: int, threads: int, skip_bad: bool
) -> tuple[np.ndarray, list[int]]:
    """What `read` makes of each picture, (N, 3, size, size) uint8, and the places in `paths` of those it could read.

    Raises: UserError for a picture that cannot be read, unless `skip_bad`; where none can be.
    """
    images = np.empty((len(paths), 3, size, size), np.uint8)
    good = np.ones(len(paths), bool)

    def read_one(n: int) -> None:
        try:
            images[n] = read(paths[n])
        except Exception as error:  # Pillow raises many kinds for damaged files
            if not skip_bad:
                raise unreadable(paths[n], error) from None
            good[n] = False

    folder = paths[0].parent
    # Threads, not processes: Pillow decodes outside the interpreter lock, and the pictures land in one array.
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _ in progress(_in_order(pool, read_one, len(paths)), total=len(paths), label=f"reading {folder}"):
            pass
    tell_skipped(int((~good).sum()), len(paths), folder)
    return (images if good.all() else images[good]), good.nonzero()[0].tolist()


def unreadable(path: Path, error: object) -> UserError:
    """The error for a picture that cannot be read."""
    return UserError(f"--data_path: cannot read {path} ({error}); mend it, or add --skip_bad_images")


def tell_skipped(bad: int, count: int, folder: Path) -> None:
    """Say how many of `count` pictures were left out. Raises: UserError where all were."""
    if bad == count:
        raise UserError(f"--data_path: not one readable picture in {folder}")
    if bad:
        print(f"--skip_bad_images: left out {bad} of {count} pictures in {folder}")


def _in_order(pool: ThreadPoolExecutor, read, count: int) -> Iterator[None]:
    futures = [pool.submit(read, n) for n in range(count)]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def read_upright(path: Path, short_side: int) -> Image.Image:
    """One picture, upright and RGB, its short side resized to `short_side` with an anti-aliasing filter.

    16-bit pictures are scaled to 8 bits, transparent ones laid on white, palettes and grey expanded.
    """
    with Image.open(path) as picture:
        # Large JPEGs are decoded at the smallest eighth that still has twice the pixels to resize from.
        picture.draft("RGB", (2 * short_side, 2 * short_side))
        upright = to_rgb(ImageOps.exif_transpose(picture))
    width, height = upright.size
    scale = short_side / min(width, height)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    return upright if size == upright.size else upright.resize(size, Image.Resampling.BILINEAR)


def centre(pixels: np.ndarray, size: int) -> np.ndarray:
    """The middle (3, size, size) of (H, W, 3) pixels."""
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].transpose(2, 0, 1)


def read_picture(path: Path, size: int, short_side: int | None = None) -> np.ndarray:
    """The middle of one picture, (3, size, size) uint8, its short side resized to `short_side`, or to `size`."""
    return centre(np.asarray(read_upright(path, short_side or size)), size)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Three channels of 8 bits, as a person would expect to see the picture."""
    if picture.mode.startswith("I") or picture.mode == "F":
        levels = np.asarray(picture).astype(np.float64)
        if picture.mode == "F":
            top = 1.0 if levels.max() <= 1 else 255.0 if levels.max() <= 255 else 65535.0
        else:
            top = 65535.0
        return Image.fromarray((levels.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")
