"""Numbers of any range as pictures: images (N, C, H, W) with values in [0, 1]."""

import torch
from torch import Tensor

_BINS = 256
_GREY = 0.5


def stretched(images: Tensor) -> Tensor:
    """Each channel of each image from its own minimum to its own maximum; a constant channel is mid grey."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    range_ = high - low
    return torch.where(range_ > 0, (images - low) / range_.where(range_ > 0, 1), _GREY)


def equalised(images: Tensor) -> Tensor:
    """Histogram equalisation of each channel of each image in [0, 1], by 256 bins; a constant channel stays.

    A value becomes the share of pixels in bins up to its own, those of the lowest bin in use not counted.
    """
    rows = images.flatten(0, 1).flatten(1)
    bins = (rows * _BINS).long().clamp(0, _BINS - 1)
    counts = torch.zeros(len(rows), _BINS, device=rows.device).scatter_add_(1, bins, torch.ones_like(rows).float())
    below = counts.cumsum(1)
    least = counts.gather(1, bins.amin(1, keepdim=True))
    others = rows.shape[1] - least
    share = (below.gather(1, bins) - least) / others.clamp_min(1)
    return torch.where(others > 0, share.to(rows.dtype), rows).view_as(images)


def around_grey(atoms: Tensor) -> Tensor:
    """Signed atoms (N, 1 or 3, k, k), each divided by its own largest absolute value, around mid grey.

    Atoms of other numbers of channels: the norm over channels, (N, 1, k, k), divided by its own largest value.
    """
    shown = atoms if atoms.shape[1] in (1, 3) else atoms.norm(dim=1, keepdim=True)
    extreme = shown.abs().amax((1, 2, 3), keepdim=True)
    scaled = shown / extreme.where(extreme > 0, 1)
    return _GREY + scaled / 2 if atoms.shape[1] in (1, 3) else scaled
