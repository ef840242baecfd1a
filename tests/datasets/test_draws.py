"""Independent draws: flips of views, shifts and partners, sub-views, parts of the augmentation that are off."""

import pytest
import torch
from torch import Tensor

from common.seed import generator
from datasets import PictureSet, views
from datasets.augment import AlignedSpec
from datasets.loading import Loading
from datasets.sets import ImageSet, image_set
from datasets.shifts import ShiftSpec
from datasets.views import DrawSpec, draw_views, train_views

PLAIN = AlignedSpec(color_jitter_strength=0.0, resize_factor=1.0, resize_fix=True)
EACH = ShiftSpec("rot_bmix", 0.25).functions()


def ramps(n: int) -> ImageSet:
    """Grey images that are bright on the right, so that a flip can be seen; no two of the same brightness."""
    ramp = torch.linspace(0, 100, 8).expand(n, 3, 8, 8)
    return image_set((ramp + torch.arange(n).view(n, 1, 1, 1)).to(torch.uint8), torch.zeros(n))


def mirrored(images: Tensor) -> Tensor:
    """Which of the ramps (..., 3, 8, 8) are flipped."""
    return images[..., 0, 0, 0].float() > images[..., 0, 0, -1].float()


def pictures(n: int) -> PictureSet:
    """The ramps as pictures that are cropped, here to their whole, and flipped while training runs."""
    pixels = [image.permute(1, 2, 0).numpy() for image in ramps(n).images]
    return PictureSet(pixels, torch.zeros(n), AlignedSpec(resize_factor=1.0, resize_fix=True), 8, 0)


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("data", [ramps(64), pictures(64)], ids=["in memory", "decoded"])
def test_training_flips_half_of_the_images_each_view_step_and_epoch_for_itself(data):
    everything = torch.arange(64)

    def flips(epoch: int = 1, seed: int = 0) -> list[Tensor]:
        """(V, B) of each of two steps."""
        parts = [everything[:32], everything[32:]]
        return [mirrored(images) for images in data.batches(parts, Loading(views=2), seed=seed, epoch=epoch)]

    one = flips()
    assert all(torch.equal(a, b) for a, b in zip(one, flips(), strict=True))
    seen = [*one[0], *one[1], *flips(epoch=2)[0], *flips(seed=1)[0]]
    assert all(6 < int(flip.sum()) < 26 for flip in seen)
    # Two independent draws of 32 agree in about half of the places.
    assert all(6 < int((a ^ b).sum()) < 26 for n, a in enumerate(seen) for b in seen[:n])


@pytest.mark.parametrize("data", [ramps(30), pictures(30)], ids=["in memory", "decoded"])
def test_an_epoch_that_is_resumed_goes_on_with_the_same_flips(data):
    parts = list(torch.randperm(30, generator=generator(0, "test")).split(10))
    whole = list(data.batches(parts, Loading(views=2), seed=0, epoch=4))
    for first in (1, 2):
        rest = list(data.batches(parts, Loading(views=2), seed=0, epoch=4, first=first))
        assert len(rest) == 3 - first and all(torch.equal(a, b) for a, b in zip(rest, whole[first:], strict=True))


@pytest.mark.parametrize("name", ["rot_cropmix", "rot_augmix"])
def test_each_view_has_sub_views_of_its_own(name):
    """Two equal views, each a mix of two sub-views of its own."""
    shifts = ShiftSpec(name, 0.5, cropmix_resize_factor=0.3).functions(AlignedSpec(0.0, 0.3))
    one = torch.randint(0, 256, (1, 40, 3, 8, 8), dtype=torch.uint8, generator=generator(0, "x"))
    seen = train_views(one.expand(2, -1, -1, -1, -1), shifts, PLAIN, generator(0, "test")).view(2, 5, 40, 3, 8, 8)
    different = (seen[0, 4] - seen[1, 4]).abs().amax((1, 2, 3)) > 0.05
    assert different.float().mean() > 0.9


@pytest.fixture
def augmentations(monkeypatch) -> list[views.AlignedDraw]:
    """The parameters that views are augmented by, after their shift."""
    seen: list[views.AlignedDraw] = []
    monkeypatch.setattr(views, "aligned", lambda x, draw: seen.append(draw) or x)
    return seen


