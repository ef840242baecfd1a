"""How far each part is from the machine's limit, and from the published formulation: `python -m benchmarks`.

One process, in turns, medians; both results are compared before anything is timed. The ceiling is the speed of a large
float32 matrix product (bf16 on GPUs that have it), measured first.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # The profiler counts memory; its own chatter is not wanted.

import torch

from benchmarks import augmentation, coding, dictionary, kmeans, stage1
from benchmarks.compare import Comparison, Part, compare, timed
from common.device import device_name, pick_device, reuse_host_memory
from common.errors import UserError, command
from scripts.results import markdown

PARTS: dict[str, Callable[[torch.device], Part]] = {
    "dictionary": dictionary.part,
    "kmeans": kmeans.part,
    "coding": coding.part,
    "augmentation": augmentation.part,
    "augmentation_compiled": partial(augmentation.part, compiled=True),
    "stage1_resnet8": partial(stage1.part, model="resnet8"),
    "stage1_resnet18": partial(stage1.part, model="resnet18", images=16),
}


def ceilings(device: torch.device, size: int = 2048, repeats: int = 9) -> dict[str, float]:
    """FLOP/s of a matrix product of `size` in float32, and bytes/s of a copy of 256 MiB (read and written)."""
    a, b = (torch.rand(size, size, device=device) for _ in range(2))
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)

    def median(run: Callable[[], Any]) -> float:
        return sorted(timed(run, device) for _ in range(repeats))[repeats // 2]

    return {
        "product": 2 * size**3 / median(lambda: torch.mm(a, b)),
        "copy": 2 * source.nbytes / median(lambda: target.copy_(source)),
    }


def row(found: Comparison, product: float) -> list[str]:
    work = found.part.work
    return [
        found.part.name,
        found.part.size,
        f"{1e3 * found.ours_s:.1f} ms",
        f"{1e3 * found.published_s:.1f} ms",
        f"{found.ratio:.1f}",
        f"{found.ours_bytes / 2**20:.0f} MiB",
        f"{found.published_bytes / 2**20:.0f} MiB",
        f"{100 * work / found.ours_s / product:.0f} %" if work else "",
        found.remark,
    ]


HEADER = ["part", "size", "ours", "published", "ratio", "peak, ours", "peak, published", "of ceiling", "results"]


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), help="these parts alone")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each side")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats must be > 0, got {args.repeats}")
    device = pick_device(args.device)
    reuse_host_memory()
    limits = ceilings(device)
    found = []
    for name in args.only or PARTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found.append(compare(PARTS[name](device), device, repeats=args.repeats))
    if args.json:
        rows = [dict(zip(HEADER, row(f, limits["product"]), strict=True)) for f in found]
        print(json.dumps({"device": device_name(device), "torch": torch.__version__, **limits, "parts": rows}))
        return
    print(f"{device_name(device)}, torch {torch.__version__}: product {limits['product'] / 1e9:.0f} GFLOP/s,", end=" ")
    print(f"copy {limits['copy'] / 1e9:.1f} GB/s")
    print(markdown(HEADER, [row(f, limits["product"]) for f in found]), end="")


if __name__ == "__main__":
    sys.exit(main())
