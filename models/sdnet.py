"""SDNet (Dai et al., NeurIPS 2022): ResNets whose convolutions are layers of sparse coding, `models.csc.CSC2d`.

`sdnet*` have one in place of the first convolution, `*_all` in place of every 3 x 3 convolution, `*_all_noshortcut`
in a chain of layers without shortcuts and activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from common.flags import Spec, flag
from models.csc import GRADIENTS, CSC2d, Solver, csc_layers
from models.resnet import BasicBlock, Conv, ResNet, conv3x3, relu

# Lambda is relative to inputs of about unit variance. The deviations of CIFAR are means over images, as published.
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def csc3x3(inputs: int, outputs: int, stride: int = 1) -> CSC2d:
    # Computing iterates again would cost a third of a network that is made of these layers.
    return CSC2d(inputs, outputs, 3, stride, 1, recompute=False)


class CodingBlock(BasicBlock):
    """relu(body(x) + shortcut(x)) without an activation within the body: codes are sparse already."""

    def __init__(self, inputs: int, width: int, stride: int, **parts: Any):
        super().__init__(inputs, width, stride, **parts)
        self.act1 = nn.Identity()


class ChainBlock(CodingBlock):
    """body(x) alone."""

    def __init__(self, inputs: int, width: int, stride: int, **parts: Any):
        super().__init__(inputs, width, stride, **parts)
        del self.shortcut
        self.act2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Variant(NamedTuple):
    """Which blocks, of which convolutions. pool: channels -> what halves the size after a stem for large images."""

    block: type[BasicBlock]
    conv: Conv
    pool: Any


VARIANTS = {
    "": Variant(BasicBlock, conv3x3, lambda channels: nn.MaxPool2d(3, 2, 1)),
    "_all": Variant(CodingBlock, csc3x3, lambda channels: csc3x3(channels, channels, 2)),
    "_all_noshortcut": Variant(ChainBlock, csc3x3, lambda channels: csc3x3(channels, channels, 2)),
}


def sdnet(variant: str, blocks: Sequence[int], widths: Sequence[int], *, large: bool = False) -> ResNet:
    """A network of `VARIANTS` with the blocks and widths of a ResNet. large: for images of 224 pixels."""
    block, conv, pool = VARIANTS[variant]
    kernel, stride, padding = (7, 2, 3) if large else (3, 1, 1)
    mean, std = IMAGENET if large else CIFAR
    return ResNet(
        block,
        blocks,
        widths,
        stem=partial(CSC2d, kernel_size=kernel, stride=stride, padding=padding),
        conv=conv,
        act=relu,
        stem_act=nn.Identity,
        pool=pool if large else None,
        input_mean=mean,
        input_std=std,
    )


@dataclass(frozen=True)
class CSCSpec(Spec, group="network and device"):
    """Sparse coding layers of a fresh network; weights know their own."""

    csc_lambda: float = flag(0.1, "sparse coding layers: weight of |z|_1", at_least=0)
    csc_steps: int = flag(2, "sparse coding layers: K, steps of the solver", at_least=1)
    csc_mu: float = flag(0.0, "sparse coding layers: weight of |z|^2 / 2", at_least=0)
    csc_signed: bool = flag(False, "sparse coding layers: codes of either sign, not z >= 0")
    csc_gradient_at: str = flag(
        GRADIENTS[0], "sparse coding layers, K >= 3: FISTA, or the released program's scheme", choices=lambda: GRADIENTS
    )
    csc_recompute: bool = flag(False, "compute the steps of all sparse coding layers again for the gradient")

    def apply(self, net: nn.Module) -> None:
        """Give the layers of a network these settings."""
        for layer in csc_layers(net).values():
            layer.set_solver(Solver(self.csc_steps, self.csc_mu, not self.csc_signed, self.csc_gradient_at))
            layer.set_lambda(self.csc_lambda)
            layer.recompute |= self.csc_recompute
