"""Which files are pictures: one rule for class folders, their content, outlier sets and `scripts.prepare`.

- Names that begin with . or __ belong to other programs (`._x.jpg`, `.ipynb_checkpoints`, `__MACOSX`): left out.
- The extension decides about other files.
- Links are followed, except to a folder that contains them. Broken links are left out.

One printed line reports how many were left out, and why.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import UserError

ENDINGS = frozenset(".jpg .jpeg .jfif .png .bmp .webp .tif .tiff .gif .avif .avifs .mpo".split())
# Pictures in formats that Pillow does not support.
UNREADABLE = frozenset(".heic .heif .jxl".split())
# A file that `scripts.prepare` writes beside the pictures that it makes.
PREPARED = "prepared.json"

_FILES, _FOLDERS, _ENDINGS, _BROKEN, _LOOPS = "hidden file", "hidden folder", "ending", "broken link", "loop"
_SPECIAL, _OUTSIDE = "special file", "outside"
_reported: set[str] = set()

Identity = tuple[int, int]


class LeftOut:
    """The number of files that a listing left out, by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()

    def report(self, place: Path) -> None:
        """Print the line, once in this process."""
        line = f"note: {printable(place)}: left out {', '.join(self._parts())}"
        if self.counts.total() + self.endings.total() and line not in _reported:
            _reported.add(line)
            print(line)

    def _parts(self) -> Iterator[str]:
        for reason in (_FILES, _FOLDERS):
            if n := self.counts[reason]:
                yield _number(n, reason)
        if unreadable := sorted(UNREADABLE & self.endings.keys()):
            kinds = " and ".join(f"{self.endings[ending]} {ending}" for ending in unreadable)
            yield f"{kinds} (not readable here; convert them to PNG or JPEG)"
        others = Counter({ending: n for ending, n in self.endings.items() if ending not in UNREADABLE})
        if others:
            most_first = sorted(others, key=lambda ending: (-others[ending], ending))
            some = [f"{printable(ending) or 'none'} {others[ending]}" for ending in most_first[:5]]
            more = ", ..." if len(others) > len(some) else ""
            yield f"{others.total()} with other endings ({', '.join(some)}{more})"
        if n := self.counts[_OUTSIDE]:
            yield f"{_number(n, 'picture')} outside the class folders"
        for reason in (_BROKEN, _SPECIAL):
            if n := self.counts[reason]:
                yield _number(n, reason)
        if n := self.counts[_LOOPS]:
            yield f"{_number(n, 'link')} to a folder around it"


def _number(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n > 1 else ''}"


def printable(path: str | os.PathLike[str]) -> str:
    """A path for a message: bytes that are not UTF-8 and control characters as escapes."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def common_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder that holds all of the files."""
    return Path(os.path.commonpath([path.parent for path in paths]))


def list_pictures(folder: Path, flag: str = "--data_path") -> list[Path]:
    """All pictures below `folder`, sorted; none if it does not exist. Prints what was left out.

    flag: the flag that an error names. Raises: UserError for a folder without permission to list it.
    """
    left_out = LeftOut()
    found = pictures_below(folder, left_out, flag)
    left_out.report(folder)
    return found


def pictures_below(folder: Path, left_out: LeftOut, flag: str = "--data_path") -> list[Path]:
    """As `list_pictures`, but counts in `left_out` instead of printing."""
    return sorted(_walk(folder, _around(folder), left_out, flag)) if _is_folder(folder, flag) else []


def class_folders(folder: Path, left_out: LeftOut | None = None) -> list[str]:
    """Names of the class folders in `folder`, sorted; none if it does not exist."""
    if not _is_folder(folder, "--data_path"):
        return []
    left_out = left_out or LeftOut()
    folders, files = _scan(folder, _around(folder), left_out, "--data_path")
    left_out.counts[_OUTSIDE] += len(files)
    return sorted(path.name for path in folders)


def _is_folder(path: Path, flag: str) -> bool:
    """Raises: UserError where permission to find out is missing."""
    try:
        return path.is_dir()
    except PermissionError as error:
        raise _closed(path, error, flag) from None


def _closed(path: Path, error: OSError, flag: str) -> UserError:
    reason = f"{printable(path)} cannot be listed ({error.strerror})"
    return UserError(f"{flag}: {reason}; make it readable (chmod u+rx) or choose another folder")


def _around(folder: Path) -> frozenset[Identity]:
    """The folder and its parents, with and without links resolved."""
    return frozenset(map(_identity, (folder, *folder.absolute().parents, *folder.resolve().parents)))


def _identity(path: Path) -> Identity:
    found = path.stat()
    return found.st_dev, found.st_ino


def _walk(folder: Path, around: frozenset[Identity], left_out: LeftOut, flag: str) -> Iterator[Path]:
    folders, files = _scan(folder, around, left_out, flag)
    yield from files
    for inner, identity in folders.items():
        yield from _walk(inner, around | {identity}, left_out, flag)


def _scan(
    folder: Path, around: frozenset[Identity], left_out: LeftOut, flag: str
) -> tuple[dict[Path, Identity], list[Path]]:
    """Folders and pictures in `folder`, unordered. around: folders to which links are not followed."""
    folders: dict[Path, Identity] = {}
    files: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                ending = path.suffix.lower()
                try:
                    is_dir, is_file = entry.is_dir(), entry.is_file()
                except PermissionError:
                    raise
                except OSError:  # a link to itself
                    is_dir = is_file = False
                if entry.name.startswith((".", "__")):
                    left_out.counts[_FOLDERS if is_dir else _FILES] += 1
                elif is_dir:
                    identity = _identity(path)
                    if entry.is_symlink() and identity in around:
                        left_out.counts[_LOOPS] += 1
                    else:
                        folders[path] = identity
                elif not is_file:
                    left_out.counts[_BROKEN if entry.is_symlink() else _SPECIAL] += 1
                elif ending in ENDINGS:
                    files.append(path)
                elif entry.name != PREPARED:
                    left_out.endings[ending] += 1
    except OSError as error:
        raise _closed(folder, error, flag) from None
    return folders, files
