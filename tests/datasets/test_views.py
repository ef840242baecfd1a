import shutil

import pytest
import torch

from common.dist import World
from common.seed import generator
from datasets.augment import AlignedSpec, crop, draw_aligned
from datasets.augment import aligned as aligned_views
from datasets.loading import Loading
from datasets.sets import image_set
from datasets.shifts import ShiftSpec
from datasets.views import DrawSpec, apply_shift, draw_views, render_views, shift_labels, train_views

PLAIN = AlignedSpec(color_jitter_strength=0.0, resize_factor=1.0, resize_fix=True)
SHIFTS = ShiftSpec("rot_bmix", 0.2).functions()


def gray_images(n: int) -> torch.Tensor:
    """Images whose channels are equal, so that the grey step changes nothing."""
    return torch.rand(n, 1, 8, 8).expand(n, 3, 8, 8).contiguous()


def images_of(x: torch.Tensor):
    return image_set((x * 255).round().to(torch.uint8), torch.zeros(len(x)))


def either_flip(view: torch.Tensor, options: list[torch.Tensor]) -> bool:
    return any(torch.allclose(view, option, atol=1e-5) for option in options)


def test_train_views_come_view_by_view_shift_by_shift():
    x = images_of(gray_images(3)).batch(torch.arange(3))
    (loaded,) = images_of(x).batches([torch.arange(3)], Loading(views=2), seed=0, epoch=1)
    views = train_views(loaded, SHIFTS, PLAIN, generator(0, "test")).view(2, 5, 3, 3, 8, 8)
    for view in views:
        flipped = view[0]
        for i in range(3):
            assert either_flip(flipped[i], [x[i], x[i].flip(-1)])
        # The flip comes before the shift, so the rotations are of the flipped image ...
        for q in range(4):
            torch.testing.assert_close(view[q], torch.rot90(flipped, q, (2, 3)), atol=1e-5, rtol=0)
        # ... and the mix is with the neighbour of the same view.
        torch.testing.assert_close(view[4], 0.8 * flipped + 0.2 * flipped.roll(-1, 0), atol=1e-5, rtol=0)


def test_labels_follow_the_views():
    labels = shift_labels(3, 2, 2, torch.device("cpu"))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] * 2


def test_train_views_are_a_function_of_the_generator():
    x = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    a, b = (train_views(x, SHIFTS, AlignedSpec(), generator(0, "a", 1, 2)) for _ in range(2))
    c = train_views(x, SHIFTS, AlignedSpec(), generator(0, "a", 1, 3))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.min() >= 0 and a.max() <= 1


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_see_their_part_of_the_same_views(processes):
    """For any number of processes the same seed gives the same flips, shifts, partners and augmentation."""
    images = images_of(torch.rand(7, 3, 8, 8))
    shifts = ShiftSpec("rot_augmix").functions()  # mixes two sub-views
    parts, k = [torch.tensor([4, 0, 6, 2, 5])], 2 * len(shifts)

    def views(world: World) -> torch.Tensor:
        (loaded,) = images.batches(parts, Loading(views=2), seed=0, epoch=3, world=world)
        return train_views(loaded, shifts, AlignedSpec(), generator(0, "test"), shard=world.shard(5))

    whole = views(World()).unflatten(0, (k, 5))
    for rank in range(processes):
        shard = World(rank, processes).shard(5)
        own = views(World(rank, processes)).unflatten(0, (k, shard.size))
        torch.testing.assert_close(own, whole[:, shard.indices()[: shard.size]])


def all_draws(images, batch_size: int, t: int = 0, reference=None, shifts=SHIFTS, aligned=None) -> torch.Tensor:
    spec = DrawSpec(shifts, aligned or AlignedSpec(), seed=0, batch_size=batch_size)
    parts = list(draw_views(images, spec, t, reference))
    assert torch.cat([index for index, _ in parts]).tolist() == list(range(len(images)))
    return torch.cat([views for _, views in parts]).unflatten(0, (-1, len(shifts)))


def test_test_draws_do_not_depend_on_the_batch_size():
    images = image_set(torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8), torch.zeros(7))
    whole = all_draws(images, 7)
    for batch_size in (1, 2, 3):
        assert torch.equal(all_draws(images, batch_size), whole)
    assert not torch.equal(all_draws(images, 7, t=1), whole)


def test_partners_of_test_draws_go_by_index_or_are_the_reference():
    images = images_of(gray_images(5))
    x = images.batch(torch.arange(5))
    out = all_draws(images, 2, aligned=PLAIN)
    reference = gray_images(1)
    fixed = all_draws(images, 2, aligned=PLAIN, reference=reference)
    for i in range(5):
        own, neighbour = [x[i], x[i].flip(-1)], [x[(i + 1) % 5], x[(i + 1) % 5].flip(-1)]
        assert either_flip(out[i, 4], [0.8 * a + 0.2 * b for a in own for b in neighbour])
        other = [reference[0], reference[0].flip(-1)]
        assert either_flip(fixed[i, 4], [0.8 * a + 0.2 * b for a in own for b in other])
        for q in range(4):
            assert either_flip(out[i, q], [torch.rot90(a, q, (1, 2)) for a in own])


