"""Noise of test images: against the formulas, SciPy and NumPy, and what its draws depend on; arrays of CIFAR-10-C."""

import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

import datasets.noise as noise_module
from common.errors import UserError
from datasets import DataSource, ImageSet, split_one_class
from datasets.noise import CORRUPTIONS, LEVELS, NOISES, SEVERITIES, cifar10c, level_of, noisy
from datasets.outliers import interpolated
from datasets.sets import image_set

MIDDLE = {"gaussian": 0.1, "shot": 30, "speckle": 0.2, "impulse": 0.1}
MIDDLE |= {"gaussian_blur": 0.7, "brightness": 0.15, "contrast": 0.4, "pixelate": 0.6, "jpeg": 58}
OTHERS = [kind for kind in CORRUPTIONS if kind not in NOISES]
# Levels that leave an image as it is.
UNCHANGED = {"gaussian_blur": 0, "brightness": 0, "contrast": 1, "pixelate": 1}


def plain(value: int = 128, n: int = 40, channels: int = 3, side: int = 32) -> ImageSet:
    """Images of one value."""
    return image_set(torch.full((n, channels, side, side), value, dtype=torch.uint8), [0] * n)


def pictures(n: int = 30, channels: int = 3, side: int = 8) -> ImageSet:
    gen = torch.Generator().manual_seed(0)
    data = image_set(torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=gen), range(n))
    return replace(data, fingerprint="0123456789abcdef")


def floats(data: ImageSet) -> torch.Tensor:
    return data.images.double() / 255


