"""How the cost of an evaluation and of a training step grows, and whether it stays: `python -m benchmarks.growth`.

Growth: exponents of time over four sizes (1 = linear), in images, draws and shifts. Stability: thousands of training
steps of either stage; a step of the last tenth against one of the second tenth (medians), and resident memory likewise.
"""

import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.compare import timed, wait
from common.device import device_name, pick_device, reuse_host_memory
from common.errors import UserError, command
from common.flags import Flags
from common.run import Run
from common.seed import generator
from datasets.augment import AlignedSpec
from datasets.loading import Loading
from datasets.sets import ImageSet, image_set
from datasets.shifts import ShiftSpec
from datasets.views import DrawSpec, train_views
from evals.coding import TrainedDictionaries
from evals.extract import cocsr_outputs, concatenate, draw_means
from evals.scores import fit_csi_sr
from models.checkpoint import build_net
from models.feature_net import CocsrNet, FeatureTransform
from models.sparse.dictionary import CodingSpec, DictionaryBank
from scripts.results import markdown
from training.loop import fit
from training.modes.cocsr_dict import DictionaryLossSpec, dictionary_step
from training.modes.simclr import contrastive_step
from training.optim import Lars
from training.recipe import Batch, Recipe, Step

_SPEC = AlignedSpec()
# Eight shifts: four rotations, three permutations, a mixture.
_SHIFTS = ShiftSpec("rot_perm_bmix", 0.2).functions(_SPEC)
_SIZES = (1, 2, 4, 8)


def pictures(n: int, device: torch.device) -> ImageSet:
    """n random images of 32 pixels."""
    pixels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "growth"))
    return image_set(pixels, torch.zeros(n)).to(device)


def sparse_net(shifts: int, device: torch.device) -> CocsrNet:
    """resnet8 with 64 atoms a shift."""
    net = build_net("feature", "resnet8", n_classes=2, simclr_dim=128, n_shifts=shifts, seed=0)
    bank = DictionaryBank(shifts, net.feature_dim, 64, CodingSpec(0.01, 1.0, 40), generator(0, "growth"))
    return CocsrNet(net, bank, FeatureTransform()).to(device)


def evaluation(device: torch.device, *, images: int = 200, draws: int = 1, shifts: int = 2) -> Callable[[], Any]:
    """Features, codes and CSI_sr scores of `images` images."""
    net, data = sparse_net(shifts, device).eval(), pictures(images, device)
    spec = DrawSpec(_SHIFTS[:shifts], _SPEC, seed=0, batch_size=50)

    def run() -> Any:
        seen = concatenate(draw_means(cocsr_outputs(net), data, spec, draws, label="growth"))
        seen = TrainedDictionaries(net.sr_nets)(seen)
        return fit_csi_sr(seen)(seen)

    return run


def training_step(device: torch.device, *, images: int = 64, shifts: int = 2) -> Callable[[], Any]:
    """Views, network, losses and their gradient, of one step of stage 1."""
    net = build_net("feature", "resnet8", n_classes=2, simclr_dim=128, n_shifts=shifts, seed=0).to(device).train()
    data, index = pictures(images, device), torch.arange(images, device=device)
    labels = torch.zeros(images, dtype=torch.long, device=device)

    def run() -> None:
        (images,) = data.batches([index], Loading(views=2), seed=0, epoch=1)
        views = train_views(images, _SHIFTS[:shifts], _SPEC, generator(0, "growth", device=device))
        step = contrastive_step(net, views, labels, n_shifts=shifts)
        net.zero_grad(set_to_none=True)
        torch.stack(list(step.losses.values())).sum().backward()

    return run


def exponent(times: Sequence[float], sizes: Sequence[int] = _SIZES) -> float:
    """The slope of log time over log size, by least squares."""
    x, y = ([math.log(v) for v in values] for values in (sizes, times))
    return statistics.linear_regression(x, y).slope


def growth(device: torch.device, repeats: int) -> list[list[str]]:
    """A row for each thing that grows: times at the four sizes, in turns, and the exponent."""
    what: dict[str, list[Callable[[], Any]]] = {
        "evaluation, images": [evaluation(device, images=200 * n) for n in _SIZES],
        "evaluation, draws": [evaluation(device, draws=n) for n in _SIZES],
        "evaluation, shifts": [evaluation(device, shifts=n) for n in _SIZES],
        "stage-1 step, images": [training_step(device, images=64 * n) for n in _SIZES],
        "stage-1 step, shifts": [training_step(device, shifts=n) for n in _SIZES],
    }
    rows = []
    for name, runs in what.items():
        for run in runs:
            run()
        times = [[timed(run, device) for run in runs] for _ in range(repeats)]
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        rows.append([name, *(f"{1e3 * t:.1f} ms" for t in medians), f"{exponent(medians):.2f}"])
    return rows


def stage1(device: torch.device) -> Recipe:
    """Stage 1 of resnet8 on 64 images."""
    net = build_net("feature", "resnet8", n_classes=2, simclr_dim=32, n_shifts=2, seed=0).to(device).train()
    optimizer = Lars(net.parameters(), lr=0.01)

    def losses(batch: Batch) -> Step:
        drawn = generator(0, "growth", batch.epoch, batch.step, device=device)
        views = train_views(batch.images, _SHIFTS[:2], _SPEC, drawn)
        return contrastive_step(net, views, batch.labels, n_shifts=2)

    return Recipe(net, pictures(64, device), losses, (optimizer,), lambda epoch: 0.01, loading=Loading(views=2))


