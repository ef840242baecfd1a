"""Loading: plain images, pad-and-crop, flips, and the number of channels, each against a plain definition."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.dist import World
from common.errors import UserError
from common.seed import generator
from datasets import DataSource, ImageSet, PictureSet, sets, split_one_class
from datasets.augment import AlignedSpec
from datasets.loading import Loading, to_channels
from datasets.outliers import find_outliers
from datasets.sets import image_set
from datasets.shifts import ShiftSpec
from datasets.views import DrawSpec, draw_views, train_views
from tests.datasets.test_folder import save
from tests.datasets.test_one_class import write_idx
from tests.datasets.test_pictures import photographs

PARTS = [torch.tensor([4, 0, 6, 2, 5]), torch.tensor([1, 3])]


def noise(n: int = 7, channels: int = 3, size: tuple[int, int] = (6, 9)) -> ImageSet:
    pixels = torch.randint(0, 256, (n, channels, *size), dtype=torch.uint8, generator=generator(0, "noise"))
    return image_set(pixels, torch.arange(n) % 2)


def epoch_of(data: ImageSet | PictureSet, loading: Loading, epoch: int = 1, **more) -> list[Tensor]:
    return list(data.batches(PARTS, loading, seed=3, epoch=epoch, **more))


# ------------------------------------------------------------------------------------------------------- pixels


def test_plain_images_are_those_of_the_set_without_a_draw(monkeypatch):
    monkeypatch.setattr(sets, "generator", lambda *args, **kwargs: pytest.fail("a draw"))
    data = noise()
    for views in (1, 2):
        for part, images in zip(PARTS, epoch_of(data, Loading(views, flip=False)), strict=True):
            assert images.dtype == torch.uint8 and torch.equal(images, data.images[part].expand(views, -1, -1, -1, -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_pad_and_crop_is_a_window_of_the_padded_image_pixel_by_pixel(channels):
    """Against a loop over pixels, from the same draws."""
    data, pad = noise(channels=channels), 2
    for step, images in enumerate(epoch_of(data, Loading(2, flip=False, pad=pad, channels=None))):
        gen = generator(3, "pad-and-crop", 1, step)
        start = torch.randint(2 * pad + 1, (2, len(PARTS[step]), 2), generator=gen)
        expected = np.zeros((2, len(PARTS[step]), channels, 6, 9), np.uint8)
        for v, b, row, column in np.ndindex(2, len(PARTS[step]), 6, 9):
            top, left = (start[v, b] - pad).tolist()
            if 0 <= row + top < 6 and 0 <= column + left < 9:
                expected[v, b, :, row, column] = data.images[PARTS[step][b], :, row + top, column + left]
        assert torch.equal(images, torch.from_numpy(expected))


def test_every_place_of_a_crop_is_equally_likely_and_drawn_for_each_view_image_step_and_epoch():
    """White images: the black rows and columns that come in say where a crop was taken."""
    data = image_set(torch.full((400, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(400))
    parts = list(torch.arange(400).split(200))

    def places(epoch: int) -> list[Tensor]:
        """Of each step, the crop's offset from the middle, (V, B, 2)."""
        found = []
        for images in data.batches(parts, Loading(2, flip=False, pad=2), seed=0, epoch=epoch):
            white = images[:, :, 0] > 0
            sides = [
                white.any(other).long().argmax(-1) - white.any(other).flip(-1).long().argmax(-1) for other in (3, 2)
            ]
            found.append(torch.stack(sides, -1))
        return found

    seen = [view for step in (*places(1), *places(2)) for view in step]
    for view in seen:
        counts = torch.stack([(view == offset).sum(0) for offset in range(-2, 3)])
        assert counts.sum() == 400 and counts.min() > 18 and counts.max() < 65  # 40 expected, 5.7 standard deviation
    agree = [(a == b).float().mean() for n, a in enumerate(seen) for b in seen[:n]]
    assert max(agree) < 0.4  # a fifth, by chance
    rows, columns = seen[0].unbind(-1)
    assert (rows == columns).float().mean() < 0.4


