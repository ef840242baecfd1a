"""How an image becomes what a training step sees, before the mode makes its own views of it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Loading(NamedTuple):
    """How the images of a batch are loaded: a field of the recipe.

    views: V, how many random views of each image a step gets.
    flip: flip each view horizontally with probability 0.5.
    pad: pad each view with this many black pixels on every side and crop it back to its size at a random place.
    channels: 3, or 1 for grey, converted by `to_channels`. None: those that the set has.
    `Loading(flip=False)` is plain: every image as it is.
    """

    views: int = 1
    flip: bool = True
    pad: int = 0
    channels: int | None = 3


def pad_and_crop(images: Tensor, pad: int, start: Tensor) -> Tensor:
    """Pad images (B, channels, H, W) with zeros on every side, then crop each back to (H, W).

    start (B, 2): the first row and column of the crop in the padded image, in 0..2 * pad.
    """
    height, width = images.shape[2:]
    crops = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(len(images), device=images.device), :, start[:, 0], start[:, 1]]


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Images (B, 1 or 3, H, W) in 1 or 3 channels: grey is repeated, colour becomes its luma.

    Luma is that of ITU-R 601, 0.299 R + 0.587 G + 0.114 B, in Pillow's fixed-point weights and rounding.
    Raises: ValueError for other numbers of channels, and for the luma of other types than uint8.
    """
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1 and channels == 3:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] == 3 and channels == 1 and images.dtype == torch.uint8:
        red, green, blue = images.int().split(1, 1)
        return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).to(torch.uint8)
    raise ValueError(f"cannot convert {images.shape[1]} channels of {images.dtype} to {channels}")


def all_grey(images: Tensor) -> bool:
    """Whether the channels of each image (N, channels, H, W) are equal."""
    return images.shape[1] == 1 or all(bool((block == block[:, :1]).all()) for block in images.split(1024))
