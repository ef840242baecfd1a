"""Odd and damaged files from many sources: each is read as it should look, or named in one line, in little memory.

The colours of READ are what the pictures show: those that are plain say so (red, green, blue), those of one motif agree
in all formats, photographs were compared by eye, and 16-bit ones are worked out below from their values.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import DATASETS, DataSource
from datasets.folder import read_picture
from tests.conftest import ROOT, SHARED

MESSY = SHARED / "data/messy"
pytestmark = [
    pytest.mark.skipif(not MESSY.is_dir(), reason=f"{MESSY} is not on this machine"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Pillow's, of odd metadata
]

PORTRAIT, DICE, RED_ON_BLACK = (90, 80, 95), (196, 186, 187), (30, 5, 7)
READ: dict[str, tuple[int, int, int]] = {
    **dict.fromkeys("bad_icc.png hopper.Lab.tif hopper.avif hopper.iccprofile.tif hopper.webp".split(), PORTRAIT),
    **dict.fromkeys("hopper_16bit_qtables.jpg hopper_bigtiff.tif hopper_orientation_5.webp".split(), PORTRAIT),
    **dict.fromkeys("hopper_orientation_6.jpg jpeg_named.png png_named.jpg trailing_garbage.jpg".split(), PORTRAIT),
    **dict.fromkeys("transparent.gif transparent.png transparent.webp".split(), DICE),
    **dict.fromkeys("pil_sample_cmyk.jpg tiff_strip_cmyk_jpeg.tif".split(), RED_ON_BLACK),
    **dict.fromkeys("Landscape_1.jpg Landscape_6.jpg".split(), (109, 129, 152)),
    **dict.fromkeys("chi.gif gif_named.jpg".split(), (252, 253, 249)),
    **dict.fromkeys("sugarshack.mpo sugarshack_bad_mpo_header.jpg".split(), (123, 112, 101)),
    **dict.fromkeys("basn0g01.png xcsn0g01.png".split(), (125, 125, 125)),
    **dict.fromkeys("icc-after-SOF.jpg multiple_exif.jpg no_palette.gif".split(), (0, 0, 0)),
    **dict.fromkeys("broken_exif_dpi.jpg multipage.tiff".split(), (0, 128, 0)),
    **{"blend_op_over.png": (255, 0, 0), "orientation_rectangle.jpg": (254, 0, 0), "s01n3p01.png": (0, 0, 255)},
    **{"tRNS_null_1x1.png": (255, 255, 255), "tm3n3p02.png": (128, 128, 255), "basn2c16.png": (128, 128, 44)},
    **{"hopper_gray.jpg": (85, 85, 85), "hopper_bad_exif.jpg": (127, 127, 127), "Portrait_8.jpg": (141, 153, 159)},
    **{"icc_profile_big.jpg": (61, 111, 171), "exif_typeerror.jpg": (160, 159, 142), "testimgari.jpg": (168, 80, 74)},
    **{"junk_jpeg_header.jpg": (124, 123, 123), "jpeg_ff00_header.jpg": (120, 79, 81), "iss634.webp": (135, 137, 90)},
    **{"basn6a16.png": (215, 215, 195), "basi3p08.png": (135, 135, 111), "tbbn3p08.png": (167, 175, 169)},
    **{"1_trns.png": (124, 124, 124), "rgb_trns.png": (128, 176, 163), "LA_8__29x100.png": (191, 191, 191)},
    **{"xmp_tags_orientation.png": (203, 172, 115), "tiff_16bit_RGBa.tiff": (210, 202, 197)},
    **{"g4_orientation_6.tif": (212, 212, 212), "old-style-jpeg-compression.tif": (62, 72, 63)},
    **{"truncated_app14.jpg": (28, 4, 3), "badrle.bmp": (119, 23, 195), "star.avifs": (255, 249, 223)},
    **{"elongated_1800x1.png": (234, 237, 238), "elongated_3x1200.jpg": (253, 254, 253)},
}
# Largest value of the range that each has by itself. All of them together have 65535.
DEEP = {"basn0g16.png": 65535, "L_16__128x128.png": 65535, "16bit.s.tif": 65535, "16bit.cropped.tif": 1023}
DEEP |= {"16bit.MM.deflate.tif": 1023, "12bit.cropped.tif": 255, "i_trns.png": 255}
DARK = ["12bit.cropped.tif", "16bit.MM.deflate.tif", "16bit.cropped.tif", "i_trns.png"]

TRUNCATED, DAMAGED, LARGE = (
    "truncated",
    "no picture of a kind that can be read, or its header is corrupt",
    "pixels, more",
)
REFUSED = {
    **dict.fromkeys("half.jpg shortfile.bmp truncated_image.png truncated_jpeg.jpg ultrahdr.jpg".split(), TRUNCATED),
    **dict.fromkeys("broken.png header_only.jpg monkey12.jpg xhdn0g08.png xs1n0g01.png".split(), DAMAGED),
    **dict.fromkeys("multipage_rgb.tif oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif".split(), "a TIFF of a layout"),
    **dict.fromkeys("bomb_header_60000x60000.png bomb_valid_20000x20000_1bit.png reallybig.bmp".split(), LARGE),
    **dict.fromkeys("decompression_bomb.gif large_valid_11000x11000_1bit.png".split(), LARGE),
    **{"crash-2020-10-test.tif": "header is corrupt", "png_decompression_dos.png": "too large"},
    **{"truncated_end_chunk.png": "Truncated", "seek_too_large.tif": "Unable to seek", "zero_byte.jpg": "empty"},
    **{"broken_data_stream.png": "unrecognized data", "xdtn0g01.png": "cannot load", "heic_named.jpg": "HEIC"},
    **{
        "html_error_page.jpg": "web page",
        "git_lfs_pointer.png": "git lfs pull",
        "float_nan_inf.tif": "NaN or infinity",
    },
    **{"10ct_32bit_128.tiff": "values -3.14094..3.14068 have no usual range: say --value_range"},
}
LEFT_OUT = {"._hopper.jpg", "Thumbs.db", "zPug_3.heic", "truncated.heic", "chelsea.jxl"}
ODD_NAMES = [
    *("$HOME `id` ;x.jpg", "-rf.jpg", "UPPER.JPG", "Upper.Jpg", "back\\slash.jpg", "comma,semi;colon.jpg", "jpeg.jpeg"),
    *(
        "latin1_\udce9.jpg",
        "link.jpg",
        "new\nline.jpg",
        "n" * 246 + ".jpg",
        "percent%20%s.jpg",
        'quote\'s "double".jpg',
    ),
    *("tab\there.jpg", "trailing space .jpg", "two.dots.tar.jpg", "with space.jpg", "x.JPEG", "y.jfif"),
    *("é_composed.jpg", "e\u0301_decomposed.jpg", "ünïcödé 图片 😀.jpg"),
]
COUNT = len(READ) + len(DEEP) + len(ODD_NAMES)
SAID = (
    "left out 2 hidden files, 2 .heic and 1 .jxl (not readable here; convert them to PNG or JPEG),"
    " 2 with other endings (none 1, .db 1), 1 broken link"
)


def grey_of(name: str, top: int) -> float:
    """Mean of a 16-bit picture in the range 0..top, by its values."""
    with Image.open(MESSY / "files" / name) as picture:
        values = np.array(picture, float)
        white = values == picture.info.get("transparency", -1)
    return np.where(white, 255, values * 255 / top).mean()


def test_every_file_is_accounted_for():
    assert {path.name for path in (MESSY / "files").iterdir()} - {"LIST.md"} == {*READ, *DEEP, *REFUSED, *LEFT_OUT}


@pytest.mark.parametrize("name", READ)
def test_a_file_looks_as_it_should(name):
    image = read_picture(MESSY / "files" / name, 64)
    assert image.shape == (3, 64, 64) and np.abs(image.mean((1, 2)) - READ[name]).max() < 2.5


@pytest.mark.parametrize("name", DEEP)
def test_a_file_of_many_levels_shows_them(name):
    image = read_picture(MESSY / "files" / name, 64)
    assert (image == image[0]).all() and abs(image.mean() - grey_of(name, DEEP[name])) < 0.7 and image.max() > 12


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_an_error_with_a_reason(name, tmp_path):
    (tmp_path / "train/one").mkdir(parents=True)
    (tmp_path / "train/one" / name).symlink_to(MESSY / "files" / name)
    with pytest.raises(Exception, match=re.escape(REFUSED[name])) as told:
        DATASETS["folder"].load(DataSource(str(tmp_path), image_size=16), "train", None)
    text = str(told.value)
    assert text.startswith(f"--data_path: cannot read {tmp_path}/train/one/{name} (") and text.isprintable()


def test_motifs_agree_and_stand_upright():
    def seen(name: str) -> np.ndarray:
        return read_picture(MESSY / "files" / name, 64).astype(int)

    for name, colour in READ.items():
        if colour == PORTRAIT:
            assert np.abs(seen(name) - seen("hopper.iccprofile.tif")).mean() < 8, name
    assert np.abs(seen("Landscape_6.jpg") - seen("Landscape_1.jpg")).mean() < 6  # but for the number on it
    assert np.abs(seen("transparent.gif") - seen("transparent.png")).mean() < 4
    assert np.abs(seen("16bit.MM.deflate.tif") - seen("16bit.cropped.tif")).max() == 0
    assert seen("i_trns.png")[:, 32, 32].min() == 255  # what is transparent in the middle


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """All files and all names, as one class of both splits and as a set of outliers."""
    root = tmp_path_factory.mktemp("messy")
    one = root / "train/one"
    shutil.copytree(MESSY / "files", one / "files", copy_function=shutil.copyfile)
    (one / "files/LIST.md").unlink(missing_ok=True)
    with tarfile.open(MESSY / "odd_names.tar") as tar:
        # Python 3.11 knows filters from 3.11.4 on; Python 3.14 has another default.
        tar.extractall(one, **({"filter": "fully_trusted"} if hasattr(tarfile, "data_filter") else {}))
    for copy in ("test/one", "others"):
        shutil.copytree(one, root / copy, symlinks=True, copy_function=shutil.copyfile)
    return root


def run(data: Path, *commands: list[str]) -> tuple[str, str]:
    """What train.py and then eval.py print, in one process, which may take 2 GiB at most."""
    common = f"--dataset folder --model resnet8 --image_size 16 --device cpu --one_class_idx 0 --data_path {data}"
    trained, evaluated = ([*common.split(), "--skip_bad_images", *more] for more in commands)
    program = "import sys, train, eval\nsys.exit(train.main({!r}) or print('=' * 9) or eval.main({!r}))"
    command = [sys.executable, "-c", program.format(trained, evaluated)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(data / "out", "w+") as out, open(data / "err", "w+") as err:
        child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=env)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    assert child.returncode == 0, texts
    assert usage.ru_maxrss < 2 * 1024**2  # KiB
    return texts[0], texts[1]


def check_told(out: str, place: Path, left_out_of: Path) -> None:
    """What is not read is named in one line each, what is left out in one line."""
    assert out.count(f"note: {left_out_of}: {SAID}\n") == 1
    for name, why in REFUSED.items():
        (line,) = re.findall(rf"^--skip_bad_images: cannot read {place}/.*/{re.escape(name)} \((.*)\)$", out, re.M)
        assert why in line
    assert f"left out {len(REFUSED)} of {COUNT + len(REFUSED)} pictures in {place}\n" in out
    dark = f"{len(DARK)} with values so low in the range 0..65535 that they come out black ({', '.join(DARK)})"
    assert f"note: {place}: {dark}; --value_range LOW HIGH sets another\n" in out


def test_training_and_evaluation_on_all_of_them(data, tmp_path):
    run_folder = tmp_path / "folder_resnet8_unsup_simclr_one_class_0"
    trains = ["--mode", "simclr", "--epochs", "1", "--batch_size", "32", "--log_root", str(tmp_path)]
    evaluates = ["--mode", "ood_pre", "--load_path", str(run_folder), "--ood_dataset", f"folder:{data}/others"]
    out, err = run(data, trains, [*evaluates, "--save_score"])
    training, evaluation = out.split("=========\n")
    check_told(training, data / "train/one", data / "train")
    assert training.count("cannot read") == len(REFUSED) and f"{COUNT} images of class" in training
    check_told(evaluation, data / "test/one", data / "test")
    check_told(evaluation, data / "others", data / "others")
    assert f"{COUNT} against {COUNT}" in evaluation
    assert err == ""
    tables = b"".join(path.read_bytes() for path in run_folder.glob("scores_*.csv"))
    assert tables.count(os.fsencode(data) + b"/others/odd_names/latin1_\\udce9.jpg") == 1


def test_all_of_them_together_look_as_they_should(data):
    source = DataSource(str(data), image_size=64, skip_bad_images=True)
    found = DATASETS["folder"].load(source, "train", 0)
    paths = [Path(path) for path in found.paths]
    means = dict(zip((path.name for path in paths), found.images.float().mean((2, 3)).numpy(), strict=True))
    assert {path.name for path in paths if path.parent.name == "odd_names"} == set(ODD_NAMES)
    expected = {**READ, **dict.fromkeys(ODD_NAMES, PORTRAIT)}
    assert means.keys() == {*expected, *DEEP}
    for name, colour in expected.items():
        assert np.abs(means[name] - colour).max() < 2.5, name
    for name in DEEP:
        assert abs(means[name].mean() - grey_of(name, 65535)) < 0.7, name
