"""RaWRN-101-2 (Peng et al. 2023), a robust network for ImageNet, with RobustBench's names of tensors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.dm_wide_resnet import SqueezeExcitation, silu
from models.resnet import average_pool, normalised
from models.sdnet import IMAGENET

_BOTTLENECK, _SQUEEZE = 0.25, 0.25


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Branch(nn.Module):
    """Convolutions of 1, 3 and 1 pixels, a gate over channels after the second."""

    def __init__(self, inputs: int, width: int, stride: int, group_width: int):
        super().__init__()
        inner = round(_BOTTLENECK * width)
        groups = inner // group_width
        self.a = nn.Sequential(_conv(inputs, inner, 1), nn.Identity(), silu())
        self.b = nn.Sequential(_conv(inner, inner, 3, stride, groups), nn.BatchNorm2d(inner), silu())
        self.se = SqueezeExcitation(inner, round(_SQUEEZE * inputs))
        self.c = nn.Sequential(_conv(inner, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b[2](normalised(self.b[0], self.b[1], x))
        return normalised(self.c[0], self.c[1], self.se(x))


class Block(nn.Module):
    """act(F(x) + shortcut); the shortcut is x, or a 1 x 1 convolution of it where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int, group_width: int):
        super().__init__()
        self.proj = None
        if inputs != width or stride != 1:
            self.proj = nn.Sequential(_conv(inputs, width, 1, stride), nn.BatchNorm2d(width))
        self.F = Branch(inputs, width, stride, group_width)
        self.last_activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        past = x if self.proj is None else normalised(self.proj[0], self.proj[1], x)
        return self.last_activation(self.F(x) + past)


class RaNet(nn.Module):
    """Normalised images (N, 3, H, W) to features (N, F), the last of `widths`.

    stem: channels of the first convolution, of 7 pixels and stride 2. Each stage halves the size. blocks, widths,
    group_widths: of each stage; channels of a group of its 3 x 3 convolutions.
    """

    input_mean, input_std = IMAGENET

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], group_widths: Sequence[int], *, stem: int = 96):
        super().__init__()
        first: nn.Module = nn.Sequential(
            nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
        )
        self.stem = nn.ModuleDict({"stem": nn.ModuleDict({"stem": first})})
        self.stages = nn.Sequential()
        before = stem
        for i, (count, width, group_width) in enumerate(zip(blocks, widths, group_widths, strict=True), 1):
            stage = nn.Sequential()
            for j in range(count):
                stage.add_module(f"stage{i}-block{j}", Block(before, width, 2 if j == 0 else 1, group_width))
                before = width
            self.stages.add_module(f"stage{i}", stage)
        self.feature_dim = before

    def forward(self, x: Tensor) -> Tensor:
        stem: Any = self.stem
        x = self.stages(stem["stem"]["stem"](x))
        return average_pool(x, (x.shape[2], x.shape[3]))


def ra_wrn101_2() -> RaNet:
    return RaNet((7, 11, 18, 1), (512, 1024, 2016, 4032), (64, 128, 252, 504))
