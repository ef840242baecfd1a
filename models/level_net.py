"""Stage 2 at several depths: dictionaries of pixels, maps and features of a frozen stage-1 network, and the score that
adds what they say of an image.

Dimension letters: see `models`; here K transformations of an image that stage 1 has learned to tell apart, R of them
rotations, T terms of the score.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.feature_net import FeatureNet, RotTransNet, full_precision
from models.resnet import StagedNet
from models.sparse.dictionary import CODE_FACTS, CodingSpec, DictionaryBank
from models.sparse.kmeans import kmeans
from models.sparse.prox import lambda_max, lasso_objective

# What a level's features are made of, by its name: pixels; maps of all stages but the last; h, and its projection z,
# under all rotations.
LEVELS = ("pixels", "stages", "penultimate", "simclr")
# Terms that need no dictionary: the log-probability of the transformations, and nearest training images.
TRANSFORMATIONS, NEIGHBOURS, SCORE = "transformations", "neighbours", "score"
# Of the training images, how many nearest ones count.
_NEAREST = 5
# Pixels on a side of what `pixels` codes, and of each map of `stages`, at most.
_PIXELS, _GRID = 32, 4
# ADMM steps of a code at most, and the gap relative to lambda that ends them sooner.
_STEPS, TOLERANCE = 500, 1e-3
# Levels whose features are of several kinds, and have units of their own.
SCALED = ("stages", "penultimate", "simclr")
# Samples that are coded at a time, and entries of a block of similarities.
_TOGETHER, _BLOCK = 4096, 2**22
# Standard deviations below this share of the largest are taken to be that share.
_FLAT = 1e-3


class Transformations(NamedTuple):
    """How stage 1 has seen an image: `functions` (N, 3, H, W) -> the same, K of them.

    rotations: which of them are the rotations alone, upright first. truth: of each head its class under each, (K,).
    """

    functions: Sequence[Callable[[Tensor], Tensor]]
    rotations: Sequence[int]
    truth: Mapping[str, Tensor]

    @property
    def rotated(self) -> "Transformations":
        """The rotations alone."""
        chosen = list(self.rotations)
        truth = {name: of[chosen] for name, of in self.truth.items()}
        return Transformations([self.functions[k] for k in chosen], range(len(chosen)), truth)


class Reading(NamedTuple):
    """What a stage-1 network says of N images.

    logits (N, K, .): of each head, of each view. h (N, R, F): features of the rotated views. levels (N, .): what is to
    be coded, by level.
    """

    logits: dict[str, Tensor]
    h: Tensor
    levels: dict[str, Tensor]

    @classmethod
    def joined(cls, parts: Sequence["Reading"]) -> "Reading":
        """One reading of those of several batches, in order."""
        logits, h, levels = zip(*parts, strict=True)
        return cls(_joined(logits), torch.cat(h), _joined(levels))

    def to(self, device: torch.device | str) -> "Reading":
        logits = {name: x.to(device) for name, x in self.logits.items()}
        levels = {name: x.to(device) for name, x in self.levels.items()}
        return Reading(logits, self.h.to(device), levels)


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class LevelDictionary(nn.Module):
    """One dictionary for features (N, F) that are centred and scaled as training images say. They keep their norm: of
    unit norm, pixels and maps tell little."""

    centre: Tensor
    scale: Tensor

    def __init__(self, features: int, atoms: int, rho: float):
        super().__init__()
        coding = CodingSpec(1.0, rho, _STEPS, tol=TOLERANCE)
        self.bank = DictionaryBank(1, features, atoms, coding).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    @torch.no_grad()
    def fit(self, x_NF: Tensor, *, share: float, scaled: bool, generator: Generator) -> Tensor:
        """Atoms from training features: k-means centres of unit norm. Returns the lambda_max of each image, (N,).

        share: lambda as a share of the median lambda_max. scaled: divide each feature by its standard deviation.
        """
        self.centre.copy_(x_NF.mean(0))
        if scaled:
            spread = x_NF.std(0, correction=0)
            self.scale.copy_(spread.clamp_min(_FLAT * spread.max()).clamp_min(torch.finfo(x_NF.dtype).tiny))
        x = self.normalised(x_NF)
        self.bank.set_atoms(kmeans(x[None], self.bank.dictionary.shape[2], generator=generator).mT, 1.0)
        largest = lambda_max(self.bank.dictionary, x.mT)[0].cpu()
        self.bank.set_lambda(share * largest.median().item())
        return largest

    def normalised(self, x_NF: Tensor) -> Tensor:
        return (x_NF - self.centre) / self.scale

    def costs(self, x_NF: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The lasso objective of each image, and `CODE_FACTS` of its code, (N,) each. Differentiable in x."""
        values, facts = [], []
        for x in self.normalised(x_NF).split(_TOGETHER):
            x_1FN = x.mT[None]
            code = self.bank.code(x_1FN)
            values.append(lasso_objective(self.bank.dictionary, x_1FN, code.codes, self.bank.coding.lam)[0])
            facts.append({name: value[0] for name, value in self.bank.facts(x_1FN, code).items()})
        return torch.cat(values), _joined(facts)


