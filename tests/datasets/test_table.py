"""Rows: of images the pixels of the image set, of files their arrays; loaded for training as images are."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from common.dist import World
from common.errors import UserError
from common.seed import generator
from datasets import DataSource, Loading, Table, split_one_class
from datasets.corrupt import CorruptSpec, draw_noise
from datasets.sets import image_set
from tests.datasets.test_folder import save

PLAIN = Loading(flip=False)


def digits(spec: CorruptSpec | None = None, **more):
    return replace(split_one_class("digits", DataSource(), 3, None), corrupt=spec or CorruptSpec(), **more)


def test_rows_are_pixels_channel_by_channel():
    pixels = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    data = replace(image_set(pixels, [0, 1, 2, 3, 4], list("abcde")), fingerprint="0123456789abcdef")
    table = Table.of_images(data)
    assert table.shape == (3, 4, 6) and table.rows.dtype == torch.float32 and len(table) == 5
    for n, c, row, column in ((0, 0, 0, 0), (3, 1, 2, 5), (4, 2, 3, 1)):
        entry = table.rows[n, c * 24 + row * 6 + column]
        assert entry == pixels[n, c, row, column].float() / 255
    assert (table.labels.tolist(), table.paths) == ([0, 1, 2, 3, 4], tuple("abcde"))
    assert table.fingerprint == data.fingerprint and table.clean is table.mask is None and not table.cropped


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("kind", ["normal", "uniform", "salt_pepper"])
@pytest.mark.parametrize("fixed", [False, True])
def test_training_images_are_the_clipped_and_rounded_rows(channels, kind, fixed):
    split = digits(CorruptSpec(kind, 9, fixed), outliers=20, first_images=800)
    data, table = split.train(channels), split.train_table(channels)
    assert table.shape == (channels or 1, 8, 8) == data.images.shape[1:]
    levels = (table.rows.clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(levels, data.images.flatten(1))
    assert table.mask is not None and data.mask is not None and table.clean is not None
    assert torch.equal(table.mask, data.mask.expand_as(data.images).flatten(1))
    assert torch.equal(table.rows[~table.mask], table.clean[~table.mask])
    assert torch.equal(table.clean, digits(outliers=20, first_images=800).train_table(channels).rows)
    for one in ("labels", "indices"):
        assert torch.equal(getattr(table, one), getattr(data, one))
    assert table.fingerprint == data.fingerprint
    if kind == "normal":
        assert table.rows.min() < -1 and table.rows.max() > 2  # not clipped


def test_test_rows_are_those_of_the_test_images():
    split = digits(CorruptSpec("normal", 5))
    data, table = split.test(1), split.test_table(1)
    assert torch.equal((table.rows.clamp(0, 1) * 255).round().to(torch.uint8), data.images.flatten(1))
    assert len(table) == 599 and table.fingerprint == data.fingerprint


def test_images_keep_the_size_of_the_data_set_without_a_backbone():
    assert digits().train_table().shape == (1, 8, 8)
    assert split_one_class("digits", DataSource(), 3, 32).train_table().shape == (1, 32, 32)
    assert split_one_class("digits", DataSource(image_size=16), 3, None).train_table().shape == (1, 16, 16)


def table(n: int = 7, columns: int = 5) -> Table:
    rows = torch.arange(n * columns).view(n, columns).float()
    return Table(rows, torch.arange(n) % 2, torch.arange(n) + 10, fingerprint="0123456789abcdef")


PARTS = [torch.tensor([4, 0, 6, 2, 5]), torch.tensor([1, 3])]


def test_batches_are_rows_in_the_order_of_their_indices():
    data = table()
    for first in (0, 1, 2):
        found = list(data.batches(PARTS, PLAIN, seed=0, epoch=1, first=first))
        assert len(found) == 2 - first
        for part, rows in zip(PARTS[first:], found, strict=True):
            assert rows.shape == (1, len(part), 5) and torch.equal(rows[0], data.rows[part])
    assert data.index_device == torch.device("cpu")


def test_each_of_several_processes_gets_the_rows_of_its_shard_as_of_images():
    pixels = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 1, 2, 2)
    images = image_set(pixels, [0] * 7)
    rows = Table.of_images(images)
    for rank in range(3):
        world = World(rank, 3)
        expected = images.batches(PARTS, Loading(flip=False, channels=None), seed=0, epoch=1, world=world)
        found = rows.batches(PARTS, PLAIN, seed=0, epoch=1, world=world)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal((a * 255).round(), b.flatten(2).float())


@pytest.mark.parametrize("loading", [Loading(), Loading(2, flip=False), Loading(flip=False, pad=1)])
def test_rows_are_neither_flipped_nor_padded_nor_doubled(loading):
    with pytest.raises(ValueError, match="as they are"):
        next(table().batches(PARTS, loading, seed=0, epoch=1))


def test_some_rows_have_a_fingerprint_of_their_own():
    data = replace(table(), clean=table().rows * 2, mask=table().rows > 9, paths=tuple("abcdefg"))
    keep = data.labels == 1
    some = data.where(keep)
    assert torch.equal(some.rows, data.rows[[1, 3, 5]]) and some.indices.tolist() == [11, 13, 15]
    assert some.paths == ("b", "d", "f") and some.clean is not None and some.mask is not None
    assert torch.equal(some.clean, some.rows * 2) and torch.equal(some.mask, some.rows > 9)
    assert data.where(keep | True) is data and some.fingerprint not in ("", data.fingerprint)
    assert replace(data, fingerprint="").where(keep).fingerprint == ""


def test_noise_in_a_table_is_entry_by_entry():
    data = table(50, 12)
    noisy = data.with_noise(draw_noise(50, 1, 12, 4, "normal", generator(0, "x")), b"x")
    assert noisy.mask is not None and (noisy.mask.sum(1) == 4).all() and noisy.clean is data.rows
    assert torch.equal(noisy.rows != data.rows, noisy.mask) and noisy.fingerprint != data.fingerprint


def test_constant_images_are_nothing_to_learn_from(tmp_path):
    for n in range(3):
        save(Image.new("RGB", (8, 8), "black"), tmp_path / f"train/good/{n}.png")
    split = split_one_class("folder", DataSource(str(tmp_path), num_worker=1), 0, None)
    for spec in (CorruptSpec(), CorruptSpec("normal")):
        with pytest.raises(UserError, match="--data_path: all entries .* are equal"):
            replace(split, corrupt=spec).train_table()
    save(Image.new("RGB", (8, 8), "gray"), tmp_path / "train/good/3.png")
    assert split.train_table().shape == (1, 32, 32)  # grey pictures of any size
