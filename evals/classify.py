"""Classification under a list of conditions, each a perturbation of the images and/or a setting of the network.

Letters: N images, b of a batch, C classes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

from common.device import autocast
from common.dist import SINGLE, World
from common.errors import RunStopped, UserError
from common.flags import DeviceSpec
from common.progress import progress
from common.seed import generator
from datasets import ImageSet, PictureSet, ShiftSpec
from datasets.views import PassSpec
from evals import metrics
from evals.result import Result
from evals.scores import marginalized
from evals.trained import Trained, evaluation_mode, identity, settings_of
from models.mode import frozen

# (network, images (b, 3, H, W) in [0, 1]) -> class logits (b, C).
Predict = Callable[[Any, Tensor], Tensor]
# Results of all conditions -> what is said of them together.
Summary = Callable[[Sequence[Result]], Iterator[Result]]

CLEAN = "clean"


def linear_logits(net: Any, images: Tensor) -> Tensor:
    """Those of the linear head."""
    return net.linear(net.features(images)).float()


def marginalized_logits(net: Any, images: Tensor) -> Tensor:
    """Those of the joint head, averaged over the four rotations of every image."""
    views = torch.stack([shift.combine(images, images) for shift in ShiftSpec("rotation").functions()], 1)
    joint = net.joint_distribution_layer(net.features(views.flatten(0, 1))).float()
    return marginalized(joint.unflatten(0, views.shape[:2]))


class Perturbed(NamedTuple):
    """Perturbed images (b, 3, H, W), and what else is known of them.

    columns: for results per image, (b,) each. facts: lists of what a report should say, joined over batches.
    """

    images: Tensor
    columns: Mapping[str, Tensor] = {}
    facts: Mapping[str, Sequence[Any]] = {}


# (network, images (b, 3, H, W) in [0, 1], labels (b,), generator) -> images.
Perturb = Callable[[nn.Module, Tensor, Tensor, Generator], Tensor | Perturbed]


def unperturbed(net: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """The images as they are."""
    return images


@dataclass(frozen=True)
class Condition:
    """Under what a network classifies.

    name: of the perturbation; `clean` for none.
    perturb: (network, images (b, 3, H, W) in [0, 1], labels (b,), generator) -> images, or `Perturbed`. Gradients are
    on, the network is in evaluation mode, and its parameters collect none. The generator is on the images' device and
    seeded by the condition and the batch.
    setting: network -> context manager, within which it is perturbed and asked. at: names the setting.
    whole: all images are perturbed in one call, by one rank.
    """

    name: str = CLEAN
    perturb: Perturb = unperturbed
    setting: Callable[[nn.Module], AbstractContextManager[Any]] = lambda net: nullcontext()
    at: str = ""
    whole: bool = False

    @property
    def title(self) -> str:
        return f"{self.name} at {self.at}" if self.at else self.name


def each(results: Sequence[Result]) -> Iterator[Result]:
    """No summary: every condition stands for itself."""
    return iter(())


def worst_case(results: Sequence[Result]) -> Iterator[Result]:
    """For each setting, an image counts only if it is right under all of the setting's conditions."""
    for at, group in _by_setting(results).items():
        per_image = {}
        for title, columns in group[0].per_image.items():
            right = np.logical_and.reduce([result.per_image[title]["correct"] for result in group])
            per_image[title] = {"index": columns["index"], "label": columns["label"], "correct": right}
        right = np.concatenate([columns["correct"] for columns in per_image.values()])
        facts = {**group[0].facts, "condition": "worst_case", "over": [result.name for result in group]}
        name = f"worst_case at {at}" if at else "worst_case"
        yield Result(name, {"accuracy": float(right.mean())}, per_image, facts)


def best(floor: float = 0.0, max_drop: float = 1.0) -> Summary:
    """A summary: the setting with the best worst case among those that keep the clean accuracy, the first of equals.

    floor: clean accuracy that a setting must have. max_drop: by how much it may lie below that of the first setting.
    Raises: RunStopped where no setting does. Every setting needs a condition of the name `clean`.
    """

    def summarise(results: Sequence[Result]) -> Iterator[Result]:
        clean = {r.facts["at"]: r.metrics["accuracy"] for r in results if r.facts["condition"] == CLEAN}
        least = max(floor, next(iter(clean.values())) - max_drop)
        kept = [r for r in worst_case(results) if clean[r.facts["at"]] >= least]
        if not kept:
            raise RunStopped(
                f"no setting keeps a clean accuracy of {100 * least:.1f} %; the best has {_percent(clean)}"
            )
        found = max(kept, key=lambda result: result.metrics["accuracy"])
        at = found.facts["at"]
        yield found._replace(
            name="best",
            metrics={**found.metrics, "clean_accuracy": clean[at]},
            facts={**found.facts, "condition": "best", "floor": floor, "max_drop": max_drop},
        )

    return summarise


def _percent(accuracies: dict[str, float]) -> str:
    return f"{100 * max(accuracies.values()):.1f} %"


def _by_setting(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.facts["at"], []).append(result)
    return found


