"""The layer of SDNet as the released program computes it, by our description of it; for `benchmarks.sdnet`."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import ResNet, relu
from models.sdnet import CIFAR, VARIANTS

_RATIO, _STEPS, _TOLERANCE = 0.9, 50, 1e-5


class ReleasedCSC2d(nn.Module):
    """Every forward pass starts the power iteration where the last one ended, up to 50 steps, each read to know whether
    to go on; then scales the atoms to norm 1, in place; and after the code computes both terms of the objective.

    eta: of the last forward pass. terms: the squared residual and lam |z|_1 + mu/2 |z|^2 of its batch, with their
    graph. reads: how often the host has waited for the device. Gradients are autograd's; for K >= 3 that of the fit is
    taken at the last iterate.
    """

    def __init__(
        self,
        in_channels: int,
        atoms: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        lam: float = 0.1,
        steps: int = 2,
        mu: float = 0.0,
    ) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.lam, self.steps, self.mu = lam, steps, mu
        self.weight = nn.Parameter(torch.empty(atoms, in_channels, kernel_size, kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.eta = 0.0
        self.power: Tensor | None = None
        self.terms: tuple[Tensor, Tensor] | None = None
        self.reads = 0

    def analyse(self, r: Tensor) -> Tensor:
        return F.conv2d(r, self.weight, None, self.stride, self.padding)

    def synthesise(self, z: Tensor) -> Tensor:
        # Right for even sizes only.
        return F.conv_transpose2d(z, self.weight, None, self.stride, self.padding, 0 if self.stride == 1 else 1)

    @torch.no_grad()
    def largest_eigenvalue(self, x: Tensor) -> float:
        v = self.power if self.power is not None else torch.randn_like(self.analyse(x[:1]))
        for _ in range(_STEPS):
            new = self.analyse(self.synthesise(v))
            new = new / new.norm()
            change, v = (new - v).square().sum(), new
            self.reads += 1
            if change.item() <= _TOLERANCE:
                break
        self.power = v
        self.reads += 1
        return self.synthesise(v).square().sum().item()

    def forward(self, x: Tensor) -> Tensor:
        self.eta = eta = _RATIO / self.largest_eigenvalue(x)
        with torch.no_grad():
            norms = self.weight.flatten(1).norm(dim=1).clamp_min(1e-12)
            self.weight.copy_(self.weight / norms.view(-1, 1, 1, 1))

        def shrink(v: Tensor) -> Tensor:
            return F.relu((v - self.lam * eta) / (1 + self.mu * eta))

        z = last = shrink(eta * self.analyse(x))
        momentum = (1 + math.sqrt(5)) / 2
        y = z
        for _ in range(self.steps - 1):
            z, last = shrink(y + eta * self.analyse(x - self.synthesise(z))), z
            after = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
            y = z + (momentum - 1) / after * (z - last)
            momentum = after
        residual = x - self.synthesise(z)
        penalty = self.lam * z.abs().sum() + self.mu / 2 * z.square().sum()
        self.terms = residual.square().sum(), penalty
        return z

    def read(self) -> tuple[float, ...]:
        """Both terms."""
        assert self.terms is not None
        self.reads += 2
        return tuple(term.item() for term in self.terms)


def released_sdnet(variant: str, blocks: Any, widths: Any) -> ResNet:
    """As `models.sdnet.sdnet`, of these layers."""
    block, conv, _ = VARIANTS[variant]
    return ResNet(
        block,
        blocks,
        widths,
        stem=_csc3x3,
        conv=_csc3x3 if variant else conv,
        act=relu,
        stem_act=nn.Identity,
        input_mean=CIFAR[0],
        input_std=CIFAR[1],
    )


def _csc3x3(inputs: int, outputs: int, stride: int = 1) -> ReleasedCSC2d:
    return ReleasedCSC2d(inputs, outputs, 3, stride, 1)