def test_padding_changes_no_flip():
    """The middle row of images that differ by column only: mirrored or not, with padding and without."""
    ramp = torch.linspace(10, 250, 12).to(torch.uint8).expand(7, 3, 5, 12)
    data = image_set(ramp, torch.zeros(7))

    def mirrored(loading: Loading) -> Tensor:
        return torch.cat([x[..., 0, 2, 4] > x[..., 0, 2, 7] for x in epoch_of(data, loading)], 1)

    flips = mirrored(Loading(2))
    assert torch.equal(mirrored(Loading(2, pad=2)), flips) and 0 < flips.sum() < flips.numel()


def test_padded_crops_of_several_ranks_are_those_of_one_and_an_epoch_goes_on_from_any_step():
    data, loading = noise(), Loading(2, pad=3)
    whole = epoch_of(data, loading)
    assert torch.equal(epoch_of(data, loading, first=1)[0], whole[1])
    for rank in range(3):
        world = World(rank, 3)
        for images, expected in zip(epoch_of(data, loading, world=world), whole, strict=True):
            assert torch.equal(images, expected[:, world.shard(expected.shape[1]).indices()])


# ----------------------------------------------------------------------------------------------------- channels


def test_luma_is_pillows():
    corners = torch.cartesian_prod(*[torch.arange(0, 256, 15)] * 3).to(torch.uint8)
    pixels = torch.cat([corners, noise(1, size=(100, 100)).images[0].flatten(1).T]).T.unsqueeze(1)
    grey = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).convert("L")
    assert np.array_equal(to_channels(pixels[None], 1)[0, 0], np.asarray(grey))
    data = noise(1200, size=(4, 4))  # more than a block
    assert torch.equal(data.with_channels(1).images, to_channels(data.images, 1))


def test_grey_is_repeated_and_found_again():
    grey = noise(1200, channels=1, size=(4, 4))
    colour = grey.with_channels(3)
    assert colour.channels == 3 and torch.equal(colour.images, grey.images.repeat(1, 3, 1, 1))
    for data in (grey, colour):
        assert torch.equal(data.with_channels(None).images, grey.images)
        assert torch.equal(data.with_channels(1).images, grey.images)
    pixels = colour.images.clone()
    pixels[1100, 2, 3, 3] ^= 1  # one sample of one image
    assert image_set(pixels, colour.labels).with_channels(None).channels == 3
    assert grey.with_channels(1) is grey and noise().with_channels(None).channels == 3


@pytest.mark.parametrize("bad", [lambda: to_channels(torch.zeros(1, 2, 2, 2), 3), lambda: noise().with_channels(2)])
def test_other_numbers_of_channels_are_refused(bad):
    with pytest.raises(ValueError, match="cannot convert"):
        bad()


def test_luma_of_other_types_is_refused():
    with pytest.raises(ValueError, match="float16"):
        to_channels(noise().images.half(), 1)


@pytest.mark.parametrize("channels", [1, 3, None])
def test_batches_have_the_channels_that_loading_says(channels):
    for data in (noise(), noise(channels=1)):
        expected = data.channels if channels is None else channels
        plain = epoch_of(data, Loading(flip=False, channels=channels))[0][0]
        assert torch.equal(plain, to_channels(data.images[PARTS[0]], expected))


def test_sets_that_are_grey_by_nature_have_one_channel_and_three_for_who_asks(tmp_path):
    images = noise(5, channels=1, size=(28, 28)).images
    for split in ("train", "t10k"):
        write_idx(tmp_path / f"MNIST/raw/{split}-images-idx3-ubyte.gz", images[:, 0].numpy())
        write_idx(tmp_path / f"MNIST/raw/{split}-labels-idx1-ubyte.gz", np.array([1, 0, 1, 2, 9], np.uint8))
    split = split_one_class("mnist", DataSource(str(tmp_path), image_size=28), 1, 32)
    for load, expected in ((split.train, images[[0, 2]]), (split.test, images)):
        for channels in (1, None):
            assert torch.equal(load(channels).images, expected)
        assert torch.equal(load().images, expected.repeat(1, 3, 1, 1))
        assert load().fingerprint == load(1).fingerprint
    assert torch.equal(split.stream(AlignedSpec(), 1).images, images[[0, 2]])
    digits = split_one_class("digits", DataSource(image_size=8), 3, 8)
    assert 3 * digits.train(None).images.untyped_storage().nbytes() == digits.train().images.untyped_storage().nbytes()


