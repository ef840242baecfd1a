"""Operations and bytes of each phase, what they need at the machine's ceilings, and what it takes: `python -m
benchmarks.floors`.

Operations are those of products and convolutions. Bytes are what all operations together read and write, which is what
memory has to move as far as caches and fused passes do not spare it. bf16 where the device has it, as in training. The
last line: what convolutions have of a stage-1 step's time, by torch's profiler, and how fast they go.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ceilings import Ceilings
from benchmarks.compare import timed, wait
from common.device import Amp, autocast, device_name, pick_device, reuse_host_memory
from common.errors import UserError, command
from common.seed import generator
from datasets.augment import AlignedSpec
from datasets.loading import Loading
from datasets.sets import ImageSet, image_set
from datasets.shifts import ShiftSpec
from datasets.views import DrawSpec, train_views
from evals.coding import Outputs
from evals.extract import cocsr_outputs, draw_means
from models import BACKBONES
from models.checkpoint import build_net
from models.feature_net import CocsrNet, FeatureTransform
from models.sparse.dictionary import CodingSpec, DictionaryBank
from scripts.results import markdown
from training.modes.cocsr_dict import DictionaryLossSpec, dictionary_step
from training.modes.simclr import contrastive_step
from training.optim import Lars

_SPEC = AlignedSpec()
_SHIFTS = ShiftSpec("rot_bmix", 0.2).functions(_SPEC)
_LOSS = DictionaryLossSpec(1.0, 0.01, 0.1, 0, 1.0, False, None)
_ATOMS, _STEPS = 512, 40


class ByteCounter(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations read and write, views of others left out."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view:
            self.total += _nbytes(args) + _nbytes(kwargs) + _nbytes(out)
        return out


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return _nbytes(tuple(value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, (tuple, list)) else 0


def stage1(model: str, data: ImageSet, amp: Amp) -> Callable[[], None]:
    """A step of stage 1 on all of `data`."""
    net = (
        build_net("feature", model, n_classes=10, simclr_dim=128, n_shifts=len(_SHIFTS), seed=0).to(data.device).train()
    )
    optimizer, index = Lars(net.parameters(), lr=0.1, weight_decay=1e-6), torch.arange(len(data), device=data.device)
    labels = data.labels.to(data.device)

    def run() -> None:
        step = contrastive_step(net, _views(data, index, 2), labels, n_shifts=len(_SHIFTS), amp=amp)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(step.losses.values())).sum().backward()
        optimizer.step()

    return run


def stage2(model: str, data: ImageSet, amp: Amp) -> Callable[[], None]:
    """A step of stage 2 on all of `data`."""
    net, index = _sparse_net(model, data).train(), torch.arange(len(data), device=data.device)
    optimizer = torch.optim.Adam(net.sr_nets.parameters(), 1e-3, fused=True)

    def run() -> None:
        views = _views(data, index, 1)
        with amp():
            s = net(views).s
        step = dictionary_step(net.sr_nets, s.unflatten(0, (len(_SHIFTS), -1)).mT, _LOSS)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(step.losses.values())).sum().backward()
        optimizer.step()

    return run


def evaluation(model: str, data: ImageSet, amp: Amp) -> Callable[[], None]:
    """Features and codes of one draw of `data`."""
    net = _sparse_net(model, data).eval().requires_grad_(False)
    spec = DrawSpec(_SHIFTS, _SPEC, seed=0)

    def run() -> None:
        coded = cocsr_outputs(net)

        def outputs(views: Tensor) -> Outputs:
            with amp():
                return coded(views)

        for _ in draw_means(outputs, data, spec, 1, label="floors"):
            pass

    return run


PHASES = {"stage 1, step": stage1, "stage 2, step": stage2, "evaluation, one draw": evaluation}


def _views(data: ImageSet, index: Tensor, views: int) -> Tensor:
    (images,) = data.batches([index], Loading(views=views), seed=0, epoch=1)
    return train_views(images, _SHIFTS, _SPEC, generator(0, "floors", device=data.device))


def _sparse_net(model: str, data: ImageSet) -> CocsrNet:
    net = build_net("feature", model, n_classes=10, simclr_dim=128, n_shifts=len(_SHIFTS), seed=0)
    bank = DictionaryBank(len(_SHIFTS), net.feature_dim, _ATOMS, CodingSpec(0.01, 1.0, _STEPS), generator(0, "floors"))
    return CocsrNet(net, bank, FeatureTransform()).to(data.device)


def convolutions(run: Callable[[], Any], device: torch.device) -> tuple[float, float, int]:
    """Seconds of convolutions, forward and backward, in one call, of all operations, and operations of the former."""
    with FlopCounterMode(display=False) as counter:
        run()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    on_gpu = device.type == "cuda"
    with profile(use_device="cuda" if on_gpu else None) as record:
        run()
        wait(device)
    # A GPU's kernels come once more as events of their own, by names that do not say what they are for.
    events = [e for e in record.key_averages() if e.device_type == DeviceType.CPU]
    found = [(e.key, e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in events]
    spent = sum(time for name, time in found if "convolution" in name)
    return 1e-6 * spent, 1e-6 * sum(time for _, time in found), counted


def counts(run: Callable[[], Any]) -> tuple[int, int]:
    """Operations and bytes of one call."""
    with FlopCounterMode(display=False) as operations:
        run()
    with ByteCounter() as moved:
        run()
    return operations.get_total_flops(), moved.total


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floors", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--model", choices=sorted(BACKBONES), default="resnet18")
    parser.add_argument("--images", type=int, default=32, help="images of 32 pixels in a batch")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each phase")
    args = parser.parse_args(argv)
    if args.images < 2 or args.repeats < 1:
        raise UserError("--images must be > 1 and --repeats > 0")
    device = pick_device(args.device)
    reuse_host_memory()
    limits, amp = Ceilings.of(device), autocast("auto", device)
    product = limits.bf16 or limits.convolution
    pixels = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "floors"))
    data = image_set(pixels, torch.zeros(args.images)).to(device)
    rows = []
    steps = {name: make(args.model, data, amp) for name, make in PHASES.items()}
    for name, run in steps.items():
        run()
        operations, moved = counts(run)
        seconds = statistics.median(timed(run, device) for _ in range(args.repeats))
        per_image = 1e3 / args.images
        rows.append(
            [
                name,
                f"{operations / args.images / 1e9:.2f} GFLOP",
                f"{moved / args.images / 1e6:.0f} MB",
                f"{operations / product * per_image:.2f} ms",
                f"{moved / limits.copy * per_image:.2f} ms",
                f"{seconds * per_image:.2f} ms",
                f"{100 * operations / product / seconds:.0f} %",
            ]
        )
    print(f"{device_name(device)}, torch {torch.__version__}: {limits}; {args.model}, {args.images} images at a time")
    header = [
        "an image of",
        "operations",
        "bytes",
        "at the product's speed",
        "at the copy's",
        "takes",
        "of the product's",
    ]
    print(markdown(header, rows), end="")
    spent, all_, work = convolutions(steps["stage 1, step"], device)
    print(
        f"convolutions: {100 * spent / all_:.0f} % of the time of a stage-1 step, at {work / spent / 1e9:.0f} GFLOP/s,"
        f" {100 * work / spent / product:.0f} % of the product's speed"
    )


if __name__ == "__main__":
    sys.exit(main())
