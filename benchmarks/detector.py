"""Scoring pictures against the backbone's own forward pass: `python -m benchmarks.detector FILE.detector FOLDER`.

All work on the same pictures, one at a time and with one thread each, as many side by side as --num_worker says: the
detector from files to scores, the backbone from prepared pictures to its stages, in the memory format that it comes in
and in that of the detector, channels last. They take their turns in one process; ratios are medians of those within a
turn. Then memory: the growth of the process over --many scores.
"""

import argparse
import copy
import itertools
import resource
import statistics
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from common.device import device_name
from common.errors import UserError, command
from datasets.decode import Reader
from detector.detector import Detector, in_order
from detector.features import one_thread, resized
from detector.pictures import Unreadable, pictures_of, read
from scripts.results import markdown

LAYOUTS = {"as it comes": torch.contiguous_format, "channels last": torch.channels_last}


def seconds_of_rows(detector: Detector, paths: Sequence, workers: int) -> float:
    start = perf_counter()
    for _ in detector.rows(paths, workers):
        pass
    return perf_counter() - start


def seconds_of_backbone(stages: torch.nn.Module, prepared: Sequence[torch.Tensor], workers: int) -> float:
    """Of pictures (1, 3, S, S) that are normalised."""

    @torch.inference_mode()
    def one(x: torch.Tensor) -> None:
        stages(x)

    start = perf_counter()
    with one_thread():
        for _ in in_order(one, prepared, workers):
            pass
    return perf_counter() - start


def growth(detector: Detector, paths: Sequence, count: int, workers: int) -> float:
    """MiB by which the peak of the process grows from the first tenth of `count` scores to the last."""
    early = 0
    for i, _ in enumerate(detector.rows(itertools.islice(itertools.cycle(paths), count), workers)):
        if i == count // 10:
            early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early) / 1024


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detector", description=__doc__)
    parser.add_argument("detector")
    parser.add_argument("folder")
    parser.add_argument("--num_worker", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--many", type=int, default=0, help="scores for the growth of memory; 0: not measured")
    args = parser.parse_args(argv)
    if args.num_worker < 1 or args.rounds < 1 or args.many < 0:
        raise UserError("--num_worker, --rounds and --many must be positive")
    detector, paths = Detector.load(args.detector), list(pictures_of([args.folder]))
    read_all = [read(path, Reader()) for path in paths]
    pixels = [each for each in read_all if not isinstance(each, Unreadable)]
    if len(pixels) < len(paths) or not pixels or "flags" in detector.config:
        raise UserError("give a folder of readable pictures and a detector with a frozen backbone")
    pyramid: Any = detector.net.pyramid
    prepared = [(resized(each, detector.size) - pyramid.mean) / pyramid.std for each in pixels]
    backbones = {}
    for name, layout in LAYOUTS.items():
        stages = copy.deepcopy(pyramid.stages).to(memory_format=layout)
        backbones[f"backbone alone, {name}"] = stages, [x.contiguous(memory_format=layout) for x in prepared]
    turns = []
    for _ in range(args.rounds):
        turn = {"files to scores": seconds_of_rows(detector, paths, args.num_worker)}
        for name, (stages, inputs) in backbones.items():
            turn[name] = seconds_of_backbone(stages, inputs, args.num_worker)
        turns.append(turn)
    print(
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {len(paths)} pictures,"
        f" {args.num_worker} workers"
    )
    rows = []
    for name in turns[0]:
        speed = len(paths) / statistics.median(turn[name] for turn in turns)
        ratios = sorted(turn[name] / turn["files to scores"] for turn in turns)
        share = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append([name, f"{speed:.1f}", share])
    print(markdown(["", "pictures a second", "share that the detector reaches"], rows), end="")
    if args.many:
        print(f"memory grows by {growth(detector, paths, args.many, args.num_worker):.0f} MiB over {args.many} scores")


if __name__ == "__main__":
    sys.exit(main())
