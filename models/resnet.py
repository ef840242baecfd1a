"""ResNets for small images (He et al. 2016): 3 x 3 stem, no pooling at the start, global average pooling.

Every activation is a module of its own, used once per forward pass, so that `models.insert` can put an operator before
each.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Act = Callable[[], nn.Module]
Conv = Callable[[int, int, int], nn.Module]


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def relu() -> nn.ReLU:
    return nn.ReLU(inplace=True)


def normalised(conv: nn.Module, bn: nn.Module, x: Tensor) -> Tensor:
    """bn(conv(x)).

    In evaluation mode, and where no weight gets a gradient, as one convolution by folded weights: a pass over the map
    less forward, and one less backward to x.
    """
    if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d or bn.training or conv.bias is not None:
        return bn(conv(x))
    if torch.is_grad_enabled() and any(p.requires_grad for p in (conv.weight, bn.weight, bn.bias)):
        return bn(conv(x))
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    bias = bn.bias - scale * bn.running_mean
    return conv._conv_forward(x, conv.weight * scale.view(-1, 1, 1, 1), bias)


class Residual(nn.Module):
    """act(body(x) + shortcut(x)); the shortcut is a 1 x 1 convolution where the shape changes.

    expansion: output channels for each channel of `width`. Subclasses define `body`, which must return a tensor that
    its own gradient does not need, such as the output of batch normalisation: the sum and the ReLU overwrite it.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = width * self.expansion
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def add(self, x: Tensor) -> Tensor:
        """body(x) + shortcut(x), before the last activation."""
        past = normalised(self.shortcut[0], self.shortcut[1], x) if len(self.shortcut) else x
        return self.body(x).add_(past)


class BasicBlock(Residual):
    def __init__(self, inputs: int, width: int, stride: int, *, conv: Conv = conv3x3, act: Act = relu):
        super().__init__(inputs, width, stride)
        self.conv1, self.bn1, self.act1 = conv(inputs, width, stride), nn.BatchNorm2d(width), act()
        self.conv2, self.bn2, self.act2 = conv(width, width, 1), nn.BatchNorm2d(width), act()

    def body(self, x: Tensor) -> Tensor:
        return normalised(self.conv2, self.bn2, self.act1(normalised(self.conv1, self.bn1, x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.add(x))


class Bottleneck(Residual):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, conv: Conv = conv3x3, act: Act = relu):
        super().__init__(inputs, width, stride)
        outputs = width * self.expansion
        self.conv1, self.bn1, self.act1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), act()
        self.conv2, self.bn2, self.act2 = conv(width, width, stride), nn.BatchNorm2d(width), act()
        self.conv3, self.bn3, self.act3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs), act()

    def body(self, x: Tensor) -> Tensor:
        x = self.act1(normalised(self.conv1, self.bn1, x))
        return normalised(self.conv3, self.bn3, self.act2(normalised(self.conv2, self.bn2, x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.act3(self.add(x))


class StagedNet(nn.Module):
    """Stem, residual blocks, tail, pooling: normalised images (N, in_channels, H, W) to features (N, feature_dim).

    Subclasses make the stem, then the stages, in the order in which weights are drawn.

    grid: windows of the average pooling on a side; features are channels x grid x grid, the channel first.
    input_mean, input_std: by which images in [0, 1] are to be normalised, for each channel; None: 0.5.
    """

    feature_dim: int
    # Channels of the map of each stage.
    stage_channels: list[int]

    def __init__(
        self,
        *,
        in_channels: int = 3,
        grid: int = 1,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.in_channels, self.grid, self.stages = in_channels, grid, 0
        self.input_mean, self.input_std = input_mean or (0.5,) * in_channels, input_std or (0.5,) * in_channels

    def add_stages(
        self, make: Callable[[int, int, int], nn.Module], blocks: Sequence[int], widths: Sequence[int], channels: int
    ) -> None:
        """Blocks make(inputs, width, stride) in stages `layer1`, `layer2`, ...; the first gets `channels` of the stem.

        The first stage keeps the resolution, each later one halves it.
        """
        self.stages, self.stage_channels = len(widths), []
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
            layers = []
            for n in range(count):
                layers.append(make(channels, width, 2 if stage > 1 and n == 0 else 1))
                channels = width * getattr(layers[-1], "expansion", 1)
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
            self.stage_channels.append(channels)
        self.feature_dim = channels * self.grid**2

    def layers(self) -> list[nn.Sequential]:
        """The stages, in order."""
        return [self.get_submodule(f"layer{stage}") for stage in range(1, self.stages + 1)]  # type: ignore[misc]

    def stem(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def tail(self, x: Tensor, use: int = -1) -> Tensor:
        """What follows the last block. use: which of the uses that `repeat_tail` has prepared."""
        return x

    def repeat_tail(self, uses: int) -> None:
        """Prepare the tail for so many uses in one forward pass. Weights are shared, activations are not."""

    def window(self, x: Tensor) -> tuple[int, int]:
        """Sides of a window of the pooling of x (N, C, H, W). Raises: ValueError where the grid does not divide x."""
        H, W = x.shape[2:]
        if H % self.grid or W % self.grid:
            raise ValueError(f"a map of {H} x {W} has no grid of {self.grid} x {self.grid}; give larger images")
        return H // self.grid, W // self.grid

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        """What each stage makes of x, in order."""
        x = self.stem(x)
        for layer in self.layers():
            x = layer(x)
            yield x

    def features(self, last: Tensor) -> Tensor:
        """Features (N, feature_dim) of the map of the last stage."""
        x = self.tail(last)
        return average_pool(x, self.window(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers():
            x = layer(x)
        return self.features(x)


def average_pool(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Means of x (N, C, H, W) over windows, flattened (N, C x rows x columns), the channel first."""
    if tuple(x.shape[2:]) == window:
        # Channels last, as `x` lies in memory: its gradient then lies there in the same way.
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
    return F.avg_pool2d(x, window).flatten(1)


class ResNet(StagedNet):
    """blocks: number of residual blocks in each stage; widths: their channels.

    stem(inputs, outputs): makes the first convolution. pool(channels): what follows its activation; None: nothing.
    conv(inputs, outputs, stride): makes every other 3 x 3 convolution; those of 1 x 1 stay.
    act(): makes each activation; stem_act() that of the stem, by default as `act`.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        in_channels: int = 3,
        stem: Callable[[int, int], nn.Module] = conv3x3,
        conv: Conv = conv3x3,
        act: Act = relu,
        stem_act: Act | None = None,
        pool: Callable[[int], nn.Module] | None = None,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
    ):
        super().__init__(in_channels=in_channels, input_mean=input_mean, input_std=input_std)
        channels = widths[0]
        self.conv1, self.bn1, self.act1 = stem(in_channels, channels), nn.BatchNorm2d(channels), (stem_act or act)()
        self.pool = pool(channels) if pool is not None else nn.Identity()
        self.add_stages(partial(block, conv=conv, act=act), blocks, widths, channels)

    def stem(self, x: Tensor) -> Tensor:
        return self.pool(self.act1(normalised(self.conv1, self.bn1, x)))
