"""What keeping freed host memory is worth to a training step on a CPU: `python -m benchmarks.host_memory`.

The setting cannot be taken back within a process, so each measurement is a process of its own; they alternate, the
medians are compared as a ratio, and the losses of both must be equal. Linux with glibc only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from common.device import reuse_host_memory
from common.errors import UserError, command
from models import BACKBONES
from models.checkpoint import build_net
from training.modes.simclr import contrastive_step


def measure(model: str, batch_size: int, steps: int = 5) -> tuple[float, float]:
    """Median seconds of a forward and backward pass over 10 views per image, and the loss."""
    net = build_net("feature", model, n_classes=10, simclr_dim=128, n_shifts=5, seed=0).train()
    views = torch.rand(10 * batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(steps + 1):
        begun = time.perf_counter()
        labels = torch.zeros(batch_size).long()
        terms = contrastive_step(net, views, labels, n_shifts=5).losses
        total = torch.stack(list(terms.values())).sum()
        net.zero_grad()
        total.backward()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:]), total.item()


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_memory", description=__doc__)
    parser.add_argument("--model", choices=sorted(BACKBONES), default="resnet8")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind")
    parser.add_argument("--measure", choices=("default", "kept"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if sys.platform != "linux":
        raise UserError("this benchmark needs Linux with glibc")
    if args.measure:
        if args.measure == "kept":
            reuse_host_memory()
        print(json.dumps(measure(args.model, args.batch_size)))
        return
    times: dict[str, list[float]] = {"default": [], "kept": []}
    losses = set()
    for _ in range(args.repeats):
        for kind in times:
            call = [sys.executable, "-m", "benchmarks.host_memory", "--measure", kind]
            call += ["--model", args.model, "--batch_size", str(args.batch_size)]
            seconds, loss = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
            times[kind].append(seconds)
            losses.add(loss)
    if len(losses) > 1:
        raise UserError(f"losses differ: {losses}")
    default, kept = (statistics.median(times[kind]) for kind in ("default", "kept"))
    threads = torch.get_num_threads()
    print(f"{args.model}, {10 * args.batch_size} views, {threads} threads, torch {torch.__version__}, same loss")
    print(f"glibc's default {default:.3f} s, kept {kept:.3f} s, ratio {default / kept:.2f}")


if __name__ == "__main__":
    sys.exit(main())
