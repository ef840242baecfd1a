"""What a machine can do: the speed of its fastest large products and of a large copy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.compare import timed


@dataclass(frozen=True)
class Ceilings:
    """product: FLOP/s in float32, of the faster of a matrix product and a convolution (on an AMD processor MKL, under
    the first, reaches half of what oneDNN, under the second, does). product_bf16: of a matrix product, 0 on a CPU.
    copy: bytes/s, read and written."""

    product: float
    product_bf16: float
    copy: float

    @classmethod
    def of(cls, device: torch.device, size: int = 2048, repeats: int = 9) -> "Ceilings":
        """Medians, on `device`: products of (size, size) matrices, a copy of 256 MiB."""
        a, b = (torch.rand(size, size, device=device) for _ in range(2))
        source = torch.zeros(2**26, device=device)
        target = torch.empty_like(source)

        def median(run: Callable[[], Any]) -> float:
            return sorted(timed(run, device) for _ in range(repeats + 1))[repeats // 2]

        work = 2 * size**3
        product = work / min(median(lambda: a @ b), median(lambda: F.conv1d(a[None], b[:, :, None])))
        half = work / median(lambda: a.bfloat16() @ b.bfloat16()) if device.type == "cuda" else 0.0
        return cls(product, half, 2 * source.nbytes / median(lambda: target.copy_(source)))

    def __str__(self) -> str:
        half = f" (bf16 {self.product_bf16 / 1e9:.0f})" if self.product_bf16 else ""
        return f"product {self.product / 1e9:.0f} GFLOP/s{half}, copy {self.copy / 1e9:.1f} GB/s"
