"""AutoAttack (Croce & Hein 2020) and its parts by its authors' package pyautoattack, which is optional.

APGD on the cross-entropy, APGD on the targeted DLR, FAB-T and Square, each on the images that are left. N images of
shape (N, C, H, W), floats in [0, 1].
"""

import contextlib
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.attacks.search import Search
from common.errors import UserError

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
# What there is, and how many classes it needs.
ATTACKS = {"apgd-ce": 2, "apgd-t": 4, "fab-t": 2, "square": 2, "apgd-dlr": 3, "fab": 2}

_NORMS = {"linf": "Linf", "l2": "L2"}
# How the package reports the natural accuracy, and a batch of an attack.
_NATURAL = re.compile(r"initial accuracy: ([\d.]+)%")
_BATCH = re.compile(r"(\S+) - \d+/\d+ - (\d+) out of \d+ successfully perturbed")


class AutoResult(NamedTuple):
    """images (N, C, H, W): those that fool, elsewhere the originals. fooled (N,) bool: those that are wrong already
    among them. accuracy: `natural`, then by attack what it and those before it have left. warnings: of the package."""

    images: Tensor
    fooled: Tensor
    accuracy: dict[str, float]
    warnings: tuple[str, ...]


def autoattack(
    logits_of_x: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    seed: int,
    batch_size: int,
    attacks: Sequence[str] | None = None,
    queries: int = 5000,
) -> AutoResult:
    """The standard AutoAttack, or some of its parts, `["square"]` say, on all images in one call.

    logits_of_x: images -> (N, classes), each for itself. No parameter of a network gets a gradient.
    attacks: of `ATTACKS`, in the order in which they run. None: the standard ones; with fewer than 4 classes APGD-T,
    which has no loss then, is left out, and a warning says so. queries: of Square; with fewer than 5000 it ends early.
    Global generators, the trace function and the package's logger are left as they were.
    Raises: UserError where the package is not installed; ValueError for arguments that no attack can use.
    """
    package = _package()
    if batch_size < 1:
        raise ValueError(f"batch_size must be > 0, got {batch_size}")
    Search(eps, 1, norm, 1, "none", None, None).check(images, [labels], may_wait=True)
    if eps == 0 or not len(images):
        raise ValueError(f"AutoAttack needs eps > 0 and images, got {eps} and {len(images)}")
    images, labels = images.detach().float().contiguous(), labels.detach()
    model = _of_input_alone(logits_of_x)
    n_classes = model(images[:1]).shape[1]
    names, remarks = _chosen(attacks, n_classes)
    with _kept(package, images.device) as log:
        attack = package.AutoAttack(model, device=images.device, eps=eps, norm=_NORMS[norm], seed=seed)
        attack.attacks_to_run = list(names)
        attack.square.n_queries = queries
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(part.n_target_classes, n_classes - 1)
        found, named = attack.run_standard_evaluation(images, labels, batch_size=batch_size)
    fooled = named != labels
    accuracy = log.accuracies(names, left=int((~fooled).sum()), n=len(images))
    return AutoResult(found.detach(), fooled, accuracy, (*remarks, *log.warnings))


def _package() -> ModuleType:
    try:
        import pyautoattack
    except ImportError:
        raise UserError(
            "--attacks: AutoAttack and Square need the package pyautoattack; pip install pyautoattack"
        ) from None
    return pyautoattack


def _chosen(attacks: Sequence[str] | None, n_classes: int) -> tuple[Sequence[str], list[str]]:
    """The names of attacks that run, and what is to be said of them."""
    if attacks is None:
        names = [name for name in STANDARD if n_classes >= ATTACKS[name]]
        gone = [f"{name} was left out: it needs {ATTACKS[name]} classes" for name in STANDARD if name not in names]
        return names, gone
    if not attacks:
        raise ValueError("attacks: none was named")
    for name in attacks:
        if name not in ATTACKS:
            raise ValueError(f"attacks must be of {', '.join(ATTACKS)}, got {name!r}")
        if n_classes < ATTACKS[name]:
            raise ValueError(f"attacks: {name} needs {ATTACKS[name]} classes, and there are {n_classes}")
    return attacks, []


class _Log(logging.Handler):
    """What the package reports: warnings, each once, the natural accuracy in percent, rounded, and how many images each
    attack has perturbed."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.warnings: list[str] = []
        self.natural = math.nan
        self.perturbed: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING and text not in self.warnings:
            self.warnings.append(text)
        if batch := _BATCH.fullmatch(text):
            self.perturbed[batch[1]] += int(batch[2])
        if natural := _NATURAL.fullmatch(text):
            self.natural = float(natural[1])

    def accuracies(self, names: Sequence[str], *, left: int, n: int) -> dict[str, float]:
        """Raises: RuntimeError unless the counts of all attacks and what is left add up to the natural accuracy."""
        right = left + sum(self.perturbed[name] for name in names)
        if not abs(100 * right / n - self.natural) < 0.011:
            raise RuntimeError(
                f"pyautoattack counts {dict(self.perturbed)}, leaves {left} of {n} images and reports a natural"
                f" accuracy of {self.natural} %; install version 0.2.0"
            )
        found = {"natural": right / n}
        for name in names:
            right -= self.perturbed[name]
            found[name] = right / n
        return found


@contextlib.contextmanager
def _kept(package: Any, device: torch.device) -> Iterator[_Log]:
    """Collect what the package reports, and undo what it does to its process.

    It seeds the global generators and ends the trace function, with which it counts calls, in a table of the process:
    a network that attacks itself in its forward pass would be found in every later one.
    """
    logger, log = logging.getLogger("auto-attack"), _Log()
    before = logger.level, logger.propagate, sys.gettrace()
    calls = package.autoattack.checks.funcs
    calls.update(dict.fromkeys(calls, 0))
    logger.addHandler(log)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield log
    finally:
        logger.removeHandler(log)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        sys.settrace(before[2])


def _of_input_alone(logits_of_x: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same logits, in float32 and in memory of their own (Square writes into them); gradients reach the images and
    no parameter, though FAB calls `backward`."""

    def model(x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return _InputAlone.apply(x, logits_of_x)
        with torch.no_grad():
            return logits_of_x(x).float().clone()

    return model


class _InputAlone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logits_of_x: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            ctx.inner, ctx.logits = inner, logits_of_x(inner).float()
        return ctx.logits.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (found,) = torch.autograd.grad(ctx.logits, ctx.inner, grad, retain_graph=True)
        return found, None
