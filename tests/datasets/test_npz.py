"""Tables in files of numpy: what is read, and what is refused in one line."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import UserError
from datasets import DataSource, Split, split_one_class
from datasets.corrupt import CorruptSpec
from datasets.npz import NpzFile

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 5)) * 100
Y = np.array([4, 9, 4, 4, 9, 4, -1, 4, 4, 9, 4, 4])


def saved(tmp_path, **arrays) -> str:
    np.savez(tmp_path / "table.npz", **arrays)
    return str(tmp_path / "table.npz")


def split_of(path: str, one_class=None, **more) -> Split:
    return replace(split_one_class("table", DataSource(npz=path), one_class, None), **more)


def test_one_matrix_is_training_and_test(tmp_path):
    split = split_of(saved(tmp_path, X=X))
    train, test = split.train_table(), split.test_table()
    assert torch.equal(train.rows, torch.from_numpy(X.astype(np.float32))) and torch.equal(test.rows, train.rows)
    assert train.shape is None and train.labels.tolist() == [0] * 12 and split.class_names == ["0"]
    assert split.normal(test.labels).all() and train.fingerprint == test.fingerprint and len(train.fingerprint) == 16


def test_labels_are_places_of_class_names_and_a_class_is_chosen_by_its_label(tmp_path):
    path = saved(tmp_path, X=X, y=Y)
    for choice in (4, "4"):
        split = split_of(path, choice)
        assert (split.class_names, split.n_classes, split.class_name) == (["-1", "4", "9"], 3, "4")
        train, test = split.train_table(), split.test_table()
        assert torch.equal(train.rows, test.rows[torch.from_numpy(Y == 4)]) and train.indices.tolist() == [
            n for n in range(12) if Y[n] == 4
        ]
        assert [split.class_names[label] for label in test.labels] == [str(label) for label in Y]
        assert split.normal(test.labels).tolist() == (Y == 4).tolist()
    assert split_of(path, -1).class_name == "-1" and len(split_of(path).train_table()) == 12


def test_a_training_and_a_test_matrix(tmp_path):
    """Classes that only the test rows have are anomalies."""
    arrays = {"X_train": X[:8], "y_train": np.full(8, 5.0), "X_test": X[8:], "y_test": np.array([5, 7, 5, 3])}
    split = split_of(saved(tmp_path, **arrays))
    assert (split.class_names, split.n_classes) == (["5", "3", "7"], 1)
    assert len(split.train_table()) == 8
    assert split.normal(split.test_table().labels).tolist() == [True, False, True, False]
    with pytest.raises(UserError, match="--one_class_idx 7: table has no such training class, but 5"):
        split_of(split.source.npz, 7)
    only_test = split_of(saved(tmp_path, X_train=X[:8], X_test=X[8:], y_test=np.array([0, 1, 0, 1])))
    assert only_test.normal(only_test.test_table().labels).tolist() == [True, False, True, False]
    no_test = split_of(saved(tmp_path, X_train=X[:8], y_train=Y[:8]), 4)
    assert len(no_test.test_table()) == 8 and len(no_test.train_table()) == 5


def test_outliers_first_rows_and_noise_are_those_of_images(tmp_path):
    path = saved(tmp_path, X=X, y=Y)
    table = split_of(path, 4, outliers=2, first_images=10).train_table()
    assert table.indices.tolist() == sorted(table.indices.tolist()) and max(table.indices) < 10
    kept = Y[table.indices.numpy()]
    assert (kept == 4).sum() == (Y[:10] == 4).sum() and (kept != 4).sum() == 2
    noisy = split_of(path, 4, corrupt=CorruptSpec("normal", 2)).train_table()
    assert noisy.mask is not None and (noisy.mask.sum(1) == 2).all() and noisy.clean is not None
    assert torch.equal(noisy.clean, split_of(path, 4).train_table().rows)
    with pytest.raises(UserError, match="--corrupt_pixels 6: there are 5"):
        split_of(path, 4, corrupt=CorruptSpec("normal", 6)).train_table()
    with pytest.raises(UserError, match="--outliers 5: there are 4 "):
        split_of(path, 4, outliers=5).train_table()


def test_numbers_of_every_type_are_read(tmp_path):
    for x in (RNG.integers(0, 9, (4, 3)), RNG.random((4, 3)) > 0.5, RNG.random((4, 3), np.float32), X.astype(">f8")):
        table = split_of(saved(tmp_path, X=x, y=np.arange(len(x)) > 2)).train_table()
        assert table.rows.dtype == torch.float32 and np.array_equal(table.rows.numpy(), x.astype(np.float32))


def test_the_fingerprint_is_of_rows_and_labels(tmp_path):
    def mark(x, y) -> str:
        return split_of(saved(tmp_path, X=x, y=y)).test_table().fingerprint

    other = Y.copy()
    other[0] = 9
    changed = X.copy()
    changed[0, 0] += 1
    marks = [mark(X, Y), mark(X, Y), mark(X, other), mark(changed, Y), mark(X.reshape(12, 5)[:, ::-1], Y)]
    assert marks[0] == marks[1] and len(set(marks)) == 4


def bad(value, at=(3, 2)):
    x = X.copy()
    x[at] = value
    return x


@pytest.mark.parametrize(
    "arrays, told",
    [
        ({"Y": X, "data": X}, "has no array X or X_train, but Y, data"),
        ({}, "has no array X or X_train, but nothing"),
        ({"X": X[0]}, r"X of .* has the shape \(5,\)"),
        ({"X": X[:0]}, r"has the shape \(0, 5\)"),
        ({"X": X[None]}, r"has the shape \(1, 12, 5\)"),
        ({"X": bad(np.nan)}, "the value nan in row 3, column 2"),
        ({"X": bad(-np.inf, (11, 0))}, "the value -inf in row 11, column 0"),
        ({"X": bad(1e39)}, r"the value 1e\+39 in row 3, column 2"),
        ({"X": np.full((4, 3), 7.0)}, "all entries of the training rows are equal"),
        ({"X": np.array([[1, None]], dtype=object)}, "Object arrays cannot be loaded"),
        ({"X": X.astype(complex)}, "of type complex128"),
        ({"X": X.astype(str)}, "of type <U"),
        ({"X": X, "y": Y[:5]}, "12 rows and 5 labels"),
        ({"X": X, "y": Y[:, None]}, "a whole number for each row"),
        ({"X": X, "y": Y + 0.5}, "a whole number for each row"),
        ({"X": X, "y": np.full(12, np.nan)}, "a whole number for each row"),
        ({"X": X, "y": np.full(12, np.inf)}, "a whole number for each row"),
        ({"X": X, "y": np.full(12, 1e30)}, "a whole number for each row"),
        ({"X_train": X, "y": Y}, "has X_train and y; name the labels y_train"),
        ({"X": X, "y": Y.astype(str)}, "a whole number for each row"),
        ({"X_train": X, "y_train": Y, "X_test": X}, "y_train and X_test, and no y_test"),
        ({"X_train": X, "X_test": X[:, :4]}, r"4 columns in X_test, and X_train is of shape \(12, 5\)"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(arrays, told, tmp_path):
    with pytest.raises(UserError, match=f"^--npz: .*{told}") as error:
        split = split_of(saved(tmp_path, **arrays))
        split.train_table()
        split.test_table()
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="^--npz: --dataset table is read from a file"):
        split_one_class("table", DataSource(), None, None)
    with pytest.raises(UserError, match="^--npz: there is no .*none.npz"):
        NpzFile.open(str(tmp_path / "none.npz"))
    np.save(tmp_path / "one.npy", X)
    (tmp_path / "text.npz").write_text("a,b\n1,2")
    (tmp_path / "empty.npz").touch()
    whole = tmp_path / saved(tmp_path, X=X)
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:300])
    content = bytearray(whole.read_bytes())
    content[300] ^= 1
    (tmp_path / "damaged.npz").write_bytes(content)
    for name in ("one.npy", "text.npz", "empty.npz", "cut.npz", "damaged.npz", "."):
        with pytest.raises(UserError, match="^--npz: .* cannot be read"):
            NpzFile.open(str(tmp_path / name)).table("train")


def test_rows_of_a_table_are_no_pictures(tmp_path):
    split = split_of(saved(tmp_path, X=X))
    for load in (split.train, split.test):
        with pytest.raises(UserError, match="--npz: .* no pictures; .* rdae, dae and vae"):
            load()