def test_a_folder_has_one_channel_where_all_of_its_pictures_are_grey(tmp_path):
    rng = np.random.default_rng(0)
    for n, mode in enumerate(["L", "RGB"]):  # both grey
        picture = Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).convert(mode)
        save(picture, tmp_path / f"train/good/{n}.png")
    save(Image.new("RGB", (9, 9), "red"), tmp_path / "test/good/0.png")
    split = split_one_class("folder", DataSource(str(tmp_path), image_size=9), 0, 9)
    train = split.train(None)
    assert train.channels == 1 and torch.equal(train.with_channels(3).images, split.train().images)
    assert split.test(None).channels == 3
    assert split.test(1).images.unique().tolist() == [76]  # of pure red: 0.299 * 255
    save(Image.new("RGB", (9, 9), (1, 1, 2)), tmp_path / "train/good/2.png")
    assert split.train(None).channels == 3


def test_outliers_have_the_channels_of_the_normal_images(tmp_path):
    save(Image.new("RGB", (9, 9), "red"), tmp_path / "a.png")
    normal = split_one_class("digits", DataSource(image_size=8), 3, 8).test(1)
    names = ["digits", "interp", f"folder:{tmp_path}"]
    found = find_outliers(names, DataSource(image_size=8), lambda: normal, lag=2, channels=1)
    assert [load().channels for load in found.values()] == [1, 1, 1]
    found = find_outliers(names, DataSource(image_size=8), lambda: normal.with_channels(3), lag=2)
    assert [load().channels for load in found.values()] == [3, 3, 3]


def test_one_channel_goes_through_parts_batches_and_plain_views_but_not_through_the_augmentation():
    data = noise(channels=1, size=(8, 8)).to(torch.device("cpu"))
    some = data.where(data.labels == 1)
    assert some.channels == 1 and torch.equal(some.batch(torch.tensor([1])) * 255, data.images[3:4].float())
    spec = DrawSpec(ShiftSpec("rotation").functions(), None, seed=0, batch_size=3)
    views = torch.cat([views for _, views in draw_views(data, spec, 0)]).unflatten(0, (7, 4))
    for q in range(4):
        assert torch.equal(views[:, q], torch.rot90(data.batch(torch.arange(7)), q, (2, 3)))
    with pytest.raises(ValueError, match="three channels, got 1"):
        train_views(data.images[None], spec.shifts, AlignedSpec(), generator(0, "test"))


# ------------------------------------------------------------------------- pictures decoded during training


def test_decoded_pictures_are_flipped_only_where_asked_and_their_crops_stay():
    ramp = np.linspace(0, 250, 8).astype(np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2)
    data = PictureSet([ramp] * 7, torch.zeros(7), AlignedSpec(), 8, 0)
    for plain, flipped in zip(epoch_of(data, Loading(2, flip=False)), epoch_of(data, Loading(2)), strict=True):
        assert (plain[..., 0] <= plain[..., -1]).all()
        mirrored = flipped[..., 0, 0, 0] > flipped[..., 0, 0, -1]
        assert torch.equal(torch.where(mirrored[..., None, None, None], flipped.flip(-1), flipped), plain)
        assert mirrored.any()


@pytest.mark.parametrize("loading", [Loading(pad=4), Loading(channels=1)], ids=["pad", "one channel"])
def test_decoded_pictures_are_neither_padded_nor_grey(loading):
    data = PictureSet([np.zeros((8, 8, 3), np.uint8)] * 7, torch.zeros(7), AlignedSpec(), 8, 0)
    with pytest.raises(UserError, match="--dataset: pictures that are decoded during training"):
        epoch_of(data, loading)


def test_one_channel_of_a_data_set_that_is_decoded_during_training_is_refused_by_its_name(tmp_path):
    photographs(tmp_path, {"one_class_train/acorn": 2})
    split = split_one_class("imagenet", DataSource(str(tmp_path), image_size=28, num_worker=0), 0, 28)
    with pytest.raises(UserError, match="--dataset imagenet: .* three channels only"):
        split.stream(AlignedSpec(), 1)
    assert split.stream(AlignedSpec(), None).channels == 3 and split.train(1).channels == 1
