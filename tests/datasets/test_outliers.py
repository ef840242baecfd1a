import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datasets import DATASETS, DataSource
from datasets.outliers import MULTI_CLASS, OUTLIERS, PICTURE_SETS, find_outliers, interpolated
from datasets.sets import image_set
from tests.datasets.test_folder import save


def solid(root, count: int, size=(40, 40)) -> None:
    """Pictures whose red is their number."""
    for n in range(count):
        save(Image.new("RGB", size, (n % 256, n // 256, 0)), root / f"deep/{n:05}.png")


def normal():
    return image_set(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 8, 8) * 11, torch.arange(5))


def find(names, root, size=8, lag=2):
    return find_outliers(names, DataSource(str(root), image_size=size), normal, lag=lag)


def test_published_sets_are_all_known():
    assert set(OUTLIERS) == {
        *("lsun_resize", "lsun_fix", "imagenet_resize", "imagenet_fix", "interp"),
        *("cub", "stanford_dogs", "flowers102", "places365", "food_101", "caltech_256", "dtd", "pets"),
    }
    assert all(name in DATASETS or name in OUTLIERS for names in MULTI_CLASS.values() for name in names)


def test_interp_is_the_exact_mean_with_the_image_a_batch_before():
    out = interpolated(normal(), 2)
    x = normal().images.double()
    assert torch.equal(out.images[:2].double(), x[:2])
    assert torch.equal(out.images[2:].double(), (x[2:] + x[:-2]) / 2)
    assert (out.images[3, 0, 0, 0].item(), out.images[4, 0, 0, 0].item()) == (22.0, 33.0)
    odd = interpolated(
        image_set(torch.tensor([0, 1], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2), [0, 0]), 1
    )
    torch.testing.assert_close(odd.batch(torch.tensor([1])), torch.full((1, 3, 2, 2), 0.5 / 255))


def test_folders_are_read_whole_and_by_path(tmp_path):
    solid(tmp_path / "LSUN_fix", 3, (8, 8))
    solid(tmp_path / "elsewhere", 2)
    found = {k: load() for k, load in find(["lsun_fix", f"folder:{tmp_path}/elsewhere", "interp"], tmp_path).items()}
    assert [len(data) for data in found.values()] == [3, 2, 5]
    assert found["lsun_fix"].images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert len(found["lsun_fix"].paths) == 3


def test_folders_of_the_published_sets():
    assert {name: folder for name, (folder, _) in PICTURE_SETS.items()} == {
        **{"lsun_resize": "LSUN_resize", "lsun_fix": "LSUN_fix", "imagenet_resize": "Imagenet_resize"},
        **{"imagenet_fix": "Imagenet_fix", "stanford_dogs": "stanford_dogs", "cub": "cub200", "pets": "pets"},
        **{"flowers102": "flowers102", "places365": "places365", "food_101": "food-101/images"},
        **{"caltech_256": "caltech-256", "dtd": "dtd/images"},
    }


@pytest.mark.parametrize(
    "name, reason", [("folder:", "give its path"), ("folder", "give its path"), ("interp", "mixed")]
)
def test_sets_that_make_no_sense_are_reported(name, reason, tmp_path, monkeypatch):
    solid(tmp_path, 2)
    monkeypatch.chdir(tmp_path)  # an empty path would be the folder one stands in
    with pytest.raises(UserError, match=reason):
        find([name], tmp_path, lag=5)


def test_large_sets_are_drawn_the_same_every_time(tmp_path):
    solid(tmp_path / "pets", 3100, (9, 9))
    first, second = (find(["pets"], tmp_path)["pets"]() for _ in range(2))
    assert len(first) == 3000 and first.paths == second.paths and len(set(first.paths)) == 3000


def test_large_pictures_are_framed_like_those_of_imagenet(tmp_path):
    """Short side 8/7 of the size, centre crop: a border of a sixteenth is cut off."""
    array = np.zeros((64, 64, 3), np.uint8)
    array[3:61, 3:61] = 255
    save(Image.fromarray(array), tmp_path / "dtd/images/a.png")
    assert find(["dtd"], tmp_path, size=28)["dtd"]().images.min() > 200


def test_all_missing_sets_are_named_before_anything_is_decoded(tmp_path):
    solid(tmp_path / "LSUN_fix", 1)
    (tmp_path / "LSUN_fix/deep/00000.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as told:
        find(["lsun_fix", "svhn", "lsun_resize", "cub", f"folder:{tmp_path}/nothing"], tmp_path)
    text = str(told.value)
    assert text.startswith("--ood_dataset: not found:")
    for name in ("svhn", "lsun_resize", "cub", "folder:", "--ood_data_path"):
        assert name in text
    assert "lsun_fix" not in text


def test_data_sets_of_the_catalog_come_in_the_size_that_is_asked_for(tmp_path):
    data = find(["digits"], tmp_path, size=16)["digits"]()
    assert data.images.shape == (599, 3, 16, 16)
