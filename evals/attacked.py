"""A detector under attack: its test images are changed within a radius so that it fails. Normal images are pushed down,
anomalous ones up.

What is attacked is the score as `evals.detect` computes it, by gradients through views, network, averages, codes and
score. Training images, to which scores are fitted, stay clean, and so do mix partners. Success is judged by the score
itself, with its own draws, which an attacker may know or not. Distances are L-inf, of images in [0, 1].
Letters: n images of a set that are attacked, b of a batch.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from itertools import chain, count, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.attacks import apgd, fgsm, masked, pgd
from common.attacks.masked import Sign
from common.attacks.search import LossOfX, ascent
from common.attacks.specs import EpsilonSpec, radius_text
from common.errors import UserError
from common.flags import Flags
from common.progress import progress
from common.seed import generator
from datasets import ImageSet
from datasets.sets import evenly
from evals.coding import Outputs
from evals.extract import Extraction, Part
from evals.metrics import auroc
from evals.scores import Scorer
from evals.specs import AttackSpec, DetectorAttackSpec
from evals.trained import evaluation_mode
from models.mean_sparse import alpha_of, with_backward
from models.mode import frozen

# The first draw of an attacker; the procedure that is attacked makes none as late as that.
_OWN = 2**30
# What an AUROC of scores with random draws may differ by from that of another attack as strong.
_RANDOM_SLACK = 0.01
# Which side of a comparison is attacked. Columns of the table.
SIDES = {"clean": (False, False), "normal": (True, False), "anomalous": (False, True), "both": (True, True)}


class Attack(NamedTuple):
    """One row.

    climb: (loss, images, *data, settings of `pgd`, random=whether every call of the loss has draws of its own) ->
    images. smooth: whether it climbs `Scorer.smooth`. straight: whether its gradient passes MeanSparse as if nothing
    were replaced.
    draws: what its loss draws where the procedure does: `new` ones in each call; the `same` in all of them, for attacks
    that compare losses; or what the procedure itself draws, where that is `known`.
    """

    climb: Callable[..., Tensor]
    smooth: bool = False
    draws: str = "new"
    straight: bool = False


def _pgd(loss_of_x: LossOfX, x: Tensor, *data: Tensor, eps: float, random: bool, **settings: Any) -> Tensor:
    if random:
        # The largest loss would be that of the luckiest draws, and seldom of the best image. Momentum averages draws.
        settings |= {"keep": "last", "momentum": 0.9, "step": eps / 8}
    return pgd(loss_of_x, x, *data, eps=eps, **settings)


def _apgd(loss_of_x: LossOfX, x: Tensor, *data: Tensor, random: bool, **settings: Any) -> Tensor:
    return apgd(loss_of_x, x, *data, **settings)


def _one_step(loss_of_x: LossOfX, x: Tensor, *data: Tensor, eps: float, **settings: Any) -> Tensor:
    return fgsm(loss_of_x, x, *data, eps=eps)


ATTACKS: dict[str, Attack] = {
    "pgd": Attack(_pgd),
    "pgd_smooth": Attack(_pgd, smooth=True),
    "pgd_known": Attack(_pgd, draws="known"),
    "pgd_straight": Attack(_pgd, straight=True),
    "pgd_known_straight": Attack(_pgd, draws="known", straight=True),
    "apgd": Attack(_apgd, draws="same"),
    "apgd_smooth": Attack(_apgd, smooth=True, draws="same"),
    "apgd_known": Attack(_apgd, draws="known"),
}
_ONE_STEP = Attack(_one_step)


@dataclass(frozen=True)
class Attacker:
    """Attacks one score.

    references: what test images mix with, as in `Extraction.blocks`. runs: how often an attacker runs the procedure for
    a gradient, each time with draws of its own, over which its scores are averaged.
    """

    extraction: Extraction
    scorer: Scorer
    references: Tensor | None
    runs: int
    seed: int

    @property
    def random(self) -> bool:
        """Whether the procedure draws."""
        return self.extraction.random

    def fitting(self, attacks: Iterable[str]) -> list[str]:
        """As the function."""
        return fitting(attacks, type(self.scorer), self.random, alpha_of(self.extraction.net) > 0)

    def loss(self, images: ImageSet, attack: Attack) -> LossOfX:
        """(x (b, 3, H, W), places in the set (b,), +1 or -1 (b,)) -> the mean score times that, (b,).

        The n-th call has the same draws for all batches.
        """
        score: Callable[[Outputs], Tensor] = self.scorer.smooth if attack.smooth else self.scorer
        samples, known = self.extraction.samples, attack.draws == "known"
        runs, begin = (1, 0) if known else (self.runs, _OWN)
        calls = count() if attack.draws == "new" else repeat(0)

        def loss_of_x(x: Tensor, index: Tensor, direction: Tensor) -> Tensor:
            first = begin + next(calls) * runs * samples
            draws = range(first, first + runs * samples, samples)
            found = [score(self.extraction.run(images, t, self.references, Part(index, x))) for t in draws]
            return torch.stack(found).mean(0).to(x.device) * direction

        return loss_of_x

    def attacked(self, chosen: "Chosen", attack: Attack, eps: float, steps: int, label: str) -> list[Part]:
        """The batches of this rank, attacked."""
        images, own, net = chosen.images, self._own(chosen), self.extraction.net
        direction = chosen.direction.to(images.device)
        found = []
        with evaluation_mode(net), frozen(net), _backward(net, attack):
            for part in progress(own, total=len(own), label=label):
                pixels = []
                for index in part.split(self._size):
                    x = images.batch(index)
                    start = torch.stack([self._start(images, i) for i in index.tolist()]).mul_(eps).add_(x).clamp_(0, 1)
                    data, loss = (index, direction[index].to(x.dtype)), self.loss(images, attack)
                    settings = {"steps": steps, "start": start, "random": self.random and attack.draws == "new"}
                    pixels.append(attack.climb(loss, x, *data, eps=eps, **settings) if eps else x)
                found.append(Part(part, torch.cat(pixels)))
        return found

    def judge(self, chosen: "Chosen", parts: Sequence[Part] | None = None) -> np.ndarray:
        """The scores (n,) of the images of a set that are attacked, as the procedure gives them, in all ranks.

        parts: the batches of this rank, attacked; by default they are as they are.
        """
        parts = [Part(index) for index in self._own(chosen)] if parts is None else parts
        blocks = self.extraction.blocks(chosen.images, f"{chosen.title} test images", self.references, parts)
        return self._gathered([self.scorer(outputs).numpy() for outputs in blocks])

    def without_gradient(self, chosen: "Chosen", attack: Attack) -> np.ndarray:
        """Whether an attack has a gradient of 0 (or NaN) in all pixels of an image, (n,) bool, in all ranks."""
        images, net, found = chosen.images, self.extraction.net, []
        with evaluation_mode(net), frozen(net), _backward(net, attack):
            for index in chain.from_iterable(part.split(self._size) for part in self._own(chosen)):
                x = images.batch(index)
                _, grad = ascent(self.loss(images, attack), x, (index, x.new_ones(len(x))))
                found.append((grad.nan_to_num() == 0).flatten(1).all(1).cpu().numpy())
        return self._gathered(found)

    @property
    def _size(self) -> int:
        """Images that are attacked at a time: as many views as are judged at a time."""
        return max(1, self.extraction.draws.batch_size // (self.runs * self.extraction.samples))

    def _start(self, images: ImageSet, place: int) -> Tensor:
        """Uniform in [-1, 1], of the pixels of an image."""
        gen = generator(self.seed, "start of an attack", place)
        return torch.rand((images.channels, *images.size), generator=gen).mul_(2).sub_(1).to(images.device)

    def _own(self, chosen: "Chosen") -> list[Tensor]:
        return self.extraction.world.shard_list(self.extraction.batches(chosen.index.to(chosen.images.device)))

    def _gathered(self, own: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(chain.from_iterable(self.extraction.world.all_gather_object(own))))


def _backward(net: nn.Module, attack: Attack) -> AbstractContextManager[None]:
    """The gradient of MeanSparse in an attack."""
    return with_backward(net, "straight_through" if attack.straight else "plain")


@dataclass(frozen=True)
class Chosen:
    """The images of a set that are attacked. index (n,): their places. normal (N,) bool: which images of the set are.

    classes: names of what the anomalous ones are compared by, and which of the n they are.
    """

    title: str
    images: ImageSet
    index: Tensor
    normal: Tensor
    classes: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls,
        title: str,
        images: ImageSet,
        normal: Tensor,
        name_of: Callable[[int], str] | None = None,
        *,
        n: int | None,
        seed: int,
    ) -> "Chosen":
        """n normal and n anomalous images of a set, drawn by the seed, or all; of each class as many as of the others.

        name_of: label -> the name of a class of anomalous images; None: they are one class, named after the set.
        """
        labels = images.labels.cpu()
        index = torch.arange(len(labels))
        if n is not None:
            order = torch.randperm(len(labels), generator=generator(seed, f"attacked images of {title}"))
            parts = [evenly(labels, order[normal[order] == side], n) for side in (True, False)]
            index = torch.cat(parts).sort().values
        own, anomalous = labels[index], ~normal[index]
        if name_of is None:
            return cls(title, images, index, normal, {title: anomalous.numpy()})
        classes = {name_of(c): ((own == c) & anomalous).numpy() for c in own[anomalous].unique().tolist()}
        return cls(title, images, index, normal, classes)

    @property
    def direction(self) -> Tensor:
        """Where their scores are pushed, (N,)."""
        return torch.where(self.normal, -1, 1)


@dataclass(frozen=True)
class Plan:
    """What --attack asks for. radii: in rising order, epsilon among them."""

    attacks: tuple[str, ...]
    epsilon: float
    radii: tuple[float, ...]
    steps: int
    runs: int
    images: int | None
    seed: int

    @classmethod
    def of(cls, flags: Flags, random: bool) -> "Plan | None":
        """From the flags; None without --attack. random: whether the procedure draws."""
        attacks = flags.of(DetectorAttackSpec, only=["attack"]).attack
        if not attacks:
            return None
        runs = flags.of(DetectorAttackSpec, only=["attack_draws"]).attack_draws if random else 1
        spec = flags.of(AttackSpec, only=["attack_images", "attack_steps", "epsilons"])
        epsilon = flags.of(EpsilonSpec).epsilon
        radii = tuple(sorted({*(spec.epsilons or ()), epsilon}))
        if radii[-1] > 1:
            raise UserError(f"--epsilons {radii[-1]:g}: at 1 images in [0, 1] may become any other; give at most 1")
        names = tuple(dict.fromkeys(attacks))
        return cls(names, epsilon, radii, spec.attack_steps, runs, spec.attack_images, flags.seed)

    def check(self, scorers: Mapping[str, type[Scorer]], random: bool, sparse: bool) -> None:
        """Raises: UserError for a score that none of the attacks is for. random, sparse: as `fitting`.

        Prints a note where operators of MeanSparse act and no attack passes them straight through.
        """
        if sparse and not any(ATTACKS[name].straight for name in self.attacks):
            known = "pgd_known_straight" if random else "pgd_straight"
            print(f"note: MeanSparse hides gradients; --attack {' '.join(self.attacks)} {known} climbs past it")
        for name, scorer in scorers.items():
            if not fitting(self.attacks, scorer, random, sparse):
                raise UserError(
                    f"--attack {' '.join(self.attacks)}: for score {name} here that is no attack of its own; give"
                    f" {', '.join(fitting(ATTACKS, scorer, random, sparse))}"
                )


def fitting(attacks: Iterable[str], scorer: type[Scorer], random: bool, sparse: bool) -> list[str]:
    """Those that are an attack of their own: a score may have no smooth form, a procedure no draws to know (random), a
    network no operators of MeanSparse that act (sparse)."""
    smooth = scorer.smooth is not Scorer.smooth

    def fits(row: Attack) -> bool:
        return (smooth or not row.smooth) and (random or row.draws != "known") and (sparse or not row.straight)

    return [name for name in attacks if fits(ATTACKS[name])]


class Attacked(NamedTuple):
    """What attacks have found of one score.

    metrics: `attacked/<side>`, the mean AUROC at epsilon with these images attacked, of `SIDES`. columns: by set, the
    scores of its N images under attack, NaN where an image was not attacked. facts: all there is to report, for JSON.
    """

    metrics: dict[str, float]
    columns: dict[str, dict[str, np.ndarray]]
    facts: dict[str, Any]


Scores = dict[str, np.ndarray]


def attack_detector(plan: Plan, attacker: Attacker, sets: Sequence[Chosen]) -> Attacked:
    """The AUROC of attacked images at every radius, and the signs of masked gradients. sets: the one with normal images
    first.

    Of each image the worst counts: of all attacks, of smaller radii, and of the image as it is. Hence no number is
    above one of fewer attacked images or of a smaller radius. The signs look at attacks by themselves.
    """
    begun, directions = time.monotonic(), {of.title: of.direction[of.index].numpy() for of in sets}
    clean = {of.title: attacker.judge(of) for of in sets}

    @cache
    def scores(name: str, eps: float, steps: int) -> Scores:
        attack = ATTACKS.get(name, _ONE_STEP)
        label = f"{name} at {radius_text(eps)}"
        found = {of.title: attacker.judge(of, attacker.attacked(of, attack, eps, steps, label)) for of in sets}
        # What is no number was of no use to the attacker.
        return {title: np.nan_to_num(np.where(np.isnan(x), clean[title], x)) for title, x in found.items()}

    def worst(*found: Scores) -> Scores:
        """Of each image."""
        columns = {title: np.stack([scores[title] for scores in found]) for title in directions}
        return {title: np.where(directions[title] > 0, x.max(0), x.min(0)) for title, x in columns.items()}

    names, so_far, of_radius = attacker.fitting(plan.attacks), clean, {}
    for eps in plan.radii:
        so_far = of_radius[eps] = worst(so_far, *(scores(name, eps, plan.steps) for name in names))
    curve = {eps: _sides(sets, clean, found) for eps, found in of_radius.items()}
    here = curve[plan.epsilon]

    def left(name: str, eps: float = plan.epsilon, steps: int = plan.steps) -> float:
        """What an attack leaves by itself."""
        return _aurocs(sets, *[scores(name, eps, steps)] * 2)["mean"]

    by_attack = {name: left(name) for name in names}
    without = [np.concatenate([attacker.without_gradient(of, ATTACKS[name]) for of in sets]) for name in names]
    slack = _RANDOM_SLACK if attacker.random else masked.SLACK
    signs = _signs(plan, here["clean"]["mean"], by_attack, left, float(np.logical_and.reduce(without).mean()), slack)
    counts = {
        of.title: {"normal": int((side < 0).sum()), "anomalous": int((side > 0).sum())}
        for of, side in zip(sets, directions.values(), strict=True)
    }
    facts = {
        "epsilon": plan.epsilon,
        "norm": "linf",
        "steps": plan.steps,
        "draws": plan.runs * attacker.extraction.samples if attacker.random else 0,
        "images": counts,
        "curve": [{"epsilon": eps, **row} for eps, row in curve.items()],
        "by_attack": by_attack,
        "health": [{"name": sign.name, "number": sign.number, "shows": sign.shows} for sign in signs],
        "health_line": masked.health_line(signs),
        "seconds": round(time.monotonic() - begun, 2),
    }
    columns = {
        of.title: {_column(eps, plan): _spread(of, found[of.title]) for eps, found in of_radius.items()} for of in sets
    }
    return Attacked({f"attacked/{side}": here[side]["mean"] for side in SIDES}, columns, facts)


def _column(eps: float, plan: Plan) -> str:
    return "attacked" if eps == plan.epsilon else f"attacked {radius_text(eps)}"


def _spread(chosen: Chosen, scores: np.ndarray) -> np.ndarray:
    """To all images of the set, NaN where one was not attacked."""
    found = np.full(len(chosen.images), np.nan)
    found[chosen.index.numpy()] = scores
    return found


def _signs(
    plan: Plan, clean: float, by_attack: Mapping[str, float], left: Callable[..., float], without: float, slack: float
) -> list[Sign]:
    first, steps = next(iter(by_attack)), plan.steps
    one = left("one step", steps=1)
    few = {n: left(first, steps=n) for n in {max(1, steps // 4)} - {steps}}
    signs = [
        masked.attack_above_natural(clean, max(by_attack.values())),
        masked.one_step_stronger(one, by_attack[first], slack),
    ]
    if few:
        signs.append(masked.more_steps_leave_more({**few, steps: by_attack[first]}, slack))
    radii = [left(first, eps) for eps in plan.radii]
    if len(radii) > 1:
        rise = max(after - before for before, after in zip(radii, radii[1:], strict=False))
        signs.append(Sign("a larger radius leaves more by", rise, rise > slack))
    return [*signs, masked.left_at_eps_1(left(first, 1.0)), masked.zero_gradients(without)]


def _sides(sets: Sequence[Chosen], clean: Scores, attacked: Scores) -> dict[str, dict[str, Any]]:
    """The AUROCs of each column of the table."""
    return {
        side: _aurocs(sets, attacked if normal else clean, attacked if anomalous else clean)
        for side, (normal, anomalous) in SIDES.items()
    }


def _aurocs(sets: Sequence[Chosen], of_normal: Scores, of_anomalous: Scores) -> dict[str, Any]:
    """`mean` over classes, `pooled` and `auroc` by class, as `metrics.detection_metrics` has them."""
    own, *others = sets
    normal = of_normal[own.title][own.normal[own.index].numpy()]
    classes, rest = (
        {name: of_anomalous[of.title][which] for of in some for name, which in of.classes.items()}
        for some in ([own], others)
    )
    counted = classes or rest
    found = {name: auroc(normal, scores) for name, scores in {**classes, **rest}.items()}
    pooled = auroc(normal, np.concatenate(list(counted.values())))
    return {"mean": float(np.mean([found[name] for name in counted])), "pooled": pooled, "auroc": found}
