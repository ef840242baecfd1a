"""Tables in files of numpy (.npz), of numbers that are no pictures."""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import UserError
from datasets.sets import combined
from datasets.table import Table


@dataclass(frozen=True)
class NpzFile:
    """A file with the arrays `X` (N, n) and, where there are labels, `y` (N,), or `X_train`, `y_train`, `X_test`,
    `y_test`; without `X_test` the test rows are the training rows.

    names: of its arrays.
    """

    path: str
    names: tuple[str, ...]

    @classmethod
    def open(cls, path: str | None) -> "NpzFile":
        """Raises: UserError for no path, and for a file that is not found or no .npz."""
        if path is None:
            raise UserError("--npz: --dataset table is read from a file that numpy.savez made; give it")
        with _opened(path) as file:
            return cls(path, tuple(file.files))

    def classes(self) -> tuple[list[str], int]:
        """The names of the classes, those of training rows first, and how many these are. A class is named by its
        label; without labels there is the class 0. Raises: UserError as `table`."""
        train, test = self._labels("train"), self._labels("test")
        known = np.unique(train if train is not None else [0])
        others = np.setdiff1d(test if test is not None else [0], known)
        return [str(label) for label in (*known.tolist(), *others.tolist())], len(known)

    def table(self, split: str) -> Table:
        """The training or test rows. Labels are the places of their names in `classes`.

        Raises: UserError without an array X, and for one that is no matrix of finite numbers; for labels that are not
        as many, or no whole numbers; for test rows of another length.
        """
        name, (names, _) = self._rows_name(split), self.classes()
        rows, labels = self._rows(name), self._labels(split)
        first = self._rows_name("train")
        if name != first and (shape := self._array(first).shape)[1:] != rows.shape[1:]:
            raise UserError(
                f"--npz: {self.path} has {rows.shape[1]} columns in {name}, and {first} is of shape {shape}; give both"
                " the same columns"
            )
        if labels is None:
            labels = np.zeros(len(rows), np.int64)
        if len(labels) != len(rows):
            raise UserError(f"--npz: {self.path} has {len(rows)} rows and {len(labels)} labels; give each row one")
        place_of = {label: place for place, label in enumerate(names)}
        places = torch.tensor([place_of[str(label)] for label in labels.tolist()])
        found = combined([labels.astype("<i8").tobytes(), repr(rows.shape).encode(), rows.astype("<f4").tobytes()])
        return Table(torch.from_numpy(rows), places, torch.arange(len(rows)), fingerprint=found)

    def _rows_name(self, split: str) -> str:
        wanted = ("X_test", "X_train", "X") if split == "test" else ("X_train", "X")
        name = next((name for name in wanted if name in self.names), None)
        if name is None:
            there = ", ".join(self.names) or "nothing"
            raise UserError(f"--npz: {self.path} has no array X or X_train, but {there}; name the rows X")
        return name

    def _rows(self, name: str) -> np.ndarray:
        """(N, n) float32."""
        x = self._array(name)
        if x.ndim != 2 or x.size == 0:
            raise UserError(f"--npz: {name} of {self.path} has the shape {x.shape}; it has to be (rows, columns)")
        if x.dtype.kind not in "buif":
            raise UserError(f"--npz: {name} of {self.path} is of type {x.dtype}; it has to hold real numbers")
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(x, np.float32)
        if not np.isfinite(rows).all():
            row, column = np.argwhere(~np.isfinite(rows))[0].tolist()
            raise UserError(
                f"--npz: {name} of {self.path} has the value {x[row, column]} in row {row}, column {column}, which is"
                " not finite in single precision; leave such rows out, or fill them in"
            )
        return rows

    def _labels(self, split: str) -> np.ndarray | None:
        """(N,) int64."""
        rows = self._rows_name(split)
        name = f"y{rows.removeprefix('X')}"
        if name not in self.names:
            if name == "y_test" and "y_train" in self.names:
                raise UserError(f"--npz: {self.path} has y_train and X_test, and no y_test; add it")
            if name == "y_train" and "y" in self.names:
                raise UserError(f"--npz: {self.path} has X_train and y; name the labels y_train")
            return None
        y = self._array(name)
        # Floats count up to 2^53; infinity equals what it is rounded to.
        if y.ndim != 1 or y.dtype.kind not in "buif" or not ((y == np.round(y)) & (np.abs(y) <= 2.0**53)).all():
            raise UserError(f"--npz: {name} of {self.path} has to hold a whole number for each row of {rows}")
        return y.astype(np.int64)

    def _array(self, name: str) -> np.ndarray:
        with _opened(self.path) as file:
            return file[name]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[np.lib.npyio.NpzFile]:
    """Raises: UserError for a file that is not found or no .npz, and where reading it fails."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with file:
            yield file
    except FileNotFoundError:
        raise UserError(f"--npz: there is no {path}; give a file that numpy.savez made") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"--npz: {path} cannot be read ({error}); give plain arrays, as numpy.savez writes them"
        ) from None
