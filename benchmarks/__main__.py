"""How far each part is from the machine's limit, and from the published formulation: `python -m benchmarks`.

In turns, medians; both results are compared before anything is timed. Ceilings, measured first: the speed of the
fastest large float32 product (bf16, too, on a GPU) and of a large copy. Each part has a process of its own. `kept`:
both sides in it, under our memory policy; `ratio`: on a CPU the published side is in one more that sets nothing.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # The profiler counts memory; its own chatter is not wanted.

import torch

from benchmarks import augmentation, coding, dictionary, kmeans, stage1
from benchmarks.ceilings import Ceilings
from benchmarks.compare import Comparison, Part, apart, compare
from common.device import device_name, pick_device, reuse_host_memory
from common.errors import RunStopped, UserError, command
from scripts.results import markdown

PARTS: dict[str, Callable[[torch.device], Part]] = {
    "dictionary": dictionary.part,
    "kmeans": kmeans.part,
    "coding": coding.part,
    "cross": coding.cross_part,
    "cross_draws": coding.cross_draws_part,
    "augmentation": augmentation.part,
    "augmentation_compiled": partial(augmentation.part, compiled=True),
    "stage1_resnet8": partial(stage1.part, model="resnet8"),
    "stage1_resnet8_compiled": partial(stage1.part, model="resnet8", compiled=True),
    "stage1_resnet18": partial(stage1.part, model="resnet18", images=16),
    "stage1_resnet18_bf16": partial(stage1.part, model="resnet18", bf16=True),
    "stage1_resnet18_compiled": partial(stage1.part, model="resnet18", images=16, compiled=True),
}


def row(found: Comparison, limits: Ceilings) -> list[str]:
    return [
        found.name,
        found.size,
        f"{1e3 * found.ours_s:.1f} ms",
        f"{1e3 * found.published_s:.1f} ms",
        f"{found.ratio:.1f}",
        f"{found.kept_ratio:.1f}",
        f"{found.ours_bytes / 2**20:.0f} / {found.published_bytes / 2**20:.0f} MiB",
        f"{100 * found.share(getattr(limits, found.arithmetic), limits.copy):.0f} %",
        str(found.rounds),
        found.remark,
    ]


HEADER = ["part", "size", "ours", "published", "ratio", "kept", "peak memory", "of ceiling", "rounds", "results"]


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), help="these parts alone")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each side")
    parser.add_argument("--seconds", type=float, default=120, help="of timing a part; fewer rounds of what is slow")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args(argv)
    if args.repeats < 1 or not args.seconds > 0:
        raise UserError("--repeats and --seconds must be > 0")
    device = pick_device(args.device)
    reuse_host_memory()
    limits = Ceilings.of(device)
    found, failed = [], []
    for name in args.only or [name for name in PARTS if limits.bf16 or not name.endswith("_bf16")]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            found.append(apart(compare, PARTS[name], device, repeats=args.repeats, seconds=args.seconds))
            # At once: what follows may not come to its end.
            print(
                "  ".join(map(": ".join, zip(HEADER, row(found[-1], limits), strict=True))), file=sys.stderr, flush=True
            )
        except Exception as error:  # What the other parts give is not lost for it.
            failed.append(f"{name} ({type(error).__name__}: {error})")
    if args.json:
        rows = [dict(zip(HEADER, row(f, limits), strict=True)) for f in found]
        facts = {"device": device_name(device), "torch": torch.__version__, **asdict(limits)}
        print(json.dumps({**facts, "parts": rows}))
    else:
        print(f"{device_name(device)}, torch {torch.__version__}: {limits}")
        print(markdown(HEADER, [row(f, limits) for f in found]), end="", flush=True)
    if failed:
        raise RunStopped(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    sys.exit(main())
