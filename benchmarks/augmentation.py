"""Views of a stage-1 step: flips, shifts, jitter, grey, crop. Ours against the published layers, written out."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Part
from common.seed import generator
from datasets.augment import AlignedSpec, crop_boxes, draw_tries
from datasets.loading import Loading
from datasets.sets import image_set
from datasets.shifts import ShiftSpec
from datasets.views import render_views, train_views

_SHIFTS = ShiftSpec("rot_bmix", 0.2)
_SPEC = AlignedSpec()


def part(device: torch.device, images: int = 64, compiled: bool = False) -> Part:
    """10 views of each of `images` images of 32 pixels."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=g)
    data = image_set(pixels, torch.zeros(images)).to(device)
    index, shifts = torch.arange(images, device=device), _SHIFTS.functions(_SPEC)
    floats = data.batch(index)
    render = torch.compile(render_views, dynamic=False) if compiled else render_views

    def ours() -> Tensor:
        (images,) = data.batches([index], Loading(views=2), seed=0, epoch=1)
        return train_views(images, shifts, _SPEC, generator(0, "augment", 1, 0, device=device), render)

    name = "augmentation, compiled" if compiled else "augmentation"
    traffic = pixels.nbytes + 10 * floats.nbytes
    return Part(name, f"{10 * images} views", ours, partial(published_views, floats), check, traffic)


def check(ours: Tensor, published: Tensor) -> str:
    """Draws differ, so distributions are compared: mean and spread of pixels, and of their means over an image."""
    assert ours.shape == published.shape
    pairs = [(ours.mean(), published.mean(), 0.03), (ours.std(), published.std(), 0.05)]
    # The spread of a few hundred means, and one order of the jitter for all in the published layers: a looser bound.
    pairs.append((ours.mean((1, 2, 3)).std(), published.mean((1, 2, 3)).std(), 0.2))
    for a, b, share in pairs:
        assert abs(a - b) < share * b, f"other distribution: {float(a):.4f} against {float(b):.4f}"
    return f"mean {float(ours.mean()):.3f} and {float(published.mean()):.3f}"


# ------------------------------------------------------------------------------------------ the published layers


def published_views(images: Tensor) -> Tensor:
    """Images (B, 3, 32, 32) -> views (10 B, 3, 32, 32): flips and crops by grid sampling, colours through HSV and back
    with a full-size temporary for every step, one order of contrast and HSV for the whole batch, masks by blending."""
    both = _flip(images.repeat(2, 1, 1, 1))
    views = []
    for x in both.chunk(2):
        views += [torch.rot90(x, k, (2, 3)) for k in range(4)]
        views.append(0.8 * x + 0.2 * torch.cat([x[1:], x[:1]]))
    return _crop(_gray(_jitter(torch.cat(views))))


def _grid(x: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _flip(x: Tensor) -> Tensor:
    sign = torch.bernoulli(torch.ones(len(x), device=x.device) * 0.5) * 2 - 1
    theta = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    theta[:, 0, 0] = sign
    return _grid(x, theta)


def _jitter(x: Tensor) -> Tensor:
    chosen = torch.bernoulli(torch.ones(len(x), device=x.device) * 0.8).view(-1, 1, 1, 1)
    steps = [_contrast, _hsv_jitter]
    if torch.rand(()) > 0.5:
        steps.reverse()
    y = x
    for step in steps:
        y = step(y)
    return x * (1 - chosen) + y * chosen


def _contrast(x: Tensor) -> Tensor:
    factor = torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(0.6, 1.4)
    means = x.mean((2, 3), keepdim=True)
    return torch.clamp((x - means) * factor + means, 0, 1)


def _hsv_jitter(x: Tensor) -> Tensor:
    hue = torch.empty(len(x), 1, 1, device=x.device).uniform_(-0.1, 0.1)
    saturation, value = (torch.empty(len(x), 1, 1, device=x.device).uniform_(0.6, 1.4) for _ in range(2))
    hsv = _to_hsv(x)
    h = (hsv[:, 0] + hue * 255 / 360) % 1
    s, v = hsv[:, 1] * saturation, hsv[:, 2] * value
    return torch.clamp(_to_rgb(torch.clamp(torch.stack([h, s, v], 1), 0, 1)), 0, 1)


def _to_hsv(x: Tensor) -> Tensor:
    r, g, b = x[:, 0], x[:, 1], x[:, 2]
    hue = torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)
    hue = (hue % (2 * math.pi)) / (2 * math.pi)
    top, low = x.max(1)[0], x.min(1)[0]
    hsv = torch.stack([hue, (top - low) / (top + 1e-8), top], 1)
    hsv[~torch.isfinite(hsv)] = 0.0
    return hsv


def _to_rgb(hsv: Tensor) -> Tensor:
    h, s, v = hsv[:, 0], hsv[:, 1], hsv[:, 2]
    channels = []
    for n in (5, 3, 1):
        k = (n + h * 6) % 6
        t = torch.clamp(torch.min(k, 4 - k), 0, 1)
        channels.append(v - v * s * t)
    return torch.stack(channels, 1)


def _gray(x: Tensor) -> Tensor:
    chosen = torch.bernoulli(torch.ones(len(x), device=x.device) * 0.2).view(-1, 1, 1, 1)
    weight = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)
    gray = F.conv2d(x, weight).repeat(1, 3, 1, 1)
    return x * (1 - chosen) + gray * chosen


def _crop(x: Tensor) -> Tensor:
    box = crop_boxes(draw_tries(len(x), torch.Generator(x.device).manual_seed(0)), (32, 32), _SPEC)
    theta = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2] = box.unbind(1)
    return _grid(x, theta)
