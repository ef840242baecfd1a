"""The robust autoencoder in scikit-learn's habit."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, OutlierMixin, clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from models.autoencoder.networks import ACTIVATIONS, OUTPUTS, AutoencoderSpec, TruncatedSVD
from models.autoencoder.robust import PENALTIES, STOPS, Gradients, LStep, Threshold, separate

_CHOICES: dict[str, Iterable[str]] = {
    "penalty": PENALTIES,
    "stop": STOPS,
    "activation": ACTIVATIONS,
    "output": ("auto", *OUTPUTS),
}
_KINDS = ("dense", "svd")


class RobustAutoencoder(OutlierMixin, BaseEstimator):
    """Split a data matrix into a part that an autoencoder reconstructs and a sparse one, and detect outliers.

    No clean data is needed. `penalty="l1"` finds corrupted entries (noise), `"l21_rows"` outlying rows, `"l21_cols"`
    corrupted columns. Zhou & Paffenroth, KDD 2017; a heuristic, which need not converge.

    Bring the features to one range before, [0, 1] best: all residuals count alike.

    Parameters
    ----------
    layers : sizes of the layers after the input, the code's last. None: n / 2 and n / 4 for n features.
    penalty : "l1", "l21_rows" or "l21_cols".
    threshold : of the proximal operator, > 0, in the units of the data. None: it follows from `contamination`.
    contamination : share of outliers that is expected, in (0, 0.5]. Without a threshold, it is in each round the
        (1 - contamination) quantile of the absolute entries (row norms, column norms) of the residual, so that S has
        that share of them. `predict` cuts at the threshold where one is given and `penalty` is "l21_rows", else such
        that a share `contamination` of the training rows is -1.
    rounds, inner_epochs : alternations at most, and epochs of training in each.
    lr, batch_size : of Adam.
    reinit : draw the weights anew in each round.
    stop, eps : which criteria must lie below eps: "c2" (L + S stands still), "any" (as in the paper) or "all".
        0: never stop.
    autoencoder : "dense", "svd" (the best linear one of that code size, exact: robust PCA), or an object with
        `fit(rows)` and `reconstruct(rows)`, both of tensors (N, n) of its `dtype`, or float64 where it has none. A copy
        of it is trained. `robust.Gradients` is one, of any network: convolutional, variational.
    activation, output, tied : of a dense one. activation: "relu", "sigmoid", "tanh" or "linear". output: "sigmoid",
        "linear", or "auto": sigmoid for data in [0, 1]. tied: the decoder has the encoder's weights, transposed.
    device : where to compute. random_state : all draws follow from it.

    Attributes
    ----------
    L_, S_ : ndarray (N, n), the two parts of the training data, float32 where a dense network is trained. X - L_ - S_
        is what the threshold has cut off. Rows, columns or entries where S_ is not 0 are those that were found.
    history_ : dict of lists, of each round `c1`, `c2`, `threshold`, and `loss` where a network is trained.
    n_iter_ : rounds. stopped_by_ : "c1", "c2" or "rounds". threshold_ : in use. offset_ : `predict` cuts there.
    autoencoder_ : what reconstructs.
    """

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        *,
        penalty: str = "l21_rows",
        threshold: float | None = None,
        contamination: float = 0.1,
        rounds: int = 20,
        inner_epochs: int = 10,
        lr: float = 1e-3,
        batch_size: int = 128,
        reinit: bool = False,
        stop: str = "c2",
        eps: float = 1e-3,
        autoencoder: Literal["dense", "svd"] | LStep = "dense",
        activation: str = "sigmoid",
        output: str = "auto",
        tied: bool = False,
        device: str = "cpu",
        random_state: Any = 0,
    ) -> None:
        self.layers = layers
        self.penalty = penalty
        self.threshold = threshold
        self.contamination = contamination
        self.rounds = rounds
        self.inner_epochs = inner_epochs
        self.lr = lr
        self.batch_size = batch_size
        self.reinit = reinit
        self.stop = stop
        self.eps = eps
        self.autoencoder = autoencoder
        self.activation = activation
        self.output = output
        self.tied = tied
        self.device = device
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: Any = None) -> "RobustAutoencoder":
        """Split X (N, n); y is ignored.

        Raises: ValueError for parameters out of range, for data that is not finite, and where training diverges.
        """
        self._check()
        # In one order, so that rounding does not depend on how the data lies in memory.
        data = np.asarray(validate_data(self, X, dtype=(np.float32, np.float64), order="C", ensure_min_samples=2))
        step = self._step(data)
        found = separate(
            self._rows(data, step),
            step,
            penalty=self.penalty,
            threshold=Threshold(self.threshold, self.contamination),
            rounds=self.rounds,
            stop=self.stop,
            eps=self.eps,
        )
        self.autoencoder_ = step
        self.L_, self.S_ = (part.cpu().numpy() for part in (found.L, found.S))
        self.history_ = found.history | ({"loss": step.losses} if isinstance(step, Gradients) else {})
        self.n_iter_, self.stopped_by_, self.threshold_ = found.rounds, found.stopped_by, found.threshold
        if self.penalty == "l21_rows" and self.threshold is not None:
            self.offset_ = -self.threshold_
        else:
            self.offset_ = float(np.percentile(self.score_samples(X), 100 * self.contamination))
        return self

    def reconstruct(self, X: ArrayLike) -> np.ndarray:
        """What the autoencoder makes of rows (M, n), any rows."""
        check_is_fitted(self)
        data = np.asarray(validate_data(self, X, dtype=(np.float32, np.float64), order="C", reset=False))
        return self.autoencoder_.reconstruct(self._rows(data, self.autoencoder_)).cpu().numpy()

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """Minus the norm of the reconstruction error of each row (M,), of any rows; higher means more normal."""
        found = self.reconstruct(X)
        return -np.linalg.norm(np.asarray(X, dtype=np.float64) - found, axis=1)

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """`score_samples` minus `offset_` (M,); below 0 for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> np.ndarray:
        """+1 for inliers, -1 for outliers (M,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _rows(self, data: np.ndarray, step: LStep) -> torch.Tensor:
        """Networks are trained in float32; what is exact stays so."""
        return torch.tensor(data, dtype=getattr(step, "dtype", torch.float64), device=self.device)

    def _check(self) -> None:
        """Raises: ValueError that names the parameter."""
        own = self.get_params(deep=False)
        for name in ("rounds", "inner_epochs", "batch_size"):
            if not _whole(own[name]):
                raise ValueError(f"{name} must be a whole number >= 1, got {own[name]!r}")
        for name, low in (("lr", 0), ("threshold", 0), ("contamination", 0), ("eps", -math.inf)):
            if own[name] is None and name == "threshold":
                continue
            if not isinstance(own[name], Real) or not float(own[name]) > low:
                raise ValueError(f"{name} must be a number{f' > {low}' if low == 0 else ''}, got {own[name]!r}")
        if self.contamination > 0.5:
            raise ValueError(f"contamination must lie in (0, 0.5], got {self.contamination!r}")
        if self.layers is not None and not _sizes(self.layers):
            raise ValueError(f"layers must be sizes >= 1, one at least, got {self.layers!r}")
        for name, known in _CHOICES.items():
            if own[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {own[name]!r}")
        if isinstance(self.autoencoder, str):
            if self.autoencoder not in _KINDS:
                raise ValueError(f"autoencoder must be {', '.join(_KINDS)} or an object, got {self.autoencoder!r}")
        elif not (hasattr(self.autoencoder, "fit") and hasattr(self.autoencoder, "reconstruct")):
            raise ValueError(f"autoencoder must have the methods fit and reconstruct, got {self.autoencoder!r}")

    def _step(self, data: np.ndarray) -> LStep:
        if not isinstance(self.autoencoder, str):
            # A copy, as scikit-learn wants it: to fit twice is to begin twice.
            return clone(self.autoencoder, safe=False)
        features = data.shape[1]
        layers = (max(1, features // 2), max(1, features // 4)) if self.layers is None else tuple(map(int, self.layers))
        if self.autoencoder == "svd":
            return _ExactStep(TruncatedSVD(features, layers[-1]).double().to(self.device))
        bounded = 0 <= data.min() and data.max() <= 1
        output = self.output if self.output != "auto" else "sigmoid" if bounded else "linear"
        spec = AutoencoderSpec(layers=layers, activation=self.activation, output=output, tied=self.tied)
        return Gradients(
            partial(spec.build, "dense", features, None),
            epochs=self.inner_epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            reinit=self.reinit,
            device=torch.device(self.device),
        )


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and int(value) >= 1


def _sizes(value: Any) -> bool:
    return np.iterable(value) and all(map(_whole, value)) and len(tuple(value)) > 0


class _ExactStep:
    """A `TruncatedSVD` as an `LStep`."""

    def __init__(self, net: TruncatedSVD) -> None:
        self.net = net

    def fit(self, rows: torch.Tensor) -> None:
        self.net.fit(rows)

    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor:
        return self.net(rows)
