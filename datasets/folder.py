"""Pictures in folders, `<root>/{train,test}/<class>/*`: finding, reading and fingerprints."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.progress import progress
from datasets.decode import Reader, read_picture, reason, unreadable
from datasets.decode import read_upright as read_upright
from datasets.decode import to_rgb as to_rgb
from datasets.listing import ENDINGS, LeftOut, class_folders, common_folder, pictures_below, printable
from datasets.listing import list_pictures as list_pictures
from datasets.sets import combined

# Larger files are identified by their size and their two ends.
_WHOLE, _END = 64 * 1024, 8 * 1024
# At most so many unreadable pictures are named.
_NAMED = 100


@dataclass(frozen=True)
class Layout:
    """Names of the folders of the two splits."""

    train: str = "train"
    test: str = "test"


class Picture(NamedTuple):
    """A file of a set: path, label, class name ("" in a set without classes), path below the class folder.

    The last two are part of the fingerprint.
    """

    path: Path
    label: int
    class_name: str
    below: str


def class_names(root: Path, layout: Layout = Layout()) -> list[str]:
    """Names of the classes of the training split, sorted, then of those found only in the test split.

    Raises: UserError where there is no training split with a class folder in it.
    """
    train = class_folders(root / layout.train)
    if not train:
        where = printable(root / layout.train)
        raise UserError(f"--data_path: no folder {where} with one folder of pictures per class")
    outliers = [name for name in class_folders(root / layout.test) if name not in train]
    for name in outliers:
        twins = [other for other in train if other.casefold() == name.casefold()]
        if twins:
            there = f"{printable(root / layout.train / twins[0])} and {printable(root / layout.test / name)}"
            raise UserError(f"--data_path: {there} differ in case; rename one")
    return train + outliers


def n_train_classes(root: Path, layout: Layout = Layout()) -> int:
    """How many of `class_names(root)` are in the training split; the others are outliers."""
    return len(class_folders(root / layout.train))


def find_pictures(root: Path, split: str, *, label: int | None = None, layout: Layout = Layout()) -> list[Picture]:
    """The pictures of a split ("train" or "test"), or of its class `label`. Prints what was left out.

    Raises: UserError where there is none.
    """
    names = class_names(root, layout)
    folder = root / getattr(layout, split)
    left_out = LeftOut()
    class_folders(folder, left_out)
    found = [
        Picture(path, index, name, str(path.relative_to(folder / name)))
        for index, name in enumerate(names)
        if label is None or index == label
        for path in pictures_below(folder / name, left_out)
    ]
    left_out.report(folder)
    if not found:
        which = f"{names[label]!r} of " if label is not None and label < len(names) else ""
        kinds = " ".join(sorted(ENDINGS))
        raise UserError(f"--data_path: no pictures ({kinds}) for {which}{printable(folder)}")
    return found


def training_paths(root: Path, layout: Layout = Layout()) -> list[Path]:
    """All pictures of the training split."""
    return [picture.path for picture in find_pictures(root, "train", layout=layout)]


def digest(path: Path) -> bytes:
    """A digest of a file: its size and the SHA-256 of its content; of larger files, of the first and last 8 KiB."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(_END if size > _WHOLE else -1)
        if size > _WHOLE:
            file.seek(-_END, os.SEEK_END)
            content += file.read()
    return size.to_bytes(8, "little") + hashlib.sha256(content).digest()


def digests(paths: Sequence[Path], threads: int) -> list[bytes]:
    """`digest` of each file; empty for one that cannot be read, since decoding it raises the error."""

    def one(path: Path) -> bytes:
        try:
            return digest(path)
        except OSError:
            return b""

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(one, paths))


def fingerprint(pictures: Sequence[Picture], digests: Sequence[bytes]) -> str:
    """A fingerprint of names and contents that does not depend on the folder; digests: `digest` of each file."""
    return combined(
        part
        for picture, found in zip(pictures, digests, strict=True)
        for part in (os.fsencode(picture.class_name), os.fsencode(picture.below), found)
    )


def read_pictures(
    pictures: Sequence[Picture],
    reader: Reader,
    *,
    size: int,
    short_side: int | None = None,
    threads: int,
    skip_bad: bool,
) -> tuple[np.ndarray, list[int], str]:
    """Centre crops (N, 3, size, size), uint8, of the readable pictures; their places; their fingerprint.

    short_side: the length to which the short side is resized first; None: `size`.
    Raises: UserError for a picture that cannot be read, unless `skip_bad`; if none can be read.
    """
    paths = [picture.path for picture in pictures]
    images = np.empty((len(paths), 3, size, size), np.uint8)
    found = [b""] * len(paths)
    bad: dict[int, str] = {}

    def read_one(n: int) -> None:
        try:
            found[n] = digest(paths[n])
            images[n] = read_picture(paths[n], size, short_side, reader)
        except UserError:  # of another cause than this picture
            raise
        except Exception as error:  # Pillow raises many types for corrupt files
            why = reason(paths[n], error)
            if not skip_bad:
                raise unreadable(paths[n], why) from None
            bad[n] = why

    folder = common_folder(paths)
    # Threads, not processes: Pillow decodes outside the interpreter lock, and the pictures land in one array.
    with ThreadPoolExecutor(max(1, threads)) as pool:
        label = f"reading {printable(folder)}"
        for _ in progress(_in_order(pool, read_one, len(paths)), total=len(paths), label=label):
            pass
    report_skipped({paths[n]: bad[n] for n in sorted(bad)}, len(paths), folder)
    reader.report_remarks(folder)
    good = [n for n in range(len(paths)) if n not in bad]
    return images[good] if bad else images, good, fingerprint([pictures[n] for n in good], [found[n] for n in good])


def report_skipped(bad: dict[Path, str], count: int, folder: Path) -> None:
    """Print which of `count` pictures were skipped, and why. Raises: UserError where all were."""
    for path, why in list(bad.items())[:_NAMED]:
        print(f"--skip_bad_images: cannot read {printable(path)} ({why})")
    if len(bad) == count:
        raise UserError(f"--data_path: not one readable picture in {printable(folder)}")
    if bad:
        print(f"--skip_bad_images: left out {len(bad)} of {count} pictures in {printable(folder)}")


def _in_order(pool: ThreadPoolExecutor, read: Callable[[int], None], count: int) -> Iterator[None]:
    futures = [pool.submit(read, n) for n in range(count)]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
