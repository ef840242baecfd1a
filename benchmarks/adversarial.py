"""A training step of TRADES-ANCRA against the released formulation: `python -m benchmarks.adversarial`.

Ours is the step that `train.py --mode adv_trades --ra --anc` takes. The released one is written by our description of
it: negatives are chosen and contrasted image by image, in loops of Python; two attacks, the same but for a sign; after
the step three passes of the network, with gradients, for the log. Loss and gradients of both are compared first, with
the same negatives and the same noise. Both live in one process and take their steps in turns; a ratio is the median of
the ratios within a turn. `channels last`: the released step on weights and images in the memory format of ours, so that
the formulation alone differs. Memory: the most that tensors take during a step by torch's allocator, parameters,
gradients and momentum included.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # The profiler counts memory; its own chatter is not wanted.

import torch
from torch import Tensor

from benchmarks.compare import distance, peak_bytes
from benchmarks.rdae import Clock
from benchmarks.released_ancra import (
    contrast_loop,
    logging_passes,
    pick_loop,
    released_copy,
    targeted_attack,
    trades_ancra,
    untargeted_attack,
)
from benchmarks.sdnet import Data, Ratio, Step, turns
from common.attacks.specs import EpsilonSpec
from common.device import autocast, device_name, pick_device, reuse_host_memory
from common.dist import SINGLE
from common.errors import UserError, command
from common.flags import Flags, build_parser, parse
from common.negatives import pick_negatives
from common.seed import generator
from datasets import DataSource, Split
from datasets.catalog import DatasetSpec
from datasets.sets import floats, image_set
from program import SPECS
from scripts.results import markdown
from training import STAGE1
from training.attack import PGD
from training.loop import descend
from training.losses.adversarial import anc
from training.modes.adversarial import AdversarialSpec
from training.recipe import Batch

_MODE, _CLASSES, _SIDE = "adv_trades", 10, 32
# Past the epochs in which all negatives are random.
_EPOCH = 11
OURS, RELEASED, SAME_FORMAT = "ours", "released", "released, channels last"


class OurStep(Step):
    """The step of training, on one batch again and again."""

    def __init__(self, flags: Flags, device: torch.device) -> None:
        batch_size = flags.as_dict()["batch_size"]
        data = Data.of(batch_size, torch.device("cpu"), _SIDE)
        pixels = (data.images * 255).round().to(torch.uint8)
        spec = DatasetSpec(lambda *_: image_set(pixels, data.labels), lambda source: [], ())
        split = Split("random", spec, DataSource(), None, _CLASSES, [str(n) for n in range(_CLASSES)])
        self.recipe = STAGE1[_MODE].build(flags, split, SINGLE)
        self.net = self.recipe.model  # type: ignore[assignment]
        (self.optimizer,) = self.recipe.optimizers
        own = pixels.to(device)
        self.data = Data(floats(own), data.labels.to(device))
        places = torch.arange(batch_size, device=device)
        self.batch = Batch(own[None], self.data.labels, places, _EPOCH, 0, SINGLE.shard(batch_size))

    def loss(self) -> Tensor:
        return torch.stack(list(self.recipe.losses(self.batch).losses.values())).sum()

    def __call__(self) -> None:
        descend(self.recipe, self.batch, SINGLE)
        self.recipe.after_step()


class ReleasedStep(Step):
    """That of the released program, on copies of the weights of `ours`, with torch's own choice of optimizer.

    negatives, noise: places (B,) and draws (2, B, 3, H, W), of negatives and of images; None: drawn in each step.
    """

    negatives: Tensor | None = None
    noise: Tensor | None = None

    def __init__(self, ours: OurStep, flags: Flags, *, contiguous: bool = True) -> None:
        self.released = released_copy(ours.net, contiguous=contiguous)  # type: ignore[arg-type]
        self.net = self.released.net
        form = torch.contiguous_format if contiguous else torch.channels_last
        self.data = Data(ours.data.images.contiguous(memory_format=form), ours.data.labels)
        self.spec, self.eps = flags.of(AdversarialSpec), flags.of(EpsilonSpec).epsilon
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.9, weight_decay=2e-4)

    def pick(self) -> Tensor:
        logits = None
        if self.spec.rule != "random":
            with torch.no_grad():
                logits = self.released(self.data.images)[0]
        return torch.tensor(pick_loop(self.data.labels, logits, self.spec.rule), device=self.data.labels.device)

    def loss(self) -> Tensor:
        images, labels = self.data
        rows = self.pick() if self.negatives is None else self.negatives
        noise = torch.randn_like(images.expand(2, *images.shape)) if self.noise is None else self.noise
        spec = self.spec
        how: dict[str, Any] = {"eps": self.eps, "step": spec.step_size, "steps": spec.num_steps, "beta": spec.cr_beta}
        negatives = images[rows]
        if self.spec.attacked:
            negatives = targeted_attack(self.released, negatives, labels, noise[0], **how)
        attacked = untargeted_attack(self.released, images, labels, noise[1], **how)
        self.seen = (images, attacked, negatives), (labels, labels, labels[rows])
        terms = trades_ancra(
            self.released,
            self.seen[0],
            labels,
            labels[rows],
            cr_beta=self.spec.cr_beta,
            beta=self.spec.robust_weight,
            zeta=self.spec.zeta,
            alpha=self.spec.alpha,
        )
        self.logged = [term.item() for term in terms]
        return torch.stack(terms).sum()

    def finish(self) -> None:
        self.logged += logging_passes(self.released, *self.seen)


def training_flags(model: str, batch_size: int, *more: str) -> Flags:
    """Those of the published step, as the command line gives them."""
    argv = ["--mode", _MODE, "--ra", "--anc", "--model", model, "--batch_size", str(batch_size), *more]
    return parse(argv, build_parser("train.py", STAGE1, None, SPECS)).filled(STAGE1[_MODE].defaults)


def check(model: str, images: int, *more: str) -> str:
    """Loss and gradients of both on the CPU, computed by networks in float64, with the same weights and draws.

    Raises: AssertionError unless they agree; returns how far they are apart.
    """
    flags = training_flags(model, images, *more, "--device", "cpu", "--amp", "off")
    ours = OurStep(flags, torch.device("cpu"))
    ours.net.double()
    theirs = ReleasedStep(ours, flags)
    batch, labels = ours.batch, ours.data.labels
    gen = generator(flags.seed, "attack", batch.epoch, batch.step)
    with torch.no_grad():
        logits = theirs.released(ours.data.images)[0]
    rows = pick_negatives(logits, labels, strategy=theirs.spec.rule, generator=gen)[:, 0]
    assert (rows >= 0).all(), "an image has no negative; take more images"
    # In the order in which ours draws.
    draws = [PGD.noise(images, ours.data.images, gen) for _ in range(1 + theirs.spec.attacked)]
    theirs.negatives, theirs.noise = rows, torch.stack([draws[0], draws[-1]])
    losses = [ours.loss(), theirs.loss()]
    torch.stack(losses).sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in step.net.parameters()]) for step in (ours, theirs)]  # type: ignore[union-attr]
    apart = [distance(losses[1].detach(), losses[0].detach()), distance(gradients[1], gradients[0])]
    assert max(apart) < 1e-4, f"{model}: loss or gradients differ by {max(apart):.1e}"
    return f"{model}: loss differs from the released formulation's by {apart[0]:.0e}, gradients by {apart[1]:.0e}"


def parts(ours: OurStep, theirs: ReleasedStep) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What of a step is formulated otherwise: ours, and the released one. Contrasts are of one head, with gradients."""
    labels, spec = ours.data.labels, theirs.spec
    gen = generator(0, "benchmark adversarial", device=labels.device)
    first = torch.randn(2, len(labels), _CLASSES, generator=gen, device=labels.device)
    # Every other pair is taken for one class.
    first[1, ::2] = first[0, ::2]
    logits = [x.requires_grad_() for x in first.unbind(0)]

    def backward(contrast: Callable[..., Tensor], **how: float) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(contrast(*logits, **how), logits, allow_unused=True)

    def pick() -> Tensor:
        return pick_negatives(logits[0].detach(), labels, strategy=spec.rule, generator=gen)

    theirs.loss()
    return {
        "choice of negatives": (pick, lambda: pick_loop(labels, logits[0], spec.rule)),
        "contrast of one head": (backward(anc, alpha=spec.alpha), backward(contrast_loop, alpha=spec.alpha)),
        "passes for the log": (lambda: None, lambda: logging_passes(theirs.released, *theirs.seen)),
    }