def stage2(device: torch.device) -> Recipe:
    """Stage 2 of resnet8 on 64 images."""
    net = sparse_net(2, device).train()
    optimizer = torch.optim.Adam(net.sr_nets.parameters(), 1e-4, fused=True)
    spec = DictionaryLossSpec(1.0, 0.01, 0.1, 0, 1.0, False, None)

    def losses(batch: Batch) -> Step:
        drawn = generator(0, "growth", batch.epoch, batch.step, device=device)
        views = train_views(batch.images, _SHIFTS[:2], _SPEC, drawn)
        return dictionary_step(net.sr_nets, net(views).s.unflatten(0, (2, -1)).mT, spec)

    return Recipe(net, pictures(64, device), losses, (optimizer,), lambda epoch: 1e-4)


_STAGES: dict[str, Callable[[torch.device], Recipe]] = {"stage 1": stage1, "stage 2": stage2}
# Steps of an epoch, and so of a turn.
_TURN = 8


class Course(NamedTuple):
    """Seconds of a step, turn by turn; resident bytes at the end of the second tenth, and in the last step."""

    seconds: list[float]
    resident: tuple[int, int]


def stability(name: str, device: torch.device, steps: int) -> list[str]:
    """A row: times of a step in the second and the last tenth, and resident memory at the end of both.

    The second tenth is that of the same run started once more, which waits for the first one's last tenth and then
    takes turns with it, an epoch each: whatever else the machine does meets both. steps: a multiple of
    80, since a tenth is whole epochs.
    """
    tenth, context = steps // 10, get_context("spawn")
    with ProcessPoolExecutor(2, context, _meet, (context.Barrier(2),)) as pair:
        courses = [pair.submit(course, name, device, first, tenth) for first in (steps - tenth, tenth)]
        old, young = (found.result() for found in courses)
    last, second = (statistics.median(found.seconds) for found in (old, young))
    before, after = old.resident
    return [
        f"{name}, {steps} steps",
        f"{1e3 * second:.2f} ms",
        f"{1e3 * last:.2f} ms",
        f"{100 * (last / second - 1):+.1f} %",
        *(f"{m / 2**20:.1f} MiB" for m in (before, after)),
        f"{100 * (after / before - 1):+.2f} %",
    ]


# Where the two processes of `stability` meet: the older one goes first in every round.
_MEETING: list[Barrier] = []


def _meet(barrier: Barrier) -> None:
    _MEETING.append(barrier)


def course(name: str, device: torch.device, first: int, tenth: int) -> Course:
    """Train up to step `first` at once, and `tenth` steps more in turns with the other process."""
    try:
        return _course(name, device, first, tenth)
    except BaseException:
        _MEETING[0].abort()  # The other one would wait for ever.
        raise


def _course(name: str, device: torch.device, first: int, tenth: int) -> Course:
    reuse_host_memory()
    device = pick_device(str(device))  # With what it sets in a process.
    recipe, barrier, young = _STAGES[name](device), _MEETING[0], first == tenth
    seconds: list[float] = []
    step, begun, before, after = 0, 0.0, 0, 0

    def hand_over() -> None:
        wait(device)
        seconds.append((time.perf_counter() - begun) / _TURN)
        barrier.wait()

    def watched(epoch: float) -> float:
        nonlocal step, begun, before, after
        after = resident()
        before = after if step <= 2 * tenth else before
        if step >= first and step % _TURN == 0:
            if step > first:
                hand_over()
            elif young:
                barrier.wait()
            wait(device)
            barrier.wait()
            begun = time.perf_counter()
        step += 1
        return schedule(epoch)

    schedule = recipe.lr or (lambda epoch: 0.0)
    watching = replace(recipe, lr=watched)
    epochs = (first + tenth) // _TURN
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = Flags({"mode": name, "dataset": "growth", "epochs": epochs, "overwrite": False})
        run = Run(Path(folder) / "run", flags, weights="last.model", resume="last.resume")
        run.open()
        fit(watching, run, epochs=epochs, batch_size=len(recipe.data) // _TURN, seed=0, save_step=epochs)
        run.close()
    hand_over()
    if not young:
        barrier.wait()
    return Course(seconds, (before, after))


def resident() -> int:
    """Bytes of resident memory of this process (Linux)."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each size")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of each stage, in eighties")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.steps < 80:
        raise UserError("--repeats must be > 0 and --steps >= 80")
    if sys.platform != "linux":
        raise UserError("this benchmark reads /proc; it needs Linux")
    device = pick_device(args.device)
    reuse_host_memory()
    steady = [stability(name, device, args.steps // 80 * 80) for name in _STAGES]
    rows = growth(device, args.repeats)
    print(f"{device_name(device)}, torch {torch.__version__}")
    print(markdown(["what grows", *(f"x {n}" for n in _SIZES), "exponent"], rows))
    print(
        markdown(["training", "second tenth", "last tenth", "change", "resident", "at the end", "change"], steady),
        end="",
    )


if __name__ == "__main__":
    sys.exit(main())
