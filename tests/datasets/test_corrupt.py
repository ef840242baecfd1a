"""Noise at an exact number of positions: against loops, known answers, and on images of every kind."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.seed import generator
from datasets import DataSource, ImageSet, split_one_class
from datasets.corrupt import KINDS, CorruptSpec, Noise, corrupt_pixels, draw_noise, replaced
from datasets.outliers import interpolated
from datasets.sets import image_set


def pictures(n: int = 30, channels: int = 3, side: int = 6, seed: int = 0) -> torch.Tensor:
    # Without 0 and 1, so that salt and pepper are seen everywhere.
    return torch.rand(n, channels, side, side, generator=generator(seed, "pictures")) * 0.8 + 0.1


def draws(seed: int = 1) -> torch.Generator:
    return generator(seed, "noise")


# --------------------------------------------------------------------------------------------------------- function


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 36])
def test_exactly_as_many_pixels_are_replaced_and_others_stay_bit_for_bit(kind, channels, count):
    images = pictures(channels=channels)
    before = images.clone()
    noisy, mask = corrupt_pixels(images, count, kind, draws())
    assert torch.equal(images, before) and noisy.data_ptr() != images.data_ptr()
    assert mask.shape == images.shape and mask.dtype == torch.bool and noisy.dtype == images.dtype
    for clean, dirty, places in zip(images.numpy(), noisy.numpy(), mask.numpy(), strict=True):
        changed = {
            (row, column)
            for row in range(6)
            for column in range(6)
            if any(clean[c, row, column] != dirty[c, row, column] for c in range(channels))
        }
        assert len(changed) == count
        for c in range(channels):
            assert {(r, k) for r, k in np.argwhere(places[c]).tolist()} == changed
            assert (clean[c][~places[c]] == dirty[c][~places[c]]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_replaced_entry_by_entry(kind):
    rows = pictures().flatten(1).double()
    noisy, mask = corrupt_pixels(rows, 11, kind, draws())
    assert noisy.dtype == torch.float64 and torch.equal(noisy != rows, mask) and (mask.sum(1) == 11).all()


def test_the_same_seed_gives_the_same_noise_and_another_one_another():
    images = pictures()
    one, two, other = (corrupt_pixels(images, 9, "normal", draws(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[1], other[1])
    assert len({tuple(row) for row in one[1][:, 0].flatten(1).tolist()}) == len(images)  # each image has its own


def test_the_same_positions_in_every_image_and_values_of_their_own():
    images = pictures()
    noisy, mask = corrupt_pixels(images, 9, "uniform", draws(), per_image=False)
    assert mask[0, 0].sum() == 9 and (mask == mask[0, 0]).all()
    values = noisy[mask].view(len(images), 3, 9)
    assert values.unique().numel() == values.numel()


def test_positions_are_spread_evenly():
    """Each of 36 pixels is hit by 9 of 36: 4000 images, six standard deviations."""
    _, mask = corrupt_pixels(pictures(4000, 1), 9, "normal", draws())
    share = mask.double().mean(0).flatten()
    assert float((share - 0.25).abs().max()) < 6 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize("per_image", [True, False])
def test_values_have_the_moments_of_their_kind(per_image):
    images, n = pictures(3000, 1), 3000 * 12
    values = {}
    for kind in KINDS:
        noisy, mask = corrupt_pixels(images, 12, kind, draws(), per_image=per_image)
        values[kind] = noisy[mask].double()
    six = 6 / n**0.5
    assert abs(values["normal"].mean()) < six and abs(values["normal"].var() - 1) < six * 2**0.5
    assert values["normal"].min() < 0 and values["normal"].max() > 1
    uniform = values["uniform"]
    assert 0 <= uniform.min() and uniform.max() <= 1 and abs(uniform.mean() - 0.5) < six / 12**0.5
    assert abs(uniform.var() - 1 / 12) < six / 180**0.5
    salt = values["salt_pepper"]
    assert set(salt.tolist()) == {0.0, 1.0} and abs(salt.mean() - 0.5) < six / 2


def test_a_pixel_of_salt_or_pepper_is_white_or_black_and_one_of_the_others_coloured():
    for kind, plain in (("salt_pepper", True), ("normal", False), ("uniform", False)):
        noisy, mask = corrupt_pixels(pictures(), 5, kind, draws())
        pixels = noisy.transpose(0, 1)[mask.transpose(0, 1)].view(3, -1)
        assert (pixels == pixels[0]).all().item() is plain, kind


def test_clipping_is_of_what_is_drawn():
    images = pictures() * 3  # up to 2.7, which stays
    noisy, mask = corrupt_pixels(images, 12, "normal", draws(), clip=(0.0, 1.0))
    plain, same = corrupt_pixels(images, 12, "normal", draws())
    assert torch.equal(mask, same) and torch.equal(noisy[mask], plain[mask].clamp(0, 1))
    assert torch.equal(noisy[~mask], images[~mask]) and noisy.max() > 2 and noisy[mask].max() == 1


def test_given_positions_and_values_are_those_of_the_golden_file(golden):
    known = golden("rdae_a")
    noise = Noise(known["noise_index"], known["noise_value"][:, None])
    noisy, mask = replaced(known["noise_clean"], noise)
    assert torch.equal(noisy, known["noise_out"])
    assert torch.equal(mask, known["noise_out"] != known["noise_clean"]) and mask.sum() == known["noise_index"].numel()


def test_many_images_are_drawn_in_blocks_and_their_positions_follow_one_stream(monkeypatch):
    import datasets.corrupt as module

    monkeypatch.setattr(module, "_BLOCK", 5 * 16)
    found = draw_noise(13, 1, 16, 4, "normal", draws())
    gen = draws()
    expected = [torch.rand(16, dtype=torch.float64, generator=gen).argsort(descending=True)[:4] for _ in range(13)]
    assert torch.equal(found.positions, torch.stack(expected))
    assert torch.equal(found.values, torch.randn(13, 1, 4, generator=gen))


def test_no_images_have_no_noise_and_what_cannot_be_done_is_an_error():
    noisy, mask = corrupt_pixels(torch.empty(0, 1, 4, 4), 3, "normal", draws())
    assert noisy.shape == mask.shape == (0, 1, 4, 4)
    for count in (-1, 37):
        with pytest.raises(ValueError, match=f"{count} of 36"):
            corrupt_pixels(pictures(), count, "normal", draws())
    with pytest.raises(ValueError, match="normal, uniform, salt_pepper, got speckle"):
        corrupt_pixels(pictures(), 3, "speckle", draws())
    for images in (torch.zeros(3, 4, 4), torch.zeros(3, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="floats"):
            corrupt_pixels(images, 3, "normal", draws())


# -------------------------------------------------------------------------------------------------------- data sets

NORMAL = CorruptSpec("normal", 9)


def digits(spec: CorruptSpec = NORMAL, **more):
    return replace(split_one_class("digits", DataSource(), 3, None), corrupt=spec, **more)


def test_images_are_clipped_and_rounded_and_keep_the_mask():
    clean, noisy = digits(CorruptSpec()).train(1), digits().train(1)
    assert clean.mask is None and noisy.mask is not None
    assert noisy.mask.shape == (122, 1, 8, 8) and (noisy.mask.sum((1, 2, 3)) == 9).all()
    assert noisy.images.dtype == torch.uint8
    assert torch.equal(noisy.images[~noisy.mask], clean.images[~noisy.mask])
    values = noisy.images[noisy.mask].float()
    # Half of all standard normal draws are below 0, a sixth above 1.
    assert abs((values == 0).float().mean() - 0.5) < 0.08 and abs((values == 255).float().mean() - 0.16) < 0.06
    assert noisy.where(noisy.labels == 3).mask is not None
    some = torch.arange(122) % 3 == 0
    assert torch.equal(noisy.where(some).mask, noisy.mask[some])
    assert noisy.to(torch.device("cpu")).mask is noisy.mask and noisy.with_channels(3).mask is noisy.mask


def test_grey_images_have_the_same_noise_in_all_channels_and_in_one():
    three, one = digits().train(3), digits().train(1)
    assert torch.equal(three.images, one.images.expand(-1, 3, -1, -1)) and torch.equal(three.mask, one.mask)


def test_noise_in_half_levels_leaves_other_pixels_exact():
    split = digits()
    plain = split.clean_test()
    mixed = interpolated(plain, 2)
    noisy = split.corrupted(mixed, "interp")
    assert noisy.images.dtype == torch.float16
    intact = ~noisy.mask.expand_as(noisy.images)
    assert torch.equal(noisy.images[intact], mixed.images[intact])
    assert interpolated(split.test(), 2).mask is None


def test_training_and_test_images_have_draws_of_their_own_and_fingerprints_say_what_was_done():
    split = digits()
    train, test = split.train(), split.test()
    assert test.mask is not None and (test.mask.sum((1, 2, 3)) == 9).all() and len(test) == 599
    assert not torch.equal(train.mask[:50], test.mask[:50])
    assert torch.equal(split.clean_test().images, digits(CorruptSpec()).test().images)
    marks = [digits(spec).train().fingerprint for spec in (
        CorruptSpec(), NORMAL, NORMAL, replace(NORMAL, corrupt_pixels=8), replace(NORMAL, corrupt="uniform"),
        replace(NORMAL, data_seed=1), replace(NORMAL, corrupt_fixed=True))]  # fmt: skip
    assert marks[1] == marks[2] and len(set(marks)) == 6 and all(len(mark) == 16 for mark in marks)
    assert split.train(1).fingerprint == train.fingerprint


def test_corrupted_features_are_the_same_pixels_in_all_sets():
    split = digits(replace(NORMAL, corrupt_fixed=True))
    train, test = split.train(), split.test()
    assert (train.mask == test.mask[:1]).all() and (test.mask == test.mask[:1]).all() and test.mask[0].sum() == 9
    other = split.corrupted(image_set(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [0] * 4), "other")
    assert torch.equal(other.mask[0], test.mask[0]) and not torch.equal(other.images[:4, 0], test.images[:4, 0])
    assert not torch.equal(digits(replace(split.corrupt, data_seed=1)).train().mask[0], train.mask[0])


def test_colour_images_get_colour_noise(tmp_path):
    pixels = torch.randint(1, 255, (20, 3, 8, 8), dtype=torch.uint8)
    data: ImageSet = image_set(pixels, [0] * 20)
    noisy = digits().corrupted(data, "colour")
    values = noisy.images.transpose(0, 1)[noisy.mask.expand_as(pixels).transpose(0, 1)].view(3, -1)
    assert not (values == values[0]).all()
    assert torch.equal(noisy.images[~noisy.mask.expand_as(pixels)], pixels[~noisy.mask.expand_as(pixels)])


def test_more_pixels_than_an_image_has_are_an_error():
    assert (digits(CorruptSpec("normal", 64)).train().mask).all()
    for load in (digits(CorruptSpec("normal", 65)).train, digits(CorruptSpec("normal", 65)).test_table):
        with pytest.raises(UserError, match="--corrupt_pixels 65: there are 64"):
            load()
