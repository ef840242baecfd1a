"""What a machine can do: the speed of its fastest large products and of a large copy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import timed
from common.device import has_bf16


@dataclass(frozen=True)
class Ceilings:
    """product: FLOP/s of a product of float32 matrices, convolution: of a convolution of float32 images (TF32 on a GPU,
    as torch has it). On a CPU both are the faster of the two: MKL, under the first, reaches half of what oneDNN, under
    the second, does on an AMD processor, and either serves for either. bf16: of a product, 0 where there is none.
    copy: bytes/s, read and written."""

    product: float
    convolution: float
    bf16: float
    copy: float

    @classmethod
    def of(cls, device: torch.device, size: int | None = None, repeats: int = 15) -> "Ceilings":
        """The best of several: products of (size, size) matrices (2048 on a CPU, else 8192), a copy of 256 MiB."""
        size = size or (2048 if device.type == "cpu" else 8192)
        a, b = (torch.rand(size, size, device=device) for _ in range(2))
        source = torch.zeros(2**26, device=device)
        target = torch.empty_like(source)

        def speed(run: Callable[[], Any], work: float) -> float:
            return work / min(timed(run, device) for _ in range(repeats))

        work, half = 2.0 * size**3, 0.0
        x, weight = _convolution(device, images=16 if device.type == "cpu" else 256)
        product = speed(lambda: a @ b, work)
        convolution = speed(lambda: F.conv2d(x, weight, padding=1), 2.0 * x.numel() * weight.numel() / len(x[0]))
        if device.type == "cpu":
            product = convolution = max(product, convolution)
        if has_bf16(device):
            c, d = a.bfloat16(), b.bfloat16()
            half = speed(lambda: c @ d, work)
        return cls(product, convolution, half, speed(lambda: target.copy_(source), 2.0 * source.nbytes))

    def __str__(self) -> str:
        found = {"product": self.product, "convolution": self.convolution, "bf16 product": self.bf16}
        if self.product == self.convolution:
            del found["convolution"]
        speeds = [f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in found.items() if value]
        return ", ".join([*speeds, f"copy {self.copy / 1e9:.1f} GB/s"])


def _convolution(device: torch.device, images: int) -> tuple[Tensor, Tensor]:
    """Images (N, 256, 32, 32), channels last, and weights (256, 256, 3, 3), as a large ResNet has them."""
    x, weight = torch.rand(images, 256, 32, 32, device=device), torch.rand(256, 256, 3, 3, device=device)
    return x.contiguous(memory_format=torch.channels_last), weight.contiguous(memory_format=torch.channels_last)
