"""Models of normal patches: how far each patch of a picture is from them. `METHODS` is the table.

Letters: n pictures, P patches (places of a grid), F features, M atoms or patches kept, k directions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.sparse.admm import RidgeSystem, admm_lasso
from models.sparse.kmeans import kmeans
from models.sparse.learn import update_atoms

# Share of the isotropic part in a covariance of one place, and of the mean variance in the one of all places: with as
# few pictures as there are features, a sample covariance has no inverse.
_SHRINK, _RIDGE = 0.3, 0.01
# What a feature varies by at least, as a share of what features vary by: a dead one is no reason for an alarm.
_LEAST = 0.01
# Directions that a place may have of its own, at most one for each so many pictures.
_DIRECTIONS, _PER_DIRECTION = (0, 1, 2, 4, 8, 16), 10
# Patches that a dictionary or a coreset is made of, at most, and the share of them that a coreset keeps.
_PATCHES, _KEPT = 50_000, 0.1
_ATOMS, _ROUNDS, _STEPS, _SHARE = 256, 5, 30, 0.2
_PROJECTED = 128
_PROTOTYPES, _COARSE_PROTOTYPES = 1024, 256


class PatchModel(nn.Module):
    """Distances (n, P) of patch features (n, P, F), 0 or more; made of named tensors alone."""

    tensors: ClassVar[tuple[str, ...]]

    def __init__(self, **tensors: Tensor):
        super().__init__()
        if set(tensors) != set(self.tensors):
            raise ValueError(f"{type(self).__name__} has {sorted(self.tensors)}, got {sorted(tensors)}")
        for name, value in tensors.items():
            # Another layout in memory would round otherwise, and a file has this one.
            self.register_buffer(name, value.contiguous())


class Gaussians(PatchModel):
    """The Mahalanobis distance to one Gaussian of all places, or to one of the patch's own place.

    A place's covariance, after all places are whitened together, has k directions of its own and is isotropic besides
    (probabilistic PCA, Tipping & Bishop 1999). scale (F,): of features. mean (P, F) or (1, F). white (F, F).
    precision (P,) or (1,): of what is isotropic. directions (P, k, F): scaled so that what they find is taken off.
    """

    tensors = ("scale", "mean", "white", "precision", "directions")
    scale: Tensor
    mean: Tensor
    white: Tensor
    precision: Tensor
    directions: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = (x * self.scale - self.mean.float()) @ self.white
        far = y.square().sum(-1) * self.precision
        if self.directions.shape[1]:
            own = torch.einsum("npf,pkf->npk", y, self.directions.float())
            far = far - own.square().sum(-1)
        return (far.clamp_min(0) / x.shape[-1]).sqrt()


class FullGaussians(PatchModel):
    """The Mahalanobis distance to a Gaussian of the patch's place with a covariance of its own (PaDiM).

    scale (F,), mean (P, F), white (P, F, F).
    """

    tensors = ("scale", "mean", "white")
    scale: Tensor
    mean: Tensor
    white: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("npf,pfg->npg", x * self.scale - self.mean.float(), self.white.float())
        return (y.square().sum(-1) / x.shape[-1]).sqrt()


class Neighbours(PatchModel):
    """The distance to the nearest of the normal patches that are kept (PatchCore). scale (F,), bank (M, F)."""

    tensors = ("scale", "bank")
    scale: Tensor
    bank: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nearest(x * self.scale, self.bank.float())


def nearest(x: Tensor, bank: Tensor) -> Tensor:
    """The distance of x (n, P, F) to the nearest of bank (M, F), by feature: (n, P)."""
    which = (bank.square().sum(-1) - 2 * x @ bank.T).argmin(-1)
    # By their difference: by products, a small distance would have no digits left.
    return ((x - bank[which]).square().sum(-1) / x.shape[-1]).sqrt()


class Prototypes(PatchModel):
    """The distance to the nearest of few normal patches, after all are whitened together.

    scale, mean (F,), white (F, F), bank (M, F).
    """

    tensors = ("scale", "mean", "white", "bank")
    scale: Tensor
    mean: Tensor
    white: Tensor
    bank: Tensor
    _sizes: Tensor
    _products: Tensor

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        bank = self.bank.float()
        self.register_buffer("_sizes", bank.square().sum(-1), persistent=False)
        self.register_buffer("_products", (-2 * bank.T).contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = ((x * self.scale - self.mean) @ self.white).flatten(0, 1)
        # |y - b|^2 by products, in half the time of `nearest`: what decides are large distances.
        far = torch.addmm(self._sizes, y, self._products).amin(-1) + y.square().sum(-1)
        return (far.clamp_min(0) / x.shape[-1]).sqrt().view(x.shape[:2])


class Pooled(Neighbours):
    """The distance of the mean patch to the nearest of the normal ones: (n, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(1, keepdim=True))


