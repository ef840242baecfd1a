"""Steps of training SDNets against ResNets and against the released formulation of their layers: `python -m
benchmarks.sdnet`.

A step: forward and backward pass of the cross-entropy, SGD with Nesterov momentum and, for our layers, what follows it
(`follow_weights`). All networks live in one process and take their steps in turns; a ratio is the median of the ratios
within a turn. Loss and gradients of both formulations are compared first. Memory: the most that tensors take during a
step by torch's allocator, parameters, gradients and momentum included; `saved` is what the forward pass keeps for the
backward pass, each storage once.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # The profiler counts memory; its own chatter is not wanted.

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import distance, peak_bytes
from benchmarks.rdae import Clock
from benchmarks.released_csc import ReleasedCSC2d, released_sdnet
from common.device import Amp, autocast, device_name, pick_device, reuse_host_memory
from common.errors import UserError, command
from common.seed import generator
from models.checkpoint import build_net
from models.csc import csc_layers, follow_weights, input_sizes
from models.feature_net import Classifier
from scripts.results import markdown
from training.modes.supervised import parameter_groups

_CLASSES = 10
# Blocks and widths of the stages, as in `models.BACKBONES`.
SIZES = {"8": ((1, 1, 1), (16, 32, 64)), "18": ((2, 2, 2, 2), (64, 128, 256, 512))}


class Data(NamedTuple):
    """Images (B, 3, H, W) in [0, 1] and labels (B,)."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, batch_size: int, device: torch.device, side: int = 32) -> "Data":
        gen = generator(0, "benchmark sdnet")
        images = torch.rand(batch_size, 3, side, side, generator=gen)
        return cls(images.to(device), torch.randint(_CLASSES, (batch_size,), generator=gen).to(device))


