"""torchvision's ResNets with one module for each activation.

torchvision's blocks call one ReLU module two or three times in a forward pass, so an operator put before that module
would serve all of them. These blocks have one module per use. Weights, keys and outputs are torchvision's. A rewrite of
the traced graph (torch.fx) would do the same but freeze what depends on training mode or on the input's shape.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet

from models.resnet import normalised, relu


class BasicBlock(resnet.BasicBlock):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        del self.relu
        self.act1, self.act2 = relu(), relu()
        in_order(self, "conv1", "bn1", "act1", "conv2", "bn2")

    def forward(self, x: Tensor) -> Tensor:
        y = normalised(self.conv2, self.bn2, self.act1(normalised(self.conv1, self.bn1, x)))
        return self.act2(y.add_(_shortcut(self, x)))


class Bottleneck(resnet.Bottleneck):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        del self.relu
        self.act1, self.act2, self.act3 = relu(), relu(), relu()
        in_order(self, "conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3")

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(normalised(self.conv1, self.bn1, x))
        y = normalised(self.conv3, self.bn3, self.act2(normalised(self.conv2, self.bn2, y)))
        return self.act3(y.add_(_shortcut(self, x)))


def in_order(block: nn.Module, *names: str) -> None:
    """Register these modules of a block first: each activation follows the layer it is of (`models.placements`)."""
    rest = dict(block._modules)
    block._modules.clear()
    block._modules.update({name: rest.pop(name) for name in names} | rest)


def _shortcut(block: resnet.BasicBlock | resnet.Bottleneck, x: Tensor) -> Tensor:
    if block.downsample is None:
        return x
    conv, bn = block.downsample
    return normalised(conv, bn, x)


def resnet18() -> nn.Module:
    return _build(BasicBlock, (2, 2, 2, 2))


def resnet34() -> nn.Module:
    return _build(BasicBlock, (3, 4, 6, 3))


def resnet50() -> nn.Module:
    return _build(Bottleneck, (3, 4, 6, 3))


def _build(block: type[BasicBlock] | type[Bottleneck], blocks: Sequence[int]) -> nn.Module:
    """Images (N, 3, H, W), normalised, to pooled features (N, F); weights as torchvision draws them."""
    net: Any = resnet.ResNet(block, list(blocks))
    net.feature_dim = net.fc.in_features
    net.fc = nn.Identity()
    return net
