"""Autoencoders, and what makes them robust: the data is split into a part that an autoencoder reconstructs and a sparse
one (Zhou & Paffenroth, KDD 2017).

`networks`: the autoencoders. `robust`: the algorithm. `estimator`: `RobustAutoencoder`, in scikit-learn's habit.

Letters: N rows (images), n entries of a row (features), B rows of a batch. X (N, n) is the data, L what the autoencoder
reconstructs, S the sparse part.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.autoencoder.estimator import RobustAutoencoder

__all__ = ["RobustAutoencoder"]


def __getattr__(name: str) -> Any:
    """Import the estimator when it is asked for: scikit-learn takes a second, and training does not need it."""
    if name == "RobustAutoencoder":
        from models.autoencoder.estimator import RobustAutoencoder

        return RobustAutoencoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
