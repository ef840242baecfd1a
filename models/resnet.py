"""ResNets for small images (He et al. 2016): 3 x 3 stem, no pooling at the start, global average pooling."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class _Residual(nn.Module):
    """relu(body(x) + shortcut(x)); the shortcut is a 1 x 1 convolution where the shape changes.

    What batch normalisation puts out is not needed for its gradient, so sums and ReLUs are made in its place.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x).add_(self.shortcut(x)), inplace=True)


class BasicBlock(_Residual):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__(inputs, width, stride)
        self.conv1, self.bn1 = _conv3x3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3x3(width, width), nn.BatchNorm2d(width)

    def body(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))


class Bottleneck(_Residual):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        outputs = width * self.expansion
        super().__init__(inputs, outputs, stride)
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)), inplace=True)))


class ResNet(nn.Module):
    """Images (N, 3, H, W), normalised, to pooled features (N, feature_dim).

    blocks: residual blocks in each stage; widths: their channels. The first stage keeps the resolution, each later one
    halves it.
    """

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], blocks: Sequence[int], widths: Sequence[int]):
        super().__init__()
        channels = widths[0]
        self.conv1, self.bn1 = _conv3x3(3, channels), nn.BatchNorm2d(channels)
        self.stages = len(widths)
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
            layers = []
            for n in range(count):
                layers.append(block(channels, width, stride=2 if stage > 1 and n == 0 else 1))
                channels = width * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.feature_dim = channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        # Channels last, as `x` lies in memory: its gradient then lies there in the same way.
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
