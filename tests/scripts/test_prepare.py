"""Pictures made from pictures: what they look like, which they are, and what is refused before anything is written."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import DataSource, split_one_class
from datasets.folder import list_pictures
from scripts.prepare import IMAGENET30, fix, main, shorten
from tests.datasets.test_folder import save


def checkerboard(width: int, height: int) -> Image.Image:
    """Single pixels of black and white by turns: grey from afar."""
    dark = np.add.outer(np.arange(height), np.arange(width)) % 2 == 0
    return Image.fromarray(np.where(dark, 0, 255).astype(np.uint8)).convert("RGB")


def solid(level: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def levels(folder: Path) -> list[int]:
    """Grey level of each picture that lsun_fix made of a `solid` one, by number."""
    return [int(pixels(path).mean()) for path in sorted(folder.glob("*.png"))]


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file with its inode and time of change: a file that is written again differs."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def grays(tmp_path) -> Path:
    """Twenty pictures, some in sub-folders, each of a grey level of its own."""
    for n in range(20):
        save(solid(10 * n), tmp_path / "grays" / ("deep/er" if n % 3 else "") / f"{n}.png")
    return tmp_path / "grays"


@pytest.fixture
def originals(tmp_path) -> Path:
    """A folder of ImageNet with a picture per class and split, half of the classes under their names."""
    for n, (name, wnid) in enumerate(IMAGENET30.items()):
        for split in ("train", "val"):
            save(solid(4 * n), tmp_path / "in" / split / (name if n % 2 else wnid) / f"{wnid}_1.JPEG")
    save(solid(0), tmp_path / "in/train/n00000001/other.jpg")  # one of the 970 other classes
    return tmp_path / "in"


def lsun_fix(source: Path, data: Path, *args: object) -> int:
    return main(["lsun_fix", "--source", str(source), "--data_path", str(data), *map(str, args)])


def imagenet30(source: Path, data: Path, *args: object) -> int:
    return main(["imagenet30", "--source", str(source), "--data_path", str(data), *map(str, args)])


def refused(capsys, code: int, *words: str) -> None:
    told = capsys.readouterr().err
    assert code == 2 and told.count("\n") == 1 and all(word in told for word in words), told


# ------------------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("size", [(64, 64), (131, 97), (500, 375), (333, 700)])
def test_fine_patterns_become_flat_grey_and_not_another_pattern(size):
    board = checkerboard(*size)
    inner = np.asarray(fix(board)).astype(int)[1:-1, 1:-1]  # at the rim the filter sees less
    assert inner.shape == (30, 30, 3) and np.abs(inner - 127.5).max() <= 3
    nearest = np.asarray(board.resize((32, 32), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(nearest - 127.5).min() > 100
    half = np.asarray(shorten(board, min(size) // 2)).astype(int)[1:-1, 1:-1]
    assert np.abs(half - 127.5).max() <= 6


def test_edges_get_no_halos():
    edge = np.zeros((256, 256, 3), np.uint8) + 60
    edge[:, 100:] = 190
    out = np.asarray(fix(Image.fromarray(edge))).astype(int)
    assert (out.min(), out.max()) == (60, 190) and (np.diff(out[16, :, 0]) >= 0).all()


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (60, 60), (20, 16)])
def test_the_fix_sets_show_the_middle_in_its_own_proportions(size):
    """A round spot in the middle stays round; what lies beyond the middle square is gone."""
    x, y = np.meshgrid(np.arange(size[0]) + 0.5 - size[0] / 2, np.arange(size[1]) + 0.5 - size[1] / 2)
    short = min(size)
    array = np.where(np.hypot(x, y) < short / 4, 255, 0).astype(np.uint8)
    array[np.maximum(abs(x), abs(y)) > short / 2 + 2] = 255
    out = np.asarray(fix(Image.fromarray(array).convert("RGB"))).astype(float)[..., 0] / 255
    assert out[:, [0, -1]].max() < 0.02 and out[[0, -1]].max() < 0.02
    assert abs(out.sum(0).max() - 16) < 1.5 and abs(out.sum(1).max() - 16) < 1.5


@pytest.mark.parametrize(
    "size, expected",
    [((500, 375), (341, 256)), ((375, 500), (256, 341)), ((300, 256), (300, 256)), ((90, 40), (90, 40))],
)
def test_imagenet_pictures_keep_their_aspect_ratio_and_small_ones_their_size(size, expected):
    assert shorten(solid(9, size), 256).size == expected


# ------------------------------------------------------------------------------------------------------- the sets


def test_imagenet30_in_the_folders_that_the_data_set_is_read_from(originals, tmp_path, capsys):
    half = np.zeros((375, 500, 3), np.uint8)
    half[:, :250] = 255
    save(Image.fromarray(half), originals / "train/acorn/big.png")
    upright = Image.Exif()
    upright[0x0112] = 6  # shown rotated 90 degrees clockwise
    save(Image.fromarray(half), originals / "val/n12267677/turned.jpeg", exif=upright)
    assert imagenet30(originals, tmp_path / "data", "--workers", 2) == 0
    assert "62 pictures: 62 made, 0 there already" in capsys.readouterr().out
    root = tmp_path / "data/ImageNet"
    for split in ("one_class_train", "one_class_test"):
        names = sorted(path.name for path in (root / split).iterdir() if path.is_dir())
        assert names == list(IMAGENET30) and len(names) == 30
        for n, (name, wnid) in enumerate(IMAGENET30.items()):
            assert abs(pixels(root / split / name / f"{wnid}_1.jpg") - 4 * n).max() <= 1, name
    big = pixels(root / "one_class_train/acorn/big.jpg")
    assert big.shape == (256, 341, 3) and big[:, :165].min() > 240 and big[:, 176:].max() < 15
    turned = pixels(root / "one_class_test/acorn/turned.jpg")
    assert turned.shape == (341, 256, 3) and turned[:165].min() > 240 and turned[176:].max() < 15
    with Image.open(root / "one_class_train/acorn/big.jpg") as picture:
        assert picture.format == "JPEG"
        found = picture.quantization
    Image.new("RGB", (8, 8)).save(tmp_path / "95.jpg", quality=95)
    with Image.open(tmp_path / "95.jpg") as picture:
        assert picture.quantization == found


@pytest.mark.parametrize("what, folder", [("lsun_fix", "LSUN_fix"), ("imagenet_fix", "Imagenet_fix")])
def test_fix_sets_are_lossless_pictures_of_32_pixels(what, folder, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    save(noise, tmp_path / "in/a.png")
    assert main([what, "--source", str(tmp_path / "in"), "--data_path", str(tmp_path / "d"), "--count", "1"]) == 0
    (path,) = (tmp_path / "d" / folder).glob("*.*g")
    assert path.name == "00000.png" and (pixels(path) == np.asarray(noise)).all()


def test_the_seed_draws_and_a_larger_count_goes_on_with_the_draw(grays, tmp_path, capsys):
    drawn = {}
    for name, args in {"a": (8, 0), "again": (8, 0), "more": (12, 0), "other": (8, 1), "all": (99, 0)}.items():
        assert lsun_fix(grays, tmp_path / name, "--count", args[0], "--seed", args[1]) == 0
        drawn[name] = levels(tmp_path / name / "LSUN_fix")
        assert len(set(drawn[name])) == len(drawn[name]) == min(args[0], 20)
        assert ("there are 20 pictures below" in capsys.readouterr().out) == (name == "all")
    assert drawn["a"] == drawn["again"] == drawn["more"][:8] == drawn["all"][:8]
    assert sorted(drawn["other"]) != sorted(drawn["a"]) and sorted(drawn["all"]) == list(range(0, 200, 10))
    # The draw is not merely the first of the list, and it reaches every depth.
    assert sorted(drawn["a"]) != list(range(0, 80, 10)) and {level % 30 == 0 for level in drawn["a"]} == {True, False}
    assert lsun_fix(grays, tmp_path / "a", "--count", 12) == 0
    assert levels(tmp_path / "a/LSUN_fix") == drawn["more"]


# --------------------------------------------------------------------------------------------------- Tiny-ImageNet

# Not sorted, as the lines of an archive's file need not be; no test picture of the second.
WNIDS = ("n02", "n10", "n01")


@pytest.fixture
def archive(tmp_path) -> Path:
    """The unpacked archive, small: each picture has a grey level of its own."""
    root = tmp_path / "tiny-imagenet-200"
    for k, wnid in enumerate(WNIDS):
        for n in range(2):
            save(solid(40 * k + n, (64, 64)), root / "train" / wnid / "images" / f"{wnid}_{n}.JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes\n")
    lines = []
    for n, k in enumerate((2, 0, 2)):
        save(solid(200 + n, (64, 64)), root / "val/images" / f"val_{n}.JPEG")
        lines.append(f"val_{n}.JPEG\t{WNIDS[k]}\t0\t0\t62\t62\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    return root


def tiny_imagenet(source: Path, data: Path, *args: object) -> int:
    return main(["tiny_imagenet", "--source", str(source), "--data_path", str(data), *map(str, args)])


def test_tiny_imagenet_becomes_a_folder_whose_splits_have_one_mapping_of_classes(archive, tmp_path, capsys):
    assert tiny_imagenet(archive, tmp_path / "data") == 0
    assert "9 pictures of 3 classes: 9 made, 0 there already" in capsys.readouterr().out
    root = tmp_path / "data/TinyImageNet"
    split = split_one_class("folder", DataSource(data_path=str(root), image_size=64, num_worker=1), None, 64)
    assert split.class_names == ["n01", "n02", "n10"] and split.n_classes == 3
    levels = {}
    for images in (split.train(), split.test()):
        assert images.size == (64, 64)
        for image, label in zip(images.images, images.labels.tolist(), strict=True):
            levels.setdefault(split.class_names[label], []).append(round(float(image.float().mean())))
    assert {name: sorted(found) for name, found in levels.items()} == {
        "n01": [80, 81, 200, 202],
        "n02": [0, 1, 201],
        "n10": [40, 41],
    }
    source, made = archive / "train/n01/images/n01_1.JPEG", root / "train/n01/n01_1.JPEG"
    assert made.read_bytes() == source.read_bytes() and not made.is_symlink()


def test_tiny_imagenet_is_copied_once_and_a_stopped_copy_completed(archive, tmp_path, capsys):
    assert tiny_imagenet(archive, tmp_path / "d") == 0
    before = snapshot(tmp_path / "d")
    lost = tmp_path / "d/TinyImageNet/test/n01/val_2.JPEG"
    lost.unlink()
    capsys.readouterr()
    assert tiny_imagenet(archive, tmp_path / "d") == 0
    assert "1 made, 8 there already" in capsys.readouterr().out
    assert {path for path, state in snapshot(tmp_path / "d").items() if state != before[path]} == {lost}


ANNOTATIONS = "val/val_annotations.txt"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda root: (root / ANNOTATIONS).unlink(), [f"{ANNOTATIONS} is not there", "tiny-imagenet-200"]),
        (lambda root: (root / ANNOTATIONS).write_text("val_0.JPEG n01\n"), ["holds no lines"]),
        (lambda root: (root / ANNOTATIONS).write_text("val_0.JPEG\tn01\n"), ["val_1.JPEG, val_2.JPEG (2)"]),
        (lambda root: (root / "val/images/val_1.JPEG").unlink(), ["annotation of val_1.JPEG (1)"]),
        (lambda root: (root / "train/n01").rename(root / "train/n05"), ["no pictures in train/ for n01 (1)"]),
        (lambda root: (root / "train/n07").mkdir(), ["no pictures in train/ for n07 (1)"]),
    ],
)
def test_an_archive_of_tiny_imagenet_that_does_not_fit_is_refused(change, words, archive, tmp_path, capsys):
    change(archive)
    refused(capsys, tiny_imagenet(archive, tmp_path / "d"), "--source", *words)
    assert not (tmp_path / "d").exists()


# --------------------------------------------------------------------------------------------- again, and damage


def test_a_second_run_writes_nothing_and_a_stopped_one_is_completed(grays, originals, tmp_path, capsys):
    for run, count in (
        (lambda: lsun_fix(grays, tmp_path / "d"), 20),
        (lambda: imagenet30(originals, tmp_path / "d"), 60),
    ):
        assert run() == 0
        before = snapshot(tmp_path / "d")
        capsys.readouterr()
        assert run() == 0 and snapshot(tmp_path / "d") == before
        assert f"{count} pictures: 0 made, {count} there already" in capsys.readouterr().out
    lost = tmp_path / "d/LSUN_fix/00007.png"
    content = lost.read_bytes()
    lost.unlink()
    assert lsun_fix(grays, tmp_path / "d") == 0 and lost.read_bytes() == content
    assert "20 pictures: 1 made, 19 there already" in capsys.readouterr().out
    changed = {path for path, state in snapshot(tmp_path / "d").items() if state != before.get(path)}
    assert changed == {lost}
    assert not [path for path in (tmp_path / "d").rglob(".*")]
    assert len(list_pictures(tmp_path / "d/LSUN_fix")) == 20
    assert capsys.readouterr().out == ""  # what prepare leaves beside the pictures is nobody's loss


def test_a_kind_of_pictures_is_not_mixed_into_another(grays, originals, tmp_path, capsys):
    data = tmp_path / "d"
    assert lsun_fix(grays, data, "--count", 5) == 0 and imagenet30(originals, data, "--size", 30) == 0
    save(solid(1), data / "Imagenet_fix/from_elsewhere.png")
    before = snapshot(data)
    capsys.readouterr()
    refused(capsys, lsun_fix(grays, data, "--seed", 1), "LSUN_fix", '"seed": 1')
    refused(capsys, lsun_fix(grays / "deep", data), "LSUN_fix", "--data_path")
    refused(capsys, imagenet30(originals, data, "--size", 20), "one_class_train", '"size": 20')
    code = main(["imagenet_fix", "--source", str(grays), "--data_path", str(data)])
    refused(capsys, code, "Imagenet_fix", "did not make")
    assert snapshot(data) == before


@pytest.mark.parametrize("prepare", [lsun_fix, imagenet30])
def test_a_truncated_picture_is_named_or_left_out_and_counted(prepare, originals, tmp_path, capsys):
    bad = originals / "train/banjo/bad.jpg"
    save(Image.effect_noise((300, 300), 80), originals / "train/banjo/good.jpg")
    whole = (originals / "train/banjo/good.jpg").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    refused(capsys, prepare(originals, tmp_path / "d"), "--source", str(bad), "truncated", "--skip_bad_images")
    # 30 + 30 pictures, the good one and the bad one; lsun_fix takes the one of another class as well.
    count = 62 + (prepare is lsun_fix)
    assert prepare(originals, tmp_path / "d", "--skip_bad_images") == 0
    assert f"{count} pictures:" in (told := capsys.readouterr().out) and "1 left out (--skip_bad_images)" in told
    made = [path for path in (tmp_path / "d").rglob("*.*g")]
    assert len(made) == count - 1 and "bad.jpg" not in {path.name for path in made}


def test_only_unreadable_pictures_are_an_error(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"no picture")
    refused(capsys, lsun_fix(tmp_path / "in", tmp_path / "d", "--skip_bad_images"), "--source", "not one")


# ------------------------------------------------------------------------- refused before anything is written


def test_missing_classes_are_all_named(originals, tmp_path, capsys):
    gone = {"train": ["n12267677", "volcano"], "val": ["n02787622"]}
    for split, folders in gone.items():
        for folder in folders:
            for path in (originals / split / folder).iterdir():
                path.unlink()
    (originals / "val/n02787622").rmdir()
    code = imagenet30(originals, tmp_path / "d")
    words = ("train/n12267677 (acorn)", "train/n09472597 (volcano)", "val/n02787622 (banjo)")
    told = capsys.readouterr().err
    assert code == 2 and told.count("\n") == 1 and all(word in told for word in words)
    assert told.count("train/") == 2 and told.count("val/") == 1 and not (tmp_path / "d").exists()


@pytest.mark.parametrize("prepare", [lsun_fix, imagenet30])
def test_what_is_left_out_is_reported_once_and_the_range_belongs_to_the_set(prepare, originals, tmp_path, capsys):
    for split in ("train", "val"):
        (originals / split / "n12267677/._x.jpg").write_bytes(b"x")
    assert prepare(originals, tmp_path / "d") == 0
    told = capsys.readouterr().out
    assert told.count(f"note: {originals}: left out 2 hidden files\n") == told.count("left out") == 1
    refused(
        capsys, prepare(originals, tmp_path / "d", "--value_range", 0, 9), "--data_path", '"value_range": [0.0, 9.0]'
    )


def test_two_pictures_that_would_become_one_file(originals, tmp_path, capsys):
    save(solid(1), originals / "train/tank/n04389033_1.png")
    refused(capsys, imagenet30(originals, tmp_path / "d"), "n04389033_1.png", "n04389033_1.JPEG")
    assert not (tmp_path / "d").exists()


def test_the_source_is_not_written_into(grays, tmp_path, capsys):
    before = snapshot(tmp_path)
    refused(capsys, lsun_fix(grays, grays), "--data_path", "--source")
    (tmp_path / "link").symlink_to(grays)
    refused(capsys, lsun_fix(grays, tmp_path / "link"), "--data_path")
    refused(capsys, lsun_fix(tmp_path, tmp_path / "d"), "--data_path")
    (tmp_path / "LSUN_fix").symlink_to(grays.parent)
    refused(capsys, lsun_fix(grays, tmp_path), "--data_path")  # what would be written to holds the source
    assert snapshot(tmp_path) == before


def test_more_that_cannot_work(grays, tmp_path, capsys):
    data = tmp_path / "d"
    (tmp_path / "empty").mkdir()
    refused(capsys, lsun_fix(tmp_path / "nothing", data), "--source", "nothing")
    refused(capsys, lsun_fix(tmp_path / "empty", data), "--source", "no pictures")
    refused(capsys, lsun_fix(grays, data, "--count", 0), "--count")
    refused(capsys, lsun_fix(grays, data, "--workers", 0), "--workers")
    refused(capsys, tiny_imagenet(grays, data, "--workers", 0), "--workers")
    refused(capsys, tiny_imagenet(tmp_path / "nothing", data), "--source", "nothing")
    refused(capsys, imagenet30(grays, data, "--size", -1), "--size")
    assert not data.exists()
    data.write_text("a file")
    refused(capsys, lsun_fix(grays, data), "--data_path", "cannot write")


def test_a_disk_that_refuses_a_picture_is_compared_with_a_bad_picture(grays, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr("scripts.prepare.claim", lambda folders, settings: None)
    code = lsun_fix(grays, tmp_path / "d", "--skip_bad_images")
    refused(capsys, code, "--data_path", "No space left on device")
    assert not snapshot(tmp_path / "d")  # the temporary files are gone as well
