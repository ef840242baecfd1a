import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import UserError
from datasets import DATASETS, DataSource, split_one_class
from datasets.augment import AlignedSpec
from datasets.catalog import CIFAR100_GROUPS, resize
from datasets.corrupt import CorruptSpec
from datasets.sets import image_set
from tests.conftest import SHARED


def test_digits_are_split_by_class_two_to_one():
    split = split_one_class("digits", DataSource(image_size=8), 3, 32)
    train, test = split.train(), split.test()
    assert train.images.shape == (122, 3, 8, 8) and (train.labels == 3).all()
    assert len(test) == 599 and split.normal(test.labels).sum() == 61
    assert len(split_one_class("digits", DataSource(), None, 32).train()) == 1198
    # 0..16 becomes 0..255, in three equal channels.
    assert train.images.max() == 255 and torch.equal(train.images[:, 0], train.images[:, 2])


@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_bilinear(channels):
    x = torch.randint(0, 256, (2, channels, 8, 8), dtype=torch.uint8)
    out = resize(x, 32)
    expected = torch.nn.functional.interpolate(x.float(), (32, 32), mode="bilinear", align_corners=False)
    assert out.shape == (2, channels, 32, 32) and torch.equal(out, expected.round().to(torch.uint8))


def test_batches_are_floats_between_0_and_1():
    data = split_one_class("digits", DataSource(image_size=8), 0, 32).train()
    x = data.batch(torch.tensor([5, 2]))
    assert x.dtype == torch.float32 and torch.equal((x * 255).round().to(torch.uint8), data.images[[5, 2]])


@pytest.mark.parametrize("idx", [-1, 10])
def test_a_class_out_of_range_is_reported(idx):
    with pytest.raises(UserError, match=r"--one_class_idx must lie in 0\.\.9"):
        split_one_class("digits", DataSource(), idx, 32)


@pytest.mark.parametrize("kind", ["published", "standard"])
def test_superclasses_partition_the_fine_classes(kind):
    groups = list(CIFAR100_GROUPS[kind].values())
    assert sorted(sum(groups, ())) == list(range(100)) and len(groups) == 20


def test_superclasses_are_those_of_the_published_program_and_of_cifar100():
    """By their fine classes: 13 published groups hold a foreign one."""
    names = DATASETS["cifar100"].classes(DataSource())
    published, standard = (list(CIFAR100_GROUPS[kind].values()) for kind in ("published", "standard"))
    assert [names[n] for n in standard[0]] == ["beaver", "dolphin", "otter", "seal", "whale"]
    assert [names[n] for n in published[0]] == ["beaver", "elephant", "otter", "seal", "whale"]
    assert sum(a != b for a, b in zip(published, standard, strict=True)) == 13
    assert sum("(published)" in name for name in CIFAR100_GROUPS["published"]) == 13
    folder = SHARED / "data/cifar100"
    if not folder.is_dir():
        pytest.skip("the lists of CIFAR-100 are not on this machine")
    assert names == json.loads((folder / "fine_labels_in_order.json").read_text())
    own = json.loads((folder / "superclasses.json").read_text())
    assert {frozenset(names[n] for n in group) for group in standard} == {frozenset(v) for v in own.values()}


class FakeTorchvision:
    """Arrays in torchvision's layout: (N, H, W, 3), labels of all 100 classes."""

    def __init__(self, root, download, train):
        self.data = np.arange(200, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)
        self.targets = list(range(100)) * 2


def test_cifar100_takes_superclasses_in_one_class_training_and_fine_ones_without(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR100", FakeTorchvision)
    split = split_one_class("cifar100", DataSource(), 1, 32)
    train, test = split.train(), split.test()
    assert split.n_classes == 100 and len(split.class_names) == 20
    assert set(train.images[:, 0, 0, 0].tolist()) == {v + w for v in (1, 33, 67, 73, 91) for w in (0, 100)}
    assert set(train.labels.tolist()) == {1} and split.normal(test.labels).sum() == 10
    assert set(test.labels.tolist()) == set(range(20))
    standard = split_one_class("cifar100", DataSource(superclasses="standard"), "fish", 32)
    assert set(standard.train().images[:, 0, 0, 0].tolist()) == {v + w for v in (1, 32, 67, 73, 91) for w in (0, 100)}
    with pytest.raises(UserError, match=r"no such training class, but .*fish \(published\)"):
        split_one_class("cifar100", DataSource(), "fish", 32)
    everything = split_one_class("cifar100", DataSource(), None, 32)
    assert set(everything.train().labels.tolist()) == set(range(100))
    with pytest.raises(UserError, match=r"0\.\.19"):
        split_one_class("cifar100", DataSource(), 20, 32)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist", "svhn"])
def test_absent_data_is_reported_with_the_remedy(tmp_path, name):
    with pytest.raises(UserError, match="--data_path.*--download_data"):
        DATASETS[name].load(DataSource(str(tmp_path)), "train", None)


def test_mnist_is_read_from_packed_files_in_place():
    if not (SHARED / "data/MNIST/raw").is_dir():
        pytest.skip("MNIST is not on this machine")
    test = split_one_class("mnist", DataSource(str(SHARED / "data")), 7, 32).test()
    assert test.images.shape == (10_000, 3, 32, 32)
    # Facts about the original test set: its first labels, and how many sevens there are.
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9] and (test.labels == 7).sum() == 1028


