"""The network of a detector: a picture to its score and to what each patch has to do with it.

Letters: n pictures, S pixels on a side, P patches, F features.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from common.seed import generator
from detector.features import Pyramid
from detector.patches import METHODS, PatchModel

# The patches of a grid that decide, by its stride: the mean of so large a share of the farthest ones.
SHARES = {16: 0.02, 32: 0.2}
# The share of the pictures to fit that settings and units are found by, before all are fitted.
_ASIDE = 0.2
# Pictures that are measured together in the fit.
_TOGETHER = 8


class Scored(NamedTuple):
    """score (n,): higher is more normal. maps: of each term, by patch (n, P), in standard deviations of patches."""

    score: Tensor
    maps: list[Tensor]


class Term(nn.Module):
    """One model of patches on one grid. weight (): of its distances. units (2,): mean, deviation of normal patches."""

    weight: Tensor
    units: Tensor

    def __init__(self, model: PatchModel, stride: int, weight: Tensor, units: Tensor):
        super().__init__()
        self.model, self.stride = model, stride
        self.register_buffer("weight", weight)
        self.register_buffer("units", units)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        far = self.model(x)
        return self.weight * pooled(far, self.stride), (far - self.units[0]) / self.units[1]


def pooled(far: Tensor, stride: int) -> Tensor:
    """The mean of the farthest patches (n, P) of the grid of this stride, a robust maximum: (n,)."""
    count = max(1, round(SHARES[stride] * far.shape[1]))
    return far.topk(count, dim=1).values.mean(1)


class PatchNet(nn.Module):
    """Pictures (n, 3, S, S) in [0, 1] -> `Scored`: minus a weighted mean of distances; of a normal picture about -1.

    Weights are as the inverse of what a distance varies by over normal pictures.
    """

    def __init__(self, pyramid: Pyramid, terms: list[Term]):
        super().__init__()
        self.pyramid, self.terms = pyramid, nn.ModuleList(terms)
        self._strides = [term.stride for term in terms]

    def forward(self, x: Tensor) -> Scored:
        return self.scored(self.pyramid(x, self._strides))

    def scored(self, grids: Mapping[int, Tensor]) -> Scored:
        """Of patch features, by the stride of their grid."""
        found = [term(grids[stride]) for term, stride in zip(self.terms, self._strides, strict=True)]
        return Scored(-torch.stack([score for score, _ in found]).sum(0), [far for _, far in found])


def pairs_of(methods: Sequence[str], strides: Iterable[int]) -> list[tuple[str, int]]:
    """The terms of methods: each method with the strides of its grids, of those that there are."""
    return [(name, stride) for name in methods for stride in METHODS[name].fits if stride in set(strides)]


def fit_terms(grids: Mapping[int, Tensor], methods: Sequence[str], seed: int) -> tuple[list[Term], list[str]]:
    """Terms of patch features (n, P, F) of normal pictures, by stride, and a line on each that says what was chosen.

    A fifth of the pictures is set aside: by it settings and weights are found; then all are fitted.
    """
    n = len(next(iter(grids.values())))
    order = torch.randperm(n, generator=generator(seed, "set aside"))
    aside, rest = order[: max(2, round(_ASIDE * n))].sort().values, order[max(2, round(_ASIDE * n)) :].sort().values
    terms, lines = [], []
    for name, stride in pairs_of(methods, grids):
        x, own = grids[stride], METHODS[name].fits[stride]
        settings = own.choose(x[rest], x[aside])
        model = own.fit(x[rest], settings, _generator(seed, name, stride))
        far = torch.cat([model(part) for part in x[aside].split(_TOGETHER)])
        varies = pooled(far, stride).std().clamp_min(1e-6)
        units = torch.stack([far.mean(), far.std().clamp_min(1e-6)])
        terms.append(Term(own.fit(x, settings, _generator(seed, name, stride)), stride, 1 / varies, units))
        lines.append(f"{name}, grid of stride {stride}: {settings or 'nothing to choose'}")
    total = torch.stack([term.weight for term in terms]).sum()
    for term in terms:
        term.weight /= total
    return terms, lines


def _generator(seed: int, name: str, stride: int) -> Generator:
    return generator(seed, f"patches {name}", stride)
