"""Fingerprints: the same for the same files however they are read and wherever they lie, another for all others."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import DATASETS, DataSource, split_one_class
from datasets.augment import AlignedSpec
from datasets.outliers import find_outliers, interpolated
from tests.datasets.test_folder import fill, load, save
from tests.datasets.test_one_class import write_idx
from tests.datasets.test_pictures import photographs


def by_hand(*pictures: tuple[bytes, bytes, bytes]) -> str:
    """From (class name, path below the class folder, content) of each picture."""
    whole = b""
    for name, below, content in pictures:
        seen = content if len(content) <= 65536 else content[:8192] + content[-8192:]
        for part in (name, below, len(content).to_bytes(8, "little") + hashlib.sha256(seen).digest()):
            whole += len(part).to_bytes(8, "little") + part
    return hashlib.sha256(whole).hexdigest()[:16]


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes, one with a folder inside and a name that is not UTF-8, one with a large file."""
    data = tmp_path / "data"
    fill(data, {"train/cat": 2, "train/ship/deep": 1, "test/cat": 1})
    save(Image.new("RGB", (9, 9), "blue"), data / "train/ship/b\udce9.png")
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    save(Image.fromarray(noise), data / "train/ship/large.png")
    save(Image.fromarray(noise[:100, :100]), data / "train/ship/middle.png")
    assert (
        (data / "train/ship/large.png").stat().st_size > 65536 > (data / "train/ship/middle.png").stat().st_size > 20000
    )
    return data


def test_it_is_the_hash_of_names_and_contents(root):
    ship = root / "train/ship"
    pictures = [(b"ship", below, (ship / name).read_bytes()) for below, name in NAMES]
    assert load(root, "train", label=1).fingerprint == by_hand(*pictures)
    cat = [(b"cat", f"{n}.png".encode(), (root / f"train/cat/{n}.png").read_bytes()) for n in range(2)]
    assert load(root, "train").fingerprint == by_hand(*cat, *pictures)
    outliers = find_outliers([f"folder:{ship}"], DataSource(image_size=8), lambda: load(root, "test"), lag=1)
    assert outliers[f"folder:{ship}"]().fingerprint == by_hand(*[(b"", *rest) for _, *rest in pictures])


NAMES = [
    (b"b\xe9.png", "b\udce9.png"),
    (b"deep/0.png", "deep/0.png"),
    (b"large.png", "large.png"),
    (b"middle.png", "middle.png"),
]


def test_it_does_not_depend_on_place_size_of_images_threads_or_the_number_of_the_class(root, tmp_path):
    before = load(root, "train", label=1).fingerprint
    shutil.copytree(root, tmp_path / "moved")
    fill(tmp_path / "moved", {"train/aaa": 1})
    assert load(tmp_path / "moved", "train", label=2).fingerprint == before
    source = DataSource(str(root), image_size=16, num_worker=1)
    assert DATASETS["folder"].load(source, "train", 1).fingerprint == before


@pytest.mark.parametrize("change", ["content", "first", "last", "size", "name", "class", "less", "more"])
def test_any_change_gives_another(root, change):
    before = load(root, "train", label=1).fingerprint
    folder = root / "train/ship"
    large = folder / "large.png"
    content = bytearray(large.read_bytes())
    match change:
        case "content":
            save(Image.new("RGB", (9, 9), "red"), folder / "b\udce9.png")
        case "first":
            content[20] += 1  # its height
        case "last":
            content.append(0)
            del content[40]
        case "size":
            content[9000:9000] = b"x"
        case "name":
            large.rename(folder / "larger.png")
        case "class":
            folder.rename(root / "train/tank")
        case "less":
            (folder / "deep/0.png").unlink()
        case "more":
            save(Image.new("RGB", (9, 9)), folder / "z.png")
    if change in ("first", "last", "size"):
        large.write_bytes(content)
        from datasets.folder import digests, find_pictures, fingerprint

        found = find_pictures(root, "train", label=1)
        assert fingerprint(found, digests([picture.path for picture in found], 2)) != before
    else:
        assert load(root, "train", label=1).fingerprint != before