class LevelNet(nn.Module):
    """The network of stage 2 at several depths: a frozen `feature_net`, dictionaries by level, nearest neighbours, and
    the units and weights of the terms that make the score.

    sizes: features of each level. known (R, n, F): how many training features are kept.
    """

    known: Tensor
    means: Tensor
    deviations: Tensor
    weights: Tensor

    def __init__(
        self,
        net: FeatureNet | RotTransNet,
        sizes: Mapping[str, int],
        atoms: int,
        known: tuple[int, int, int],
        *,
        rho: float = 1.0,
    ):
        super().__init__()
        self.feature_net = net.requires_grad_(False).eval()
        self.levels = nn.ModuleDict({name: LevelDictionary(size, atoms, rho) for name, size in sizes.items()})
        self.register_buffer("known", torch.zeros(known))
        for name in ("means", "deviations", "weights"):
            self.register_buffer(name, torch.ones(len(self.terms)))

    @property
    def dictionaries(self) -> dict[str, LevelDictionary]:
        """By level."""
        return dict(self.levels.items())  # type: ignore[arg-type]

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms of the score."""
        return (TRANSFORMATIONS, NEIGHBOURS, *self.levels)

    def train(self, mode: bool = True) -> "LevelNet":
        super().train(mode)
        self.feature_net.eval()
        return self

    def read(self, images: Tensor, views: Transformations) -> Reading:
        """Images (N, 3, H, W) in [0, 1] as stage 1 sees them."""
        return read_levels(self.feature_net, images, views, list(self.levels))

    def values(self, reading: Reading, views: Transformations) -> dict[str, Tensor]:
        """The terms of each image by name, not standardised, larger for more normal ones, and the means over levels of
        `CODE_FACTS`: (N,) each. Differentiable; without autocast, since bf16 would tell few values apart."""
        facts = []
        with torch.autocast(reading.h.device.type, enabled=False):
            found = {
                TRANSFORMATIONS: own_log_probability(reading.logits, views.truth),
                NEIGHBOURS: cosine_neighbours(self.known, reading.h, _NEAREST),
            }
            for name, level in self.dictionaries.items():
                cost, of_codes = level.costs(reading.levels[name])
                found[name] = -cost
                facts.append(of_codes)
        return {**found, **{name: torch.stack([of[name] for of in facts]).mean(0) for name in CODE_FACTS}}

    def score(self, values: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of standardised terms, (N,)."""
        parts = zip(self.terms, self.means, self.deviations, self.weights, strict=True)
        return torch.stack([weight * (values[name] - mean) / scale for name, mean, scale, weight in parts]).sum(0)


def levels_of(net: FeatureNet | RotTransNet) -> list[str]:
    """Which of `LEVELS` a network has."""
    lacks = {"stages": not isinstance(net.backbone, StagedNet), "simclr": not isinstance(net, FeatureNet)}
    return [name for name in LEVELS if not lacks.get(name)]


def read_levels(
    net: FeatureNet | RotTransNet, images: Tensor, views: Transformations, levels: Sequence[str]
) -> Reading:
    """Images (N, 3, H, W) in [0, 1]. Raises: ValueError for a level that the network does not have."""
    features = [net.features(function(images)) for function in views.functions]
    logits = [net.transformation_logits(h) for h in features]
    h = full_precision(torch.stack([features[k] for k in views.rotations], 1))
    upright = views.functions[views.rotations[0]](images)
    by_head = {name: torch.stack([of[name] for of in logits], 1) for name in views.truth}
    return Reading(by_head, h, {name: _level(net, upright, h, name) for name in levels})


def _level(net: FeatureNet | RotTransNet, images: Tensor, h: Tensor, name: str) -> Tensor:
    """The features of one level, (N, .). h (N, R, F): of the rotated views."""
    if name == "pixels":
        return shrunk(images, _PIXELS).flatten(1)
    if name == "penultimate":
        return h.flatten(1)
    if name == "simclr":
        if not isinstance(net, FeatureNet):
            raise ValueError("simclr: the network has no projector, which --mode simclr_CSI trains")
        return full_precision(net.simclr_layer(h)).flatten(1)
    backbone = net.backbone
    if not isinstance(backbone, StagedNet):
        raise ValueError("stages: the backbone is not made of stages")
    earlier = islice(backbone.maps(net.normalise(images)), backbone.stages - 1)
    return torch.cat([full_precision(shrunk(x, _GRID)).flatten(1) for x in earlier], 1)


def shrunk(x: Tensor, side: int) -> Tensor:
    """x (N, C, H, W) averaged down to `side` pixels on a side; a smaller side stays."""
    H, W = x.shape[2:]
    return F.adaptive_avg_pool2d(x, (min(side, H), min(side, W))) if max(H, W) > side else x


def own_log_probability(logits: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Tensor:
    """The mean over views of the log-probability of the transformation that the view bears, (N,).

    logits (N, K, .) of each head; those of several heads add up. truth: of each head its class of each view, (K,).
    """
    parts = []
    for name, own in truth.items():
        index = own.to(logits[name].device).expand(len(logits[name]), -1)[..., None]
        parts.append(logits[name].log_softmax(2).gather(2, index)[..., 0].mean(1))
    return torch.stack(parts).sum(0)


def cosine_neighbours(known_KNF: Tensor, h_NKF: Tensor, nearest: int) -> Tensor:
    """The mean over K views of the mean cosine to the nearest features of the same view, (N,).

    known (K, n, F), of unit norm. h (N, K, F). nearest: how many count, all there are at most.
    """
    h_KNF = F.normalize(h_NKF, dim=2).transpose(0, 1)
    rows = max(1, _BLOCK // known_KNF.shape[:2].numel())
    nearest = min(nearest, known_KNF.shape[1])
    found = [(part @ known_KNF.mT).topk(nearest, 2).values for part in h_KNF.split(rows, 1)]
    return torch.cat(found, 1).mean((0, 2))
