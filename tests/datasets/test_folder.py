import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datasets import DATASETS, DataSource, ImageSet
from datasets.folder import class_names, read_picture


def load(root, split: str, label: int | None = None, skip_bad: bool = False) -> ImageSet:
    return DATASETS["folder"].load(DataSource(str(root), image_size=8, skip_bad_images=skip_bad), split, label)


def corner_picture(size=(16, 16)) -> Image.Image:
    """Black with a red upper left quarter."""
    array = np.zeros((*size[::-1], 3), np.uint8)
    array[: size[1] // 2, : size[0] // 2, 0] = 255
    return Image.fromarray(array)


def save(picture: Image.Image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "bmp", "webp", "tif", "PNG"])
def test_every_listed_kind_is_read(tmp_path, ending):
    path = save(corner_picture(), tmp_path / f"a.{ending}")
    out = read_picture(path, 16).astype(int)
    assert out.shape == (3, 16, 16)
    assert out[0, 3, 3] > 200 and out[0, 12, 12] < 40 and out[1:].max() < 60


def test_gray_palette_alpha_and_16_bit_look_as_a_person_would_expect(tmp_path):
    half = np.full((8, 8), 128, np.uint8)
    cases = {
        "gray": (Image.fromarray(half), [128, 128, 128]),
        "palette": (Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4), [10, 200, 30]),
        "bilevel": (Image.new("1", (8, 8), 1), [255, 255, 255]),
        "transparent": (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), [255, 255, 255]),
        "half_transparent": (Image.new("RGBA", (8, 8), (255, 0, 0, 128)), [255, 127, 127]),
        "gray_alpha": (Image.new("LA", (8, 8), (0, 255)), [0, 0, 0]),
        "sixteen_bit": (Image.fromarray(np.full((8, 8), 0x8080, np.uint16)), [128, 128, 128]),
    }
    for name, (picture, expected) in cases.items():
        out = read_picture(save(picture, tmp_path / f"{name}.png"), 8)
        assert np.abs(out.reshape(3, -1).T.astype(int) - expected).max() <= 1, name
    cmyk = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "cmyk.jpg")
    assert read_picture(cmyk, 8)[0].min() > 200 and read_picture(cmyk, 8)[1].max() < 60


def test_exif_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated 90 degrees clockwise
    path = save(corner_picture(), tmp_path / "a.png", exif=exif)
    out = read_picture(path, 16)
    assert out[0, 3, 12] == 255 and out[0, 3, 3] == 0


def test_short_side_is_resized_and_the_centre_cropped(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    out = read_picture(save(Image.fromarray(wide), tmp_path / "a.png"), 10)
    assert out.shape == (3, 10, 10) and out.min() == 255


def test_large_jpegs_keep_their_content_when_decoded_small(tmp_path):
    path = save(corner_picture((800, 800)), tmp_path / "a.jpg", quality=95)
    out = read_picture(path, 16).astype(int)
    assert out[0, 3, 3] > 245 and out[0, 12, 12] < 10


def fill(root, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        for n in range(count):
            save(corner_picture(), root / name / f"{n}.png")


def test_classes_are_the_names_in_train_then_those_only_in_test(tmp_path):
    fill(tmp_path, {"train/good": 2, "train/fine": 1, "test/good": 1, "test/crack": 2, "test/aaa": 1})
    assert class_names(tmp_path) == ["fine", "good", "aaa", "crack"]
    data = load(tmp_path, "test")
    assert data.images.shape == (4, 3, 8, 8) and data.labels.tolist() == [1, 2, 3, 3]
    assert [p.split("/")[-2] for p in data.paths] == ["good", "aaa", "crack", "crack"]
    assert load(tmp_path, "train", label=1).labels.tolist() == [1, 1]


def test_a_damaged_picture_is_named_or_skipped_and_counted(tmp_path, capsys):
    fill(tmp_path, {"train/good": 3})
    whole = (tmp_path / "train/good/1.png").read_bytes()
    (tmp_path / "train/good/1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/good/notes.txt").write_text("not a picture, and not meant to be one")
    with pytest.raises(UserError, match=r"1\.png.*--skip_bad_images"):
        load(tmp_path, "train")
    data = load(tmp_path, "train", skip_bad=True)
    assert len(data) == len(data.labels) == len(data.paths) == 2
    assert [p.split("/")[-1] for p in data.paths] == ["0.png", "2.png"]
    assert "left out 1 of 3" in capsys.readouterr().out


def test_hidden_folders_are_no_classes_and_names_that_differ_in_case_are_reported(tmp_path):
    fill(tmp_path, {"train/good": 1, "train/.ipynb_checkpoints": 1, "train/__MACOSX": 1, "test/good": 1})
    assert class_names(tmp_path) == ["good"]
    fill(tmp_path, {"test/Good": 1})
    with pytest.raises(UserError, match="differ in case"):
        class_names(tmp_path)


def test_missing_and_empty_folders_are_reported(tmp_path):
    with pytest.raises(UserError, match="--data_path: no folder .*train"):
        class_names(tmp_path)
    (tmp_path / "train/good").mkdir(parents=True)
    with pytest.raises(UserError, match="--data_path: no pictures"):
        load(tmp_path, "train")
