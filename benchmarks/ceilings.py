"""What a machine can do: the speed of its fastest large products and of a large copy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

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
    def of(cls, device: torch.device, size: int | None = None, repeats: int = 9) -> "Ceilings":
        """Medians, on `device`: products of (size, size) matrices (2048 on a CPU, else 8192), a copy of 256 MiB."""
        size = size or (2048 if device.type == "cpu" else 8192)
        a, b = (torch.rand(size, size, device=device) for _ in range(2))
        source = torch.zeros(2**26, device=device)
        target = torch.empty_like(source)

        def speed(run: Callable[[], Any], work: float) -> float:
            return work / sorted(timed(run, device) for _ in range(repeats + 1))[repeats // 2]

        work, half = 2.0 * size**3, 0.0
        product, convolution = speed(lambda: a @ b, work), speed(lambda: F.conv1d(a[None], b[:, :, None]), work)
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
