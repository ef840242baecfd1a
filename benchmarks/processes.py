"""How much faster several processes are than one: `python -m benchmarks.processes`. Each has one thread (CPU) or a GPU.

The same steps and evaluations, on the same batches, by one process while the others wait, and by all of them; in turns,
medians. What is compared is the whole: images in, gradients added up, optimiser stepped.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common.device import device_name, pick_device, reuse_host_memory
from common.dist import SINGLE, World, processes
from common.errors import command
from common.files import save_tensors
from common.flags import build_parser, parse
from datasets import DataSource, ImageSet, split_one_class
from datasets.views import DrawSpec
from evals.extract import cocsr_outputs, draw_means
from models.checkpoint import build_net
from models.feature_net import CocsrNet
from program import SPECS
from scripts.results import markdown
from training import STAGE1, STAGE2
from training.loop import batches, descend
from training.recipe import Recipe

_PARTS = "--shift_trans_type rot_bmix --mix_alpha 0.2 --image_size 32 --dataset digits --simclr_dim 128".split()


def recipe_of(args: Sequence[str], world: World) -> Recipe:
    """A mode ready to train on all digits at 32 pixels."""
    modes = STAGE1 | STAGE2
    flags = parse([*args, *_PARTS], build_parser("benchmark", modes, "simclr_CSI", SPECS))
    mode = modes[flags.mode]
    split = split_one_class("digits", DataSource.of(flags, "digits", training=True), None, 32)
    return mode.build(flags, split, world)


def step(args: Sequence[str], batch_size: int, world: World) -> Callable[[], object]:
    """One step on `batch_size` images of all processes together, read at its end as an epoch is."""
    recipe = recipe_of(args, world)

    def run() -> object:
        batch = next(batches(recipe.data, batch_size, loading=recipe.loading, seed=0, epoch=1, world=world))
        return [float(value) for value in descend(recipe, batch, world).values()]

    return run


def evaluation(args: Sequence[str], images: int, world: World) -> Callable[[], object]:
    """Features and codes of one draw of some images."""
    recipe = recipe_of(args, SINGLE)
    net, data = recipe.model.eval(), recipe.data
    assert isinstance(net, CocsrNet) and isinstance(data, ImageSet)
    flags = parse(_PARTS, build_parser("benchmark", STAGE1, "simclr_CSI", SPECS))
    spec = DrawSpec(STAGE1["simclr_CSI"].shifts(flags).functions(), None, seed=0, batch_size=max(1, images // 8))
    some = data.where(torch.arange(len(data)) < images)

    def run() -> object:
        own = list(draw_means(cocsr_outputs(net), some, spec, 1, label="evaluation", world=world))
        return world.all_gather_object([block["gap"].cpu() for block in own])

    return run


def measure(device: str, repeats: int, images: int, folder: Path) -> list[list[str]]:
    """Rows of the table, in the first process."""
    rows = []
    with processes(device) as world:
        for model in ("resnet8", "resnet18"):
            weights = folder / f"{model}.model"
            if world.is_main:
                net = build_net("feature", model, n_classes=10, simclr_dim=128, n_shifts=5, seed=0)
                save_tensors(weights, net.state_dict())
            world.all_gather_object(None)
            count = images if model == "resnet8" else images // 4
            common = ["--model", model, "--device", device]
            sparse = [*common, "--mode", "cocsr_dict", "--resume_path", str(weights)]
            makers: dict[str, Callable[[World], Callable[[], object]]] = {
                "stage 1, step": partial(step, [*common, "--mode", "simclr_CSI"], count),
                "stage 2, step": partial(step, sparse, count),
                "evaluation": partial(evaluation, sparse, count),
            }
            for name, make in makers.items():
                one, all_of_them = _in_turns(make(SINGLE) if world.is_main else None, make(world), world, repeats)
                share = f"{one / all_of_them:.2f}"
                rows.append([f"{name}, {model}", str(count), *(f"{count / t:.1f}" for t in (one, all_of_them)), share])
        return rows if world.is_main else []


def _in_turns(
    alone: Callable[[], object] | None, together: Callable[[], object], world: World, repeats: int
) -> tuple[float, float]:
    """Median seconds of the first process alone, and of all together."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):  # the first is to warm up
        for run, found in zip((alone, together), times, strict=True):
            dist.monitored_barrier()
            begun = time.perf_counter()
            if run is not None:
                run()
            found.append(time.perf_counter() - begun)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def _work(rank: int, size: int, port: int, args: argparse.Namespace, folder: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    reuse_host_memory()
    rows = measure(args.device, args.repeats, args.images, folder)
    if rows:
        header = ["part", "images", "images/s, one", f"images/s, {size}", "ratio"]
        print(markdown(header, rows), end="")
        what = device_name(pick_device(args.device, rank))
        print(f"{size} processes on {what} each, torch {torch.__version__}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each, in turns")
    parser.add_argument("--images", type=int, default=128, help="of a step of resnet8; a fourth of it for resnet18")
    args = parser.parse_args(argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (args.processes, port, args, Path(folder)), args.processes, start_method="spawn")


if __name__ == "__main__":
    sys.exit(main())
