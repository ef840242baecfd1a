"""The pictures of a detector: which files, how they are read, which are copies of each other, which are held out."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.errors import UserError
from datasets.decode import Reader, reason
from datasets.listing import LeftOut, pictures_below, printable

# Pictures whose thumbnails correlate more than this count as copies.
_ALIKE = 0.99
_THUMBNAIL = 32
# Folders of normal pictures inside the folder that is given, the preferred first.
_NORMAL = ("train/good", "good", "train")


class Unreadable(NamedTuple):
    """A picture that cannot be read, and why."""

    path: Path
    why: str


def normal_pictures(place: Path) -> list[Path]:
    """The files to fit: of a text file with one path a line, or below a folder (its train/good or good, if there).

    Raises: UserError where there is none.
    """
    if place.is_file():
        return _listed(place)
    folder = next((place / name for name in _NORMAL if (place / name).is_dir()), place)
    if folder != place:
        print(f"note: pictures of {printable(folder)} only")
    found = below(folder, "DIR")
    if not found:
        raise UserError(f"DIR: no pictures in {printable(place)}; give a folder of good pictures")
    return found


def _listed(file: Path) -> list[Path]:
    try:
        lines = os.fsdecode(file.read_bytes()).splitlines()
    except OSError as error:
        raise UserError(f"DIR: cannot read {printable(file)} ({error.strerror})") from None
    paths = [file.parent / line for line in lines if line.strip()]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        why = f"no file {printable(missing[0])}" if missing else "it is empty"
        raise UserError(f"DIR: {printable(file)} is to name one picture a line: {why}")
    return paths


def pictures_of(places: Iterable[str | Path]) -> Iterator[Path]:
    """The files themselves, and those below the folders, in the order given.

    Raises: UserError for a place that is not there.
    """
    for place in map(Path, places):
        if place.is_dir():
            yield from below(place, "PATH")
        elif os.path.lexists(place):
            yield place
        else:
            raise UserError(f"PATH: no file and no folder {printable(place)}")


def below(folder: Path, flag: str) -> list[Path]:
    left_out = LeftOut()
    found = pictures_below(folder, left_out, flag)
    left_out.report(folder)
    return found


def read(path: Path, reader: Reader) -> np.ndarray | Unreadable:
    """The pixels (H, W, 3), uint8, of one picture, or why there are none."""
    try:
        if path.exists() and not path.is_file():
            return Unreadable(path, "no regular file")
        return np.array(reader.rgb(path))
    except MemoryError:
        return Unreadable(path, "out of memory: lower --max_megapixels")
    except Exception as error:  # Pillow raises many types for corrupt files.
        try:
            return Unreadable(path, reason(path, error))
        except OSError as again:
            return Unreadable(path, again.strerror or str(again))


class Look(NamedTuple):
    """What tells copies of a picture: a hash of its pixels, and a grey thumbnail (1024,)."""

    digest: str
    thumbnail: np.ndarray


def look(pixels: np.ndarray) -> Look:
    """Of pixels (H, W, 3), uint8."""
    whole = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    small = Image.fromarray(pixels).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX).convert("L")
    return Look(whole, np.asarray(small, dtype=np.float32).ravel())


def copies(looks: Sequence[Look]) -> np.ndarray:
    """A number for each picture (n,), equal for pictures that are the same, or nearly so, directly or through others.

    Nearly: their thumbnails correlate above 0.99, and still do without the mean thumbnail of all, since aligned parts
    under one light all look alike.
    """
    thumbnails = np.stack([each.thumbnail for each in looks])
    raw, own = _unit(thumbnails), _unit(thumbnails - thumbnails.mean(0))
    group = np.arange(len(looks))
    first: dict[str, int] = {}
    for i, each in enumerate(looks):
        alike = (raw[:i] @ raw[i] > _ALIKE) & (own[:i] @ own[i] > _ALIKE)
        near = [*np.nonzero(alike)[0], *([first[each.digest]] if each.digest in first else [])]
        first.setdefault(each.digest, i)
        for number in {int(group[j]) for j in near} - {int(group[i])}:
            group[group == number] = group[i]
    return np.unique(group, return_inverse=True)[1]


def _unit(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)


def held_out(looks: Sequence[Look], groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which pictures (n,) to hold out: about `count`, groups of copies whole, chosen by seed and content alone."""
    keys: dict[int, str] = {}
    for each, group in zip(looks, groups.tolist(), strict=True):
        key = hashlib.sha256(f"{seed} {each.digest}".encode()).hexdigest()
        keys[group] = min(keys.get(group, key), key)
    sizes = np.bincount(groups)
    chosen, total = set(), 0
    for group in sorted(keys, key=lambda g: keys[g]):
        if total + sizes[group] / 2 <= count:
            chosen.add(group)
            total += sizes[group]
    return np.isin(groups, sorted(chosen))
