"""The robust autoencoder in scikit-learn's habit."""

from collections.abc import Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from models.autoencoder.networks import AutoencoderSpec, TruncatedSVD
from models.autoencoder.robust import PENALTIES, STOPS, Gradients, LStep, Threshold, separate


class RobustAutoencoder(OutlierMixin, BaseEstimator):
    """Split a data matrix into a part that an autoencoder reconstructs and a sparse one, and detect outliers.

    No clean data is needed. `penalty="l1"` finds corrupted entries (noise), `"l21_rows"` outlying rows, `"l21_cols"`
    corrupted columns. Zhou & Paffenroth, KDD 2017.

    Scale features to one range, [0, 1] best, before: all residuals count alike.

    Parameters
    ----------
    layers : sizes of the layers after the input, the code's last. None: n / 2 and n / 4 for n features.
    penalty : "l1", "l21_rows" or "l21_cols".
    threshold : of the proximal operator, > 0, in the units of the data. None: it follows from `contamination`.
    contamination : share of outliers that is expected, in (0, 0.5]. Without a threshold, t is the (1 - contamination)
        quantile of the residual's entries, row norms or column norms after the first round. With `penalty="l21_rows"`
        and a threshold, `predict` cuts there; else such that a share `contamination` of the training rows is -1.
    rounds, inner_epochs : alternations at most, and epochs of training in each.
    lr, batch_size : of Adam.
    reinit : draw the weights anew in each round.
    stop, eps : which criteria must lie below eps: "c2" (L + S stands still), "any" (as in the paper) or "all".
    autoencoder : "dense", "svd" (exact, robust PCA), or any object with `fit(rows)` and `reconstruct(rows)`, both of
        float64 tensors (N, n).
    activation, output, tied : of a dense one. output "auto": sigmoid for data in [0, 1], else linear.
    device : where to compute. random_state : all draws follow from it.

    Attributes
    ----------
    L_, S_ : ndarray (N, n), the two parts of the training data. X - L_ - S_ is what the threshold has cut off.
    history_ : dict, of each round `c1`, `c2`, `threshold`, and `loss` where a network is trained.
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
        """Split X (N, n). Raises: ValueError for parameters out of range and for data that is not finite."""
        self._check()
        X = validate_data(self, X, dtype=(np.float32, np.float64), ensure_min_samples=2)
        rows = torch.tensor(X, dtype=self._dtype, device=self.device)
        step = self._step(X)
        found = separate(
            rows,
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
        """What the autoencoder makes of rows (M, n)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=(np.float32, np.float64), reset=False)
        rows = torch.tensor(X, dtype=self._dtype, device=self.device)
        return self.autoencoder_.reconstruct(rows).cpu().numpy()

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """Minus the norm of the reconstruction error of each row (M,), of any rows; higher means more normal."""
        found = self.reconstruct(X)
        return -np.linalg.norm(np.asarray(X, dtype=np.float64) - found, axis=1)

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """`score_samples` minus `offset_`; below 0 for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> np.ndarray:
        """+1 for inliers, -1 for outliers (M,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    @property
    def _dtype(self) -> torch.dtype:
        """Networks are trained in float32; what is exact stays so."""
        return torch.float32 if self.autoencoder == "dense" else torch.float64

    def _check(self) -> None:
        for name in ("rounds", "inner_epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        for name in ("lr", *(["threshold"] if self.threshold is not None else [])):
            value = getattr(self, name)
            if not isinstance(value, Real) or not value > 0:
                raise ValueError(f"{name} must be > 0, got {value!r}")
        if not 0 < self.contamination <= 0.5:
            raise ValueError(f"contamination must lie in (0, 0.5], got {self.contamination!r}")
        for name, known in (("penalty", PENALTIES), ("stop", STOPS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def _step(self, X: np.ndarray) -> LStep:
        if not isinstance(self.autoencoder, str):
            return self.autoencoder
        n = X.shape[1]
        layers = tuple(self.layers) if self.layers is not None else (max(1, n // 2), max(1, n // 4))
        if self.autoencoder == "svd":
            return _ExactStep(TruncatedSVD(n, layers[-1]).double().to(self.device))
        if self.autoencoder != "dense":
            raise ValueError(f"autoencoder must be dense, svd or an object, got {self.autoencoder!r}")
        bounded = 0 <= X.min() and X.max() <= 1
        output = self.output if self.output != "auto" else "sigmoid" if bounded else "linear"
        spec = AutoencoderSpec(layers=layers, activation=self.activation, output=output, tied=self.tied)
        return Gradients(
            partial(spec.build, "dense", n, None),
            epochs=self.inner_epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            reinit=self.reinit,
            device=torch.device(self.device),
        )


class _ExactStep:
    """A `TruncatedSVD` as an `LStep`."""

    def __init__(self, net: TruncatedSVD) -> None:
        self.net = net

    def fit(self, rows: torch.Tensor) -> None:
        self.net.fit(rows)

    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor:
        return self.net(rows)
