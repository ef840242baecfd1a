"""Steps of attacks against what the network itself takes: `python -m benchmarks.attacks`.

The ceiling: forward and backward pass to the images, as often as an attack steps, and nothing else; no attack can be
faster. Beside it a plain loop, which `pgd` must equal, and the passes with parameters that are not frozen. The network
is in evaluation mode, the loss the cross-entropy, and no image drops out. All sides live in one process and take their
turns; a ratio is the median of the ratios within a turn.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rdae import Clock
from benchmarks.sdnet import Data, Ratio, turns
from common.attacks import apgd, pgd
from common.attacks.objectives import cross_entropy
from common.device import Amp, autocast, device_name, pick_device, reuse_host_memory
from common.errors import UserError, command
from models import BACKBONES
from models.checkpoint import build_net
from models.feature_net import Classifier
from models.mode import frozen
from scripts.results import markdown

_EPS, _EPS_L2, _CLASSES = 8 / 255, 0.5, 10
CEILING, LIVE, LOOP = "forward and backward pass", "the same, parameters not frozen", "a plain loop"
PGD = "pgd, last"

Result = TypeVar("Result")


class Attacked:
    """A network in evaluation mode, images and labels."""

    def __init__(self, model: str, data: Data, amp: Amp, steps: int) -> None:
        net = build_net("classifier", model, n_classes=_CLASSES, seed=0)
        assert isinstance(net, Classifier)
        self.net, self.amp, self.steps = net.to(data.images.device).eval(), amp, steps
        self.images, self.labels = data

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        with self.amp():
            logits = self.net(x)
        return cross_entropy(logits, labels)

    def passes(self) -> None:
        """As often as an attack steps."""
        for _ in range(self.steps):
            x = self.images.detach().requires_grad_()
            torch.autograd.grad(self.loss(x, self.labels).sum(), x)

    def loop(self) -> Tensor:
        """PGD as tutorials have it, without a start at random."""
        x = self.images.clone()
        for _ in range(self.steps):
            x.requires_grad_()
            with self.amp():
                logits = self.net(x)
            (grad,) = torch.autograd.grad(F.cross_entropy(logits.float(), self.labels, reduction="sum"), x)
            x = x.detach() + _EPS / 4 * grad.sign()
            x = torch.min(torch.max(x, self.images - _EPS), self.images + _EPS).clamp(0, 1)
        return x

    def sides(self) -> dict[str, Callable[[], object]]:
        """What is measured, by name; the ceiling first."""

        def attack(run: Callable[..., Tensor], norm: str, **more: str) -> Callable[[], Tensor]:
            eps = {"linf": _EPS, "l2": _EPS_L2}[norm]
            settings = {"eps": eps, "norm": norm, "steps": self.steps, "start": "none", **more}
            return alone(lambda: run(self.loss, self.images, self.labels, **settings))

        def alone(run: Callable[[], Result]) -> Callable[[], Result]:
            def of_frozen() -> Result:
                with frozen(self.net):
                    return run()

            return of_frozen

        return {
            CEILING: alone(self.passes),
            LIVE: self.passes,
            LOOP: alone(self.loop),
            PGD: attack(pgd, "linf", keep="last"),
            "pgd, best": attack(pgd, "linf"),
            "apgd": attack(apgd, "linf"),
            "pgd, last, L2": attack(pgd, "l2", keep="last"),
            "pgd, best, L2": attack(pgd, "l2"),
            "apgd, L2": attack(apgd, "l2"),
        }


def check(sides: dict[str, Callable[[], object]]) -> str:
    """Raises: AssertionError unless `pgd` finds what the plain loop does; returns how many pixels are others."""
    loop, ours = sides[LOOP](), sides[PGD]()
    assert isinstance(loop, Tensor) and isinstance(ours, Tensor)
    # Signs of gradients next to 0.
    apart = float(((loop - ours).abs() > 1e-5).float().mean())
    assert apart < 0.01, f"pgd differs from the plain loop in {100 * apart:.1f} % of the pixels"
    return f"pgd differs from the plain loop in {100 * apart:.2g} % of the pixels"


def table(seconds: dict[str, list[float]], image_steps: int) -> list[list[str]]:
    """A row for each side. image_steps: images times steps of a turn."""
    return [
        [name, f"{image_steps / statistics.median(taken):.0f}", str(Ratio.of(taken, seconds[CEILING]))]
        for name, taken in seconds.items()
    ]


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--model", choices=sorted(BACKBONES), default="resnet8", metavar="NAME")
    parser.add_argument("--image_size", type=int, default=32, help="pixels on a side")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="of each attack")
    parser.add_argument("--repeats", type=int, default=7, help="attacks of each side")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="precision of forward and backward pass")
    parser.add_argument("--process_time", action="store_true", help="CPU seconds: on a machine that others use, too")
    args = parser.parse_args(argv)
    if min(args.threads, args.image_size, args.batch_size, args.steps, args.repeats) < 1:
        raise UserError("--threads, --image_size, --batch_size, --steps and --repeats must be > 0")
    device = pick_device(args.device)
    if args.process_time and device.type != "cpu":
        raise UserError("--process_time: a GPU's work is not in it; leave it out")
    torch.set_num_threads(args.threads)
    reuse_host_memory()
    data = Data.of(args.batch_size, device, args.image_size)
    sides = Attacked(args.model, data, autocast(args.amp, device), args.steps).sides()
    print(
        f"{device_name(device)}, torch {torch.__version__}, {args.model}, batch {args.batch_size},"
        f" {args.steps} steps, amp {args.amp}",
        flush=True,
    )
    print(check(sides), flush=True)
    seconds = turns(sides, Clock(device, args.process_time), args.repeats)
    header = ["", "images x steps / s", "of the ceiling"]
    print(markdown(header, table(seconds, args.batch_size * args.steps)), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
