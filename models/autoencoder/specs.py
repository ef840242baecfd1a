"""Flags of the sparse part of a robust autoencoder; those of the network are in `networks`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from common.errors import UserError
from common.flags import Spec, flag
from models.autoencoder.robust import (
    PENALTIES,
    STOPS,
    Threshold,
    threshold_from_lambda_mu,
    threshold_from_lambda_n,
)

# (value of --threshold, X) -> the threshold in the units of the data.
CONVENTIONS: dict[str, Callable[[float, Tensor], float]] = {
    "data": lambda value, X: value,
    "lambda_mu": threshold_from_lambda_mu,
    "lambda_n": lambda value, X: threshold_from_lambda_n(value, len(X)),
}


# Files of results have no infinity.
_LARGEST = 1e30


@dataclass(frozen=True)
class SeparationSpec(Spec, group="autoencoder"):
    """Which part is sparse, and how much of it."""

    penalty: str = flag(
        "l21_rows",
        "rdae: what of S is sparse: l1 entries (noise), l21_rows (outliers), l21_cols (corrupted features)",
        choices=lambda: tuple(PENALTIES),
        origin="fixed",
    )
    threshold: float | None = flag(
        None, "rdae: of the proximal operator, in the units of the data", type=float, above=0, at_most=_LARGEST
    )
    threshold_from: str = flag(
        "data",
        "rdae: data: --threshold as it is; lambda_mu, lambda_n: it is the lambda of a published convention",
        choices=lambda: tuple(CONVENTIONS),
    )
    contamination: float = flag(
        0.1, "share of what is sparse, from which the threshold follows where none is given", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.contamination < 1:
            raise UserError(f"--contamination must lie in (0, 1), got {self.contamination}")

    def rule(self, X: Tensor) -> Threshold:
        """How the threshold of the data X (N, n) is found. Raises: UserError for a convention without its lambda."""
        if self.threshold is not None:
            return Threshold(CONVENTIONS[self.threshold_from](self.threshold, X), self.contamination)
        if self.threshold_from != "data":
            raise UserError(f"--threshold_from {self.threshold_from}: which lambda? Give it with --threshold")
        return Threshold(None, self.contamination)


@dataclass(frozen=True)
class RoundsSpec(Spec, group="autoencoder"):
    """How long to alternate."""

    rounds: int = flag(20, "rdae: alternations between network and S at most", above=0)
    inner_epochs: int = flag(10, "rdae: epochs of each", above=0)
    reinit: bool = flag(False, "rdae: draw the weights anew in each round")
    stop: str = flag(
        "c2", "rdae: stop when L + S stands still (c2); any, all: or, and when X = L + S", choices=lambda: tuple(STOPS)
    )
    eps: float = flag(1e-3, "rdae: below this a criterion of --stop is met", at_least=0)