class Sparse(PatchModel):
    """The root of the lasso objective 0.5 |y - D a|^2 + lam |a|_1 of the patch, not of unit norm.

    scale, mean (F,): of features. project (F, G): a random projection. atoms (G, M). lam (): of the codes.
    """

    tensors = ("scale", "mean", "project", "atoms", "lam")
    scale: Tensor
    mean: Tensor
    project: Tensor
    atoms: Tensor
    lam: Tensor

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        self.threshold = float(self.lam)
        self.system = RidgeSystem.of(self.atoms.float()[None], _rho(self.atoms.float()))

    def forward(self, x: Tensor) -> Tensor:
        y = ((x * self.scale - self.mean) @ self.project).flatten(0, 1).T[None]
        D = self.system.D
        codes = admm_lasso(D, y, lam=self.threshold, rho=self.system.rho, steps=_STEPS, system=self.system).codes
        far = 0.5 * (y - D @ codes).square().sum(1) + self.threshold * codes.abs().sum(1)
        return (far / y.shape[1]).sqrt().view(x.shape[:2])


def _rho(atoms: Tensor) -> float:
    """The penalty of ADMM: the mean eigenvalue of D'D that is not 0, by which steps converge fastest."""
    return float(atoms.square().sum() / min(atoms.shape))


# What `choose` decides from pictures that the fit has not seen: settings of a Gaussian.
class Places(NamedTuple):
    """apart: one Gaussian for each place. directions: of each. likelihood: of held-out patches, by value, in nats."""

    apart: bool
    directions: int
    likelihood: float


def choose_places(x: Tensor, held_out: Tensor) -> Places:
    """Of the Gaussians fitted to patches x (n, P, F), the settings under which others are likeliest."""
    places = [Places(False, 0, 0.0)]
    places += [Places(True, k, 0.0) for k in _DIRECTIONS if k * _PER_DIRECTION <= len(x) and k < x.shape[2]]
    fitted = _Places.of(x, apart=True)
    shared = _Places.of(x, apart=False)
    found = []
    for each in places:
        source = fitted if each.apart else shared
        found.append(each._replace(likelihood=source.likelihood(held_out, each.directions)))
    return max(found, key=lambda each: each.likelihood)