def test_without_shifts_nothing_is_flipped():
    images = images_of(gray_images(20))
    out = all_draws(images, 20, shifts=ShiftSpec("none").functions(), aligned=PLAIN)
    torch.testing.assert_close(out[:, 0], images.batch(torch.arange(20)), atol=1e-5, rtol=0)


def what_is_off(draw):
    """Whether the augmentation after a shift leaves colours, and frames, of the views alone."""
    from datasets.views import _disabled

    spec = AlignedSpec()
    plain = draw_aligned(2000, (8, 8), spec, generator(0, "test"))
    found = _disabled(plain, draw, torch.arange(2000) % len(draw))
    mine = torch.arange(2000) % len(draw) == len(draw) - 1
    assert torch.equal(found.jitter[~mine], plain.jitter[~mine]) and torch.equal(found.box[~mine], plain.box[~mine])
    whole = (found.box[mine] == torch.tensor([1.0, 1.0, 0.0, 0.0])).all()
    return not (found.jitter[mine] | found.gray[mine]).any(), bool(whole)


def test_mixed_crops_are_not_cropped_again_and_mixed_augmentations_not_touched_again():
    spec = {"shift_trans_type": "rot_cropmix"}
    assert what_is_off(ShiftSpec(**spec).functions()) == (False, True)
    assert what_is_off(ShiftSpec(**spec, cropmix_crop_aug=True).functions()) == (False, False)
    for crop_aug in (False, True):  # the flag is cropmix's alone
        assert what_is_off(ShiftSpec("rot_augmix", cropmix_crop_aug=crop_aug).functions()) == (True, True)


@pytest.mark.parametrize("name", ["rot_cropmix", "rot_augmix"])
def test_two_sub_views_of_an_image_are_mixed_and_nothing_else_is(name):
    """Against the definition, written out: the mix of two crops (or augmentations) of the image itself."""
    aligned = AlignedSpec(color_jitter_strength=1.0, resize_factor=0.3)
    spec = ShiftSpec(name, 0.2, cropmix_resize_factor=0.25, cropmix_resize_fix=True)
    *rotations, mixed = spec.functions(aligned)
    assert mixed.sub_views is not None and all(s.sub_views is None for s in rotations)
    x, partner = torch.rand(6, 3, 8, 8), torch.rand(6, 3, 8, 8)
    draws = [draw_aligned(6, (8, 8), mixed.sub_views.spec, generator(0, "look", i)) for i in (0, 1)]
    out = apply_shift(mixed, x, partner, (draws[0], draws[1]))
    if name == "rot_cropmix":
        a, b = (crop(x, draw.box) for draw in draws)
        share = draws[0].box[:, 0] * draws[0].box[:, 1]
        assert (share - 0.25).abs().max() < 0.07  # whole pixels of 8
    else:
        a, b = (aligned_views(x, draw) for draw in draws)
        assert mixed.sub_views.spec == aligned
    torch.testing.assert_close(out, 0.8 * a + 0.2 * b)
    assert (out - apply_shift(mixed, x, 1 - partner, (draws[0], draws[1]))).abs().max() == 0


@pytest.mark.parametrize("name", ["rot_cropmix", "rot_augmix"])
def test_draws_of_sub_views_do_not_depend_on_the_batch_size(name):
    images = image_set(torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8), torch.zeros(7))
    shifts = ShiftSpec(name, 0.2).functions()
    whole = all_draws(images, 7, shifts=shifts)
    for batch_size in (1, 3):
        torch.testing.assert_close(all_draws(images, batch_size, shifts=shifts), whole, atol=1e-6, rtol=0)


def test_plain_views_are_the_shifted_images_themselves():
    images = images_of(torch.rand(5, 3, 8, 8))
    spec = DrawSpec(ShiftSpec("rotation").functions(), None, seed=0, batch_size=2)
    views = torch.cat([v for _, v in draw_views(images, spec, 0)]).unflatten(0, (5, 4))
    x = images.batch(torch.arange(5))
    for q in range(4):
        assert torch.equal(views[:, q], torch.rot90(x, q, (2, 3)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("shifts", [SHIFTS, ShiftSpec("rot_augmix", 0.2).functions()], ids=["rot_bmix", "rot_augmix"])
def test_compiled_views_are_the_same(shifts):
    x = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8, generator=generator(0, "x"))
    render = torch.compile(render_views, dynamic=False, fullgraph=True)
    a, b = (train_views(x, shifts, AlignedSpec(), generator(0, "a", 1, 2), f) for f in (render_views, render))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
