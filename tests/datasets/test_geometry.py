"""Where the pixels of a picture end up: its axes, its middle, its size, its crop on a GPU."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.seed import generator
from datasets import DataSource, split_one_class
from datasets.augment import AlignedSpec, crop, crop_boxes, draw_tries
from datasets.catalog import resize
from datasets.folder import read_picture
from datasets.pictures import Decoded, open_cache
from tests.datasets.test_folder import save


class OnGpu(torch.Tensor):
    """A tensor that says that it lies on a GPU, so that code takes the way that it takes there."""

    @property
    def device(self):  # type: ignore[override]
        return torch.device("cuda")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.device.__get__:
            return torch.device("cuda")
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("size", [(8, 8), (7, 12)])
def test_the_crop_of_a_gpu_is_that_of_a_cpu(size):
    x = torch.rand(30, 3, *size, generator=generator(0, "crop"))
    box = crop_boxes(draw_tries(30, generator(1, "crop")), size, AlignedSpec())
    there = crop(x.as_subclass(OnGpu), box).as_subclass(torch.Tensor)
    torch.testing.assert_close(there, crop(x, box), atol=1e-5, rtol=0)


def test_arrays_of_torchvision_keep_their_rows_columns_and_channels(monkeypatch):
    class Cifar:
        def __init__(self, root, download, train):
            self.data = np.random.default_rng(int(train)).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
            self.targets = [0, 1, 0, 1]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Cifar)
    split = split_one_class("cifar10", DataSource(), 1, 32)
    for found, data, places in (
        (split.train(), Cifar(0, 0, True), [1, 3]),
        (split.test(), Cifar(0, 0, False), [0, 1, 2, 3]),
    ):
        assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), data.data[places])


def test_images_that_shrink_are_averaged_and_not_sampled():
    """Two of eight columns are white, those between which a sample would fall."""
    place = torch.arange(64) % 8
    striped = (255 * ((place == 3) | (place == 4))).to(torch.uint8).expand(2, 1, 64, 64)
    small = resize(striped, 8).float()
    assert small.shape == (2, 1, 8, 8) and (small[..., 1:-1] - 255 / 4).abs().max() < 16


@pytest.mark.parametrize("size", [(10, 30), (30, 10), (31, 10)])
def test_the_middle_of_wide_and_of_tall_pictures_is_what_is_seen(tmp_path, size):
    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    top, left = (height - 10) // 2, (width - 10) // 2
    picture[top : top + 10, left : left + 10] = np.arange(100).reshape(10, 10, 1) + 100
    found = read_picture(save(Image.fromarray(picture), tmp_path / "a.png"), 10)
    assert np.array_equal(found[0], np.arange(100).reshape(10, 10) + 100)


def test_pictures_of_another_size_get_a_cache_of_their_own(tmp_path):
    paths = [save(Image.new("RGB", (40, 60)), tmp_path / f"{n}.png") for n in range(2)]
    for short_side in (20, 30, 20):
        decoded = Decoded(paths, short_side)
        cached, places, _ = open_cache(decoded, tmp_path / "cache", workers=0, skip_bad=False)
        assert places == [0, 1] and cached[0].shape == (short_side * 3 // 2, short_side, 3)
    assert len(list((tmp_path / "cache").glob("*.u8"))) == 2
