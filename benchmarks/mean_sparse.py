"""Inference with operators of MeanSparse against the network without them: `python -m benchmarks.mean_sparse`.

Forward passes in evaluation mode, without gradients: of the network as it is, with operators that do nothing (alpha 0),
with operators that act, and while statistics are collected. All sides live in one process and take their turns; a ratio
is the median of the ratios within a turn. --compile compiles each network.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.rdae import Clock
from benchmarks.sdnet import Data, Ratio, turns
from common.device import Amp, autocast, device_name, pick_device, reuse_host_memory
from common.errors import UserError, command
from models import BACKBONES
from models.checkpoint import build_net
from models.mean_sparse import collect, insert, operators, sparsify
from scripts.results import markdown

BASE, IDLE, ACTING, COLLECTING = "without operators", "alpha 0", "acting", "collecting statistics"


def networks(model: str, data: Data, placement: str, alpha: float) -> dict[str, nn.Module]:
    """The network, and copies with operators that have the statistics of the images."""
    base = build_net("classifier", model, n_classes=10, seed=0).to(data.images.device).eval()
    idle = insert(copy.deepcopy(base), placement)
    collect(idle, [data.images])
    acting = copy.deepcopy(idle)
    sparsify(acting, alpha)
    return {BASE: base, IDLE: idle, ACTING: acting}


def sides(nets: dict[str, nn.Module], data: Data, amp: Amp, compiled: bool) -> dict[str, Callable[[], object]]:
    """What is measured, by name, the network itself first."""

    def passes(net: nn.Module) -> Callable[[], object]:
        run = torch.compile(net) if compiled else net

        def forward() -> object:
            with torch.no_grad(), amp():
                return run(data.images)

        return forward

    found = {name: passes(net) for name, net in nets.items()}
    return found | {COLLECTING: lambda: collect(nets[IDLE], [data.images])}


def table(seconds: dict[str, list[float]], images: int) -> list[list[str]]:
    """A row for each side: images a second, and as a share of the network's own."""
    return [
        [name, f"{images / statistics.median(taken):.0f}", str(Ratio.of(taken, seconds[BASE]))]
        for name, taken in seconds.items()
    ]


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mean_sparse", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--model", choices=sorted(BACKBONES), default="resnet8", metavar="NAME")
    parser.add_argument("--placement", choices=("activations", "blocks"), default="activations")
    parser.add_argument("--alpha", type=float, default=0.2)
    parser.add_argument("--image_size", type=int, default=32, help="pixels on a side")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15, help="passes of each side")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--process_time", action="store_true", help="CPU seconds: on a machine that others use, too")
    args = parser.parse_args(argv)
    if min(args.threads, args.image_size, args.batch_size, args.repeats) < 1 or args.alpha <= 0:
        raise UserError("--threads, --image_size, --batch_size, --repeats and --alpha must be > 0")
    device = pick_device(args.device)
    if args.process_time and device.type != "cpu":
        raise UserError("--process_time: a GPU's work is not in it; leave it out")
    torch.set_num_threads(args.threads)
    reuse_host_memory()
    data = Data.of(args.batch_size, device, args.image_size)
    nets = networks(args.model, data, args.placement, args.alpha)
    print(
        f"{device_name(device)}, torch {torch.__version__}, {args.model}, {len(operators(nets[IDLE]))} operators, batch"
        f" {args.batch_size}, amp {args.amp}{', compiled' if args.compile else ''}",
        flush=True,
    )
    of_all = sides(nets, data, autocast(args.amp, device), args.compile)
    for run in of_all.values():
        run()  # What is compiled is compiled now.
    seconds = turns(of_all, Clock(device, args.process_time), args.repeats)
    print(markdown(["", "images/s", "of the network's own"], table(seconds, args.batch_size)), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