@dataclass(frozen=True)
class _Places:
    """Gaussians of all numbers of directions. values (P, r), vectors (P, r, F): of each place's covariance."""

    scale: Tensor
    mean: Tensor
    white: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, x: Tensor, *, apart: bool) -> "_Places":
        n, places, features = x.shape
        scale = _scale(x.flatten(0, 1))
        x = x * scale
        mean = x.mean(0) if apart else x.mean((0, 1))[None]
        mean = mean.half().float()
        white = _whitening(_covariance((x - mean).flatten(0, 1)))
        y = (x - mean) @ white
        if not apart:
            one = torch.ones(1, features)
            return cls(scale, mean, white, one, torch.empty(1, 0, features))
        values = torch.empty(places, min(n, features))
        vectors = torch.empty(places, min(n, features), features)
        # One by one: a batch of decompositions takes more memory and no less time on a CPU.
        for p in range(places):
            _, s, vectors[p] = torch.linalg.svd(y[:, p], full_matrices=False)
            values[p] = s.square() / n
        return cls(scale, mean, white, values, vectors)

    def model(self, k: int) -> Gaussians:
        largest, rest = self._split(k)
        gain = (1 / rest[:, None] - 1 / largest).clamp_min(0).sqrt()
        directions = (gain[..., None] * self.vectors[:, :k]).half()
        return Gaussians(
            scale=self.scale, mean=self.mean.half(), white=self.white, precision=1 / rest, directions=directions
        )

    def likelihood(self, x: Tensor, k: int) -> float:
        largest, rest = self._split(k)
        features = x.shape[2]
        volume = largest.log().sum(1) + (features - k) * rest.log()
        constant = self.white.diagonal().log().sum() + self.scale.log().sum()
        far = features * self.model(k)(x).square()
        return float((-0.5 * (far + volume)).mean() + constant) / features

    def _split(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues (P, k), shrunk, and the mean of all others (P,)."""
        features = self.white.shape[0]
        total = self.values.sum(1)
        mean = total / features
        largest = (1 - _SHRINK) * self.values[:, :k] + _SHRINK * mean[:, None]
        rest = ((1 - _SHRINK) * (total - self.values[:, :k].sum(1)) + _SHRINK * mean * (features - k)) / (features - k)
        return largest, rest


def _scale(x: Tensor) -> Tensor:
    """1 / the standard deviation of each feature of (N, F); of one that hardly varies, as if it did a little."""
    deviation = x.std(0)
    return 1 / deviation.clamp_min(max(1e-6, _LEAST * float(deviation.mean())))


def _covariance(x: Tensor) -> Tensor:
    found = x.T @ x / len(x)
    return found + _RIDGE * found.diagonal().mean() * torch.eye(len(found))


def _whitening(covariance: Tensor) -> Tensor:
    """W (F, F), triangular, with W'CW = I."""
    identity = torch.eye(len(covariance))
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), identity, upper=False).T.contiguous()


def fit_places(x: Tensor, places: Places, generator: Generator) -> Gaussians:
    return _Places.of(x, apart=places.apart).model(places.directions)


def fit_one(x: Tensor, settings: None, generator: Generator) -> Gaussians:
    return _Places.of(x, apart=False).model(0)


def fit_padim(x: Tensor, settings: None, generator: Generator) -> FullGaussians:
    scale = _scale(x.flatten(0, 1))
    x = x * scale
    mean = x.mean(0).half().float()
    off = x - mean
    white = torch.stack([_whitening(_covariance(off[:, p])) for p in range(x.shape[1])])
    return FullGaussians(scale=scale, mean=mean.half(), white=white.half())


def fit_neighbours(x: Tensor, settings: None, generator: Generator, *, count: int | None = None) -> Neighbours:
    """count: of patches that are kept; None: a tenth."""
    scale = _scale(x.flatten(0, 1))
    y = _some(x.flatten(0, 1) * scale, generator)
    count = round(_KEPT * len(y)) if count is None else min(count, len(y))
    return Neighbours(scale=scale, bank=y[coreset(y, count, generator)].half())


def fit_few_neighbours(x: Tensor, settings: None, generator: Generator) -> Neighbours:
    return fit_neighbours(x, settings, generator, count=_COARSE_PROTOTYPES)


def fit_prototypes(x: Tensor, settings: None, generator: Generator) -> Prototypes:
    y = _some(x.flatten(0, 1), generator)
    scale = _scale(y)
    y = y * scale
    mean = y.mean(0)
    white = _whitening(_covariance(y - mean))
    y = (y - mean) @ white
    bank = y[coreset(y, min(_PROTOTYPES, len(y)), generator)]
    return Prototypes(scale=scale, mean=mean, white=white, bank=bank.half())


