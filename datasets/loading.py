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
    channels: 1 or 3, see `ImageSet.with_channels`. None: those that the set has.
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
