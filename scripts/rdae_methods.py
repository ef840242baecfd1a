"""What `scripts.rdae` compares: fits to a data matrix X (N, n) that are told neither labels nor clean images.

A robust autoencoder whose threshold is infinite splits nothing off: it is the plain autoencoder of the same network
with the same number of updates.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.autoencoder.networks import Autoencoder, AutoencoderSpec, TruncatedSVD
from models.autoencoder.robust import Gradients, LStep, Separation, Threshold, separate

Shape = tuple[int, int, int]
# Never met: the rounds that a setting names are all carried out, which makes updates equal in number.
_NEVER = 0.0
# The network of the slides, and that of the authors' program.
SLIDES, RELEASE = (625, 400, 225, 100), (400, 200)


class SlidesNet(Autoencoder):
    """The dense autoencoder with ReLU after every layer, code and output too, as the slides have it."""

    def encode(self, rows: Tensor) -> Tensor:
        return super().encode(rows).relu()

    def decode(self, codes: Tensor) -> Tensor:
        return super().decode(codes).relu()


def slides_net(features: int) -> nn.Module:
    """A fresh `SlidesNet` with torch's own initial weights, as the slides leave them."""
    net = SlidesNet((features, *SLIDES), activation="relu", output="linear")
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return net


@dataclass(frozen=True)
class Setting:
    """A network and how long it is trained: `rounds` of `epochs`, by Adam.

    kind: what `AutoencoderSpec.build` makes of `net`; "slides": `SlidesNet`.
    """

    kind: str
    net: AutoencoderSpec
    rounds: int
    epochs: int = 1
    lr: float = 1e-3
    batch_size: int = 128
    reinit: bool = False

    def step(self, features: int, shape: Shape | None, seed: int) -> LStep:
        """What reconstructs, with weights drawn by the seed."""
        if self.kind == "svd":
            return ExactStep(TruncatedSVD(features, self.net.layers[-1]).double())
        make = (
            partial(slides_net, features)
            if self.kind == "slides"
            else partial(self.net.build, self.kind, features, shape)
        )
        return Gradients(make, self.epochs, self.lr, self.batch_size, seed, self.reinit)


class ExactStep:
    """A `TruncatedSVD` as an `LStep`, in float64."""

    def __init__(self, net: TruncatedSVD) -> None:
        self.net = net

    def fit(self, rows: Tensor) -> None:
        self.net.fit(rows)

    def reconstruct(self, rows: Tensor) -> Tensor:
        return self.net(rows.double()).to(rows.dtype)


class AfterFirstRound:
    """A copy of an `LStep` that was fitted to X, for another `separate` of X: its first fit is that one.

    The first round does not depend on the threshold, all later ones do, since S goes into L = X - S.
    """

    def __init__(self, step: LStep) -> None:
        self.step = copy.deepcopy(step)
        self._fitted = True

    def fit(self, rows: Tensor) -> None:
        if not self._fitted:
            self.step.fit(rows)
        self._fitted = False

    def reconstruct(self, rows: Tensor) -> Tensor:
        return self.step.reconstruct(rows)


class Fit(NamedTuple):
    """One separation, and what has made it. threshold: as it was asked for."""

    threshold: Threshold
    parts: Separation
    step: Any


def fits(
    X: Tensor, shape: Shape | None, setting: Setting, seed: int, penalty: str, thresholds: Sequence[Threshold]
) -> Iterator[Fit]:
    """A separation of X (N, n) for each threshold; all share the first round."""
    first = setting.step(X.shape[1], shape, seed)
    first.fit(X)
    for threshold in thresholds:
        own = AfterFirstRound(first)
        parts = separate(X, own, penalty=penalty, threshold=threshold, rounds=setting.rounds, eps=_NEVER)
        yield Fit(threshold, parts, own.step)


PLAIN = Threshold(math.inf)


