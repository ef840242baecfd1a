"""Which files are found, how they are read, what counts as a copy, what is held out."""

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datasets.decode import Reader
from detector.pictures import Unreadable, copies, held_out, look, normal_pictures, pictures_of, read
from tests.conftest import SHARED
from tests.detector.conftest import stripes


def put(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(stripes(0) if pixels is None else pixels).save(path)
    return path


@pytest.mark.parametrize(
    "files, found",
    [
        (["b.png", "a.jpg"], ["a.jpg", "b.png"]),
        (["x/y/a.png", "b.png"], ["b.png", "x/y/a.png"]),
        (["good/a.png", "bad/b.png"], ["good/a.png"]),
        (["train/good/a.png", "test/good/b.png", "good/c.png"], ["train/good/a.png"]),
    ],
)
def test_folders_of_all_layouts(tmp_path, files, found):
    for name in files:
        put(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [str(path.relative_to(tmp_path)) for path in normal_pictures(tmp_path)] == found


def test_a_text_file_names_pictures_relative_to_itself(tmp_path):
    put(tmp_path / "x" / "a b.png")
    (tmp_path / "list.txt").write_text("x/a b.png\n\n")
    assert normal_pictures(tmp_path / "list.txt") == [tmp_path / "x/a b.png"]
    (tmp_path / "list.txt").write_text("x/other.png\n")
    with pytest.raises(UserError, match="no file .*other.png"):
        normal_pictures(tmp_path / "list.txt")


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_places_without_pictures_are_errors(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures" if name == "empty" else "no file and no folder"):
        normal_pictures(tmp_path / name) if name == "empty" else list(pictures_of([tmp_path / name]))


def test_files_and_folders_come_in_the_order_given(tmp_path):
    b, a, single = put(tmp_path / "f/b.png"), put(tmp_path / "f/a.png"), put(tmp_path / "z.png")
    assert list(pictures_of([single, tmp_path / "f"])) == [single, a, b]


def test_pixels_or_a_reason(tmp_path):
    pixels = stripes(3)
    assert (read(put(tmp_path / "a.png", pixels), Reader()) == pixels).all()
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name, why in (("empty.png", "empty"), ("folder.png", "no regular file"), ("gone.png", "No such file")):
        found = read(tmp_path / name, Reader())
        assert isinstance(found, Unreadable) and why in found.why
    found = read(put(tmp_path / "large.png", np.zeros((1000, 1200, 3), np.uint8)), Reader(max_megapixels=1))
    assert isinstance(found, Unreadable) and "max_megapixels" in found.why


def test_copies_are_found_directly_and_through_others():
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2))
    near = np.clip(one.astype(int) + 3, 0, 255).astype(np.uint8)
    looks = [look(x) for x in (one, other, one, near, rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))]
    groups = copies(looks)
    assert groups[0] == groups[2] == groups[3] and len(set(groups.tolist())) == 3


def test_aligned_parts_that_all_look_alike_are_no_copies():
    looks = [look(stripes(i, 256)) for i in range(12)]
    raw = np.corrcoef([each.thumbnail for each in looks])
    assert raw.min() > 0.99  # By their thumbnails alone all would be one.
    assert len(set(copies(looks).tolist())) == 12


def test_what_is_held_out_follows_from_seed_and_content_alone():
    looks = [look(stripes(i)) for i in range(40)]
    groups = np.arange(40) // 2
    out = held_out(looks, groups, 10, seed=0)
    assert out.sum() == 10 and all(len(set(out[groups == g])) == 1 for g in range(20))
    order = np.random.default_rng(0).permutation(40)
    again = held_out([looks[i] for i in order], groups[order], 10, seed=0)
    assert (again == out[order]).all()
    assert (held_out(looks, groups, 10, seed=1) != out).any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not (SHARED / "data/messy").is_dir(), reason="the team's pictures are not here")
def test_messy_files_are_read_or_refused(tmp_path):
    found = {path.name: read(path, Reader()) for path in sorted((SHARED / "data/messy/files").iterdir())}
    assert len(found) > 90
    for name, pixels in found.items():
        if isinstance(pixels, Unreadable):
            assert pixels.why and "\n" not in pixels.why, name
        else:
            assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8, name
    assert isinstance(found["truncated_jpeg.jpg"], Unreadable)
    assert found["hopper_orientation_6.jpg"].shape == (128, 128, 3)
