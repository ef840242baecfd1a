import torch

from common.seed import generator
from datasets.augment import AlignedSpec
from datasets.catalog import image_set
from datasets.shifts import ShiftSpec
from datasets.views import DrawSpec, draw_views, shift_labels, train_views

PLAIN = AlignedSpec(color_jitter_strength=0.0, resize_factor=1.0, resize_fix=True)
SHIFTS = ShiftSpec("rot_bmix", 0.2).functions()


def gray_images(n: int) -> torch.Tensor:
    """Images whose channels are equal, so that the grey step changes nothing."""
    return torch.rand(n, 1, 8, 8).expand(n, 3, 8, 8).contiguous()


def either_flip(view: torch.Tensor, options: list[torch.Tensor]) -> bool:
    return any(torch.allclose(view, option, atol=1e-5) for option in options)


def test_train_views_come_copy_by_copy_shift_by_shift():
    x = gray_images(3)
    views = train_views(x, SHIFTS, PLAIN, generator(0, "test"), copies=2).view(2, 5, 3, 3, 8, 8)
    for copy in views:
        flipped = copy[0]
        for i in range(3):
            assert either_flip(flipped[i], [x[i], x[i].flip(-1)])
        # The flip comes before the shift, so the rotations are of the flipped image ...
        for q in range(4):
            torch.testing.assert_close(copy[q], torch.rot90(flipped, q, (2, 3)), atol=1e-5, rtol=0)
        # ... and the mix is with the neighbour of the same copy.
        torch.testing.assert_close(copy[4], 0.8 * flipped + 0.2 * flipped.roll(-1, 0), atol=1e-5, rtol=0)


def test_labels_follow_the_views():
    labels = shift_labels(3, 2, 2, torch.device("cpu"))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] * 2


def test_train_views_are_a_function_of_the_generator():
    x = torch.rand(4, 3, 8, 8)
    a, b = (train_views(x, SHIFTS, AlignedSpec(), generator(0, "a", 1, 2), 2) for _ in range(2))
    c = train_views(x, SHIFTS, AlignedSpec(), generator(0, "a", 1, 3), 2)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.min() >= 0 and a.max() <= 1


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
    images = image_set((gray_images(5) * 255).round().to(torch.uint8), torch.zeros(5))
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
    images = image_set((gray_images(20) * 255).round().to(torch.uint8), torch.zeros(20))
    out = all_draws(images, 20, shifts=ShiftSpec("none").functions(), aligned=PLAIN)
    torch.testing.assert_close(out[:, 0], images.batch(torch.arange(20)), atol=1e-5, rtol=0)