def write_idx(path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_packed_files_of_mnists_format(tmp_path):
    raw = tmp_path / "FashionMNIST/raw"
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    write_idx(raw / "train-images-idx3-ubyte.gz", images)
    write_idx(raw / "train-labels-idx1-ubyte.gz", np.array([1, 0, 1, 2, 9], np.uint8))
    train = split_one_class("fashion_mnist", DataSource(str(tmp_path), image_size=28), 1, 32).train()
    assert torch.equal(train.images[:, 0], torch.from_numpy(images[[0, 2]])) and train.indices.tolist() == [0, 2]
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"junk")
    with pytest.raises(UserError, match="--data_path: .*train-images.* is corrupt"):
        split_one_class("fashion_mnist", DataSource(str(tmp_path)), 1, 32).train()


def test_folder_classes_that_only_test_has_are_outliers(tmp_path):
    from tests.datasets.test_folder import fill

    fill(tmp_path, {"train/good": 2, "test/good": 1, "test/crack": 2})
    source = DataSource(str(tmp_path), image_size=8)
    for idx in (0, None):
        split = split_one_class("folder", source, idx, 32)
        test = split.test()
        assert split.n_classes == 1 and split.normal(test.labels).tolist() == [True, False, False]
        assert test.paths is not None and test.paths[1].endswith("crack/0.png")
    with pytest.raises(UserError, match=r"0\.\.0"):
        split_one_class("folder", source, 1, 32)


def test_indices_are_places_in_the_whole_set():
    data = split_one_class("digits", DataSource(image_size=8), None, 32).test()
    some = data.where(data.labels == 2)
    assert torch.equal(data.images[some.indices], some.images)


# --------------------------------------------------------------------------------- outliers among training images


def mixture(dataset: str = "digits", source: DataSource | None = None, idx=3, **more):
    split = split_one_class(dataset, source or DataSource(), idx, None)
    return replace(split, **more)


def test_training_images_of_other_classes_are_mixed_in():
    everything, plain = mixture(idx=None).train(), mixture().train()
    split = mixture(outliers=40)
    data = split.train()
    assert len(data) == 122 + 40 and (data.labels == 3).sum() == 122
    # Labels are the true ones, the order is that of the data set, and all normal images are there once.
    assert torch.equal(data.labels, everything.labels[data.indices])
    assert torch.equal(data.images, everything.images[data.indices])
    assert (data.indices.diff() > 0).all() and set(plain.indices.tolist()) < set(data.indices.tolist())
    assert len(data.labels.unique()) > 5
    assert split.normal(data.labels).sum() == 122 and split.title == "class 3 (3), 40 outliers among them"
    assert torch.equal(split.test().images, mixture().test().images)


def test_the_seed_of_the_data_draws_the_outliers():
    def drawn(seed: int) -> list[int]:
        data = mixture(outliers=40, corrupt=CorruptSpec(data_seed=seed)).train()
        return data.indices[data.labels != 3].tolist()

    assert drawn(0) == drawn(0) != drawn(1) and len(set(drawn(0))) == 40
    assert set(mixture(outliers=1076).train().indices.tolist()) == set(range(1198))  # all that there are
    with pytest.raises(UserError, match="--outliers 1077: there are 1076 images"):
        mixture(outliers=1077).train()


def test_each_image_of_other_classes_is_drawn_as_often():
    """10 of 1076, by 400 seeds: a class of the nine comes in proportion to its size, up to five standard deviations."""
    everything = mixture(idx=None).train()
    counts = torch.zeros(10)
    for seed in range(400):
        chosen = mixture(outliers=10, corrupt=CorruptSpec(data_seed=seed))._chosen(everything.labels)
        counts += torch.bincount(everything.labels[chosen], minlength=10)
    share = torch.bincount(everything.labels, minlength=10) / 1076
    others = [n for n in range(10) if n != 3]
    assert counts[3] == 400 * 122
    expected = 4000 * share[others]
    assert ((counts[others] - expected).abs() < 5 * expected.sqrt()).all()


def test_the_first_images_of_the_data_set_are_used():
    everything = mixture(idx=None).train()
    for idx in (3, None):
        data = mixture(idx=idx, first_images=500).train()
        expected = [n for n in range(500) if idx is None or everything.labels[n] == idx]
        assert data.indices.tolist() == expected
    data = mixture(outliers=30, first_images=500).train()
    assert data.indices.max() < 500 and (data.labels != 3).sum() == 30
    assert len(mixture(first_images=1198).train()) == 122
    with pytest.raises(UserError, match="--first_images 1199: digits has 1198 training images"):
        mixture(first_images=1199).train()
    with pytest.raises(UserError, match=r"--first_images 1: none of them is of class 3 \(3\)"):
        mixture(first_images=1).train()


