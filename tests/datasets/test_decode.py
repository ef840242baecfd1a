"""What a picture looks like after reading: ranges of values, limits, reasons."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

import eval as evaluate
import train
from common.errors import UserError
from common.flags import Flags
from datasets import DATASETS, DataSource, split_one_class
from datasets.augment import AlignedSpec
from datasets.decode import Reader
from datasets.folder import find_pictures, read_picture, read_upright
from datasets.outliers import find_outliers
from scripts.prepare import main as prepare
from tests.datasets.test_folder import corner_picture, fill, load, save
from tests.datasets.test_pictures import one_epoch, photographs, stream


def levels(path, *values: float, dtype=np.uint16) -> None:
    """A picture of 8 x 8 with a column of each value, the last one repeated."""
    row = np.array([*values, *[values[-1]] * (8 - len(values))], dtype)
    save(Image.fromarray(np.tile(row, (8, 1))), path)


def first_row(data, n: int = 0) -> list[int]:
    assert (data.images[n, 0] == data.images[n]).all()
    return data.images[n, 0, 0].tolist()


def read(root, split="train", **settings):
    return DATASETS["folder"].load(DataSource(str(root), image_size=8, **settings), split, None)


# ----------------------------------------------------------------------------------------------- ordinary pictures


@pytest.mark.parametrize("size", [(40, 40), (97, 31), (31, 97), (300, 200), (33, 1000)])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_ordinary_pictures_are_what_pillow_makes_of_them_to_the_bit(tmp_path, size, ending):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    path = save(Image.fromarray(noise), tmp_path / f"a.{ending}", quality=80)
    with Image.open(path) as picture:
        picture.draft("RGB", (48, 48))
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    short = min(upright.size)
    wanted = tuple(max(24, round(side * (24 / short))) for side in upright.size)
    whole = np.asarray(upright.resize(wanted, Image.Resampling.BILINEAR))
    assert np.array_equal(np.asarray(read_upright(path, 24)), whole)
    top, left = (whole.shape[0] - 24) // 2, (whole.shape[1] - 24) // 2
    assert np.array_equal(read_picture(path, 24), whole[top : top + 24, left : left + 24].transpose(2, 0, 1))


@pytest.mark.parametrize("ending, kind", [("jfif", "JPEG"), ("gif", "GIF"), ("avif", "AVIF"), ("avifs", "AVIF")])
def test_more_kinds_are_read(tmp_path, ending, kind):
    more = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), "blue")]} if kind != "JPEG" else {}
    save(corner_picture(), tmp_path / f"train/good/a.{ending}", format=kind, **more)
    image = DATASETS["folder"].load(DataSource(str(tmp_path), image_size=16), "train", None).images[0].int()
    assert image[0, 3, 3] > 200 and image[0, 12, 12] < 40 and image[1:].max() < 60  # the first picture


def test_of_an_mpo_file_the_first_picture_is_read(tmp_path):
    save(corner_picture(), tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")])
    image = read_picture(tmp_path / "a.mpo", 16).astype(int)
    assert image[0, 3, 3] > 200 and image[2].max() < 60


# ------------------------------------------------------------------------------------------------- range of values


@pytest.mark.parametrize(
    "most, top", [(200, 255), (255, 255), (256, 1023), (1000, 1023), (4000, 4095), (9000, 16383), (16384, 65535)]
)
def test_integers_are_scaled_by_the_smallest_usual_range_that_holds_the_training_set(tmp_path, most, top):
    levels(tmp_path / "train/good/a.png", 0, 10)
    levels(tmp_path / "train/other/b.tif", most // 2, most)
    levels(tmp_path / "test/good/a.png", 0, most)
    expected = [[round(value * 255 / top) for value in row] for row in ([0, 10], [most // 2, most], [0, most])]
    train, test = read(tmp_path), read(tmp_path, "test")
    assert [first_row(train)[:2], first_row(train, 1)[:2], first_row(test)[:2]] == expected


@pytest.mark.parametrize("most, top", [(0.8, 1), (1.5, 255), (300, 65535)])
def test_floats_have_a_range_of_their_own(tmp_path, most, top):
    levels(tmp_path / "train/good/a.tif", 0, most, dtype=np.float32)
    levels(tmp_path / "train/good/b.png", 0, 4000)
    data = read(tmp_path)
    assert first_row(data)[:2] == [0, round(most * 255 / top)] and first_row(data, 1)[1] == round(4000 * 255 / 4095)


def test_the_range_is_that_of_the_training_split_for_all_that_a_command_reads(tmp_path, capsys):
    levels(tmp_path / "d/train/good/a.png", 0, 4000)
    levels(tmp_path / "d/train/other/a.png", 0, 900)
    levels(tmp_path / "d/test/good/a.png", 0, 900)
    levels(tmp_path / "d/test/good/b.png", 0, 5000)
    levels(tmp_path / "others/a.png", 0, 900)

    values = {"data_path": str(tmp_path / "d"), "image_size": 8, "num_worker": 2, "skip_bad_images": False}
    flags = Flags(values | {"max_megapixels": 100.0, "value_range": None})
    split = split_one_class("folder", DataSource.of(flags, "folder"), 1, 8)
    scaled = round(900 * 255 / 4095)
    assert first_row(split.train())[1] == scaled
    test = split.test()
    assert [first_row(test, n)[1] for n in (0, 1)] == [scaled, 255]
    told = capsys.readouterr().out
    assert "1 with values outside the range 0..4095, clipped (b.png)" in told and told.count("\n") == 1
    name = f"folder:{tmp_path}/others"
    assert first_row(find_outliers([name], split.source, lambda: test, lag=1)[name]())[1] == scaled
    # Without 16-bit training pictures the set's own range goes.
    fill(tmp_path, {"plain/train/good": 1})
    levels(tmp_path / "plain/test/good/a.png", 0, 900)
    assert first_row(read(tmp_path / "plain", "test"))[1] == round(900 * 255 / 1023)


def test_a_range_that_cannot_be_found_is_no_fault_of_the_picture(tmp_path):
    levels(tmp_path / "test/good/a.png", 0, 900)
    (tmp_path / "train/good").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^--data_path: no pictures \(.*\) for .*/train"):
        read(tmp_path, "test", skip_bad_images=True)
    assert first_row(read(tmp_path, "test", value_range=(0, 900)))[1] == 255


def test_the_range_is_looked_for_only_where_it_is_needed(tmp_path, monkeypatch):
    fill(tmp_path, {"train/good": 2, "test/good": 1})
    monkeypatch.setattr("datasets.decode.Reader.find_range", lambda self: pytest.fail("looked"))
    read(tmp_path), read(tmp_path, "test")


@pytest.mark.parametrize(
    "most, dtype, told",
    [(50, np.uint16, 1), (70, np.uint16, 0), (4096, np.uint16, 0), (2.5, np.float32, 1), (9000, np.float32, 1)],
)
def test_a_set_that_uses_little_of_its_range_is_reported_once(tmp_path, capsys, most, dtype, told):
    for n in range(3):
        levels(tmp_path / f"train/good/{n}.tif", 0, most, dtype=dtype)
    read(tmp_path, num_worker=3)
    assert capsys.readouterr().out.count("make dark pictures in the range") == told


def test_pictures_that_come_out_black_are_named(tmp_path, capsys):
    levels(tmp_path / "train/good/dim.png", 0, 500)
    levels(tmp_path / "train/good/bright.png", 0, 65000)
    levels(tmp_path / "train/good/none.png", 0, 0)
    read(tmp_path)
    assert "1 with values so low in the range 0..65535 that they come out black (dim.png)" in capsys.readouterr().out


def test_value_range_says_it_and_clips(tmp_path, capsys):
    levels(tmp_path / "train/good/a.png", 100, 150, 200, 300)
    levels(tmp_path / "train/good/b.tif", -50, 150, 1e6, dtype=np.float32)
    data = read(tmp_path, value_range=(100, 200))
    assert first_row(data)[:4] == [0, 128, 255, 255] and first_row(data, 1)[:3] == [0, 128, 255]
    assert "2 with values outside the range 100..200, clipped (a.png, b.tif)" in capsys.readouterr().out


@pytest.mark.parametrize("values", [(5, 5), (2, 1), (0, float("inf")), (float("nan"), 1)])
def test_a_range_that_is_none_is_reported(values):
    with pytest.raises(UserError, match="--value_range: LOW must be less than HIGH"):
        DataSource(value_range=values)


@pytest.mark.parametrize(
    "values, reason",
    [
        ((0, np.nan), "NaN or infinity"),
        ((0, np.inf), "NaN or infinity"),
        ((-1, 1), r"values -1..1 .*--value_range"),
        ((0, 70000), r"values 0..70000 .*--value_range"),
    ],
)
def test_floats_without_a_natural_look_are_refused_or_left_out(tmp_path, capsys, values, reason):
    levels(tmp_path / "train/good/a.tif", *values, dtype=np.float32)
    levels(tmp_path / "train/good/b.tif", 0, 0.5, dtype=np.float32)
    with pytest.raises(UserError, match=rf"a\.tif \(.*{reason}.*--skip_bad_images"):
        read(tmp_path)
    data = read(tmp_path, skip_bad_images=True)
    assert len(data) == 1 and first_row(data)[1] == 128 and "left out 1 of 2" in capsys.readouterr().out


def test_nan_is_refused_even_where_the_range_is_given(tmp_path):
    levels(tmp_path / "train/good/a.tif", 0, np.nan, dtype=np.float32)
    with pytest.raises(UserError, match="NaN"):
        read(tmp_path, value_range=(0, 1))


def test_a_transparent_level_of_16_bit_grey_is_laid_on_white(tmp_path):
    row = np.tile(np.array([0, 1000, 2000, 4000], np.uint16), (4, 1))
    save(Image.fromarray(row), tmp_path / "a.png", transparency=1000)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "I;16"
    assert read_picture(tmp_path / "a.png", 4)[:, 0].tolist() == [[0, 255, round(2000 / 4095 * 255), 249]] * 3


def test_the_stream_and_its_cache_have_the_same_range(tmp_path):
    for name, most in (("acorn", 4000), ("tank", 900)):
        for split in ("train", "test"):
            levels(tmp_path / f"ImageNet/one_class_{split}/{name}/a.png", 0, most)
    source = DataSource(str(tmp_path), image_size=8, num_worker=0)
    for cache in (None, str(tmp_path / "cache")):
        pixels = DATASETS["imagenet"].stream(replace(source, image_cache=cache), AlignedSpec(), 1).pixels
        if cache is None:  # known before worker processes begin, each of which would look for it
            assert pixels.reader.settings()[2] == {"integers": 4095}
        assert pixels[0].max() == round(900 * 255 / 4095)
    other = replace(source, image_cache=str(tmp_path / "cache"), value_range=(0, 900))
    assert DATASETS["imagenet"].stream(other, AlignedSpec(), 1).pixels[0].max() == 255
    assert DATASETS["imagenet"].load(source, "test", None).images.amax((1, 2, 3)).tolist() == [249, 56]


# ------------------------------------------------------------------------------------------------ limits and bands


def test_large_pictures_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    save(Image.new("1", (1001, 1000)), tmp_path / "train/good/a.png")
    assert len(read(tmp_path, max_megapixels=1.001)) == 1
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(
        UserError, match=r"a\.png \(1001 x 1000 pixels, more than --max_megapixels 1\).*--skip_bad_images"
    ):
        read(tmp_path, max_megapixels=1)
    with pytest.raises(UserError, match="--max_megapixels must be > 0"):
        DataSource(max_megapixels=0)


def test_the_limit_is_ours_and_not_pillows(tmp_path):
    """179 megapixels is what Pillow takes at most by itself; the JPEG is decoded at an eighth."""
    save(Image.new("L", (13500, 13400)), tmp_path / "a.jpg", quality=20)
    with pytest.raises(ValueError, match="--max_megapixels 100"):
        read_picture(tmp_path / "a.jpg", 16)
    assert read_picture(tmp_path / "a.jpg", 16, reader=Reader(max_megapixels=200)).max() == 0


@pytest.mark.parametrize("size", [(20000, 1), (1, 20001), (6, 9000)])
def test_elongated_pictures_show_their_middle_in_little_memory(tmp_path, size):
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8).reshape(*((1, -1) if size[1] == 1 else (-1, 1)))
    save(Image.fromarray(np.broadcast_to(ramp, size[::-1]).copy()), tmp_path / "a.png")
    upright = read_upright(tmp_path / "a.png", 24)
    assert max(upright.size) <= 33 * 24 and min(upright.size) == 24
    assert np.abs(read_picture(tmp_path / "a.png", 24).astype(int) - 127.5).max() <= 1


@pytest.mark.parametrize(
    "bands, extra, reason",
    [
        (4, (0,), "4 bands, of which"),
        (5, (0, 0), "5 bands, of which"),
        (6, (2, 0, 0), "6 bands, of which"),
        (2, (0,), "2 bands, of which"),
        (7, (0, 0, 0, 0), "a TIFF of a layout that is not readable here"),  # Pillow knows six at most
    ],
)
def test_bands_beyond_colour_and_alpha_are_refused(tmp_path, bands, extra, reason):
    (tmp_path / "train/good").mkdir(parents=True)
    multiband(tmp_path / "train/good/a.tif", bands, extra)
    with pytest.raises(UserError, match=rf"a\.tif \({reason}"):
        read(tmp_path)


def test_alpha_is_no_band_too_many(tmp_path):
    multiband(tmp_path / "a.tif", 4, (2,))
    assert read_picture(tmp_path / "a.tif", 4).shape == (3, 4, 4)


def multiband(path, bands: int, extra: tuple[int, ...]) -> None:
    """A TIFF of 4 x 4 pixels, by hand: Pillow writes none with extra bands."""
    grey = bands == 2
    data = bytes(range(16 * bands))
    tags = [(256, 4, (4,)), (257, 4, (4,)), (258, 3, (8,) * bands), (259, 3, (1,)), (262, 3, (1 if grey else 2,))]
    tags += [(273, 4, (8,)), (277, 3, (bands,)), (278, 4, (4,)), (279, 4, (len(data),)), (338, 3, extra)]
    start = 8 + len(data)
    more, entries = b"", b""
    for tag, kind, values in tags:
        size = 2 if kind == 3 else 4
        packed = b"".join(value.to_bytes(size, "little") for value in values)
        if len(packed) > 4:
            at = start + 2 + 12 * len(tags) + 4 + len(more)
            more += packed
            packed = at.to_bytes(4, "little")
        entries += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + len(values).to_bytes(4, "little")
        entries += packed.ljust(4, b"\0")
    head = b"II*\0" + start.to_bytes(4, "little")
    path.write_bytes(head + data + len(tags).to_bytes(2, "little") + entries + bytes(4) + more)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "convert it to PNG or JPEG"),
        (b"\xff\x0a" + bytes(30), "JPEG XL"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no picture of a kind"),
    ],
    ids=["empty", "lfs", "html", "heic", "jxl", "eps"],
)
@pytest.mark.parametrize("cache", [None, "memory", "cache"])
def test_what_is_no_picture_gets_a_reason(tmp_path, capsys, content, reason, cache):
    if cache == "memory":
        fill(tmp_path, {"train/good": 1})
        (tmp_path / "train/good/x.jpg").write_bytes(content)
        read_it = lambda skip: load(tmp_path, "train", skip_bad=skip)  # noqa: E731
    else:
        photographs(tmp_path, {"one_class_train/acorn": 1})
        (tmp_path / "ImageNet/one_class_train/acorn/x.jpg").write_bytes(content)
        folder = str(tmp_path / "c") if cache else None
        source = DataSource(str(tmp_path), image_size=28, num_worker=0, image_cache=folder)
        read_it = lambda skip: one_epoch(stream(replace(source, skip_bad_images=skip)), parts=[(0,), (skip - 1,)])  # noqa: E731
    with pytest.raises(UserError) as told:
        read_it(False)
    assert reason in str(told.value) and "fix it, or add --skip_bad_images" in str(told.value)
    for _ in range(2):
        read_it(True)
        out = capsys.readouterr().out
        assert "x.jpg (" in out and reason in out and "left out 1 of 2" in out


def test_prepare_reads_by_the_same_rules(tmp_path, capsys):
    levels(tmp_path / "in/a.png", 0, 4000)
    save(Image.new("L", (1200, 1000)), tmp_path / "in/b.png")
    args = ["lsun_fix", "--source", str(tmp_path / "in"), "--data_path", str(tmp_path / "out")]
    assert prepare([*args, "--max_megapixels", "1"]) == 2
    assert "b.png (1200 x 1000 pixels, more than --max_megapixels 1)" in capsys.readouterr().err
    assert prepare([*args, "--value_range", "3", "2"]) == 2 and "--value_range" in capsys.readouterr().err
    assert prepare(args) == 0
    made = [np.asarray(Image.open(path)).max() for path in sorted((tmp_path / "out").rglob("*.png"))]
    assert sorted(made) == [0, 249]
    assert prepare([*args, "--value_range", "0", "4000"]) == 2  # pictures of another range are there
    assert "prepared.json" in capsys.readouterr().err


def test_the_flags_reach_the_pictures(tmp_path, capsys):
    levels(tmp_path / "d/train/good/a.png", 0, 40000)
    levels(tmp_path / "d/train/good/b.png", 0, 40000)
    common = f"--dataset folder --data_path {tmp_path}/d --model resnet8 --mode simclr --epochs 1 --image_size 8"
    args = [*common.split(), "--log_root", str(tmp_path), "--device", "cpu", "--one_class_idx", "0"]
    assert train.main([*args, "--max_megapixels", "0.00001"]) == 2
    assert "8 x 8 pixels, more than --max_megapixels 1e-05" in capsys.readouterr().err
    assert train.main([*args, "--value_range", "0", "30000"]) == 0
    assert "2 with values outside the range 0..30000" in capsys.readouterr().out


def test_outlier_sets_of_an_evaluation_are_read_in_the_range_of_training(tmp_path, capsys):
    for name, most in (("d/train/good", 900), ("d/test/good", 900), ("others", 5000)):
        for n in range(2):
            levels(tmp_path / name / f"{n}.png", 0, most)
    common = f"--dataset folder --data_path {tmp_path}/d --model resnet8 --image_size 8 --device cpu --one_class_idx 0"
    args = ["--mode", "simclr", "--epochs", "1", "--log_root", str(tmp_path / "logs")]
    assert train.main([*common.split(), *args]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    args = ["--mode", "ood_pre", "--load_path", str(run), "--ood_dataset", f"folder:{tmp_path}/others"]
    assert evaluate.main([*common.split(), *args]) == 0
    assert "2 with values outside the range 0..1023, clipped (0.png, 1.png)" in capsys.readouterr().out


def test_find_pictures_names_class_and_place(tmp_path):
    fill(tmp_path, {"train/good/deep": 1, "train/fine": 1})
    found = [(p.label, p.class_name, p.below) for p in find_pictures(tmp_path, "train")]
    assert found == [(0, "fine", "0.png"), (1, "good", "deep/0.png")]