@pytest.mark.parametrize("bad", [False, True])
def test_it_is_the_same_in_memory_streamed_and_from_the_cache(tmp_path, bad, monkeypatch):
    photographs(tmp_path, {"one_class_train/acorn": 5, "one_class_train/tank": 4, "one_class_test/acorn": 1})
    if bad:
        (tmp_path / "ImageNet/one_class_train/acorn/3.jpg").write_bytes(b"no picture")
    source = DataSource(str(tmp_path), image_size=28, num_worker=0, skip_bad_images=bad)
    cached = replace(source, image_cache=str(tmp_path / "cache"))
    for label in (None, 0, 1):
        expected = DATASETS["imagenet"].load(source, "train", label).fingerprint
        found = [DATASETS["imagenet"].stream(way, AlignedSpec(), label) for way in (source, cached, cached)]
        assert [data.fingerprint for data in found] == [expected] * 3 and len(expected) == 16
        assert found[0].to(torch.device("cpu")).fingerprint == expected
    monkeypatch.setattr("datasets.folder.digest", lambda path: pytest.fail("read again"))
    assert DATASETS["imagenet"].stream(cached, AlignedSpec(), 1).fingerprint == expected


def test_pictures_that_were_left_out_do_not_count(root):
    before = load(root, "train", label=0).fingerprint
    (root / "train/cat/bad.png").write_bytes(b"no picture")
    assert load(root, "train", label=0, skip_bad=True).fingerprint == before


def test_parts_and_mixtures_have_their_own(root):
    data = load(root, "train")
    keep = torch.tensor([True, False, True, True, True, True])
    assert data.where(keep | True).fingerprint == data.to(torch.device("cpu")).fingerprint == data.fingerprint
    part, other, mixed, further = (
        data.where(keep),
        data.where(keep.flip(0)),
        interpolated(data, 1),
        interpolated(data, 2),
    )
    marks = {one.fingerprint for one in (data, part, other, mixed, further)}
    assert len(marks) == 5 and all(len(mark) == 16 for mark in marks)
    assert data.where(keep).fingerprint == part.fingerprint
    unknown = replace(data, fingerprint="")
    assert unknown.where(keep).fingerprint == interpolated(unknown, 1).fingerprint == ""


def test_sets_that_come_as_arrays(tmp_path):
    def digits(size: int, label: int | None, split: str = "train") -> str:
        return DATASETS["digits"].load(DataSource(image_size=size), split, label).fingerprint

    assert digits(8, 3) == digits(16, 3) and len(digits(8, 3)) == 16
    assert len({digits(8, 3), digits(8, 4), digits(8, None), digits(8, None, "test")}) == 4
    raw = tmp_path / "MNIST/raw"
    noise = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for labels, images in (([1, 0, 1], noise[:3]), ([1, 0, 0], noise[:3]), ([1, 0, 1], noise[1:4])):
        write_idx(raw / "train-images-idx3-ubyte.gz", images)
        write_idx(raw / "train-labels-idx1-ubyte.gz", np.array(labels, np.uint8))
        found = DATASETS["mnist"].load(DataSource(str(tmp_path)), "train", None).fingerprint
        parts = [np.array(labels, "<i8").tobytes(), images.tobytes()]
        content = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        assert found == hashlib.sha256(content).hexdigest()[:16]


def test_outlier_sets_have_one(tmp_path):
    save(Image.new("RGB", (40, 40), "red"), tmp_path / "LSUN_fix/a.png")
    normal = split_one_class("digits", DataSource(image_size=8), 3, 8).test()
    source = DataSource(str(tmp_path), image_size=8)
    found = find_outliers(["lsun_fix", "digits", "interp"], source, lambda: normal, lag=2)
    marks = [load().fingerprint for load in found.values()]
    assert marks[0] == by_hand((b"", b"a.png", (tmp_path / "LSUN_fix/a.png").read_bytes()))
    assert marks[1] == normal.fingerprint and marks[2] == interpolated(normal, 2).fingerprint != marks[1]
