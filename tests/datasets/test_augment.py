import colorsys
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from common.seed import generator
from datasets import augment
from datasets.augment import (
    AlignedDraw,
    AlignedSpec,
    aligned,
    crop,
    crop_boxes,
    draw_aligned,
    draw_tries,
    hflip,
    hsv_to_rgb,
    rgb_to_hsv,
)


def draw_of(n: int, **changes: torch.Tensor) -> AlignedDraw:
    """Parameters under which nothing happens, but for the changes."""
    off, one = torch.zeros(n, dtype=torch.bool), torch.ones(n)
    box = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(n, 4)
    values = {"jitter": off, "hsv_first": off, "contrast": one, "hue": 0 * one, "saturation": one, "value": one}
    return AlignedDraw(**{**values, "gray": off, "box": box, **changes})


def on_images(step):
    """A step on planes (V, H, W) as one on images (V, 3, H, W)."""
    return lambda x, *parameters: torch.stack(step(x.unbind(1), *parameters), 1)


contrast, gray = on_images(augment.contrast), on_images(augment.gray)
hsv_jitter, jitter = on_images(augment.hsv_jitter), on_images(augment.jitter)


def test_known_crops_and_colours(golden):
    g = golden("shifts")
    torch.testing.assert_close(crop(g["x"], g["crop_params_w_h_dx_dy"]), g["crop_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(rgb_to_hsv(g["x"]), g["hsv"], atol=1e-5, rtol=0)
    torch.testing.assert_close(hsv_to_rgb(g["hsv"]), g["rgb_back"], atol=1e-5, rtol=0)
    factors = [g[name].flatten() for name in ("hue_shift", "sat_factor", "val_factor")]
    torch.testing.assert_close(hsv_jitter(g["x"], *factors), g["hsv_jitter_out"], atol=1e-5, rtol=0)


def test_hsv_agrees_with_the_standard_library_pixel_by_pixel():
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 0.7  # black and grey
    hsv, back = rgb_to_hsv(x), hsv_to_rgb(x)
    for n, i, j in np.ndindex(2, 4, 4):
        h, s, v = colorsys.rgb_to_hsv(*x[n, :, i, j].tolist())
        assert hsv[n, 1:, i, j].tolist() == pytest.approx([s, v], abs=1e-12)
        # The hue is an angle in the circle, within 1.2 degrees of the hexagonal one.
        assert s == 0 or abs((hsv[n, 0, i, j].item() - h + 0.5) % 1 - 0.5) < 1.2 / 360
        assert back[n, :, i, j].tolist() == pytest.approx(colorsys.hsv_to_rgb(*x[n, :, i, j].tolist()), abs=1e-12)
    assert 0 <= hsv[:, 0].min() and hsv[:, 0].max() < 1


def test_contrast_is_about_the_mean_of_each_channel_and_clamped():
    x = torch.rand(2, 3, 5, 5)
    out = contrast(x, torch.tensor([0.5, 3.0]))
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(out[0], mean[0] + 0.5 * (x[0] - mean[0]))
    torch.testing.assert_close(out[1], (mean[1] + 3 * (x[1] - mean[1])).clamp(0, 1))


def test_jitter_keeps_the_drawn_order_and_leaves_the_others_bitwise_alone():
    x = torch.rand(3, 3, 6, 6)
    f = torch.tensor([1.4, 1.4, 1.4])
    changes = {"contrast": f, "hue": 0.1 * f, "saturation": 0.6 * f, "value": f}
    draw = draw_of(3, jitter=torch.tensor([True, True, False]), hsv_first=torch.tensor([True, False, True]), **changes)
    out = jitter(x, draw)
    hsv = [0.1 * f, 0.6 * f, f]
    torch.testing.assert_close(out[0], contrast(hsv_jitter(x, *hsv), f)[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(out[1], hsv_jitter(contrast(x, f), *hsv)[1], atol=1e-6, rtol=0)
    assert torch.equal(out[2], x[2])
    assert (out[0] - hsv_jitter(contrast(x, f), *hsv)[0]).abs().max() > 1e-3  # the order matters


def test_gray_and_flip_touch_only_the_chosen():
    x, chosen = torch.rand(2, 3, 4, 4), torch.tensor([True, False])
    out = gray(x, chosen)
    expected = 0.299 * x[0, 0] + 0.587 * x[0, 1] + 0.114 * x[0, 2]
    torch.testing.assert_close(out[0], expected.expand(3, 4, 4))
    assert torch.equal(out[1], x[1])
    assert torch.equal(hflip(x, chosen), torch.stack([x[0].flip(-1), x[1]]))


def test_whole_image_box_changes_nothing_and_quarter_box_magnifies():
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(aligned(x, draw_of(1)), x, atol=1e-6, rtol=0)
    corner = crop(x, torch.tensor([[0.5, 0.5, -0.5, -0.5]]))
    inside = torch.nn.functional.interpolate(x[..., :4, :4], scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(corner[..., 1:-1, 1:-1], inside[..., 1:-1, 1:-1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 5), (33, 32)])
def test_crop_is_bilinear_sampling(size):
    """On a CPU rows are weighted sums of rows; a GPU samples the grid."""
    x = torch.rand(40, 3, *size, dtype=torch.float64, generator=generator(0, "crop"))
    box = crop_boxes(draw_tries(40, generator(1, "crop")), size, AlignedSpec()).double()
    theta = x.new_zeros(40, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2] = box.unbind(1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    sampled = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(crop(x, box), sampled, atol=1e-6, rtol=0)
    assert crop(x, box).is_contiguous(memory_format=torch.channels_last)


def test_hue_goes_round_however_far():
    x = torch.rand(6, 3, 4, 4, generator=generator(0, "hue"))
    one, turn = torch.ones(6), 360 / 255  # one turn of the circle
    hues = torch.tensor([0.0, 0.1, -0.1, 0.4, -0.4, 0.25])
    back, here, on = (hsv_jitter(x, hues + n * turn, one, one) for n in (-3, 0, 5))
    torch.testing.assert_close(back, here, atol=2e-5, rtol=0)
    torch.testing.assert_close(on, here, atol=2e-5, rtol=0)


@pytest.mark.parametrize("factor, fix", [(0.08, False), (0.54, True), (1.0, True)])
def test_boxes_have_whole_pixels_half_pixel_offsets_and_the_stated_area(factor, fix):
    box = crop_boxes(draw_tries(20_000, generator(0, "test")), (32, 32), AlignedSpec(1.0, factor, fix)).double()
    w, h, x, y = (box * 32).T
    for value in (w, h, x, y):
        torch.testing.assert_close(value, value.round(), atol=1e-4, rtol=0)
    assert ((w >= 1) & (w <= 32) & (h >= 1) & (h <= 32)).all()
    assert (x.abs() <= 32 - w + 1e-4).all() and (y.abs() <= 32 - h + 1e-4).all()
    area, ratio = w * h / 1024, w / h
    if fix and factor < 1:
        assert abs(area.mean().item() - factor) < 0.01 and area.std() < 0.02
    if not fix:
        # Uniform area: mean (0.08 + 1) / 2, a little less where wide crops of large area do not fit and are redrawn.
        assert 0.48 < area.mean() < 0.54 and area.min() < 0.1 and area.max() > 0.97
    # Log ratio symmetric in 3/4 .. 4/3, but for rounding.
    assert ratio.min() > 0.65 and ratio.max() < 1.55 and abs(ratio.log().mean()) < 0.01
    if factor < 1:
        # Every centre equally likely: uniform on -r .. r has the variance r (r + 1) / 3.
        room = (32 - w)[w < 32]
        assert abs(x.mean()) < 0.2 and abs((3 * x[w < 32] ** 2 / (room * (room + 1))).mean() - 1) < 0.03


def test_draws_have_the_stated_shares_and_ranges():
    d = draw_aligned(40_000, (32, 32), AlignedSpec(0.5), generator(0, "test"))
    assert d.jitter.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert d.gray.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert d.hsv_first.float().mean().item() == pytest.approx(0.5, abs=0.01)
    for value, low, high in (
        (d.contrast, 0.8, 1.2),
        (d.saturation, 0.8, 1.2),
        (d.value, 0.8, 1.2),
        (d.hue, -0.05, 0.05),
    ):
        assert low <= value.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < value.max() <= high
        assert value.mean().item() == pytest.approx((low + high) / 2, abs=0.005 * (high - low) * 2)


def test_no_jitter_at_strength_zero():
    assert not draw_aligned(100, (8, 8), AlignedSpec(0.0), generator(0, "test")).jitter.any()


@pytest.mark.parametrize("bad", [{"resize_factor": 0.0}, {"resize_factor": 1.1}, {"color_jitter_strength": -1.0}])
def test_refuses_values_out_of_range_by_flag_name(bad):
    with pytest.raises(UserError, match=f"--{next(iter(bad))}"):
        AlignedSpec(**bad)


def test_views_are_jittered_then_grey_then_cropped_each_by_its_own_draw():
    """Against the three steps, one after the other."""
    x = torch.rand(60, 3, 8, 8, generator=generator(0, "x"))
    draw = draw_aligned(60, (8, 8), AlignedSpec(), generator(0, "draw"))
    assert 0 < draw.jitter.sum() < 60 and 0 < draw.gray.sum() < 60
    expected = crop(gray(jitter(x, draw), draw.gray), draw.box)
    torch.testing.assert_close(aligned(x, draw), expected, atol=1e-6, rtol=0)
    for other in (
        crop(jitter(x, draw), draw.box),
        crop(gray(x, draw.gray), draw.box),
        gray(jitter(x, draw), draw.gray),
    ):
        assert (expected - other).abs().max() > 0.1


def test_gradients_reach_pixels_and_are_finite_where_there_is_no_hue():
    """Against finite differences of colours; black, white and grey pixels, whose hue has none."""
    gen = torch.Generator().manual_seed(0)
    x = 0.2 + 0.6 * torch.rand(6, 3, 5, 4, generator=gen, dtype=torch.float64)
    draw = draw_aligned(6, (5, 4), AlignedSpec(), generator(0, "test"))
    draw = dataclasses.replace(draw, jitter=torch.ones(6, dtype=torch.bool))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(aligned(leaf, draw).square().sum(), leaf)
    for seed in (1, 2):
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        above, below = (aligned(x + h * v, draw).square().flatten(1).sum(1) for h in (1e-7, -1e-7))
        torch.testing.assert_close((above - below) / 2e-7, (grad * v).flatten(1).sum(1), rtol=1e-4, atol=1e-5)
    for value in (0.0, 0.4, 1.0):
        plain = x.float()
        plain[:, :, 1:3] = value
        leaf = plain.clone().requires_grad_()
        found = aligned(leaf, draw)
        (grad,) = torch.autograd.grad(found.sum(), leaf)
        assert grad.isfinite().all() and torch.equal(found.detach(), aligned(plain, draw))