def _isolation_forest(X: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.ensemble import IsolationForest

    return -IsolationForest(n_estimators=1000, random_state=seed).fit(X).score_samples(X)


def _one_class_svm(X: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.svm import OneClassSVM

    return -OneClassSVM(nu=0.05, gamma="scale").fit(X).decision_function(X)


def _neighbour(X: np.ndarray, seed: int, k: int = 5) -> np.ndarray:
    """The distance of each row to the k-th nearest of the others."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k).fit(X).kneighbors()[0][:, -1]


def _principal_components(X: np.ndarray, seed: int, rank: int = 30) -> np.ndarray:
    from sklearn.decomposition import PCA

    found = PCA(min(rank, *X.shape), random_state=seed).fit(X)
    return np.linalg.norm(X - found.inverse_transform(found.transform(X)), axis=1)


# X (N, n) and a seed -> scores (N,), high for outlying rows.
DETECTORS: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "pca": _principal_components,
    "isolation_forest": _isolation_forest,
    "one_class_svm": _one_class_svm,
    "nearest": _neighbour,
}


def dead_outputs(X: Tensor, L: Tensor) -> int:
    """How many columns of the reconstruction L (N, n) are constant although those of X (N, n) are not."""
    return int(((L.amax(0) == L.amin(0)) & (X.amax(0) > X.amin(0))).sum())


@torch.no_grad()
def encode(step: Any, rows: Tensor) -> Tensor:
    """Codes (N, k) of rows (N, n)."""
    net = step.net
    dtype = next(iter([*net.parameters(), *net.buffers()])).dtype
    return net.encode(rows.to(dtype)).float()


@dataclass(frozen=True)
class Denoiser:
    """A setting, and the threshold for each number of noisy pixels; without thresholds it splits nothing off."""

    setting: Setting
    thresholds: Mapping[int, float] = field(default_factory=dict)

    def threshold(self, points: int) -> Threshold:
        """The one that was chosen for the nearest number of points."""
        if not self.thresholds:
            return PLAIN
        return Threshold(self.thresholds[min(self.thresholds, key=lambda known: abs(known - points))])


_RELU = partial(AutoencoderSpec, activation="relu")
# Chosen on mixtures whose nominal digit was 2, 7 or 9. `*_slides` and `*_release` are the
# published settings but for the output and the code, which are sigmoid and linear.
SPLITTERS: Mapping[str, Setting] = {
    "rdae": Setting("dense", _RELU(layers=(400, 32)), rounds=10, epochs=1),
    "rdae_vae": Setting("vae", _RELU(layers=(400, 50), likelihood="gaussian", sigma=0.3), rounds=10, epochs=1),
    "rdae_vae_bernoulli": Setting("vae", _RELU(layers=(400, 20)), rounds=10),
    "rdae_slides": Setting("dense", _RELU(layers=SLIDES), rounds=3, epochs=5),
    "slides_dae": Setting("slides", AutoencoderSpec(layers=SLIDES), rounds=1, epochs=15),
    "rdae_release": Setting(
        "dense", AutoencoderSpec(layers=RELEASE, tied=True), rounds=20, epochs=50, batch_size=133, reinit=True
    ),
    "rdae_conv": Setting("conv", _RELU(layers=(32,), widths=(8, 16)), rounds=5, epochs=2),
    "robust_pca": Setting("svd", AutoencoderSpec(layers=(30,)), rounds=5),
    "vae": Setting("vae", _RELU(layers=(400, 20)), rounds=1, epochs=10),
}
# Chosen on training images 50,000 to 54,999 by one seed.
_NET = Setting("dense", _RELU(layers=(400, 100)), rounds=6, epochs=5)
DENOISERS: Mapping[str, Denoiser] = {
    "rdae": Denoiser(_NET, {10: 0.6, 100: 0.4, 250: 0.3}),
    "autoencoder": Denoiser(_NET),
    "vae": Denoiser(Setting("vae", _RELU(layers=(400, 20), likelihood="gaussian", sigma=0.3), rounds=1, epochs=30)),
    "robust_pca": Denoiser(Setting("svd", AutoencoderSpec(layers=(40,)), rounds=6), {10: 0.4, 100: 0.3, 250: 0.3}),
    "slides_dae": Denoiser(Setting("slides", AutoencoderSpec(layers=SLIDES), rounds=6, epochs=5)),
}
