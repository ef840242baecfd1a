"""Residual networks with activations before convolutions (He et al. 2016, Identity mappings), among them the wide ones
(Zagoruyko & Komodakis 2016), for small images: 3 x 3 stem, no pooling at the start.

Every activation is a module of its own, used once per forward pass, as in `models.resnet`.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.resnet import StagedNet, conv3x3, normalised, relu


class PreActBlock(nn.Module):
    """conv2(act2(bn2(conv1(y)))) + shortcut, y = act1(bn1(x)).

    The shortcut is x, or a 1 x 1 convolution of y where the shape changes.
    """

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.act1, self.conv1 = nn.BatchNorm2d(inputs), relu(), conv3x3(inputs, width, stride)
        self.bn2, self.act2, self.conv2 = nn.BatchNorm2d(width), relu(), conv3x3(width, width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(x))
        past = self.shortcut(y) if len(self.shortcut) else x
        return self.conv2(self.act2(normalised(self.conv1, self.bn2, y))).add_(past)


class PreActResNet(StagedNet):
    """blocks: number of residual blocks in each stage; widths: their channels; stem: channels of the first convolution.

    After the last block come batch normalisation and an activation. Further arguments: those of `StagedNet`.
    """

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], *, stem: int, **settings: Any):
        super().__init__(**settings)
        self.conv1 = conv3x3(self.in_channels, stem)
        self.add_stages(PreActBlock, blocks, widths, stem)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.acts = nn.ModuleList([relu()])

    def stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def tail(self, x: Tensor, use: int = -1) -> Tensor:
        return self.acts[use](self.bn(x))

    def repeat_tail(self, uses: int) -> None:
        self.acts = nn.ModuleList(relu() for _ in range(uses))


class WideResNet(PreActResNet):
    """WRN-depth-factor, without dropout. depth: 6 n + 4 for n blocks in each of three stages.

    Convolutions of k x k pixels start from weights of variance 2 / (k x k x outputs), a classifier from a bias of 0.
    """

    zero_bias = True

    def __init__(self, depth: int, factor: int, **settings: Any):
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"the depth must be 6 n + 4, got {depth}")
        super().__init__((blocks,) * 3, [factor * width for width in (16, 32, 64)], stem=16, **settings)
        for module in self.modules():
            # Normal numbers on the meta device, where there is nothing to draw, make torch load its compiler: seconds.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                k, outputs = module.kernel_size[0], module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (k * k * outputs)))