def test_what_is_changed_has_a_fingerprint_of_its_own_and_what_is_not_keeps_it():
    plain = mixture().train().fingerprint
    marks = [mixture(**more).train().fingerprint for more in (
        {"outliers": 40}, {"first_images": 500}, {"outliers": 40, "corrupt": CorruptSpec(data_seed=1)})]  # fmt: skip
    assert len({plain, *marks}) == 4
    assert plain == split_one_class("digits", DataSource(image_size=8), 3, 32).train().fingerprint
    assert mixture(outliers=40, corrupt=CorruptSpec("normal")).train().fingerprint not in marks


def test_superclasses_are_mixed_too(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR100", FakeTorchvision)
    data = mixture("cifar100", idx=1, outliers=50).train()
    assert (data.labels == 1).sum() == 10 and (data.labels != 1).sum() == 50 and data.labels.max() < 20


def test_folders_are_mixed_too(tmp_path):
    from tests.datasets.test_folder import fill

    fill(tmp_path, {"train/a": 3, "train/b": 4, "test/a": 1})
    source = DataSource(str(tmp_path), image_size=8)
    data = mixture("folder", source, 1, outliers=2).train()
    assert data.labels.tolist() == [0, 0, 1, 1, 1, 1] and data.paths is not None
    assert all(f"train/{'ab'[label]}" in path for label, path in zip(data.labels, data.paths, strict=True))
    assert mixture("folder", source, 0, first_images=2).train().indices.tolist() == [0, 1]


def test_the_published_mixture_of_mnist():
    if not (SHARED / "data/MNIST/raw").is_dir():
        pytest.skip("MNIST is not on this machine")
    split = mixture("mnist", DataSource(str(SHARED / "data")), 4, outliers=265, first_images=50_000)
    table = split.train_table()
    assert table.rows.shape == (5124, 784) and table.shape == (1, 28, 28)
    assert (table.labels == 4).sum() == 4859 and (table.indices < 50_000).all()
    assert len(table.labels.unique()) == 10 and 0.05 < table.rows.mean() < 0.15


def test_pictures_that_are_decoded_during_training_are_not_changed(tmp_path):
    from tests.datasets.test_pictures import photographs

    photographs(tmp_path, {"one_class_train/acorn": 2, "one_class_train/tank": 2, "one_class_test/acorn": 1})
    source = DataSource(str(tmp_path), image_size=28, num_worker=0)
    noise = CorruptSpec("normal")
    for flag, more in (
        ("outliers", {"outliers": 1}),
        ("first_images", {"first_images": 1}),
        ("corrupt", {"corrupt": noise}),
    ):
        split = mixture("imagenet", source, 0, **more)
        with pytest.raises(UserError, match=f"^--{flag}: .*imagenet .*decoded during training"):
            split.stream(AlignedSpec())
        assert len(split.test()) == 1
    noisy = mixture("imagenet", source, 0, corrupt=noise).test()
    assert noisy.mask is not None and noisy.mask.sum() == 10


def held_out(name: str, count: int | str, **more):
    return replace(split_one_class(name, DataSource(**more), None, None), held_out=count)


@pytest.mark.parametrize("images, apart", [(4, 0), (5, 2), (12, 2), (35, 3), (60_000, 5_000)])
def test_auto_sets_a_tenth_aside_and_two_at_least(images, apart):
    data = image_set(torch.zeros(images, 3, 1, 1, dtype=torch.uint8), [0] * images)
    split = held_out("digits", "auto")
    part = split._part(data, held=True)
    assert (0 if part is None else len(part)) == apart and len(split._train_part(data)) == images - apart


@pytest.mark.parametrize("name", ["digits", "imagenet1k"])
def test_both_parts_of_the_training_images_come_from_one_reading(name, tmp_path):
    from tests.datasets.test_pictures import photographs

    photographs(tmp_path, {"train/n01": 5, "train/n02": 4, "val/n01": 1, "val/n02": 1})
    split = held_out(name, 3, data_path=str(tmp_path), image_size=8, num_worker=0)
    apart = split.stream(AlignedSpec()), split.held_out_images()
    read = []
    for way in ("load", "stream"):
        if original := getattr(split.spec, way):
            own = lambda *args, original=original: read.append(args) or original(*args)  # noqa: E731
            split = replace(split, spec=replace(split.spec, **{way: own}))
    together = split.training_parts(AlignedSpec())
    assert len(read) == 1
    for one, other in zip(apart, together, strict=True):
        assert one.fingerprint == other.fingerprint and torch.equal(one.labels, other.labels)
        index = torch.arange(len(one))
        assert torch.equal(one.batch(index), other.batch(index))
    assert len(together[1]) == 3 and len(together[0]) + 3 == len(split.spec.load(split.source, "train", None))
    assert replace(split, held_out=0).training_parts(AlignedSpec())[1] is None
