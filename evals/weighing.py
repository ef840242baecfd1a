"""Units and weights of the terms of a sum, by normal images that were set aside: how well a term tells them from the
same images turned, which stand in for anomalies."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets import ImageSet
from evals.metrics import auroc

# Log-loss in bits below which a classifier counts as sure.
_SURE = 0.01


class Term(NamedTuple):
    """What a term counts in a sum: weight * (value - mean) / deviation. auroc: of images set aside against the same
    turned."""

    mean: float
    deviation: float
    weight: float
    auroc: float


class Weighing(NamedTuple):
    """The terms of a sum, by name. alike: none tells turned images from upright ones, so that those with a weight count
    alike."""

    terms: dict[str, Term]
    alike: bool

    @property
    def lines(self) -> list[str]:
        """What it says of each term, and a warning where they count alike."""
        found = [
            f"term {name}: weight {term.weight:.3g}; it tells turned images from upright ones by"
            f" {100 * term.auroc:.1f} % AUROC"
            for name, term in self.terms.items()
        ]
        if self.alike:
            names = ", ".join(name for name, term in self.terms.items() if term.weight)
            found.append(f"warning: no term tells turned images from upright ones; these count alike: {names}")
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """In types that JSON has."""
        return {"terms": {name: term._asdict() for name, term in self.terms.items()}, "alike": self.alike}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "Weighing":
        """The weighing that `facts` are of."""
        return cls({name: Term(**term) for name, term in facts["terms"].items()}, facts["alike"])


def weigh(
    normal: Mapping[str, np.ndarray], turned: Mapping[str, np.ndarray], probabilities: Collection[str] = ()
) -> Weighing:
    """What each term counts, by its values (N,) on images set aside and on the same turned.

    Every term is standardised. Its weight is 2 A - 1, where A is the AUROC by which it tells turned images from upright
    ones, or 0 where that is negative. probabilities: terms that are a mean log-probability of transformations; one that
    tells them apart has the weight 1 / l^2, where l is the mean log-loss of upright images in bits: a classifier that
    is unsure of normal images says little of others. Where no term has a weight, all have 1, or all but these if there
    are others.
    """
    terms = {name: _term(normal[name].astype(float), turned[name], name in probabilities) for name in normal}
    if any(term.weight for term in terms.values()):
        return Weighing(terms, alike=False)
    others = terms.keys() - set(probabilities) or terms.keys()
    return Weighing({name: term._replace(weight=float(name in others)) for name, term in terms.items()}, alike=True)


def _term(normal: np.ndarray, turned: np.ndarray, probability: bool) -> Term:
    area, mean, deviation = auroc(normal, turned), float(normal.mean()), float(normal.std())
    weight = max(2 * area - 1, 0.0) if deviation else 0.0
    if probability and weight:
        weight = 1 / max(-mean / math.log(2), _SURE) ** 2
    return Term(mean, deviation or 1.0, weight, area)


def turn(images: Tensor, index: Tensor) -> Tensor:
    """Images (B, C, H, W) turned by one, two or three quarters of a circle, as their places (B,) in the set say."""
    return torch.stack([torch.rot90(x, 1 + n % 3, (1, 2)) for x, n in zip(images, index.tolist(), strict=True)])


def turned_set(images: ImageSet) -> ImageSet:
    """All images of a set, turned."""
    return replace(images, images=turn(images.images, torch.arange(len(images))), fingerprint="")
