"""From pixels to patch features: grids of a frozen backbone's stages.

Letters: n pictures, S pixels on a side, P patches (places of a grid), F features.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from models import TIMM, backbone_spec

# Rows of a picture are made floats so many values at a time: a picture of 100 megapixels would take 2.4 GB.
_STRIP = 2**21
# A grid by its stride: between which strides stages are joined for its patches. The fine one is needed.
GRIDS = {16: (4, 16), 32: (32, 32)}
FINE = 16


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch works with one thread: more would round otherwise. Pictures go side by side instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resized(pixels: np.ndarray, size: int) -> Tensor:
    """Pixels (H, W, 3), uint8, as one picture (1, 3, size, size) of floats in [0, 1]; its sides may be stretched.

    Linear interpolation with an anti-aliasing filter, first along rows, then along columns, in float64: in float32 its
    weights are off by a hundred thousandth, which scores would show.
    """
    picture = torch.from_numpy(np.require(pixels, requirements="W"))
    rows = max(1, _STRIP // (3 * pixels.shape[1]))
    narrow = torch.cat(
        [_linear(part.permute(2, 0, 1)[None].double(), (len(part), size)) for part in picture.split(rows)], dim=2
    )
    return (_linear(narrow, (size, size)) / 255).float()


def _linear(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", antialias=True)


class Pyramid(nn.Module):
    """Pictures (n, 3, S, S) in [0, 1] -> patch features (n, P, F) by the stride of their grid, of those in `grids`.

    Each stage is averaged over 3 x 3 places of its own before. levels: which stages each grid joins, the one of its own
    stride last.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, stages: nn.Module, levels: dict[int, list[int]], mean: tuple[float, ...], std: tuple[float, ...]
    ):
        super().__init__()
        # Channels last: a quarter faster on CPUs, for small backbones with depthwise convolutions.
        self.stages, self.levels = stages.to(memory_format=torch.channels_last), levels
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor, grids: Iterable[int] = tuple(GRIDS)) -> dict[int, Tensor]:
        found = self.stages(((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last))
        return {
            stride: _grid([found[i] for i in level]) for stride, level in self.levels.items() if stride in set(grids)
        }


def _grid(stages: list[Tensor]) -> Tensor:
    """Stages (n, F_i, H_i, W_i), the coarsest last, on the grid of the last: (n, P, F)."""
    side = stages[-1].shape[-2:]
    parts = []
    for stage in stages:
        # With zeros beyond the edge: patches there, which the backbone's own padding makes unlike others, weigh less.
        x = F.avg_pool2d(stage, 3, 1, 1)
        step = (x.shape[-2] // side[0], x.shape[-1] // side[1])
        parts.append(x if step == (1, 1) else F.avg_pool2d(x, step))
    return torch.cat(parts, 1).flatten(2).transpose(1, 2)


class _ResNetStages(nn.Module):
    """The four stages of a ResNet of torchvision's layout."""

    def __init__(self, net: Any):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> list[Tensor]:
        net = self.net
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        found = []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            found.append(x := layer(x))
        return found


def pyramid(name: str, load: Callable[[nn.Module], None] = lambda net: None) -> Pyramid:
    """Of the backbone `name`, in evaluation mode. load: puts weights into the backbone; without, they are fresh.

    Raises: UserError for a backbone without a stage of stride 16; other grids and stages that it lacks are left out.
    """
    spec = backbone_spec(name)
    if name.startswith(TIMM):
        stages, strides, config = _timm_stages(name)
    elif name.startswith("resnet") and name.endswith("_imagenet"):
        stages, strides, config = _ResNetStages(spec.make()), [4, 8, 16, 32], None
    else:
        raise UserError(f"--backbone {name}: it has no stages here; give timm_<model> or resnet18_imagenet, say")
    load(stages.net if isinstance(stages, _ResNetStages) else stages)
    levels = {}
    for stride, (first, last) in GRIDS.items():
        if stride in strides:
            levels[stride] = [i for i, each in enumerate(strides) if first <= each <= last]
    if FINE not in levels:
        raise UserError(f"--backbone {name}: it has no stage of stride {FINE} ({strides}); give a convolutional one")
    mean, std = config or ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Pyramid(stages, levels, mean, std).eval().requires_grad_(False)


def _timm_stages(name: str) -> tuple[nn.Module, list[int], tuple[Any, Any]]:
    """The stages of a model of timm, their strides, mean and standard deviation of its inputs."""
    import timm

    model = name.removeprefix(TIMM)
    try:
        net: Any = timm.create_model(model, pretrained=False, features_only=True)
    except RuntimeError as error:
        raise UserError(f"--backbone {name}: timm gives no stages of it ({error})") from None
    config = timm.get_pretrained_cfg(model)
    size, mean, std = (config.input_size[-1], config.mean, config.std) if config else (224, (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        shapes = [tuple(x.shape) for x in net.eval()(torch.zeros(1, 3, size, size))]
    if any(len(shape) != 4 or shape[1] != c for shape, c in zip(shapes, net.feature_info.channels(), strict=True)):
        raise UserError(f"--backbone {name}: its stages are no maps of channels first; give a convolutional one")
    return net, list(net.feature_info.reduction()), (mean, std)
