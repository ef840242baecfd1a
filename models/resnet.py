"""ResNets for small images (He et al. 2016): 3 x 3 stem, no pooling at the start, global average pooling.

Every activation is a module of its own, used once per forward pass, so that `models.insert` can put an operator before
each.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

Act = Callable[[], nn.Module]
Conv = Callable[[int, int, int], nn.Module]


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def relu() -> nn.ReLU:
    return nn.ReLU(inplace=True)


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
        return self.body(x).add_(self.shortcut(x))


class BasicBlock(Residual):
    def __init__(self, inputs: int, width: int, stride: int, *, conv: Conv = conv3x3, act: Act = relu):
        super().__init__(inputs, width, stride)
        self.conv1, self.bn1, self.act1 = conv(inputs, width, stride), nn.BatchNorm2d(width), act()
        self.conv2, self.bn2, self.act2 = conv(width, width, 1), nn.BatchNorm2d(width), act()

    def body(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))

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
        x = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.act3(self.add(x))


class ResNet(nn.Module):
    """Images (N, in_channels, H, W), normalised, to pooled features (N, feature_dim).

    blocks: number of residual blocks in each stage; widths: their channels. The first stage keeps the resolution, each
    later one halves it.

    stem(inputs, outputs): makes the first convolution. pool(channels): what follows its activation; None: nothing.
    conv(inputs, outputs, stride): makes every other 3 x 3 convolution; those of 1 x 1 stay.
    act(): makes each activation; stem_act() that of the stem, by default as `act`.
    last_block: class of the last `n_last` blocks in place of `block`, called with the same arguments.
    input_mean, input_std: by which images in [0, 1] are to be normalised, for each channel; None: 0.5.
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
        last_block: Callable[..., nn.Module] | None = None,
        n_last: int = 1,
        pool: Callable[[int], nn.Module] | None = None,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.input_mean, self.input_std = input_mean or (0.5,) * in_channels, input_std or (0.5,) * in_channels
        channels = widths[0]
        self.conv1, self.bn1, self.act1 = stem(in_channels, channels), nn.BatchNorm2d(channels), (stem_act or act)()
        self.pool = pool(channels) if pool is not None else nn.Identity()
        self.stages = len(widths)
        left = sum(blocks)
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
            layers = []
            for n in range(count):
                make = last_block if last_block is not None and left <= n_last else block
                layers.append(make(channels, width, 2 if stage > 1 and n == 0 else 1, conv=conv, act=act))
                channels = width * block.expansion
                left -= 1
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.feature_dim = channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act1(self.bn1(self.conv1(x))))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        # Channels last, as `x` lies in memory: its gradient then lies there in the same way.
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
