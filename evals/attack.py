"""Classifiers under attack: accuracy by attack, the worst case of each image, the radius at which it falls, and signs
that gradients are masked.

The protocol is that of docs/robustness.md. Whatever an attack climbs, its success is judged by the network's own
prediction, in the precision in which it predicts. N images of a set, b of a batch, C classes.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

from common.attacks import apgd, apgd_targeted, fgsm, masked, pgd
from common.attacks.auto import NOT_INSTALLED, autoattack, installed
from common.attacks.masked import Sign
from common.attacks.objectives import (
    cross_entropy,
    judged,
    margin,
    other_classes,
    targeted_dlr,
    targeted_dlr_or_margin,
    targeted_margin,
)
from common.attacks.specs import EpsilonSpec, radius_text
from common.device import autocast
from common.errors import UserError
from common.flags import DeviceSpec
from common.seed import generator
from datasets import ImageSet
from datasets.sets import evenly
from datasets.views import PassSpec
from evals.classify import (
    CLEAN,
    Condition,
    Perturb,
    Perturbed,
    check_classes,
    classified_images,
    classify,
    linear_logits,
    worst_case,
)
from evals.result import Result
from evals.specs import DEFAULT, AttackSpec
from evals.trained import Trained, evaluation_mode, load_other
from models.checkpoint import Misfit, State, kind_of
from models.feature_net import Heads
from models.mean_sparse import alpha_of, with_alpha, with_backward
from models.reverse_attention import Rows, rows_of, soft_rows, straight_through_rows

# What is climbed: the final logits, by gradients; something else that the network has; nothing of it.
STANDARD, ADAPTIVE, BLACK_BOX, ENSEMBLE = "standard", "adaptive", "black box", "ensemble"
# Another network, the one that MeanSparse was put into: what is left of it says nothing of this one.
BASE = "base"
_AUXILIARY, _SOURCE, _PACKAGE, _SPARSE = "auxiliary heads", "source", "pyautoattack", "operators of MeanSparse"
CURVE = "curve"
# Largest gap of the logits of an image under its temperature. With 1 or 5 the attack is much weaker than without one
# (on a robust network 80 and 76 % left in place of 69 %), since it then leads away from the own class towards no other;
# from 20 to 40 it is the stronger one (68 %).
_GAP = 20


@dataclass(frozen=True)
class Victim:
    """A network as attacks see it, in evaluation mode and in the precision in which it predicts.

    logits: images (b, 3, H, W) -> the logits (b, C) by which it predicts. heads: (images, **settings) -> these and the
    auxiliary ones, under settings of `RaClassifier.heads`. n_auxiliary: how many there are. n_classes: C.
    source: the logits of a network without the defence, where there is one. sparse: the network, where MeanSparse acts
    in it.
    eps: in the norm of `spec`. pixels: numbers that an image has. batch_size: of attacks that see all images in one
    call. precision: its name.
    """

    logits: Callable[[Tensor], Tensor]
    heads: Callable[..., Heads]
    n_auxiliary: int
    n_classes: int
    source: Callable[[Tensor], Tensor] | None
    sparse: nn.Module | None
    spec: AttackSpec
    eps: float
    pixels: int
    batch_size: int
    precision: str

    @torch.no_grad()
    def fooled(self, images: Tensor, labels: Tensor) -> Tensor:
        """Which images it classifies wrongly, (b,) bool."""
        return self.logits(images).argmax(1) != labels

    @property
    def ball(self) -> dict[str, Any]:
        return {"eps": self.eps, "norm": self.spec.norm}

    def climb(self, loss_of_x: Callable[..., Any], x: Tensor, *data: Tensor, gen: Generator, **settings: Any) -> Tensor:
        """APGD, as the flags say."""
        settings = {"steps": self.spec.attack_steps, "restarts": self.spec.attack_restarts, **self.ball, **settings}
        return apgd(loss_of_x, x, *data, generator=gen, **settings)


# (victim, images (b, 3, H, W), labels (b,), generator) -> images, or `Perturbed`.
Run = Callable[[Victim, Tensor, Tensor, Generator], Tensor | Perturbed]


@dataclass(frozen=True)
class Attack:
    """One row of `ATTACKS`.

    group: what is climbed. reads: flags of `AttackSpec`. needs: what a victim must have, of `_NEEDS`.
    setting: network -> context manager, within which it is attacked and asked.
    steps: of PGD on the cross-entropy of the final logits; 0 for other attacks.
    in_default: whether it is one of `--attacks default`.
    each_head: a column for each auxiliary head, whose number is an argument. whole: it sees all images in one call.
    """

    run: Callable[..., Tensor | Perturbed]
    group: str
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    setting: Callable[[nn.Module], AbstractContextManager[Any]] = lambda net: nullcontext()
    steps: int = 0
    in_default: bool = True
    each_head: bool = False
    whole: bool = False


def _natural(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Perturbed:
    """The images themselves, and which of them have no gradient."""
    return Perturbed(x, {"without_gradient": masked.without_gradient(victim.logits, x, labels)})


def _fgsm(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Tensor:
    return fgsm(lambda x, labels: cross_entropy(victim.logits(x), labels), x, labels, **victim.ball)


def _pgd(
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    victim: Victim,
    x: Tensor,
    labels: Tensor,
    gen: Generator,
    step: float | None = None,
) -> Tensor:
    """As published: the last image counts, whatever came before it, so that what a mask hides can be seen."""

    def once() -> Tensor:
        return pgd(
            lambda x, labels: loss(victim.logits(x), labels),
            x,
            labels,
            **victim.ball,
            steps=steps,
            step=step or victim.spec.attack_step_size,
            generator=gen,
            keep="last",
        )

    found = once()
    for _ in range(victim.spec.attack_restarts - 1):
        fooled = victim.fooled(found, labels).view(-1, 1, 1, 1)
        found = torch.where(fooled, found, once())
    return found


def _fgsm_random(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Tensor:
    return _pgd(cross_entropy, 1, victim, x, labels, gen, step=victim.eps)


def _apgd_ce(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Tensor:
    return victim.climb(judged(victim.logits), x, labels, gen=gen)


def _apgd_t(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Perturbed:
    spec, objective = victim.spec, targeted_dlr_or_margin(victim.n_classes)
    found = apgd_targeted(
        victim.logits, x, labels, **victim.ball, steps=spec.attack_steps, targets=spec.attack_targets, generator=gen
    )
    fallback = [] if objective.loss is targeted_dlr else [f"{victim.n_classes} classes: by the {objective.name}"]
    return Perturbed(found, facts={"warnings": fallback})


def _temperature(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Tensor:
    """The cross-entropy of logits divided by a temperature of each image, so that it does not saturate."""
    with torch.no_grad():
        logits = victim.logits(x)
    temperature = (logits.amax(1) - logits.amin(1)).div(_GAP).clamp_min(torch.finfo(logits.dtype).tiny)

    def loss_of_x(x: Tensor, labels: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        logits = victim.logits(x)
        return cross_entropy(logits / temperature[:, None], labels), logits.detach().argmax(1) != labels

    return victim.climb(loss_of_x, x, labels, temperature, gen=gen)


def _of_heads(
    victim: Victim, loss: Callable[[Heads, Tensor], Tensor], rows: Rows | None = None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A loss of all heads. rows: how reverse attention chooses them there; the judge sees what the network chooses."""

    def loss_of_x(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        heads = victim.heads(x) if rows is None else victim.heads(x, rows=rows)
        fooled = heads.final.detach().argmax(1) != labels if rows is None else victim.fooled(x, labels)
        return loss(heads, labels), fooled

    return loss_of_x


def _margins(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Tensor:
    def loss(heads: Heads, labels: Tensor) -> Tensor:
        return torch.stack([margin(logits, labels) for logits in (heads.final, *heads.auxiliary)]).sum(0)

    return victim.climb(_of_heads(victim, loss), x, labels, gen=gen)


def _auxiliary(victim: Victim, x: Tensor, labels: Tensor, gen: Generator, head: int) -> Tensor:
    def loss(heads: Heads, labels: Tensor) -> Tensor:
        return cross_entropy(heads.auxiliary[head], labels)

    return victim.climb(_of_heads(victim, loss), x, labels, gen=gen)


def _other_rows(rows: Rows, victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Tensor:
    """The margin of the final logits under a mask that a gradient passes."""
    loss = _of_heads(victim, lambda heads, labels: margin(heads.final, labels), rows)
    return victim.climb(loss, x, labels, gen=gen)


def _held(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Tensor:
    """The mask held at each of the likeliest other classes in turn, which all heads are driven to.

    Held at the own class it gives the gradient that it has anyway.
    """

    def loss_of_x(x: Tensor, labels: Tensor, aims: Tensor) -> tuple[Tensor, Tensor]:
        heads = victim.heads(x, rows=rows_of(aims))
        margins = [targeted_margin(logits, labels, aims) for logits in (heads.final, *heads.auxiliary)]
        return torch.stack(margins).sum(0), victim.fooled(x, labels)

    return _in_turn(victim, loss_of_x, x, labels, gen)


def _auxiliary_t(victim: Victim, x: Tensor, labels: Tensor, gen: Generator, head: int) -> Tensor:
    def loss_of_x(x: Tensor, labels: Tensor, aims: Tensor) -> tuple[Tensor, Tensor]:
        heads = victim.heads(x)
        fooled = heads.final.detach().argmax(1) != labels
        return targeted_margin(heads.auxiliary[head], labels, aims), fooled

    return _in_turn(victim, loss_of_x, x, labels, gen)


def _in_turn(victim: Victim, loss_of_x: Callable[..., Any], x: Tensor, labels: Tensor, gen: Generator) -> Tensor:
    """APGD towards each of the likeliest other classes; what is fooled drops out. loss_of_x takes them, too."""
    with torch.no_grad():
        logits = victim.logits(x)
    aims = other_classes(logits, labels, min(victim.spec.attack_targets, logits.shape[1] - 1))
    found, left = x.clone(), (logits.argmax(1) == labels).nonzero()[:, 0]
    for own in aims.unbind(1):
        if not len(left):
            break
        found[left] = victim.climb(loss_of_x, x[left], labels[left], own[left], gen=gen)
        left = left[~victim.fooled(found[left], labels[left])]
    return found


def _transfer(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Tensor:
    assert victim.source is not None
    source = victim.source
    return victim.climb(lambda x, labels: cross_entropy(source(x), labels), x, labels, gen=gen)


def _from_base(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Perturbed:
    """Images that fool the network without MeanSparse."""
    assert victim.sparse is not None
    with with_alpha(victim.sparse, 0):
        return _apgd_t(victim, x, labels, gen)


def straight_through(net: nn.Module) -> AbstractContextManager[None]:
    """The gradient of MeanSparse as if nothing were replaced."""
    return with_backward(net, "straight_through")


def dense(net: nn.Module) -> AbstractContextManager[None]:
    """The network without MeanSparse."""
    return with_alpha(net, 0)


def _square(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Perturbed:
    return _by_package(victim, x, labels, gen, attacks=["square"], queries=victim.spec.square_queries)


def _autoattack(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Perturbed:
    return _by_package(victim, x, labels, gen)


def _by_package(victim: Victim, x: Tensor, labels: Tensor, gen: Generator, **settings: Any) -> Perturbed:
    seed = gen.initial_seed() % 2**32
    found = autoattack(victim.logits, x, labels, **victim.ball, seed=seed, batch_size=victim.batch_size, **settings)
    return Perturbed(found.images, facts={"warnings": found.warnings, "parts": [found.accuracy]})


def _curve(victim: Victim, x: Tensor, labels: Tensor, gen: Generator) -> Perturbed:
    """APGD on the cross-entropy at one radius after the other, each from the images of the one before.

    What has fallen stays as it is, so the curve never rises. The images are those within epsilon; column `fell_at`
    (b,): which of the radii each fell at, their number where none.
    """
    every = radii(victim.spec, victim.pixels)
    fell_at, standing = torch.full_like(labels, len(every)), torch.ones_like(labels, dtype=torch.bool)
    found, within = x.clone(), x
    # Half the steps: most of the way has been gone at the radius before.
    settings: dict[str, Any] = {"steps": -(-victim.spec.attack_steps // 2), "restarts": 1}
    for place, eps in enumerate(every):
        left = standing.nonzero()[:, 0]
        if eps > 0 and len(left):
            settings |= {"eps": eps, "start": found[left]}
            found = found.clone()
            found[left] = victim.climb(judged(victim.logits), x[left], labels[left], gen=gen, **settings)
        # Of all at a time, as `classify` judges them: so both agree to the bit.
        fallen = victim.fooled(found, labels) & standing
        fell_at, standing = fell_at.masked_fill(fallen, place), standing & ~fallen
        within = found if eps <= victim.eps else within
    return Perturbed(within, {"fell_at": fell_at})


def radii(spec: AttackSpec, pixels: int) -> list[float]:
    """Of the curve, in rising order; by default the last one covers all images of so many pixels."""
    if spec.epsilons is not None:
        return sorted(set(spec.epsilons))
    return [*_RADII[spec.norm], covering(spec.norm, pixels)]


def covering(norm: str, pixels: int) -> float:
    """The radius within which every image of so many pixels lies, whatever the original."""
    return 1.0 if norm == "linf" else math.sqrt(pixels)


_RADII = {"linf": tuple(n / 255 for n in (0, 1, 2, 4, 8, 16)), "l2": (0, 0.125, 0.25, 0.5, 1, 2)}

_ALWAYS = ("attacks", "attack_images", "norm", "transfer_path")
_STEP, _RESTARTS = "attack_step_size", "attack_restarts"
_PGD, _APGD, _AIMED = (_STEP, _RESTARTS), ("attack_steps", _RESTARTS), ("attack_steps", _RESTARTS, "attack_targets")

# In order of what they cost.
ATTACKS: dict[str, Attack] = {
    CLEAN: Attack(_natural, CLEAN),
    "fgsm": Attack(_fgsm, STANDARD, steps=1),
    "fgsm_random": Attack(_fgsm_random, STANDARD, (_RESTARTS,), steps=1),
    "pgd20": Attack(partial(_pgd, cross_entropy, 20), STANDARD, _PGD, steps=20),
    "cw": Attack(partial(_pgd, margin, 20), STANDARD, _PGD),
    "pgd40": Attack(partial(_pgd, cross_entropy, 40), STANDARD, _PGD, steps=40),
    "pgd100": Attack(partial(_pgd, cross_entropy, 100), STANDARD, _PGD, steps=100, in_default=False),
    "transfer": Attack(_transfer, BLACK_BOX, _APGD, (_SOURCE,)),
    "apgd_ce": Attack(_apgd_ce, STANDARD, _APGD),
    "temperature": Attack(_temperature, ADAPTIVE, _APGD),
    "margins": Attack(_margins, ADAPTIVE, _APGD),
    "aux": Attack(_auxiliary, ADAPTIVE, _APGD, (_AUXILIARY,), each_head=True),
    "mask_straight": Attack(partial(_other_rows, straight_through_rows()), ADAPTIVE, _APGD, (_AUXILIARY,)),
    "mask_soft": Attack(partial(_other_rows, soft_rows()), ADAPTIVE, _APGD, (_AUXILIARY,)),
    CURVE: Attack(_curve, STANDARD, ("attack_steps", "epsilons")),
    "square": Attack(_square, BLACK_BOX, ("square_queries",), (_PACKAGE,)),
    "apgd_t": Attack(_apgd_t, STANDARD, ("attack_steps", "attack_targets")),
    "mask_held": Attack(_held, ADAPTIVE, _AIMED, (_AUXILIARY,)),
    "aux_t": Attack(_auxiliary_t, ADAPTIVE, _AIMED, (_AUXILIARY,), in_default=False, each_head=True),
    "straight": Attack(_apgd_ce, ADAPTIVE, _APGD, (_SPARSE,)),
    "straight_t": Attack(_apgd_t, ADAPTIVE, ("attack_steps", "attack_targets"), (_SPARSE,)),
    "from_base": Attack(_from_base, ADAPTIVE, ("attack_steps", "attack_targets"), (_SPARSE,)),
    "base": Attack(_natural, BASE, (), (_SPARSE,), dense),
    "base_apgd_ce": Attack(_apgd_ce, BASE, _APGD, (_SPARSE,), dense),
    "base_apgd_t": Attack(_apgd_t, BASE, ("attack_steps", "attack_targets"), (_SPARSE,), dense),
    "autoattack": Attack(_autoattack, ENSEMBLE, (), (_PACKAGE,), in_default=False, whole=True),
    "straight_autoattack": Attack(
        _autoattack, ENSEMBLE, (), (_PACKAGE, _SPARSE), straight_through, in_default=False, whole=True
    ),
    "base_autoattack": Attack(_autoattack, BASE, (), (_PACKAGE, _SPARSE), dense, in_default=False, whole=True),
}

# What an attack needs: whether it is there, and what to say where it is not.
_NEEDS: dict[str, tuple[Callable[[Victim], bool], str]] = {
    _AUXILIARY: (lambda victim: victim.n_auxiliary > 0, "it is for networks with reverse attention; leave it out"),
    _SOURCE: (lambda victim: victim.source is not None, "give --transfer_path, a network without the defence"),
    _PACKAGE: (lambda victim: installed(), NOT_INSTALLED),
    _SPARSE: (lambda victim: victim.sparse is not None, "it is for networks with MeanSparse; give --ms_alpha above 0"),
}


def attack(trained: Trained) -> Iterator[Result]:
    """One result: accuracy on test images by attack, what is left of each image, and the signs of masked gradients.

    Metrics: `accuracy` without an attack; `attacked/<attack>`; `worst/<group>`, of what is left under all attacks of a
    group; `worst_case`, under all; `robust_of_correct`, its share of what is right without an attack; `curve/<radius>`.
    An accuracy is one of all images, whichever other attacks run.
    per_image: what each attack has the network take an image for, the radius at which it falls, whether it is robust.
    Flags are read and images loaded before the result is asked for. All ranks get it.
    Raises: UserError for an attack that is not possible here, a radius that is 0 or of another norm, a single normal
    class, other classes than the network knows, and a source that does not fit.
    """
    flags, world = trained.flags, trained.world
    with world.raise_together():
        spec = flags.of(AttackSpec, only=_ALWAYS)
        test = some_images(classified_images(trained), spec.attack_images, flags.seed)
        victim = victim_of(trained, spec, test)
        rows = _chosen(trained, victim)
        used = {name for row in rows.values() for name in row.reads}
        spec = flags.of(AttackSpec, only=[*_ALWAYS, *used])
        victim = replace(victim, spec=spec)
        columns = dict(_columns(rows, victim))
    results = classify(
        trained,
        predict=lambda net, images: heads_of(net)(images).final,
        conditions=[condition for condition, _ in columns.values()],
        test=test,
    )

    def measured() -> Iterator[Result]:
        print(f"attacks on {len(test)} images: {', '.join(columns)}", flush=True)
        found, begun = {}, time.monotonic()
        for result in results:
            seconds, begun = time.monotonic() - begun, time.monotonic()
            print(f"{result.name}: {100 * result.metrics['accuracy']:.1f} % left, {seconds:.0f} s", flush=True)
            found[result.name] = Column(columns[result.name][1], result, round(seconds, 2))
        yield _summary(trained, victim, found)

    return measured()


class Column(NamedTuple):
    """What an attack has left, and how long it took."""

    row: Attack
    result: Result
    seconds: float

    @property
    def table(self) -> dict[str, np.ndarray]:
        """Its columns of the images."""
        (found,) = self.result.per_image.values()
        return found

    @property
    def correct(self) -> np.ndarray:
        """Which images are right, (N,) bool."""
        return self.table["correct"]

    @property
    def left(self) -> float:
        """Their share."""
        return self.result.metrics["accuracy"]


def _summary(trained: Trained, victim: Victim, columns: Mapping[str, Column]) -> Result:
    """The one result of all attacks."""
    natural = columns[CLEAN]
    worst = {"worst_case": _worst(column for column in columns.values() if column.row.group != BASE)}
    for group in (STANDARD, ADAPTIVE):
        own = [column for column in columns.values() if column.row.group == group]
        if own:
            worst[f"worst/{group}"] = _worst([natural, *own])
    table = {name: natural.table[name] for name in ("index", "label", "without_gradient")}
    table |= {name: column.table["predicted"] for name, column in columns.items()}
    robust, curve = worst["worst_case"], {}
    if CURVE in columns:
        every = radii(victim.spec, victim.pixels)
        table["radius"] = np.array([*every, math.inf])[columns[CURVE].table["fell_at"]]
        robust &= table["radius"] > victim.eps
        curve = {eps: float((table["radius"] > eps).mean()) for eps in every}
    of_this = (column for column in columns.values() if column.row.group != BASE)
    assert not any((robust & ~column.correct).any() for column in of_this)
    signs, missing = find_signs(columns, worst, curve.get(covering(victim.spec.norm, victim.pixels)))
    missing += [name for name in ("straight", "base") if victim.sparse is not None and name not in columns]
    metrics = {
        "accuracy": natural.left,
        **{name: float(right.mean()) for name, right in worst.items()},
        "robust_of_correct": float(robust.mean()) / natural.left if natural.left else 0.0,
        **{f"attacked/{name}": column.left for name, column in columns.items() if name != CLEAN},
        **{f"curve/{radius_text(eps)}": left for eps, left in curve.items()},
    }
    shared = ("data", "settings", "n", "classes")
    facts = {
        **{name: natural.result.facts[name] for name in shared},
        "epsilon": victim.eps,
        "norm": victim.spec.norm,
        "precision": victim.precision,
        "radii": list(curve),
        "health": masked.health_line(signs),
        "signs": [sign._asdict() for sign in signs],
        "not_measured_without": missing,
        "attacks": {name: _facts_of(column) for name, column in columns.items()},
    }
    return Result("attack", metrics, {trained.split.dataset: table | {"robust": robust}}, facts)


def _worst(columns: Iterable[Column]) -> np.ndarray:
    """Which images are right under all of them, (N,) bool."""
    (found,) = worst_case([column.result for column in columns])
    (table,) = found.per_image.values()
    return table["correct"]


def _facts_of(column: Column) -> dict[str, Any]:
    found, facts = {"group": column.row.group, "seconds": column.seconds}, column.result.facts
    if facts.get("warnings"):
        found["warnings"] = facts["warnings"]
    if column.row.whole:
        (found["parts"],) = facts["parts"]
    return found


def find_signs(
    columns: Mapping[str, Column], worst: Mapping[str, np.ndarray], left_at_most: float | None
) -> tuple[list[Sign], list[str]]:
    """The signs of masked gradients that these attacks show, and the attacks without which others were not looked for.

    Those of `common.attacks.masked`, for attacks on the final logits, and one more: attacks that know what else there
    is in the network are stronger than these. worst: of groups of attacks, which images are right under all (N,) bool.
    left_at_most: what is left within the radius that covers all images.
    """
    natural, found, missing = columns[CLEAN], [], []
    standard = [column for name, column in columns.items() if column.row.group == STANDARD and name != CURVE]
    by_steps = {column.row.steps: column for column in standard if column.row.steps > 1}
    one_step = [column for column in standard if column.row.steps == 1]

    def strongest(of: Iterable[Column]) -> Column:
        return min(of, key=lambda column: column.left)

    groups = [worst[f"worst/{group}"] for group in (STANDARD, ADAPTIVE) if f"worst/{group}" in worst]
    if len(groups) == 2:
        gain = float(groups[0].mean()) - float(groups[1].mean())
        found.append(Sign("attacks that know the network leave less by", gain, gain > _slack(*groups)))
    if standard:
        found.append(masked.attack_above_natural(natural.left, max(column.left for column in standard)))
    if len(by_steps) > 1:
        in_order = [column for _, column in sorted(by_steps.items())]
        slack = max(_slack(*pair) for pair in combinations([c.correct for c in in_order], 2))
        found.append(masked.more_steps_leave_more({steps: c.left for steps, c in by_steps.items()}, slack))
    if one_step and by_steps:
        one, many = strongest(one_step), strongest(by_steps.values())
        found.append(masked.one_step_stronger(one.left, many.left, _slack(one.correct, many.correct)))
    for name, sign in (("square", masked.gradient_free_stronger), ("transfer", masked.transfer_stronger)):
        if name in columns and standard:
            best = strongest(standard)
            found.append(sign(best.left, columns[name].left, _slack(best.correct, columns[name].correct)))
        else:
            missing.append(name)
    if left_at_most is not None:
        found.append(masked.left_at_eps_1(left_at_most))
    else:
        missing.append(CURVE)
    found.append(masked.zero_gradients(float(natural.table["without_gradient"].mean())))
    return found, missing


def _slack(a: np.ndarray, b: np.ndarray) -> float:
    """What chance may make of the difference of two shares of images, (N,) bool each.

    Two standard deviations, if every image on which they disagree might as well have gone the other way; on few images
    that is more than `SLACK`, which 10,000 images have of which 1 % disagree.
    """
    return max(masked.SLACK, 2 * math.sqrt((a != b).sum()) / len(a))


def victim_of(trained: Trained, spec: AttackSpec, test: ImageSet) -> Victim:
    flags, net, device = trained.flags, trained.net, trained.device
    eps = flags.of(EpsilonSpec).epsilon
    if eps == 0:
        raise UserError("--epsilon 0: nothing can be attacked; give a radius above 0")
    if spec.norm != "linf" and not flags.given("epsilon"):
        raise UserError(f"--norm {spec.norm}: the radius of training is of linf; give --epsilon 0.5, say")
    source = None if spec.transfer_path is None else _source(trained, spec.transfer_path)
    amp = autocast(flags.of(DeviceSpec, only=["amp"]).amp, device)

    def under_amp(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **settings: Any) -> Any:
            with amp():
                return call(*args, **settings)

        return called

    heads = under_amp(heads_of(net))
    with evaluation_mode(net), torch.no_grad():
        first = heads(test.batch(torch.arange(1, device=test.index_device)))
    check_classes(trained, first.final.shape[1])
    with amp():
        precision = "bf16" if torch.is_autocast_enabled(device.type) else "float32"
    return Victim(
        logits=lambda images: heads(images).final,
        heads=heads,
        n_auxiliary=len(first.auxiliary),
        n_classes=first.final.shape[1],
        sparse=net if alpha_of(net) > 0 else None,
        source=source and under_amp(lambda images: heads_of(source)(images).final),
        spec=spec,
        eps=eps,
        pixels=test.channels * math.prod(test.size),
        batch_size=flags.of(PassSpec).ood_batch_size,
        precision=precision,
    )


def heads_of(net: Any) -> Callable[..., Heads]:
    """Of a classifier its heads; of a labelled stage-1 network the linear one."""
    return net.heads if hasattr(net, "heads") else lambda images: Heads(linear_logits(net, images), ())


def _source(trained: Trained, place: str) -> nn.Module:
    flag = "transfer_path"
    net, path = load_other(trained, place, flag=flag, kind=_classifying)
    there, here = net.get_submodule("linear").out_features, trained.split.n_classes
    if there != here:
        raise UserError(f"--{flag}: {path} knows {there} classes, {trained.title} {here}; give one of the same data")
    return net.requires_grad_(False)


def _classifying(state: State) -> str:
    with contextlib.suppress(ValueError):
        if (kind := kind_of(state)) in ("classifier", "ra_classifier", "feature"):
            return kind
    raise Misfit("holds no classifier")


def _chosen(trained: Trained, victim: Victim) -> dict[str, Attack]:
    """The rows that run, by name and in order: the natural images first, and what --transfer_path asks for.

    Raises: UserError for one that was named and cannot run.
    """
    named = {CLEAN, *victim.spec.attacks} | ({"transfer"} if victim.source else set())
    if DEFAULT in named:
        named |= {name for name, row in ATTACKS.items() if row.in_default and _lacks(row, victim) is None}
    rows = {name: row for name, row in ATTACKS.items() if name in named}
    for name, row in rows.items():
        if (why := _lacks(row, victim)) is not None:
            raise UserError(f"--attacks {name}: {why}")
        if row.whole and trained.world.size > 1:
            raise UserError(f"--attacks {name}: it sees all images in one call; start one process, or leave it out")
    return rows


def _lacks(row: Attack, victim: Victim) -> str | None:
    """Why an attack cannot run."""
    needs = (_NEEDS[name] for name in row.needs)
    return next((text for there, text in needs if not there(victim)), None)


def _columns(rows: Mapping[str, Attack], victim: Victim) -> Iterator[tuple[str, tuple[Condition, Attack]]]:
    """Their conditions, by the names of the columns they fill. Attacks that know the network know MeanSparse, too."""
    for name, row in rows.items():
        for head in range(victim.n_auxiliary) if row.each_head else [None]:
            title = name if head is None else f"{name}_{head}"
            run = row.run if head is None else partial(row.run, head=head)
            setting = straight_through if row.group == ADAPTIVE else row.setting
            yield title, (Condition(title, _perturb(run, victim), setting, whole=row.whole), row)


def _perturb(run: Run, victim: Victim) -> Perturb:
    return lambda net, images, labels, gen: run(victim, images, labels, gen)


def some_images(images: ImageSet, count: int | None, seed: int) -> ImageSet:
    """So many of the images, or all there are, in their order: of each class as many as of the others, by the seed.

    Those of a smaller number are among those of a larger one.
    """
    if count is None or count >= len(images):
        return images
    drawn = torch.randperm(len(images), generator=generator(seed, "attacked images"))
    keep = evenly(images.labels.cpu(), drawn, count)
    return images.where(torch.isin(torch.arange(len(images)), keep))
