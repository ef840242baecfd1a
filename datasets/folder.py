"""Pictures in folders: `<root>/{train,test}/<class>/*`, read as a person would expect to see them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.errors import UserError
from common.progress import progress

ENDINGS = frozenset(".jpg .jpeg .png .bmp .webp .tif .tiff".split())


def class_names(root: Path) -> list[str]:
    """Names of the classes in `train/`, sorted, then of those found only in `test/`.

    Raises: UserError where there is no `train/` with a class folder in it.
    """
    train = _folders(root / "train")
    if not train:
        raise UserError(f"--data_path: no folder {root / 'train'} with one folder of pictures per class")
    outliers = [name for name in _folders(root / "test") if name not in train]
    for name in outliers:
        twins = [other for other in train if other.casefold() == name.casefold()]
        if twins:
            raise UserError(f"--data_path: {root}/train/{twins[0]} and {root}/test/{name} differ in case; rename one")
    return train + outliers


def n_train_classes(root: Path) -> int:
    """How many of `class_names(root)` are in `train/`; the others are outliers."""
    return len(_folders(root / "train"))


def _folders(path: Path) -> list[str]:
    """Names of the class folders; what begins with . or __ is other programs' (.ipynb_checkpoints, __MACOSX)."""
    names = [p.name for p in path.iterdir() if p.is_dir()] if path.is_dir() else []
    return sorted(name for name in names if not name.startswith((".", "__")))


def _pictures(folder: Path) -> list[Path]:
    return (
        sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file()) if folder.is_dir() else []
    )


def read_folder(
    root: Path, split: str, *, size: int, label: int | None = None, threads: int = 4, skip_bad: bool = False
) -> tuple[np.ndarray, list[int], list[str]]:
    """All pictures of a split, or those of class `label`: images (N, 3, size, size) uint8, labels, paths.

    Raises: UserError for an empty split and, unless `skip_bad`, for a picture that cannot be read.
    """
    names = class_names(root)
    wanted = [
        (path, index)
        for index, name in enumerate(names)
        if label is None or index == label
        for path in _pictures(root / split / name)
    ]
    if not wanted:
        which = f"{names[label]!r} of " if label is not None and label < len(names) else ""
        raise UserError(f"--data_path: no pictures ({' '.join(sorted(ENDINGS))}) for {which}{root / split}")
    images = np.empty((len(wanted), 3, size, size), np.uint8)
    good = np.ones(len(wanted), bool)

    def read(n: int) -> None:
        try:
            images[n] = read_picture(wanted[n][0], size)
        except Exception as error:  # Pillow raises many kinds for damaged files
            if not skip_bad:
                raise UserError(
                    f"--data_path: cannot read {wanted[n][0]} ({error}); mend it, or add --skip_bad_images"
                ) from None
            good[n] = False

    # Threads, not processes: Pillow decodes outside the interpreter lock, and the pictures land in one array.
    with ThreadPoolExecutor(threads) as pool:
        for _ in progress(_in_order(pool, read, len(wanted)), total=len(wanted), label=f"reading {root / split}"):
            pass
    if not good.all():
        print(f"--skip_bad_images: left out {int((~good).sum())} of {len(wanted)} pictures in {root / split}")
        if not good.any():
            raise UserError(f"--data_path: not one readable picture in {root / split}")
        images = images[good]
    kept = [item for item, ok in zip(wanted, good.tolist(), strict=True) if ok]
    return images, [index for _, index in kept], [str(path) for path, _ in kept]


def _in_order(pool: ThreadPoolExecutor, read, count: int) -> Iterator[None]:
    futures = [pool.submit(read, n) for n in range(count)]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def read_picture(path: Path, size: int) -> np.ndarray:
    """One picture as (3, size, size) uint8: upright, RGB, short side resized to `size`, centre crop.

    16-bit pictures are scaled to 8 bits, transparent ones laid on white, palettes and grey expanded.
    """
    with Image.open(path) as picture:
        # Large JPEGs are decoded at the smallest eighth that still has `size` pixels to resize from.
        picture.draft("RGB", (2 * size, 2 * size))
        upright = _to_rgb(ImageOps.exif_transpose(picture))
        square = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
        return np.asarray(square).transpose(2, 0, 1)


def _to_rgb(picture: Image.Image) -> Image.Image:
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