def fit_pooled(x: Tensor, settings: None, generator: Generator) -> Pooled:
    x = x.mean(1)
    scale = _scale(x)
    return Pooled(scale=scale, bank=(x * scale).half())


def fit_sparse(x: Tensor, settings: None, generator: Generator) -> Sparse:
    scale = _scale(x.flatten(0, 1))
    mean = (x.flatten(0, 1) * scale).mean(0)
    features = x.shape[2]
    project = torch.randn(features, min(_PROJECTED, features), generator=generator) / features**0.5
    y = (_some(x.flatten(0, 1) * scale, generator) - mean) @ project
    atoms = F.normalize(kmeans(y[None], _ATOMS, generator=generator, rounds=2)[0], dim=1).T[None]
    lam = _SHARE * float((atoms[0].T @ y.T).abs().amax(0).median())
    S = y.T[None]
    for _ in range(_ROUNDS):
        codes = admm_lasso(atoms, S, lam=lam, rho=_rho(atoms[0]), steps=_STEPS).codes
        atoms = update_atoms(atoms, S, codes)
    return Sparse(scale=scale, mean=mean, project=project, atoms=atoms[0], lam=torch.tensor(lam))


def _some(patches: Tensor, generator: Generator) -> Tensor:
    """At most `_PATCHES` of the patches (N, F), drawn."""
    if len(patches) <= _PATCHES:
        return patches
    return patches[torch.randperm(len(patches), generator=generator)[:_PATCHES].sort().values]


def coreset(patches: Tensor, count: int, generator: Generator) -> Tensor:
    """Places of `count` of the patches (N, F): each the farthest of those before it (greedy k-center), in a random
    projection to 64 dimensions."""
    project = torch.randn(patches.shape[1], min(64, patches.shape[1]), generator=generator)
    y = patches @ project
    size = y.square().sum(1)
    chosen = torch.empty(count, dtype=torch.long)
    chosen[0] = torch.randint(len(y), (), generator=generator)
    nearest = torch.full((len(y),), torch.inf)
    for i in range(1, count):
        last = y[chosen[i - 1]]
        nearest = torch.minimum(nearest, size - 2 * (y @ last) + last.square().sum())
        chosen[i] = nearest.argmax()
    return chosen


@dataclass(frozen=True)
class PatchFit:
    """model: its kind. fit: (patches (n, P, F), settings, generator) -> model. choose: settings, from patches and from
    others that the fit has not seen."""

    model: type[PatchModel]
    fit: Callable[[Tensor, Any, Generator], PatchModel]
    choose: Callable[[Tensor, Tensor], Any] = lambda x, held_out: None


@dataclass(frozen=True)
class PatchMethod:
    """A row. fits: by the stride of the grid. grows: whether the file grows with the pictures. places: whether it looks
    at places."""

    fits: Mapping[int, PatchFit]
    grows: bool = False
    places: bool = True


def _on_two(fit: PatchFit) -> dict[int, PatchFit]:
    return {16: fit, 32: fit}


METHODS: dict[str, PatchMethod] = {
    "prototypes": PatchMethod(
        {
            16: PatchFit(Prototypes, fit_prototypes),
            32: PatchFit(Neighbours, fit_few_neighbours),
        }
    ),
    "gaussians": PatchMethod(_on_two(PatchFit(Gaussians, fit_places, choose_places))),
    "mahalanobis": PatchMethod(_on_two(PatchFit(Gaussians, fit_one))),
    "padim": PatchMethod(_on_two(PatchFit(FullGaussians, fit_padim))),
    "patch_sr": PatchMethod(_on_two(PatchFit(Sparse, fit_sparse))),
    "patch_knn": PatchMethod(_on_two(PatchFit(Neighbours, fit_neighbours)), grows=True),
    "pooled_knn": PatchMethod(_on_two(PatchFit(Pooled, fit_pooled)), grows=True, places=False),
}
