"""The network of a detector: a picture to its score and to what each patch has to do with it.

Letters: n pictures, S pixels on a side, P patches, F features.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from common.seed import generator
from detector.features import Pyramid
from detector.patches import METHODS, PatchModel

# The patches of a grid that decide: the mean of so large a share of the farthest ones. Fine grid, coarse grid.
SHARES = (0.02, 0.2)
# The share of the pictures to fit that settings and units are found by, before all are fitted.
_ASIDE = 0.2


class Scored(NamedTuple):
    """score (n,): higher is more normal. maps: of each term, by patch (n, P), in standard deviations of patches."""

    score: Tensor
    maps: list[Tensor]


class Term(nn.Module):
    """One model of patches on one grid. weight (): of its distances. units (2,): mean, deviation of normal patches."""

    weight: Tensor
    units: Tensor

    def __init__(self, model: PatchModel, grid: int, weight: Tensor, units: Tensor):
        super().__init__()
        self.model, self.grid = model, grid
        self.register_buffer("weight", weight)
        self.register_buffer("units", units)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        far = self.model(x)
        return self.weight * pooled(far, self.grid), (far - self.units[0]) / self.units[1]


def pooled(far: Tensor, grid: int) -> Tensor:
    """The mean of the farthest patches (n, P), a robust maximum: (n,)."""
    count = max(1, round(SHARES[grid] * far.shape[1]))
    return far.topk(count, dim=1).values.mean(1)


class PatchNet(nn.Module):
    """Pictures (n, 3, S, S) in [0, 1] -> `Scored`: minus a weighted mean of distances; of a normal picture about -1.

    Weights are as the inverse of what a distance varies by over normal pictures.
    """

    def __init__(self, pyramid: Pyramid, terms: list[Term]):
        super().__init__()
        self.pyramid, self.terms = pyramid, nn.ModuleList(terms)
        self._grids = [term.grid for term in terms]

    def forward(self, x: Tensor) -> Scored:
        return self.scored(self.pyramid(x))

    def scored(self, grids: list[Tensor]) -> Scored:
        """Of patch features."""
        found = [term(grids[grid]) for term, grid in zip(self.terms, self._grids, strict=True)]
        return Scored(-torch.stack([score for score, _ in found]).sum(0), [far for _, far in found])


def fit_terms(grids: list[Tensor], methods: list[str], seed: int) -> tuple[list[Term], list[str]]:
    """Terms of normal pictures' patch features [(n, P, F), ...], and a line on each that says what was chosen.

    A fifth of the pictures is set aside: by it settings and weights are found; then all are fitted.
    """
    n = len(grids[0])
    order = torch.randperm(n, generator=generator(seed, "set aside"))
    aside, rest = order[: max(2, round(_ASIDE * n))].sort().values, order[max(2, round(_ASIDE * n)) :].sort().values
    terms, lines = [], []
    for name in methods:
        method = METHODS[name]
        for grid, x in enumerate(grids):
            settings = method.choose(x[rest], x[aside])

            def fit(x: Tensor) -> PatchModel:
                return method.fit(x, settings, _generator(seed, name, grid))  # noqa: B023

            far = fit(x[rest])(x[aside])
            varies = pooled(far, grid).std().clamp_min(1e-6)
            units = torch.stack([far.mean(), far.std().clamp_min(1e-6)])
            terms.append(Term(fit(x), grid, 1 / varies, units))
            lines.append(f"{name}, {('fine', 'coarse')[grid]} grid: {settings or 'nothing to choose'}")
    total = torch.stack([term.weight for term in terms]).sum()
    for term in terms:
        term.weight /= total
    return terms, lines


def _generator(seed: int, name: str, grid: int) -> Generator:
    return generator(seed, f"patches {name}", grid)