def peak(step: Step) -> int:
    """The most bytes during a step of a network that has taken one."""
    step.optimizer.zero_grad()  # The step makes gradients anew, which are counted then.
    held = step.held()
    return held + peak_bytes(step, step.data.images.device)[1]


def table(seconds: dict[str, list[float]], used: dict[str, int], images: int) -> list[list[str]]:
    """A row for each side, with how many times as fast ours is."""
    return [
        [
            name,
            f"{1e3 * statistics.median(taken):.0f} ms",
            f"{images / statistics.median(taken):.1f}",
            "" if name == OURS else str(Ratio.of(seconds[OURS], taken)),
            f"{used[name] / 2**20:.0f} MiB",
        ]
        for name, taken in seconds.items()
    ]


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adversarial", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--model", choices=("resnet8", "resnet18"), default="resnet8")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_steps", type=int, default=10, help="of each attack")
    parser.add_argument("--strategy", default="random_adv", help="which images are negatives, as for train.py")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each side")
    parser.add_argument(
        "--amp", choices=("off", "bf16"), default="off", help="precision of ours; the released is float32"
    )
    parser.add_argument("--process_time", action="store_true", help="CPU seconds: on a machine that others use, too")
    args = parser.parse_args(argv)
    if min(args.threads, args.repeats) < 1 or args.batch_size < 2:
        raise UserError("--threads and --repeats must be > 0, --batch_size > 1")
    device = pick_device(args.device)
    if args.process_time and device.type != "cpu":
        raise UserError("--process_time: a GPU's work is not in it; leave it out")
    autocast(args.amp, device)  # Raises for a precision that the device does not have.
    own = ["--num_steps", str(args.num_steps), "--strategy", args.strategy]
    flags = training_flags(args.model, args.batch_size, *own, "--device", str(device), "--amp", args.amp)
    torch.set_num_threads(args.threads)
    reuse_host_memory()
    print(
        f"{device_name(device)}, torch {torch.__version__}, {args.model}, batch {args.batch_size},"
        f" {args.num_steps} steps of each attack, {args.strategy}, amp {args.amp}",
        flush=True,
    )
    print(check(args.model, min(args.batch_size, 16), *own), flush=True)
    ours = OurStep(flags, device)
    theirs = ReleasedStep(ours, flags)
    steps: dict[str, Step] = {
        OURS: ours,
        RELEASED: theirs,
        SAME_FORMAT: ReleasedStep(ours, flags, contiguous=False),
    }
    clock = Clock(device, args.process_time)
    seconds = turns(steps, clock, args.repeats)
    used = {name: peak(step) for name, step in steps.items()}
    header = ["a step", "takes", "images/s", "ours is faster by", "peak memory"]
    print(markdown(header, table(seconds, used, args.batch_size)))
    rows = []
    for name, sides in parts(ours, theirs).items():
        found = clock.alternate(dict(zip((OURS, RELEASED), sides, strict=True)), args.repeats)
        rows.append([name, *(f"{1e3 * found[side]:.2f} ms" for side in (OURS, RELEASED))])
    print(markdown(["of a step", OURS, RELEASED], rows), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