class Step:
    """A network and its step. recompute: of all layers; None leaves each as it is in a fresh network."""

    net: Classifier
    optimizer: torch.optim.Optimizer

    def __init__(self, model: str, data: Data, amp: Amp, *, recompute: bool | None = None) -> None:
        self.data, self.amp = data, amp
        self.net = build_net("classifier", model, n_classes=_CLASSES, seed=0).to(data.images.device).train()
        layers = csc_layers(self.net)
        for layer in layers.values():
            layer.recompute = layer.recompute if recompute is None else recompute
        self.sizes = input_sizes(self.net.backbone, 3, data.images.shape[2:]) if layers else {}
        follow_weights(self.sizes, fresh=True)
        groups = parameter_groups(self.net, 5e-4)
        self.optimizer = torch.optim.SGD(groups, 0.01, momentum=0.9, nesterov=True, fused=True)

    def loss(self) -> Tensor:
        with self.amp():
            logits = self.net(self.data.images)
        return F.cross_entropy(logits, self.data.labels)

    def finish(self) -> None:
        """What follows the step of the optimizer."""
        follow_weights(self.sizes)

    def __call__(self) -> None:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.finish()

    def held(self) -> int:
        """Bytes of what there is between two steps, but for gradients: parameters, buffers and momentum."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return sum(t.nbytes for t in [*self.net.parameters(), *self.net.buffers(), *state] if isinstance(t, Tensor))


class ReleasedStep(Step):
    """The released formulation: its layers, contiguous memory, torch's own choice of optimizer, both terms and the
    loss read."""

    def __init__(self, variant: str, size: str, data: Data, amp: Amp) -> None:
        self.data, self.amp = data, amp
        torch.manual_seed(0)
        net = Classifier(released_sdnet(variant, *SIZES[size]), n_classes=_CLASSES)
        self.net = net.to(data.images.device).to(memory_format=torch.contiguous_format).train()
        self.optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.layers = [layer for layer in net.modules() if isinstance(layer, ReleasedCSC2d)]

    def loss(self) -> Tensor:
        with self.amp():
            images = (self.data.images - self.net.input_mean) / self.net.input_std
            logits = self.net.linear(self.net.backbone(images))
        loss = F.cross_entropy(logits.float(), self.data.labels)
        loss.item()
        return loss

    def finish(self) -> None:
        for layer in self.layers:
            layer.read()

    def reads(self) -> int:
        """How often a step waits for the device."""
        before = sum(layer.reads for layer in self.layers)
        self()
        return 1 + sum(layer.reads for layer in self.layers) - before

    def take(self, ours: Step) -> None:
        """The weights of `ours`, and where the power iterations of its layers are."""
        self.net.load_state_dict(ours.net.state_dict(), strict=False)
        for layer, source in zip(self.layers, csc_layers(ours.net).values(), strict=True):
            layer.power = source.power.clone(memory_format=torch.contiguous_format)


class Side(NamedTuple):
    """One network of the table. against: the side whose formulation it is to be held against, if any."""

    make: Callable[[], Step]
    against: str | None = None


def sides(size: str, data: Data, amp: Amp) -> dict[str, Side]:
    """What is measured, by name; the ResNet first."""

    def ours(model: str, against: str | None = None, recompute: bool | None = None) -> Side:
        return Side(lambda: Step(model, data, amp, recompute=recompute), against)

    def released(variant: str) -> Side:
        return Side(lambda: ReleasedStep(variant, size, data, amp))

    resnet, stem, every = f"resnet{size}", f"sdnet{size}", f"sdnet{size}_all"
    return {
        resnet: ours(resnet),
        stem: ours(stem, f"{stem}, released"),
        f"{stem}, nothing recomputed": ours(stem, f"{stem}, released", False),
        f"{stem}, released": released(""),
        every: ours(every, f"{every}, released"),
        f"{every}, --csc_recompute": ours(every, f"{every}, released", True),
        f"{every}, released": released("_all"),
        f"{every}_noshortcut": ours(f"{every}_noshortcut"),
    }


def check(size: str, images: int) -> str:
    """Loss and gradients of both formulations on the CPU in float64, with the same weights and eta.

    Raises: AssertionError unless they agree; returns how far they are apart.
    """
    cpu, remarks = torch.device("cpu"), []
    data = Data.of(images, cpu)
    data = data._replace(images=data.images.double())
    for variant in ("", "_all"):
        name = f"sdnet{size}{variant}"
        ours, theirs = Step(name, data, autocast("off", cpu)), ReleasedStep(variant, size, data, autocast("off", cpu))
        for step in (ours, theirs):
            step.net.double()
        theirs.take(ours)
        losses = [theirs.loss()]
        for layer, released in zip(csc_layers(ours.net).values(), theirs.layers, strict=True):
            layer.step.fill_(released.eta)
        losses.append(ours.loss())
        torch.stack(losses).sum().backward()
        gradients = [[p.grad.flatten() for p in step.net.parameters() if p.grad is not None] for step in (theirs, ours)]
        apart = max(distance(*(loss.detach() for loss in losses)), distance(*map(torch.cat, gradients)))
        assert apart < 1e-5, f"{name}: loss or gradients differ by {apart:.1e}"
        remarks.append(f"{name} {apart:.0e}")
    return f"loss and gradients in float64 differ from the released formulation's by: {', '.join(remarks)}"


def turns(steps: Mapping[str, Callable[[], object]], clock: Clock, repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` steps of each side, in turns, after one of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            taken = clock(step)
            if turn:
                seconds[name].append(taken)
    return seconds


class Memory(NamedTuple):
    """Bytes. peak: most during a step. saved: kept by the forward pass for the backward pass, parameters left out."""

    peak: int
    saved: int


def memory(step: Step) -> Memory:
    """Of a network that has taken a step."""
    step.optimizer.zero_grad()  # The step makes gradients anew, which are counted then.
    held = step.held()
    _, more = peak_bytes(step, step.data.images.device)
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = step.loss()
    del loss
    known = {p.untyped_storage().data_ptr() for p in step.net.parameters()}
    return Memory(held + more, sum(size for pointer, size in storages.items() if pointer not in known))


class Ratio(NamedTuple):
    """Of the speeds of two sides: median, lowest and highest of the turns, and that of their fastest steps."""

    median: float
    low: float
    high: float
    fastest: float

    @classmethod
    def of(cls, seconds: Sequence[float], other: Sequence[float]) -> "Ratio":
        pairs = [theirs / ours for ours, theirs in zip(seconds, other, strict=True)]
        return cls(statistics.median(pairs), min(pairs), max(pairs), min(other) / min(seconds))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f}; {self.fastest:.2f})"


def table(
    compared: dict[str, Side], seconds: dict[str, list[float]], used: dict[str, Memory], images: int
) -> list[list[str]]:
    """A row for each side; ratios to the first side and to the one that a side is held against."""
    base = next(iter(compared))
    rows = []
    for name, taken in seconds.items():
        against = compared[name].against
        rows.append(
            [
                name,
                f"{images / statistics.median(taken):.1f}",
                "" if name == base else str(Ratio.of(taken, seconds[base])),
                str(Ratio.of(taken, seconds[against])) if against in seconds else "",
                f"{used[name].peak / 2**20:.0f} MiB",
                f"{used[name].peak / used[base].peak:.2f}",
                f"{used[name].saved / 2**20:.0f} MiB",
            ]
        )
    return rows


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sdnet", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--model", choices=sorted(SIZES), default="18", help="depth")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7, help="steps of each network")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="precision of forward and backward pass")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows alone, beside the ResNet")
    parser.add_argument("--process_time", action="store_true", help="CPU seconds: on a machine that others use, too")
    args = parser.parse_args(argv)
    if min(args.threads, args.repeats) < 1 or args.batch_size < 2:
        raise UserError("--threads and --repeats must be > 0, --batch_size > 1")
    device = pick_device(args.device)
    if args.process_time and device.type != "cpu":
        raise UserError("--process_time: a GPU's work is not in it; leave it out")
    torch.set_num_threads(args.threads)
    reuse_host_memory()
    data, amp = Data.of(args.batch_size, device), autocast(args.amp, device)
    compared = sides(args.model, data, amp)
    unknown = set(args.only or ()) - set(compared)
    if unknown:
        raise UserError(f"--only {sorted(unknown)[0]}: unknown; rows are {'; '.join(compared)}")
    resnet = next(iter(compared))
    compared = {name: side for name, side in compared.items() if name in (args.only or compared) or name == resnet}
    print(f"{device_name(device)}, torch {torch.__version__}, batch {args.batch_size}, amp {args.amp}", flush=True)
    print(check(args.model, min(args.batch_size, 8)), flush=True)
    steps = {name: side.make() for name, side in compared.items()}
    seconds = turns(steps, Clock(device, args.process_time), args.repeats)
    used = {name: memory(step) for name, step in steps.items()}
    header = ["training", "images/s", f"of {resnet}", "of the released", "peak memory", "ratio", "saved"]
    print(markdown(header, table(compared, seconds, used, args.batch_size)), end="", flush=True)
    for name, step in steps.items():
        if isinstance(step, ReleasedStep):
            print(f"{name}: {step.reads()} reads of the device in a step")


if __name__ == "__main__":
    sys.exit(main())