def classify(
    trained: Trained,
    *,
    predict: Predict = linear_logits,
    conditions: Sequence[Condition] = (Condition(),),
    summarise: Summary = each,
    test: ImageSet | None = None,
) -> Iterator[Result]:
    """One result for each condition, then those of the summary: accuracy on the test images of the training classes.

    test: the images; None: `classified_images`.
    Under a condition there is the expected calibration error, too. Random draws of a perturbation depend on the seed,
    the condition and the batch, hence on --ood_batch_size, and not on the number of ranks.
    Flags are read and test images loaded before the first result is asked for. All ranks get all results.
    Raises: UserError for a single normal class, and for a network of another number of classes.
    """
    flags, split = trained.flags, trained.split
    with trained.world.raise_together():
        if split.one_class_idx is not None:
            raise UserError(f"--one_class_idx: --mode {flags.mode} names all classes; leave it out")
        images = classified_images(trained) if test is None else test
        batch_size, seed = flags.of(PassSpec).ood_batch_size, flags.seed
        amp = autocast(flags.of(DeviceSpec, only=["amp"]).amp, trained.device)
    titles = [condition.title for condition in conditions]
    if len(set(titles)) < len(titles):
        raise ValueError(f"two conditions of one name: {titles}")

    def logits(net: nn.Module, images: Tensor) -> Tensor:
        with amp():
            return predict(net, images)

    def results() -> Iterator[Result]:
        found = []
        facts = {"data": {split.dataset: identity(images)}, "settings": settings_of(flags), "n": len(images)}
        for condition in conditions:
            with trained.world.raise_together():
                own = _answers(trained, condition, logits, images, batch_size, seed)
            parts = list(chain.from_iterable(trained.world.all_gather_object(own)))
            columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
            labels = images.labels.cpu()
            correct = columns["predicted"] == labels
            values = {
                "accuracy": metrics.accuracy(correct),
                "ece": metrics.calibration_error(columns["confidence"], correct),
            }
            columns = {"index": images.indices.cpu(), "label": labels, **columns, "correct": correct}
            per_image = {name: column.numpy() for name, column in columns.items()}
            own_facts = {**facts, "condition": condition.name, "at": condition.at, "classes": split.n_classes}
            own_facts |= _joined(part.facts for part in parts)
            found.append(Result(condition.title, values, {split.dataset: per_image}, own_facts))
            yield found[-1]
        yield from summarise(found)

    return results()


def classified_images(trained: Trained) -> ImageSet:
    """The test images of the training classes, as the flags say. Raises: UserError as `Trained.test_images`."""
    test = trained.test_images()
    return test.where(trained.split.normal(test.labels)).to(trained.device)


class _Answers(NamedTuple):
    """Of a batch. columns: predicted (b,), the class; confidence (b,), its probability; those of the perturbation."""

    columns: dict[str, Tensor]
    facts: Mapping[str, Sequence[Any]]


def _answers(
    trained: Trained, condition: Condition, logits: Predict, test: ImageSet, batch_size: int, seed: int
) -> list[_Answers]:
    """Those of the batches of this rank, on the CPU."""
    net, found = trained.net, []
    batches = list(torch.arange(len(test), device=test.device).split(len(test) if condition.whole else batch_size))
    own = trained.world.shard_list(batches)
    labels = test.labels.to(test.device)
    with evaluation_mode(net), condition.setting(net):
        for index in progress(own, total=len(own), label=condition.title):
            gen = generator(seed, f"condition {condition.title}", int(index[0]), device=test.device)
            with torch.enable_grad(), frozen(net):
                perturbed = condition.perturb(net, test.batch(index), labels[index], gen)
            images, columns, facts = perturbed if isinstance(perturbed, Perturbed) else Perturbed(perturbed)
            with torch.no_grad():
                parts = images.detach().split(batch_size)
                probabilities = torch.cat([logits(net, part) for part in parts]).softmax(1)
            if probabilities.shape[1] != trained.split.n_classes:
                here, there = trained.split.n_classes, probabilities.shape[1]
                raise UserError(f"--dataset: it has {here} classes, but {trained.title} knows {there}")
            confidence, named = probabilities.max(1)
            columns = {"predicted": named, "confidence": confidence, **columns}
            found.append(_Answers({name: column.cpu() for name, column in columns.items()}, facts))
    return found


def _joined(facts: Iterable[Mapping[str, Sequence[Any]]]) -> dict[str, list[Any]]:
    """The facts of all batches: each entry of a list once."""
    found: dict[str, list[Any]] = {}
    for part in facts:
        for name, entries in part.items():
            joined = found.setdefault(name, [])
            joined += [entry for entry in entries if entry not in joined]
    return found


def correct_of(
    predict: Callable[[Tensor], Tensor], images: ImageSet | PictureSet, batch_size: int, world: World = SINGLE
) -> Tensor:
    """Whether each image is classified correctly, (N,) bool, on the images' device; each rank has a part of them.

    predict: images (b, 3, H, W) in [0, 1] -> logits (b, C). The network's mode is the caller's business.
    """
    labels = images.labels.to(images.device)
    batches = list(torch.arange(len(images), device=images.index_device).split(batch_size))
    with torch.inference_mode():
        found = [
            predict(images.batch(index)).argmax(1) == labels[index.to(images.device)]
            for index in world.shard_list(batches)
        ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool, device=images.device)


def error_rate(predict: Callable[[Tensor], Tensor], images: ImageSet, batch_size: int) -> float:
    """Share of the images that are classified wrongly. predict: as `correct_of`."""
    correct = correct_of(predict, images, batch_size)
    return float((~correct).sum()) / len(correct)