def only_the_last_is_off(jitter: Tensor, gray: Tensor, box: Tensor, colours: bool) -> None:
    """jitter, gray (views, K) and box (views, K, 4): the last shift keeps its frame, and its colours where so said."""
    whole = (box == torch.tensor([1.0, 1.0, 0.0, 0.0])).all(-1)
    assert whole[:, -1].all() and (whole.float().mean(0)[:-1] < 0.2).all()
    share = jitter.float().mean(0)
    assert ((share[:-1] > 0.6) & (share[:-1] < 0.95)).all() and (gray.float().mean(0)[:-1] > 0.05).all()
    assert (share[-1] == 0 and not gray[:, -1].any()) if colours else share[-1] > 0.6


@pytest.mark.parametrize("name, colours", [("rot_cropmix", False), ("rot_augmix", True)])
def test_what_a_shift_switches_off_is_off_in_its_own_views_of_training(name, colours, augmentations):
    shifts = ShiftSpec(name).functions()
    images = torch.zeros(2, 60, 3, 8, 8, dtype=torch.uint8)
    train_views(images, shifts, AlignedSpec(), generator(0, "test"))
    (draw,) = augmentations
    rows = [x.unflatten(0, (2, 5, 60)).transpose(1, 2).flatten(0, 1) for x in (draw.jitter, draw.gray, draw.box)]
    only_the_last_is_off(*rows, colours)


@pytest.mark.parametrize("name, colours", [("rot_cropmix", False), ("rot_augmix", True)])
def test_what_a_shift_switches_off_is_off_in_its_own_views_of_evaluation(name, colours, augmentations):
    spec = DrawSpec(ShiftSpec(name).functions(), AlignedSpec(), seed=0, batch_size=120)
    list(draw_views(ramps(120), spec, 0))
    (draw,) = augmentations
    only_the_last_is_off(*(x.unflatten(0, (120, 5)) for x in (draw.jitter, draw.gray, draw.box)), colours)


# ---------------------------------------------------------------------------------------------------- evaluation


def looked_at(data: ImageSet, t: int = 0, seed: int = 0, reference: Tensor | None = None) -> Tensor:
    spec = DrawSpec(EACH, PLAIN, seed=seed, batch_size=64)
    return torch.cat([x for _, x in draw_views(data, spec, t, reference)]).unflatten(0, (len(data), len(EACH)))


def turned_back(seen: Tensor) -> Tensor:
    """The four rotated views (N, 4, ...) as they were before their rotation."""
    return torch.stack([torch.rot90(seen[:, q], -q, (2, 3)) for q in range(4)], 1)


def test_evaluation_flips_half_of_the_views_each_shift_and_draw_for_itself():
    data = ramps(64)
    found = [mirrored(turned_back(looked_at(data, **which))) for which in ({}, {"t": 1}, {"seed": 1})]
    seen = [flip for flips in found for flip in flips.T]  # by shift
    assert all(16 < int(flip.sum()) < 48 for flip in seen)
    assert all(16 < int((a ^ b).sum()) < 48 for n, a in enumerate(seen) for b in seen[:n])


def test_a_partner_is_mixed_in_as_flipped_as_it_is_itself_and_a_reference_by_a_flip_of_its_own():
    data = ramps(24)
    x = data.batch(torch.arange(24))

    def flips_of_mix(partners: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Whether image and partner are flipped in the mixed view, (N,) each: the one choice of four that fits."""
        choices = [(own, other) for own in (False, True) for other in (False, True)]
        errors = []
        for own, other in choices:
            a, b = x.flip(-1) if own else x, partners.flip(-1) if other else partners
            errors.append((seen[:, 4] - (0.75 * a + 0.25 * b)).abs().amax((1, 2, 3)))
        best = torch.stack(errors).min(0)
        assert best.values.max() < 1e-5
        picked = torch.tensor(choices)[best.indices]
        return picked[:, 0], picked[:, 1]

    own, other = flips_of_mix(x.roll(-1, 0), looked_at(data))
    assert torch.equal(other, own.roll(-1)) and 0 < own.sum() < 24
    reference = torch.linspace(0.2, 0.9, 8).expand(1, 3, 8, 8)
    found = [flips_of_mix(reference.expand_as(x), looked_at(data, t=t, reference=reference)) for t in range(8)]
    assert all(len(other.unique()) == 1 for _, other in found) and len({bool(other[0]) for _, other in found}) == 2
    assert all(torch.equal(a, b) for (a, _), b in zip(found[:1], [own], strict=True))  # no draw depends on the partner
