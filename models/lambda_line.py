"""Robust inference of SDNet (Dai et al., NeurIPS 2022): lambda of the stem follows the noise of its input.

More noise asks for a larger lambda, and shows in the residual x - A(z) of the stem's input x. So a line from a measure
of the residual to lambda, fitted to images with known noise, serves images with unknown noise. The residual is always
that at one lambda, the reference: that at the best lambda, which the released program takes, is not known before lambda
is. The other layers and the weights stay as they are.

Letters: B images of a batch, C channels, H and W pixels, L levels of noise.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.csc import CSC2d, stem_of
from models.feature_net import full_precision

# What lambda is predicted for: each image of a batch by itself, or the batch as a whole.
PER = ("image", "batch")


def energy(residual: Tensor) -> Tensor:
    """|r|^2 of each image, (B,).

    After a few steps of the solver most of it is content that is not coded yet: it differs more between images than
    between levels of noise.
    """
    return residual.square().flatten(1).sum(1)


def highpass(residual: Tensor) -> Tensor:
    """The mean absolute second difference of the residual (B, C, H, W) along both axes, (B,).

    Where images are smooth and noise is not, that is noise alone (Immerkaer 1996).
    """
    rows = residual[..., 2:, :] - 2 * residual[..., 1:-1, :] + residual[..., :-2, :]
    return (rows[..., 2:] - 2 * rows[..., 1:-1] + rows[..., :-2]).abs().flatten(1).mean(1)


# What is measured of a residual.
MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"energy": energy, "highpass": highpass}


@dataclass(frozen=True)
class LambdaLine:
    """lambda = a * r + b, between `low` and `high`.

    r: the `measure`, of `MEASURES`, of an image's residual at lambda `reference`, or a mean of such. 0 <= low <= high.
    Raises: ValueError for other numbers, and an unknown measure.
    """

    a: float
    b: float
    low: float
    high: float
    reference: float
    measure: str = "energy"

    def __post_init__(self) -> None:
        numbers = (self.a, self.b, self.low, self.high, self.reference)
        if self.measure not in MEASURES:
            raise ValueError(f"measures of a residual are {', '.join(MEASURES)}, got {self.measure!r}")
        if not all(map(math.isfinite, numbers)) or not 0 <= self.low <= self.high or not self.reference >= 0:
            raise ValueError(f"a line needs finite numbers, 0 <= low <= high and a reference >= 0, got {self}")

    def predict(self, measured: Tensor) -> Tensor:
        """Lambda for measured residuals of any shape. Differentiable where it is not clipped."""
        return (self.a * measured + self.b).clamp(self.low, self.high)


def fit_line(
    measured: Sequence[float],
    lambdas: Sequence[float],
    low: float,
    high: float,
    reference: float,
    measure: str = "energy",
) -> LambdaLine:
    """The least-squares line through L points (measured residual, best lambda), in float64.

    Where all residuals are equal, or there is a single one, nothing can be told from them: the line is constant.
    Raises: ValueError for no points, or not as many residuals as lambdas.
    """
    x, y = np.asarray(measured, np.float64), np.asarray(lambdas, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"a line needs as many residuals as lambdas, at least one, got {x.shape} and {y.shape}")
    dx, dy = x - x.mean(), y - y.mean()
    spread = float(dx @ dx)
    # Residuals that differ by rounding alone are equal.
    constant = np.ptp(x) <= 1e-9 * np.abs(x).max() or np.ptp(y) == 0
    a = 0.0 if constant else float(dx @ dy) / spread
    return LambdaLine(a, float(y.mean() - a * x.mean()), low, high, reference, measure)


def residual(stem: CSC2d, x: Tensor, reference: float) -> Tensor:
    """x - A(z) of images x (B, C, H, W), with their code z at lambda `reference`, float32 or float64.

    Whatever lambda the layer has; it keeps it. Gradients flow to x.
    """
    # In bfloat16 the difference would have lost digits that lambda depends on.
    with torch.autocast(x.device.type, enabled=False), _lambda(stem, reference):
        x = full_precision(x)
        z = stem.forward(x)  # Not by a call, which would run the hook that asks for the residual.
        return x - stem.synthesise(z, x.shape[2:])


@contextlib.contextmanager
def fixed(net: nn.Module, lam: float | Tensor) -> Iterator[None]:
    """Within, the stem has this lambda: one for all images, or (B,) for batches of B. Afterwards that of before."""
    with _lambda(_stem(net), lam):
        yield


def follow(net: nn.Module, line: LambdaLine, per: str = "image") -> Callable[[], None]:
    """From now on, the stem's lambda of every batch is that which `line` predicts from its residual.

    per: of `PER`. `image`: from the residual of each image, so that none depends on others; `batch`: from their mean.
    Gradients flow through the prediction, so that an attack can be aware of it. Nothing waits for the device.
    Returns a function that ends it and puts back the lambda of before.
    Raises: ValueError for a network without sparse coding.
    """
    if per not in PER:
        raise ValueError(f"per must be one of {', '.join(PER)}, got {per!r}")

    def predict(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, CSC2d)
        found = MEASURES[line.measure](residual(layer, inputs[0], line.reference))
        layer.set_lambda(line.predict(found if per == "image" else found.mean()))

    return _hook(net, predict)


@contextlib.contextmanager
def adaptive(net: nn.Module, line: LambdaLine, per: str = "image") -> Iterator[None]:
    """`follow` within; afterwards the stem has the lambda of before, even after an error."""
    end = follow(net, line, per)
    try:
        yield
    finally:
        end()


@contextlib.contextmanager
def measured(net: nn.Module, reference: float) -> Iterator[Callable[[], Tensor]]:
    """Within, a function that returns the residual of the batch that went through the network last."""
    last: list[Tensor] = []

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, CSC2d)
        last[:] = [residual(layer, inputs[0], reference)]

    end = _hook(net, measure)
    try:
        yield lambda: last[0]
    finally:
        end()


def _stem(net: nn.Module) -> CSC2d:
    found = stem_of(net)
    if found is None:
        raise ValueError("the network has no layer of sparse coding")
    return found


@contextlib.contextmanager
def _lambda(layer: CSC2d, lam: float | Tensor) -> Iterator[None]:
    before = layer.lam
    layer.set_lambda(lam)
    try:
        yield
    finally:
        layer.lam = before


def _hook(net: nn.Module, hook: Callable[[nn.Module, tuple[Tensor, ...]], None]) -> Callable[[], None]:
    """Run `hook` before each forward pass of the stem. Returns a function that ends it."""
    layer = _stem(net)
    before, handle = layer.lam, layer.register_forward_pre_hook(hook)

    def end() -> None:
        handle.remove()
        layer.lam = before

    return end
