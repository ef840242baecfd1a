import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.dist import World
from common.errors import UserError
from datasets import DATASETS, DataSource, PictureSet, split_one_class
from datasets.augment import AlignedSpec
from datasets.loading import Loading
from datasets.pictures import Decoded, open_cache
from datasets.sets import floats
from tests.datasets.test_folder import save

WIDE = AlignedSpec()
WHOLE = AlignedSpec(resize_factor=1.0, resize_fix=True)


def photographs(root, counts: dict[str, int]) -> None:
    """Smooth random pictures of several shapes, as ImageNet-30 lies on disk."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        for n in range(count):
            small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            size = [(70, 60), (60, 90), (64, 64)][n % 3]
            path = root / "ImageNet" / name / f"{n}.jpg"
            save(small.resize(size, Image.Resampling.BICUBIC), path, quality=95)


@pytest.fixture
def source(tmp_path):
    photographs(tmp_path, {"one_class_train/acorn": 7, "one_class_train/tank": 5, "one_class_test/acorn": 3})
    photographs(tmp_path, {"one_class_test/tank": 2})
    return DataSource(str(tmp_path), image_size=28, num_worker=0)


def stream(source, spec=WIDE) -> PictureSet:
    return DATASETS["imagenet"].stream(source, spec, None)


def one_epoch(data: PictureSet, count: int = 2, epoch: int = 1, parts=((0, 3, 6), (1, 2))) -> list[torch.Tensor]:
    return list(data.batches([torch.as_tensor(part) for part in parts], Loading(views=count), seed=0, epoch=epoch))


def test_ranks_decode_their_shard_of_the_same_views(source):
    data, parts = stream(source), [torch.tensor([0, 3, 6, 1, 2]), torch.tensor([5, 4])]
    whole = list(data.batches(parts, Loading(views=2), seed=0, epoch=1))
    for rank in range(3):
        world = World(rank, 3)
        local = data.batches(parts, Loading(views=2), seed=0, epoch=1, world=world)
        for all_images, images in zip(whole, local, strict=True):
            assert torch.equal(images, all_images[:, world.shard(all_images.shape[1]).indices()])


def test_classes_labels_and_one_class_splits(source):
    split = split_one_class("imagenet", source, 1, 224)
    assert split.class_names == ["acorn", "tank"] and split.n_classes == 2
    assert len(split.train()) == len(split.stream(AlignedSpec())) == 5
    test = split.test()
    assert split.normal(test.labels).tolist() == [False] * 3 + [True] * 2 and test.images.shape == (5, 3, 28, 28)
    assert split_one_class("imagenet", source, None, 224).stream(AlignedSpec()).labels.tolist() == [0] * 7 + [1] * 5
    with pytest.raises(UserError, match="--one_class_idx must lie in 0..1"):
        split_one_class("imagenet", source, 2, 224)


def test_middles_are_the_centre_of_the_picture_at_eight_sevenths(source):
    with Image.open(Path(source.data_path) / "ImageNet/one_class_train/acorn/0.jpg") as picture:
        shrunk = np.asarray(picture.resize((37, 32), Image.Resampling.BILINEAR))
    expected = torch.from_numpy(shrunk[2:30, 4:32].transpose(2, 0, 1).copy())
    data = stream(source)
    assert data.size == (28, 28)
    torch.testing.assert_close(data.batch(torch.tensor([0]))[0], expected / 255)
    assert torch.equal(DATASETS["imagenet"].load(source, "train", 0).images[0], expected)


def test_a_crop_is_the_drawn_box_of_the_picture_resized(source):
    """With the whole frame as the crop, a copy is the picture squeezed into a square, or its mirror image."""
    data = stream(source, WHOLE)
    copies = floats(one_epoch(data, count=20, parts=[(2,)])[0])
    squeezed = Image.fromarray(data.pixels[2]).resize((28, 28), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.asarray(squeezed).transpose(2, 0, 1).copy()) / 255
    flipped = [not torch.allclose(copy[0], expected, atol=1.1 / 255) for copy in copies]
    mirrored = [copy[0] for copy, other in zip(copies, flipped, strict=True) if other]
    assert all(torch.allclose(image, expected.flip(-1), atol=1.1 / 255) for image in mirrored)
    assert 3 < sum(flipped) < 17


def test_crops_cover_the_share_of_the_area_that_is_asked_for(tmp_path):
    """A picture whose red says where a pixel lies: the spread of a crop's red tells its width."""
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100), np.arange(100)[:, None]
    path = save(Image.fromarray(ramp), tmp_path / "a.png")
    data = PictureSet(Decoded([path], 100), torch.zeros(1), AlignedSpec(resize_factor=0.25, resize_fix=True), 50, 0)
    copies = floats(one_epoch(data, count=40, parts=[(0,)])[0])
    red, green = copies[:, 0, 0], copies[:, 0, 1]
    width = (red[:, :, -1] - red[:, :, 0]).abs().mean(1) * 255 * 50 / 49
    height = (green[:, -1] - green[:, 0]).mean(1) * 255 * 50 / 49
    assert ((width * height / 10_000) - 0.25).abs().max() < 0.02
    assert (width / height).log().abs().max() < np.log(4 / 3) + 0.05 and (width / height).log().std() > 0.05


