"""How near the features of attacked images are to those of the images themselves, and of images of other classes
(ANCRA, arXiv 2310.03358: alignment and exclusion).

Letters: N test images, P of a pool, n of them anchors, F features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.attacks import pgd
from common.attacks.specs import START_NOISE, EpsilonSpec, StepsSpec
from common.device import Amp, autocast
from common.errors import RunStopped, UserError
from common.flags import DeviceSpec
from common.negatives import NONE, StrategySpec, pick_negatives
from common.run import recorded_flags
from common.seed import generator
from datasets import ImageSet
from datasets.views import PassSpec
from evals.result import Result
from evals.specs import DistanceSpec
from evals.trained import Trained, evaluation_mode, identity, settings_of
from models.mode import frozen

# Negatives are chosen among so many images, as in a batch of training.
_POOL = 128
# What is measured of each image, and the published names of the arrays.
QUANTITIES = {
    "positive_cosine": "PPfcos",
    "positive_l2": "PPfL2",
    "negative_cosine": "NPfcos",
    "negative_l2": "NPfL2",
}
STATISTICS: dict[str, Callable[[np.ndarray], Any]] = {"max": np.max, "min": np.min, "mean": np.mean, "variance": np.var}


def feature_distance(trained: Trained) -> Iterator[Result]:
    """One result, `all`, or `class_<label>` with --target_label: of the test images of all classes, or of that one.

    A positive pair is an image and itself after PGD on the cross-entropy of the final logits. A negative pair is an
    image and one of another class, chosen by --strategy among `_POOL` test images that follow from the seed; with
    `_adv`, that one after PGD towards the image's class. Features are what the linear head classifies last, in
    evaluation mode.
    metrics: max, min, mean, variance of each of `QUANTITIES`, `positive_cosine/mean` say: cosine similarity, 0 where
    features are all 0, and Euclidean distance. per_image: each image's own, NaN where its pool has no other class.
    facts: `by_class`, the same of each class by name; `trained_by`, the mode and the parts of ANCRA.
    No number depends on --ood_batch_size. Flags are read and test images loaded before the result is asked for. All
    ranks get it.
    Raises: UserError for a single normal class, a class that is not there, and a test set of one class.
    """
    flags, split = trained.flags, trained.split
    with trained.world.raise_together():
        if split.one_class_idx is not None:
            raise UserError(f"--one_class_idx: --mode {flags.mode} compares classes; --target_label chooses one")
        target = _target(flags.of(DistanceSpec).target_label, split.class_names[: split.n_classes])
        test = trained.test_images()
        test = test.where(split.normal(test.labels)).to(trained.device)
        labels = test.labels.cpu()
        if len(labels.unique()) < 2 or (target is not None and not (labels == target).any()):
            raise UserError("--target_label: there are no test images of this class, or none of any other")
        pairs = Pairs.of(trained)

    def results() -> Iterator[Result]:
        order = torch.randperm(len(test), generator=generator(flags.seed, "feature distance"))
        # Nearly equal, so that the last one is no smaller than the others.
        pools = list(enumerate(order.tensor_split(-(-len(test) // _POOL))))
        pools = [(n, pool) for n, pool in pools if target is None or (labels[pool] == target).any()]
        with trained.world.raise_together(), evaluation_mode(trained.net), frozen(trained.net):
            own = [pairs.measure(test, pool, n, target) for n, pool in trained.world.shard_list(pools)]
        parts = list(chain.from_iterable(trained.world.all_gather_object(own)))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        places = columns["index"].argsort()
        columns = {name: values[places] for name, values in columns.items()}
        if not all(np.isfinite(columns[name]).all() for name in ("positive_cosine", "positive_l2")):
            raise RunStopped(f"{trained.title}: features are not finite")
        classes = [label for label in range(split.n_classes) if (columns["label"] == label).any()]
        facts = {
            "data": {split.dataset: identity(test)},
            "settings": settings_of(flags),
            "n": len(places),
            "target": None if target is None else split.class_names[target],
            "classes": {split.class_names[label]: label for label in classes},
            "without_negative": int(np.isnan(columns["negative_l2"]).sum()),
            "trained_by": _training(trained),
            "by_class": {split.class_names[label]: summary(columns, columns["label"] == label) for label in classes},
        }
        every = summary(columns, np.ones(len(places), bool))
        metrics = {f"{name}/{kind}": value for name, of in every.items() for kind, value in of.items()}
        name = "all" if target is None else f"class_{target}"
        yield Result(name, metrics, {split.dataset: columns}, facts)

    return results()


def _target(asked: int | str | None, names: Sequence[str]) -> int | None:
    """The label of a class, by its number or its name. Raises: UserError for one that is not there."""
    if asked is None or (isinstance(asked, int) and 0 <= asked < len(names)):
        return asked
    if asked not in names:
        raise UserError(f"--target_label {asked}: give a number from 0 to {len(names) - 1}, or one of {_few(names)}")
    return names.index(str(asked))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _training(trained: Trained) -> dict[str, Any]:
    """Of a network in memory, its flags may be those of an evaluation, hence nothing."""
    flags = {} if trained.path is None else recorded_flags(trained.path)
    return {name: flags[name] for name in ("mode", "ra", "anc") if name in flags}


def summary(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, dict[str, float]]:
    """Of each quantity its statistics over some of the images, `rows` (N,) bool; none where there is no pair."""
    values = {name: columns[name][rows] for name in QUANTITIES}
    values = {name: column[~np.isnan(column)] for name, column in values.items()}
    return {
        name: {kind: float(of(column)) for kind, of in STATISTICS.items()}
        for name, column in values.items()
        if len(column)
    }


@dataclass(frozen=True)
class Pairs:
    """What measures the pairs of a pool of images: a network in evaluation mode, and the attack.

    batch_size: images at a time, on which no number depends.
    """

    net: Any
    amp: Amp
    batch_size: int
    eps: float
    steps: StepsSpec
    strategy: StrategySpec
    seed: int

    @classmethod
    def of(cls, trained: Trained) -> "Pairs":
        """As the flags say: reads all of them."""
        flags = trained.flags
        return cls(
            trained.net,
            autocast(flags.of(DeviceSpec, only=["amp"]).amp, trained.device),
            flags.of(PassSpec).ood_batch_size,
            flags.of(EpsilonSpec).epsilon,
            flags.of(StepsSpec),
            flags.of(StrategySpec),
            flags.seed,
        )

    def measure(self, test: ImageSet, pool: Tensor, number: int, target: int | None) -> dict[str, np.ndarray]:
        """Columns (n,) of the anchors of the pool: of all its images, or of those of class `target`.

        pool (P,): their places in the test set. number: of the pool.
        """
        labels, anchors = test.labels.cpu()[pool], torch.arange(len(pool))
        if target is not None:
            anchors = anchors[labels == target]
        found = {"index": test.indices.cpu()[pool[anchors]], "label": labels[anchors]}
        images = test.batch(pool.to(test.index_device))
        features, logits = self._outputs(images)
        chosen = pick_negatives(
            logits, labels, strategy=self.strategy.rule, generator=generator(self.seed, "negatives", number)
        )[anchors, 0]
        there = chosen != NONE
        found["negative"] = torch.where(there, test.indices.cpu()[pool[chosen]], NONE)
        own, of = images[anchors.to(images.device)], labels[anchors].to(images.device)
        moved = self._attack(own, of, self._noise("attack", number, images, anchors), 1)
        attacked, others = self._outputs(moved)[0], features[chosen]
        if self.strategy.attacked:
            noise = self._noise("attack on negatives", number, images, anchors)
            moved = self._attack(images[chosen.to(images.device)], of, noise, -1)
            others = self._outputs(moved)[0]
        for kind, pair in (("positive", attacked), ("negative", others)):
            cosine = F.cosine_similarity(features[anchors], pair, dim=1)
            distance = (features[anchors] - pair).norm(dim=1)
            keep = there if kind == "negative" else torch.ones_like(there)
            found |= {f"{kind}_cosine": cosine.where(keep, torch.nan), f"{kind}_l2": distance.where(keep, torch.nan)}
        return {name: values.numpy() for name, values in found.items()}

    def _noise(self, purpose: str, number: int, images: Tensor, anchors: Tensor) -> Tensor:
        """Of the whole pool, so that an anchor's does not depend on which others there are."""
        gen = generator(self.seed, purpose, number, device=images.device)
        return torch.randn(images.shape, generator=gen, device=images.device)[anchors.to(images.device)]

    def _attack(self, images: Tensor, labels: Tensor, noise: Tensor, sign: int) -> Tensor:
        """The images after PGD away from the labels, or with sign -1 towards them: its last iterate, as published."""

        def loss_of_x(x: Tensor, labels: Tensor) -> Tensor:
            with self.amp():
                logits = self.net(x)
            return sign * F.cross_entropy(logits, labels, reduction="none")

        return pgd(
            loss_of_x,
            images,
            labels,
            eps=self.eps,
            steps=self.steps.num_steps,
            step=self.steps.step_size,
            start=images + START_NOISE * noise,
            micro_batch=self.batch_size,
            keep="last",
        )

    @torch.no_grad()
    def _outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, F) in float64 and final logits (n, C), on the CPU."""
        parts = []
        for some in images.split(self.batch_size):
            with self.amp():
                features = self.net.features(some)
                parts.append((features.double(), self.net.linear(features).float()))
        features, logits = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
        return features, logits
