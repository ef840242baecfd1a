"""What `detect.py score` prints and writes of each picture, one after another, in constant memory."""

import csv
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from PIL import Image

from common.errors import UserError
from common.files import disk_errors, whole_file, write_whole
from common.flags import file_name
from datasets.listing import printable
from detector.detector import Row

# Heat that is drawn as the hottest, in standard deviations, unless the picture has a hotter place.
_HOTTEST = 12.0
COLUMNS = ("path", "verdict", "score", "p_value", "milliseconds", "error")


class Writer(Protocol):
    """Takes rows as they come."""

    def add(self, row: Row) -> None: ...


def entry(row: Row) -> dict[str, Any]:
    """The columns of a row, for JSON; None where there is no number."""
    known = row.why is None
    return {
        "path": path_text(row.path),
        "verdict": row.verdict,
        "score": row.score if known else None,
        "p_value": row.p_value if known else None,
        "milliseconds": round(1000 * row.seconds, 1) if known else None,
        "error": row.why,
    }


def path_text(path: Path) -> str:
    """A path in JSON, CSV and HTML: bytes that are not UTF-8 become escapes, all else stays as it is."""
    return os.fsencode(path).decode(errors="backslashreplace")


def line(row: Row) -> str:
    """One line for a terminal."""
    if row.why:
        return f"error    {printable(row.path)}: {row.why}"
    numbers = f"score {row.score:8.3f}  p {row.p_value:.4f}  {1000 * row.seconds:5.0f} ms"
    return f"{row.verdict:8} {numbers}  {printable(row.path)}"


class Lines:
    """Prints each row, for people or as JSON lines."""

    def __init__(self, as_json: bool):
        self._as_json = as_json

    def add(self, row: Row) -> None:
        print(json.dumps(entry(row), ensure_ascii=False) if self._as_json else line(row), flush=True)


class Csv:
    """A CSV file. Names that a spreadsheet would take for a formula get an apostrophe before them."""

    def __init__(self, file: TextIO):
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(COLUMNS)

    def add(self, row: Row) -> None:
        values = entry(row)
        values["path"] = plain_cell(values["path"])
        self._writer.writerow(["" if values[name] is None else values[name] for name in COLUMNS])


def plain_cell(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


class Heatmaps:
    """A PNG beside each picture's name in a folder: the heat over the picture in grey.

    Pictures of one name get a number.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._names: set[str] = set()

    def add(self, row: Row) -> None:
        if row.heat is None or row.small is None:
            return
        stem = file_name(printable(row.path.stem))[:120] or "picture"
        name, n = f"{stem}_heat.png", 1
        while name in self._names:
            n += 1
            name = f"{stem}_{n}_heat.png"
        self._names.add(name)
        picture = Image.fromarray(over(row.heat, row.small))
        with disk_errors(self._folder):
            write_whole(self._folder / name, lambda file: picture.save(file, "PNG"))


def shares(heat: np.ndarray) -> np.ndarray:
    """Heat as shares of the hottest, 0 to 1."""
    return np.clip(heat / max(_HOTTEST, float(heat.max())), 0, 1)


def over(heat: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Heat (S, S) as colours, from black over red and yellow to white, over the picture in grey: (h, w, 3) both."""
    height, width = pixels.shape[:2]
    fitted = Image.fromarray(shares(heat).astype(np.float32)).resize((width, height))
    x = 3 * np.asarray(fitted)[..., None] - np.arange(3)
    grey = pixels.mean(2, keepdims=True) / 255
    return (255 * (1 - (1 - 0.6 * grey) * (1 - np.clip(x, 0, 1)))).round().astype(np.uint8)


@contextmanager
def whole_text(path: Path) -> Iterator[TextIO]:
    """A text file that appears once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"{printable(path)} is a folder; give a file")
    with disk_errors(path.parent), whole_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        yield text
        text.detach()


class Counts:
    """How many rows of each verdict."""

    def __init__(self) -> None:
        self.of = {"normal": 0, "anomaly": 0, "error": 0}

    def add(self, row: Row) -> None:
        self.of[row.verdict] += 1

    def __str__(self) -> str:
        return f"{self.of['normal']} normal, {self.of['anomaly']} anomalous, {self.of['error']} unreadable"

    @property
    def exit_code(self) -> int:
        """0: all normal. 1: some anomalous. 2: some could not be read, or there was none."""
        return 2 if self.of["error"] or not sum(self.of.values()) else int(self.of["anomaly"] > 0)