def test_draws_follow_seed_and_epoch_and_go_by_index(source):
    data = stream(source)
    a, b = one_epoch(data), one_epoch(data)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert a[0].shape == (2, 3, 3, 28, 28) and not torch.equal(a[0][0], a[0][1])
    assert not torch.equal(a[0], one_epoch(data, epoch=2)[0])
    other = one_epoch(data, parts=((6,), (2, 1)))
    assert torch.equal(other[0][:, 0], a[0][:, 2]) and torch.equal(other[1][:, 1], a[1][:, 0])


def test_worker_processes_and_the_cache_change_nothing(source, tmp_path):
    expected = one_epoch(stream(source))
    cached = replace(source, image_cache=str(tmp_path / "cache"), num_worker=2)
    for data in (stream(replace(source, num_worker=2)), stream(cached), stream(cached)):
        assert all(torch.equal(x, y) for x, y in zip(one_epoch(data), expected, strict=True))
    files = sorted(p.suffix for p in (tmp_path / "cache").glob("pixels_*"))
    assert files == [".json", ".u8"]


def test_the_cache_is_built_once_and_again_when_a_picture_changed_or_the_cache_is_cut(source, tmp_path, monkeypatch):
    import datasets.pictures as pictures

    paths = sorted(tmp_path.rglob("one_class_train/acorn/*.jpg"))
    built = []
    real = pictures._write_pixels
    monkeypatch.setattr(pictures, "_write_pixels", lambda *args: (built.append(1), real(*args)))

    def build():
        return open_cache(Decoded(paths, 32), tmp_path / "cache", workers=0, skip_bad=False)[:2]

    cached, places = build()
    assert places == list(range(7)) and len(cached) == 7
    decoded = Decoded(paths, 32)
    assert all(np.array_equal(cached[n], decoded[n]) for n in range(7))
    build()
    assert len(built) == 1
    with open(cached.file, "r+b") as file:
        file.truncate(1000)
    build()
    assert len(built) == 2
    before = paths[3].stat()
    data = bytearray(paths[3].read_bytes())
    paths[3].write_bytes(data)  # as many bytes as before, at another time
    os.utime(paths[3], ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    build()
    assert len(built) == 3
    save(Image.new("RGB", (80, 70), "red"), paths[3])
    again, _ = build()
    assert len(built) == 4 and again[3].reshape(-1, 3).mean(0)[0] > 200


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_a_damaged_picture_is_named_or_left_out(source, tmp_path, capsys, workers, cache):
    source = replace(source, num_worker=workers, image_cache=str(tmp_path / "cache") if cache else None)
    bad = tmp_path / "ImageNet/one_class_train/acorn/2.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(UserError, match=r"2\.jpg.*--skip_bad_images"):
        one_epoch(stream(source), parts=[(0, 1, 2)])
    data = stream(replace(source, skip_bad_images=True))
    assert data.labels.tolist() == [0] * 6 + [1] * 5 and "left out 1 of 12" in capsys.readouterr().out
    assert one_epoch(data, parts=[(0, 1, 2)])[0].shape == (2, 3, 3, 28, 28)
    assert not list(tmp_path.glob("cache/.*.tmp"))


def test_a_cache_without_the_bad_pictures_is_not_taken_for_a_whole_one(source, tmp_path, capsys):
    source = replace(source, image_cache=str(tmp_path / "cache"), skip_bad_images=True)
    bad = tmp_path / "ImageNet/one_class_train/acorn/2.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    stream(source), stream(source)
    assert capsys.readouterr().out.count("left out 1 of 12") == 2
    with pytest.raises(UserError, match=r"2\.jpg.*--skip_bad_images"):
        stream(replace(source, skip_bad_images=False))


def test_crops_stay_inside_their_pictures():
    data = PictureSet([np.zeros((32, 37, 3), np.uint8)] * 500, torch.zeros(500), WIDE, 8, 0)
    assert sum(len(c[0]) for c in one_epoch(data, count=4, parts=torch.arange(500).split(100))) == 500


def test_a_cache_that_cannot_be_written_is_reported(source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="--image_cache: cannot write"):
        stream(replace(source, image_cache=str(tmp_path / "file")))
