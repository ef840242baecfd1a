"""DeepMind's variant of wide residual networks (Gowal et al. 2020), which most robust networks for CIFAR are, and the
robust architecture of Peng et al. (2023), with RobustBench's names of tensors.

Activations come before convolutions; a block that changes the width takes its shortcut from the activated input. The
places where MeanSparse puts operators, besides those before activations, are `models.placements.Slot`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.placements import Slot
from models.resnet import average_pool, normalised

# Means and standard deviations of the training images, by which inputs are normalised.
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

Act = Callable[[], nn.Module]


def silu() -> nn.SiLU:
    return nn.SiLU(inplace=True)


class SqueezeExcitation(nn.Module):
    """Channels of x (N, C, H, W) weighted by a gate of their means (Hu et al. 2018). squeeze: its inner channels."""

    def __init__(self, channels: int, squeeze: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeeze, 1), nn.Conv2d(squeeze, channels, 1)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.activation(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Block(nn.Module):
    """h + shortcut, h = conv_1(act(bn(conv_0(y)))), y = act(bn(x)).

    The shortcut is x, or a 1 x 1 convolution of y where the width changes. squeeze: channels of a gate over channels
    (squeeze and excitation), which h goes through; None: there is none.
    """

    def __init__(self, inputs: int, width: int, stride: int, act: Act, squeeze: int | None = None):
        super().__init__()
        self.batchnorm_0, self.meansparse_0, self.relu_0 = nn.BatchNorm2d(inputs), Slot(inputs), act()
        # With stride 2 the window reaches over the right and the bottom edge only, which `forward` pads.
        self.conv_0 = nn.Conv2d(inputs, width, 3, stride, 1 if stride == 1 else 0, bias=False)
        self.batchnorm_1, self.meansparse_1, self.relu_1 = nn.BatchNorm2d(width), Slot(width), act()
        self.conv_1 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False) if inputs != width else None
        self.se = nn.Identity() if squeeze is None else SqueezeExcitation(width, squeeze)
        self.meansparse_2 = Slot(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu_0(self.meansparse_0(self.batchnorm_0(x)))
        past = x if self.shortcut is None else self.shortcut(y)
        if self.conv_0.stride != (1, 1):
            y = F.pad(y, (0, 1, 0, 1))
        y = self.relu_1(self.meansparse_1(normalised(self.conv_0, self.batchnorm_1, y)))
        return self.meansparse_2(self.se(self.conv_1(y)) + past)


class Group(nn.Module):
    """Blocks of one width, the first with the stride."""

    def __init__(self, blocks: Sequence[Block]):
        super().__init__()
        self.block = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class DMWideResNet(nn.Module):
    """Normalised images (N, 3, H, W) to features (N, F), the last of `widths`.

    blocks, widths: of each group; all groups but the first halve the size. stem: channels of the first convolution.
    squeeze: of the gates, as a share of the width; None: without gates. statistics: means and standard deviations by
    which images in [0, 1] are to be normalised.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        stem: int = 16,
        act: Act = silu,
        squeeze: float | None = None,
        statistics: tuple[Sequence[float], Sequence[float]] = CIFAR10,
    ):
        super().__init__()
        self.input_mean, self.input_std = statistics
        self.init_conv = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        groups, before = [], stem
        for group, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            gate = None if squeeze is None else round(squeeze * width)
            parts = []
            for n in range(count):
                parts.append(Block(before, width, 2 if group and not n else 1, act, gate))
                before = width
            groups.append(Group(parts))
        self.layer = nn.Sequential(*groups)
        self.batchnorm, self.meansparse_end, self.relu = nn.BatchNorm2d(before), Slot(before), act()
        self.feature_dim = before

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.init_conv(x))
        x = self.relu(self.meansparse_end(self.batchnorm(x)))
        return average_pool(x, (x.shape[2], x.shape[3]))


def dm_wrn(depth: int, width: int, **settings: Any) -> DMWideResNet:
    """WRN-depth-width. Raises: ValueError unless the depth is 6 n + 4 for n blocks in each of three groups."""
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"the depth must be 6 n + 4, got {depth}")
    return DMWideResNet((blocks,) * 3, [factor * width for factor in (16, 32, 64)], **settings)


def ra_wrn70_16() -> DMWideResNet:
    """RaWRN-70-16 (Peng et al. 2023)."""
    return DMWideResNet((30, 31, 10), (216, 432, 864), stem=96, squeeze=0.25)
