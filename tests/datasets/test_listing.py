"""Which files count as pictures, at every depth, and the line that says what was left out."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from common.errors import UserError
from datasets import DATASETS, DataSource
from datasets.folder import class_names, list_pictures
from datasets.outliers import find_outliers
from scripts.prepare import main as prepare
from tests.datasets.test_folder import corner_picture, fill, load, save


def names(paths, root: Path) -> list[str]:
    return [str(Path(path).relative_to(root)) for path in paths]


def clutter(folder: Path) -> None:
    """Two pictures, one of them deep, and everything that lies about in folders."""
    save(corner_picture(), folder / "a.png")
    save(corner_picture(), folder / "deep/b.jfif", format="JPEG")
    for name in (".ipynb_checkpoints/a.png", "__MACOSX/a.png", "deep/._b.jpg", "__a.png"):
        save(corner_picture(), folder / name)
    for name in ("Thumbs.db", "desktop.ini", "notes.txt", "more.txt", "no_ending", "x.heic", "y.HEIC", "z.jxl"):
        (folder / name).write_bytes(b"x")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "deep/up").symlink_to("..")
    os.mkfifo(folder / "pipe.png")


CLUTTER = (
    "left out 2 hidden files, 2 hidden folders, 2 .heic and 1 .jxl (not readable here; convert them to PNG or JPEG),"
    " 5 with other endings (.txt 2, none 1, .db 1, .ini 1), 2 broken links, 1 special file,"
    " 1 link to a folder around it\n"
)


def test_what_is_left_out_is_counted_in_one_line_once(tmp_path, capsys):
    clutter(tmp_path)
    assert names(list_pictures(tmp_path), tmp_path) == ["a.png", "deep/b.jfif"]
    assert capsys.readouterr().out == f"note: {tmp_path}: {CLUTTER}"
    list_pictures(tmp_path)
    assert capsys.readouterr().out == ""


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, capsys):
    fill(tmp_path, {"train/good": 2})
    load(tmp_path, "train")
    assert list_pictures(tmp_path / "nothing") == [] and capsys.readouterr().out == ""


def test_the_rule_is_the_same_in_a_class_in_an_outlier_set_and_in_prepare(tmp_path, capsys):
    clutter(tmp_path / "d/train/good")
    data = load(tmp_path / "d", "train")
    assert names(data.paths, tmp_path / "d/train/good") == ["a.png", "deep/b.jfif"]
    assert capsys.readouterr().out == f"note: {tmp_path}/d/train: {CLUTTER}"
    clutter(tmp_path / "others")
    found = find_outliers([f"folder:{tmp_path}/others"], DataSource(image_size=8), lambda: data, lag=1)
    assert len(found[f"folder:{tmp_path}/others"]()) == 2
    assert CLUTTER in capsys.readouterr().out
    shutil.copytree(tmp_path / "others", tmp_path / "in", symlinks=True, copy_function=copy)
    assert prepare(["lsun_fix", "--source", str(tmp_path / "in"), "--data_path", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert CLUTTER.replace(", 1 special file", "") in told and "2 pictures: 2 made" in told


def copy(source: str, target: str) -> None:
    if not source.endswith("pipe.png"):
        shutil.copyfile(source, target, follow_symlinks=False)


def test_hidden_folders_and_loose_pictures_beside_the_classes_are_reported(tmp_path, capsys):
    fill(tmp_path, {"train/good": 1, "train/.ipynb_checkpoints": 1, "train/__MACOSX": 1, "train": 2})
    assert class_names(tmp_path) == ["good"] and len(load(tmp_path, "train", label=0)) == 1
    expected = f"note: {tmp_path}/train: left out 2 hidden folders, 2 pictures outside the class folders\n"
    assert capsys.readouterr().out == expected


def test_links_to_files_folders_and_classes_are_followed(tmp_path):
    fill(tmp_path, {"elsewhere/red": 2, "elsewhere/more": 1, "data/train/blue": 1})
    (tmp_path / "data/train/red").symlink_to(tmp_path / "elsewhere/red")
    (tmp_path / "data/train/blue/more").symlink_to("../../../elsewhere/more")
    (tmp_path / "data/train/blue/link.png").symlink_to(tmp_path / "elsewhere/red/0.png")
    assert class_names(tmp_path / "data") == ["blue", "red"]
    found = names(load(tmp_path / "data", "train").paths, tmp_path / "data/train")
    assert found == ["blue/0.png", "blue/link.png", "blue/more/0.png", "red/0.png", "red/1.png"]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_links_to_a_folder_around_them_are_not_followed(tmp_path, target, capsys):
    fill(tmp_path, {"data/train/good/deep": 1, "data/train/other": 1})
    (tmp_path / "data/train/good/deep/up").symlink_to(target)
    assert names(load(tmp_path / "data", "train", label=0).paths, tmp_path) == ["data/train/good/deep/0.png"]
    assert "1 link to a folder around it" in capsys.readouterr().out


def test_a_linked_class_has_folders_around_it_on_both_sides(tmp_path, capsys):
    fill(tmp_path, {"elsewhere/good": 1, "data/train/other": 1})
    (tmp_path / "data/train/good").symlink_to(tmp_path / "elsewhere/good")
    (tmp_path / "elsewhere/good/up").symlink_to("..")
    (tmp_path / "elsewhere/good/back").symlink_to(tmp_path / "data/train")
    assert names(load(tmp_path / "data", "train", label=0).paths, tmp_path) == ["data/train/good/0.png"]
    assert "2 links to a folder around it" in capsys.readouterr().out


def test_links_that_lead_to_each_other_end(tmp_path):
    fill(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a/b").symlink_to(tmp_path / "b")
    (tmp_path / "b/a").symlink_to(tmp_path / "a")
    assert names(list_pictures(tmp_path), tmp_path) == ["a/0.png", "a/b/0.png", "b/0.png", "b/a/0.png"]


@pytest.mark.parametrize("closed", ["train", "train/good", "train/good/deep"])
def test_a_folder_that_may_not_be_listed_is_reported(tmp_path, monkeypatch, closed):
    fill(tmp_path, {"train/good": 1, "train/good/deep": 1})
    real = os.scandir

    def scandir(path="."):
        if Path(path) == tmp_path / closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(UserError) as told:
        load(tmp_path, "train")
    assert str(told.value).startswith(f"--data_path: {tmp_path / closed} cannot be listed (Permission denied)")
    with pytest.raises(UserError, match="--source: .* cannot be listed"):
        list_pictures(tmp_path, "--source")


def test_a_folder_that_may_not_be_entered_is_reported(tmp_path, monkeypatch):
    """Folders with r and without x: names show, what they are does not."""
    fill(tmp_path, {"train/good/deep": 1})
    real = Path.stat

    def stat(self, **options):
        if self == tmp_path / "train/good/deep":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(UserError, match=f"--data_path: {tmp_path}/train/good cannot be listed"):
        load(tmp_path, "train")


def test_ordinary_folders_keep_their_order(tmp_path):
    for name in (
        "b/2.png",
        "b/10.png",
        "b.png",
        "B/1.png",
        "a-1/x.png",
        "a/1.png",
        "a.d/1.PNG",
        "ä.png",
        "a/b/c/0.jpg",
    ):
        save(corner_picture(), tmp_path / name, format="PNG")
    assert list_pictures(tmp_path) == sorted(path for path in tmp_path.rglob("*") if path.is_file())


def test_messages_show_names_that_are_not_utf_8(tmp_path, capsys):
    folder = tmp_path / "train" / os.fsdecode(b"caf\xe9")
    save(Image.new("RGB", (8, 8), "red"), folder / "a\nb.png")
    (folder / os.fsdecode(b"\xe9.jpg")).write_bytes(b"no picture")
    with pytest.raises(UserError) as told:
        load(tmp_path, "train")
    assert r"train/caf\xe9/\xe9.jpg (" in str(told.value) and str(told.value).isprintable()
    (folder / "a\nb.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"caf\\xe9/a\\nb.png"):
        load(tmp_path, "train")
    save(Image.new("RGB", (8, 8), "red"), folder / "a\nb.png")
    data = DATASETS["folder"].load(DataSource(str(tmp_path), image_size=8, skip_bad_images=True), "train", None)
    assert data.paths == (str(folder / "a\nb.png"),) and data.images[0, :, 4, 4].tolist() == [255, 0, 0]
    assert r"cannot read" in (out := capsys.readouterr().out) and r"\xe9.jpg" in out and out.isascii()