def uniform(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- what a kind does


@pytest.mark.parametrize("kind, std", [("gaussian", 0.1), ("speckle", 0.2 * 128 / 255)])
def test_gaussian_and_speckle_noise_have_the_moments_and_the_distribution_of_their_formulas(kind, std):
    """Of 122,880 entries at 128 / 255, five standard deviations from 0 and 1; six standard errors."""
    residual = (floats(noisy(plain(), kind, MIDDLE[kind], 0)) - 128 / 255).flatten()
    n = residual.numel()
    variance = std**2 + 1 / (12 * 255**2)  # and that of rounding
    assert abs(residual.mean()) < 6 * math.sqrt(variance / n)
    assert abs(residual.var() / variance - 1) < 6 * math.sqrt(2 / n)
    for share in (0.01, 0.2, 0.5, 0.9):
        below = (residual < stats.norm.ppf(share) * std).double().mean()
        # A level of 8 bits more or less: the density times half its width.
        slack = stats.norm.pdf(stats.norm.ppf(share)) / std / 510
        assert abs(below - share) < slack + 6 * math.sqrt(share * (1 - share) / n)


def test_speckle_is_in_proportion_to_the_pixel_and_black_stays_black():
    assert (noisy(plain(0), "speckle", 0.6, 0).images == 0).all()
    spread = [floats(noisy(plain(value), "speckle", 0.1, 0)).std() for value in (60, 120)]
    assert spread[1] / spread[0] == pytest.approx(2, rel=0.01)


def test_what_leaves_the_range_is_clipped():
    for value, end in ((0, 0), (255, 255)):
        found = noisy(plain(value), "gaussian", 0.2, 0).images
        assert abs((found == end).double().mean() - 0.5) < 0.01  # half, and what rounds to it
    assert 0 <= noisy(plain(255), "shot", 6, 0).images.min() and noisy(plain(255), "shot", 6, 0).images.max() == 255


@pytest.mark.parametrize("rate", [500, 60, 6, 3])
def test_shot_noise_has_the_moments_of_a_poisson_variable(rate):
    value = 64 if rate < 10 else 128  # what is clipped at 1 is below 1e-4 then
    found = floats(noisy(plain(value), "shot", rate, 0)).flatten()
    x, n = value / 255, found.numel()
    cut = stats.poisson.sf(rate, rate * x)
    assert abs(found.mean() - x) < 6 * math.sqrt(x / rate / n) + 2 * cut + 1e-3 / 255
    assert found.var() == pytest.approx(x / rate + 1 / (12 * 255**2), rel=0.03 + 10 * cut)


@pytest.mark.parametrize("rate", [10_000, 500, 60, 6, 0.5, 0.001])
def test_shot_noise_is_the_quantile_of_a_uniform_number_by_scipy(rate):
    """Every pixel of 8 bits, and means of two; the least and the largest number, and those beside edges of cells."""
    values = torch.arange(511)[:, None]
    edges = torch.tensor([0, 1, 2**14 - 1, 2**14, 2**23, 2**24 - 2**14 - 1, 2**24 - 1]) / 2**24
    drawn = torch.cat([edges, uniform(60)]).expand(511, -1)[:, None, :, None]
    images = (values / 510).float()[:, None, :, None].expand_as(drawn)
    found = NOISES["shot"].apply(images, rate, drawn)
    expected = stats.poisson.ppf(drawn.double().numpy() + 2.0**-25, rate * values.numpy()[:, None, :, None] / 510)
    np.testing.assert_allclose(found.numpy(), np.minimum(expected / rate, 1), rtol=1e-6)


def test_impulse_noise_replaces_entries_half_by_0_half_by_1_each_channel_on_its_own():
    data = plain(100)
    found = noisy(data, "impulse", 0.3, 0).images
    n = found.numel()
    for value, share in ((0, 0.15), (255, 0.15), (100, 0.7)):
        assert abs((found == value).double().mean() - share) < 6 * math.sqrt(share * (1 - share) / n)
    hit = (found != 100).double()
    untouched = (hit.sum(1) == 0).double().mean()  # 0.7 ** 3 where channels do not know each other
    assert abs(untouched - 0.7**3) < 6 * math.sqrt(0.343 * 0.657 * 3 / n)
    everything = noisy(data, "impulse", 1.0, 0).images
    assert ((everything == 0) | (everything == 255)).all()


@pytest.mark.parametrize("kind", [kind for kind in NOISES if kind != "shot"] + list(UNCHANGED))
def test_there_is_a_level_that_leaves_images_as_they_are(kind):
    assert torch.equal(noisy(pictures(), kind, UNCHANGED.get(kind, 0), 0).images, pictures().images)


@pytest.mark.parametrize("kind", NOISES)
def test_values_are_rounded_to_8_bits_and_not_truncated(kind):
    """The published program loses half a level of brightness by truncation."""
    data = pictures(200)
    found = noisy(data, kind, MIDDLE[kind], 0).images
    numbers = torch.empty(data.images.shape)
    for own, index in zip(numbers, range(200), strict=True):
        noise_module._draw(own[None], NOISES[kind].draw, [seed_of_test(kind) + index])
    exact = 255 * NOISES[kind].apply(data.images.float() / 255, MIDDLE[kind], numbers)
    error = found.float() - exact
    assert found.dtype == torch.uint8 and error.abs().max() <= 0.5 + 1e-4
    assert abs(error.mean()) < 0.02


def seed_of_test(kind: str) -> int:
    return noise_module.seed_of(0, f"{kind} noise of test images")


def applied(kind: str, level: float, images: torch.Tensor) -> torch.Tensor:
    return CORRUPTIONS[kind].apply(images, level, torch.empty(0))


@pytest.mark.parametrize("std", [0.1, 0.4, 1.0, 6.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_is_that_of_scipy(std, channels):
    images = torch.rand(2, channels, 9, 7, generator=torch.Generator().manual_seed(0))
    expected = [[ndimage.gaussian_filter(plane.double().numpy(), std, mode="nearest") for plane in x] for x in images]
    np.testing.assert_allclose(applied("gaussian_blur", std, images).numpy(), np.array(expected), atol=2e-6)


def test_brightness_is_added_to_the_value_of_hsv():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    images[0, :, 0, 0], images[0, :, 0, 1], images[0, :, 0, 2] = 0, 0.5, torch.tensor([0.95, 0.3, 0.0])
    found = applied("brightness", 0.2, images)
    for n, y, x in np.ndindex(2, 4, 5):
        hue, saturation, value = colorsys.rgb_to_hsv(*images[n, :, y, x].tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1))
        assert found[n, :, y, x].tolist() == pytest.approx(expected, abs=1e-6)
    grey = images[:, :1]
    torch.testing.assert_close(applied("brightness", 0.2, grey), (grey + 0.2).clamp(max=1))


def test_contrast_is_scaled_about_the_mean_of_each_channel():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    x = images.double().numpy()
    mean = x.mean((2, 3), keepdims=True)
    np.testing.assert_allclose(applied("contrast", 0.15, images).numpy(), (x - mean) * 0.15 + mean, atol=1e-6)


def test_pixels_become_the_means_of_boxes():
    """Of 2 x 2 pixels, rounded to 8 bits along each side; else of the pixels whose centre a box holds."""
    pixels = torch.randint(0, 256, (2, 3, 8, 6), generator=torch.Generator().manual_seed(0))
    boxes = pixels.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    expected = boxes.repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = applied("pixelate", 0.5, pixels.float() / 255) * 255
    assert (found - expected).abs().max() <= 1 + 1e-4
    row = torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(1, 1, 4, 4)
    # Three boxes of 4 / 3 pixels hold one, two and one centre; two of the four pixels after that lie in the middle one.
    found = applied("pixelate", 0.75, row)[0, 0, 0] * 255
    assert found.tolist() == pytest.approx([0, 128, 128, 0])


def test_jpeg_is_what_a_file_of_that_quality_holds(tmp_path):
    data = pictures(3)
    found = noisy(data, "jpeg", 40, 0).images
    for n, image in enumerate(data.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{n}.jpg", quality=40)
        with Image.open(tmp_path / f"{n}.jpg") as picture:
            assert np.array_equal(np.asarray(picture), found[n].permute(1, 2, 0).numpy())
    assert noisy(pictures(3, channels=1), "jpeg", 40, 0).images.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_corruptions_grow_with_their_severity_and_draw_nothing(kind):
    smooth = torch.linspace(0.1, 0.9, 32).view(1, 1, 32, 1) * torch.linspace(0.2, 1, 32).view(1, 1, 1, 32)
    picture = smooth.expand(1, 3, 32, 32).clone()
    picture[:, 0, 10:20, 12:25] = 0.9
    data = image_set((picture * 255).round().to(torch.uint8), [0])
    far = [
        (floats(noisy(data, kind, level_of(kind, severity, data.size), 0)) - floats(data)).abs().mean()
        for severity in SEVERITIES
    ]
    assert 0 < far[0] < far[2] < far[4]
    level = MIDDLE[kind]
    assert torch.equal(noisy(data, kind, level, 0).images, noisy(data, kind, level, 1, name="svhn").images)


# --------------------------------------------------------------------------------------------- what draws depend on


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_an_image_has_the_same_noise_whatever_its_neighbours_and_its_place(kind, monkeypatch):
    data, level = pictures(), MIDDLE[kind]
    whole = noisy(data, kind, level, 0)
    some = noisy(data.where(torch.arange(30) % 7 == 3), kind, level, 0)
    assert some.indices.tolist() == [3, 10, 17, 24] and torch.equal(some.images, whole.images[3::7])
    order = torch.arange(30).flip(0)
    turned = replace(data, images=data.images[order], indices=data.indices[order])
    assert torch.equal(noisy(turned, kind, level, 0).images, whole.images[order])
    for block in (1, 500, 10**9):
        monkeypatch.setattr(noise_module, "_BLOCK", block)
        assert torch.equal(noisy(data, kind, level, 0).images, whole.images)


@pytest.mark.parametrize("kind", NOISES)
def test_other_seeds_sets_kinds_and_images_have_noise_of_their_own(kind):
    level = MIDDLE[kind]
    sets = [noisy(plain(n=20), kind, level, 0), noisy(plain(n=20), kind, level, 1)]
    sets += [noisy(plain(n=20), kind, level, 0, name="svhn")]
    images = torch.cat([data.images for data in sets]).flatten(1).double()
    assert torch.equal(sets[0].images, noisy(plain(n=20), kind, level, 0, name="test images").images)
    correlation = torch.corrcoef(images).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.sqrt(images.shape[1])  # 1770 pairs


def test_kinds_do_not_share_their_numbers():
    gaussian, speckle = (noisy(plain(), kind, 0.1, 0).images.flatten().double() for kind in ("gaussian", "speckle"))
    assert abs(np.corrcoef(gaussian, speckle)[0, 1]) < 0.02


def test_seeds_of_images_are_distinct_in_32_bits_and_consecutive_ones_give_independent_numbers():
    """Each pixel over 5,000 images: the mean of numbers that only the index of the image distinguishes."""
    found = (floats(noisy(plain(n=5000, channels=1, side=4), "gaussian", 0.1, 0)) - 128 / 255).flatten(1) / 0.1
    assert found.mean(0).abs().max() < 4.5 / math.sqrt(5000)
    beside = (found[:-1] * found[1:]).mean(0)
    assert beside.abs().max() < 4.5 / math.sqrt(5000)
    assert len(found.unique(dim=0)) == 5000
    top = 2**32 - 1
    one, two = torch.empty(2, 1, 1, 1, 8)
    noise_module._draw(one, NOISES["gaussian"].draw, [top + 1])
    noise_module._draw(two, NOISES["gaussian"].draw, [0])
    assert torch.equal(one, two)


def test_levels_share_their_numbers():
    x = 128 / 255
    for kind, unit in (("gaussian", 1.0), ("speckle", x)):
        low, high = (((floats(noisy(plain(), kind, level, 0)) - x) / level / unit).flatten() for level in (0.06, 0.09))
        assert float((low - high).abs().max()) <= (0.5 / 255) * (1 / 0.06 + 1 / 0.09) / unit + 1e-9
    few, many = (noisy(plain(100), "impulse", level, 0).images for level in (0.1, 0.2))
    assert torch.equal(many[few != 100], few[few != 100]) and (many != 100).sum() > 1.8 * (few != 100).sum()
    counts = [floats(noisy(plain(), "shot", rate, 0)).flatten() * rate for rate in (20, 25, 30)]
    assert all((high >= low - 0.1).all() for low, high in zip(counts, counts[1:], strict=False))


# ----------------------------------------------------------------------------------------------------- sets of images


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_what_is_no_pixel_stays_and_the_fingerprint_says_what_was_done(kind):
    data = replace(pictures(), paths=tuple(map(str, range(30))))
    before = data.images.clone()
    found = noisy(data, kind, MIDDLE[kind], 0)
    assert torch.equal(data.images, before) and not torch.equal(found.images, before)
    assert found.paths == data.paths and torch.equal(found.labels, data.labels)
    again = [noisy(data, kind, MIDDLE[kind], 0), noisy(data, kind, 1.5 * MIDDLE[kind], 0)]
    again += [noisy(data, kind, MIDDLE[kind], 1), noisy(data, kind, MIDDLE[kind], 0, name="svhn")]
    marks = [data.fingerprint, found.fingerprint, *(other.fingerprint for other in again)]
    assert marks[1] == marks[2] and len(set(marks)) == 5 and all(len(mark) == 16 for mark in marks)
    assert noisy(replace(data, fingerprint=""), kind, MIDDLE[kind], 0).fingerprint == ""


def test_grey_images_become_coloured_and_those_of_one_channel_stay_so():
    grey = replace(plain(), images=plain(channels=1).images.expand(-1, 3, -1, -1))
    found = noisy(grey, "gaussian", 0.1, 0).images
    assert torch.equal(found, noisy(plain(), "gaussian", 0.1, 0).images)  # as colour images have it
    assert (found[:, 0] != found[:, 1]).double().mean() > 0.9
    one = noisy(plain(channels=1), "gaussian", 0.1, 0)
    assert one.channels == 1 and floats(one).std() == pytest.approx(0.1, rel=0.02)


def test_mixtures_in_half_levels_become_bytes():
    mixed = interpolated(split_one_class("digits", DataSource(), None, None).test(), 2)
    assert mixed.images.dtype == torch.float16
    found = noisy(mixed, "shot", 10_000, 0)
    assert found.images.dtype == torch.uint8
    assert (found.images.float() - mixed.images.float()).abs().mean() < 2.5
    assert torch.equal(noisy(mixed, "gaussian", 0, 0).images, mixed.images.float().round().to(torch.uint8))


def test_no_images_have_no_noise_and_what_cannot_be_done_is_an_error():
    empty = image_set(torch.empty(0, 3, 8, 8, dtype=torch.uint8), [])
    assert noisy(empty, "shot", 10, 0).images.shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="gaussian, shot, speckle, impulse, .*jpeg, got salt_pepper"):
        noisy(pictures(), "salt_pepper", 0.1, 0)
    for kind, level in (("gaussian", -0.1), ("shot", 0), ("speckle", float("nan")), ("impulse", 1.1), ("shot", 2e4)):
        with pytest.raises(ValueError, match=rf"{kind} noise takes a .* in \["):
            noisy(pictures(), kind, level, 0)


def test_levels_are_those_of_the_protocols():
    names = {"sdnet": NOISES, "cifar10c": CORRUPTIONS, "imagenetc": CORRUPTIONS}
    assert {protocol: list(levels) for protocol, levels in LEVELS.items()} == {n: list(t) for n, t in names.items()}
    sdnet = LEVELS["sdnet"]
    assert sdnet["gaussian"] == tuple(round(0.02 * n, 2) for n in range(1, 11))
    assert sdnet["shot"] == tuple(range(60, 0, -6)) and sdnet["speckle"] == tuple(n / 10 for n in range(1, 7))
    assert sdnet["impulse"] == tuple(round(0.03 * n, 2) for n in range(1, 11))
    for protocol in ("cifar10c", "imagenetc"):
        assert all(len(levels) == 5 for levels in LEVELS[protocol].values())
    assert LEVELS["cifar10c"]["shot"] == (500, 250, 100, 75, 50)
    assert LEVELS["imagenetc"]["gaussian"] == (0.08, 0.12, 0.18, 0.26, 0.38)
    for kinds in LEVELS.values():
        for kind, levels in kinds.items():
            assert list(levels) == sorted(set(levels), reverse=kind in ("shot", "contrast", "pixelate", "jpeg"))
            assert all(CORRUPTIONS[kind].least <= level <= CORRUPTIONS[kind].most for level in levels)
    assert LEVELS["cifar10c"]["gaussian_blur"] == (0.4, 0.6, 0.7, 0.8, 1)
    assert LEVELS["cifar10c"]["jpeg"] == (80, 65, 58, 50, 40)
    assert level_of("impulse", 5, (32, 32)) == 0.07 and level_of("impulse", 1, (224, 200)) == 0.03


# ---------------------------------------------------------------------------------------------------------- CIFAR-10-C


@pytest.fixture
def arrays(tmp_path, monkeypatch):
    """A folder of arrays of CIFAR-10-C with four images a severity, and what they hold."""
    monkeypatch.setattr(noise_module, "_IMAGES", 4)
    rng = np.random.default_rng(0)
    known = {row.archive: rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8) for row in NOISES.values()}
    known["labels"] = np.tile(np.array([3, 0, 9, 1], np.uint8), 5)
    for name, array in known.items():
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path, known


@pytest.mark.parametrize("kind", NOISES)
def test_a_severity_of_cifar_10_c_is_its_block_of_the_array(kind, arrays):
    folder, known = arrays
    marks = set()
    for severity in range(1, 6):
        data = cifar10c(str(folder), kind, severity)
        block = known[f"{kind}_noise"][4 * severity - 4 : 4 * severity]
        assert data.images.shape == (4, 3, 32, 32) and data.images.dtype == torch.uint8
        assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), block)
        assert data.labels.tolist() == [3, 0, 9, 1] and data.indices.tolist() == [0, 1, 2, 3]
        marks.add(data.fingerprint)
    assert len(marks) == 5 and all(len(mark) == 16 for mark in marks)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"severity {severity}"):
            cifar10c(folder, kind, severity)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def pickled(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def zipped(path):
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


@pytest.mark.parametrize("name", ["shot_noise", "labels"])
@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda path: path.unlink(), "there is no"),
        (truncated, "cannot be read"),
        (pickled, "cannot be read"),
        (zipped, "is an archive"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_text("<html>"), "cannot be read"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
        (lambda path: np.save(path, np.load(path)[:-1]), "holds 19"),
        (lambda path: np.save(path, np.load(path).astype(np.float32)), "float32"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_flag(name, spoil, told, arrays):
    folder, _ = arrays
    spoil(folder / f"{name}.npy")
    with pytest.raises(UserError, match=rf"^--cifar10c: .*{name}\.npy.*; ") as error:
        cifar10c(folder, "shot", 5)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_labels_of_other_classes_are_refused(arrays):
    """The arrays of CIFAR-100-C have the same names and shapes."""
    folder, known = arrays
    np.save(folder / "labels.npy", known["labels"].astype(int) + 20)
    with pytest.raises(UserError, match="--cifar10c: .*labels 20 to 29; CIFAR-10 has 0 to 9"):
        cifar10c(folder, "gaussian", 1)
