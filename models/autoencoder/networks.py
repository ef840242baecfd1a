"""Autoencoders of rows: dense, convolutional, variational, and the linear one that needs no training.

All map rows (B, n) to reconstructions (B, n) by `forward` and to codes by `encode`; `losses` gives what training
minimises, one value a row (B,). Weights are drawn by torch's global generator (`robust.draw_weights` seeds it).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.flags import Spec, flag


def identity(x: Tensor) -> Tensor:
    """x."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": identity,
}
OUTPUTS = {name: ACTIVATIONS[name] for name in ("sigmoid", "linear")}
LIKELIHOODS = ("bernoulli", "gaussian")

T = TypeVar("T")


@dataclass(frozen=True)
class AutoencoderSpec(Spec, group="autoencoder"):
    """The autoencoder. Sizes of layers: those after the input, the last is the code's."""

    autoencoder: str = flag(
        "dense",
        "dense, conv (pictures), vae (variational), or svd: the best linear one of that code size, exact (robust PCA)",
        choices=lambda: ("dense", "conv", "vae", "svd"),
        origin="fixed",
    )
    layers: Sequence[int] = flag(
        (400, 200), "sizes of the layers after the input, the code's last", type=int, nargs="+", above=0, origin="fixed"
    )
    widths: Sequence[int] = flag(
        (16, 32), "conv: channels of its layers, each halves the picture", type=int, nargs="+", above=0, origin="fixed"
    )
    activation: str = flag(
        "sigmoid", "of hidden layers; the code is linear", choices=lambda: tuple(ACTIVATIONS), origin="fixed"
    )
    output: str = flag(
        "sigmoid",
        "activation of the output: sigmoid for data in [0, 1]",
        choices=lambda: tuple(OUTPUTS),
        origin="fixed",
    )
    tied: bool = flag(False, "dense: the decoder has the encoder's weights, transposed", origin="fixed")
    likelihood: str = flag(
        "bernoulli",
        "vae: bernoulli (data in [0, 1]) or gaussian reconstruction term",
        choices=lambda: LIKELIHOODS,
        origin="fixed",
    )
    beta: float = flag(1.0, "vae: weight of the KL term", at_least=0)
    sigma: float = flag(0.1, "vae, gaussian: standard deviation of the reconstruction", above=0, origin="fixed")

    def build(self, kind: str, features: int, shape: tuple[int, int, int] | None) -> nn.Module:
        """A network with fresh weights for rows of `features` entries; `conv` needs the images' shape.

        kind: of `--autoencoder`. Raises: ValueError for `conv` without a shape.
        """
        if kind == "vae":
            return VariationalAutoencoder(
                (features, *self.layers),
                activation=self.activation,
                likelihood=self.likelihood,
                beta=self.beta,
                sigma=self.sigma,
            )
        if kind == "conv":
            if shape is None:
                raise ValueError("a convolutional autoencoder needs pictures")
            return ConvAutoencoder(
                shape, widths=self.widths, code=self.layers[-1], activation=self.activation, output=self.output
            )
        if kind == "svd":
            return TruncatedSVD(features, self.layers[-1])
        sizes = (features, *self.layers)
        return Autoencoder(sizes, activation=self.activation, output=self.output, tied=self.tied)


def squared_error(net: Any, rows: Tensor) -> Tensor:
    """Mean squared error of the reconstruction of each row, (B,)."""
    return F.mse_loss(net(rows), rows, reduction="none").mean(1)


def _known(table: Mapping[str, T], what: str, name: str) -> T:
    """Raises: ValueError for a name that the table does not have."""
    if name not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}, got {name!r}")
    return table[name]


def _pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Inputs and outputs of each layer. Raises: ValueError for no layers."""
    if len(sizes) < 2:
        raise ValueError("an autoencoder needs one layer at least: the code")
    return list(zip(sizes[:-1], sizes[1:], strict=True))


class Autoencoder(nn.Module):
    """Dense: linear layers of sizes (n, ..., code) and back, activations between them, a linear code.

    activation: one of `ACTIVATIONS`. output: one of `OUTPUTS`. tied: the decoder's weights are the encoder's
    transposed, with biases of its own. Raises: ValueError for other names, and for fewer than two sizes.
    """

    def __init__(
        self, sizes: Sequence[int], *, activation: str = "sigmoid", output: str = "sigmoid", tied: bool = False
    ) -> None:
        super().__init__()
        pairs = _pairs(sizes)
        self.encoder = nn.ModuleList(_linear(i, o) for i, o in pairs)
        self.decoder = nn.ModuleList(_Bias(i) if tied else _linear(o, i) for i, o in reversed(pairs))
        self.activation, self.output = _known(ACTIVATIONS, "activation", activation), _known(OUTPUTS, "output", output)
        self.tied = tied

    def encode(self, rows: Tensor) -> Tensor:
        """Codes (B, sizes[-1])."""
        return _through(self.encoder, rows, self.activation)

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstructions (B, n)."""
        layers: Any = self.decoder
        if self.tied:
            both: Any = zip(reversed(self.encoder), self.decoder, strict=True)
            layers = [partial(F.linear, weight=theirs.weight.T, bias=own.bias) for theirs, own in both]
        return self.output(_through(layers, codes, self.activation))

    def forward(self, rows: Tensor) -> Tensor:
        return self.decode(self.encode(rows))

    losses = squared_error


class _Bias(nn.Module):
    """The bias of a layer whose weights belong to another."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Weights uniform within +-sqrt(6 / (inputs + outputs)) (Glorot & Bengio 2010), no bias to begin with."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _through(layers: Any, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """x through layers with the activation between them, none after the last."""
    for depth, layer in enumerate(layers):
        x = layer(activation(x) if depth else x)
    return x


class ConvAutoencoder(nn.Module):
    """For rows that are flattened images of `shape` (channels, H, W), of any size.

    Strided 3 x 3 convolutions of `widths` channels, each to half the size, rounded up; a linear layer to `code` numbers
    and one back; nearest-neighbour enlargement and convolutions. Raises: ValueError for names of no activation.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        widths: Sequence[int] = (16, 32),
        code: int = 64,
        activation: str = "sigmoid",
        output: str = "sigmoid",
    ) -> None:
        super().__init__()
        pairs = _pairs([shape[0], *widths])
        self.shape, self.sizes = shape, _halved(shape[1:], len(widths))
        self.down = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairs)
        inner = widths[-1] * math.prod(self.sizes[-1])
        self.to_code, self.from_code = _linear(inner, code), _linear(code, inner)
        self.up = nn.ModuleList(nn.Conv2d(o, i, 3, padding=1) for i, o in reversed(pairs))
        self.activation, self.output = _known(ACTIVATIONS, "activation", activation), _known(OUTPUTS, "output", output)

    def encode(self, rows: Tensor) -> Tensor:
        """Codes (B, code)."""
        x = rows.unflatten(1, self.shape)
        for layer in self.down:
            x = self.activation(layer(x))
        return self.to_code(x.flatten(1))

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstructions (B, n)."""
        x = self.from_code(codes).unflatten(1, (-1, *self.sizes[-1]))
        for layer, size in zip(self.up, reversed(self.sizes[:-1]), strict=True):
            x = layer(F.interpolate(self.activation(x), size))
        return self.output(x.flatten(1))

    def forward(self, rows: Tensor) -> Tensor:
        return self.decode(self.encode(rows))

    losses = squared_error


def _halved(size: Sequence[int], times: int) -> list[tuple[int, ...]]:
    """Sizes before and after each halving, rounded up."""
    sizes = [tuple(size)]
    for _ in range(times):
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    return sizes


class VariationalAutoencoder(nn.Module):
    """Kingma & Welling 2014: dense, with a normal distribution over codes; `forward` decodes its mean.

    sizes: (n, ..., latents). likelihood: `bernoulli`, whose output is a probability, or `gaussian` of standard
    deviation `sigma`, with a linear output. beta: weight of the KL term. Raises: ValueError for other names, and for
    fewer than two sizes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: str = "sigmoid",
        likelihood: str = "bernoulli",
        beta: float = 1.0,
        sigma: float = 0.1,
    ) -> None:
        super().__init__()
        *pairs, _ = _pairs(sizes)
        hidden, latents = sizes[-2:]
        self.encoder = nn.ModuleList(_linear(i, o) for i, o in pairs)
        self.mean, self.log_variance = _linear(hidden, latents), _linear(hidden, latents)
        self.decoder = nn.ModuleList([_linear(latents, hidden), *(_linear(o, i) for i, o in reversed(pairs))])
        self.activation = _known(ACTIVATIONS, "activation", activation)
        self.likelihood = _known({name: name for name in LIKELIHOODS}, "likelihood", likelihood)
        self.beta, self.sigma, self.latents = beta, sigma, latents

    def distribution(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the codes, each (B, latents)."""
        x = rows
        for layer in self.encoder:
            x = self.activation(layer(x))
        return self.mean(x), self.log_variance(x)

    def encode(self, rows: Tensor) -> Tensor:
        """Means of the codes (B, latents)."""
        return self.distribution(rows)[0]

    def _raw(self, codes: Tensor) -> Tensor:
        """Logits of a bernoulli, means of a gaussian, (B, n)."""
        return _through(self.decoder, codes, self.activation)

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstructions (B, n)."""
        raw = self._raw(codes)
        return raw if self.likelihood == "gaussian" else raw.sigmoid()

    def forward(self, rows: Tensor) -> Tensor:
        return self.decode(self.encode(rows))

    def losses(self, rows: Tensor, eps: Tensor) -> Tensor:
        """Of each row: reconstruction term + beta KL, (B,); eps (B, latents): standard normal draws.

        With beta 1 the negative evidence lower bound, constants left out.
        """
        mean, log_variance = self.distribution(rows)
        raw = self._raw(reparametrized(mean, log_variance, eps))
        return reconstruction_term(raw, rows, self.likelihood, self.sigma) + self.beta * kl(mean, log_variance)


def reparametrized(mean: Tensor, log_variance: Tensor, eps: Tensor) -> Tensor:
    """Samples of normal distributions, made of standard normal draws `eps`; all of one shape."""
    return mean + (log_variance / 2).exp() * eps


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Divergence of normal distributions (B, latents) from the standard one, summed over latents: (B,), >= 0."""
    # expm1: exp(v) - 1 - v cancels near 0, down to values below 0.
    return 0.5 * (mean.square() + (log_variance.expm1() - log_variance)).sum(1)


def reconstruction_term(raw: Tensor, rows: Tensor, likelihood: str, sigma: float = 1.0) -> Tensor:
    """Negative log-likelihood of rows (B, n), constants left out, summed over entries: (B,).

    raw (B, n): logits of a `bernoulli`, means of a `gaussian` of standard deviation `sigma`.
    """
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(raw, rows, reduction="none").sum(1)
    return (raw - rows).square().sum(1) / (2 * sigma**2)


class TruncatedSVD(nn.Module):
    """The linear autoencoder without biases that reconstructs a matrix best, by its singular vectors; no centring."""

    components: Tensor

    def __init__(self, features: int, rank: int) -> None:
        super().__init__()
        if not 0 < rank <= features:
            raise ValueError(f"the rank must lie in 1..{features}, got {rank}")
        self.register_buffer("components", torch.zeros(features, rank))

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Take the first right singular vectors of rows (N, n), computed in float64.

        Raises: ValueError for fewer rows than components.
        """
        rank = self.components.shape[1]
        if len(rows) < rank:
            raise ValueError(f"{rank} components need as many rows, there are {len(rows)}")
        exact = (rows.cpu() if rows.device.type == "mps" else rows).double()  # Apple's GPUs have no float64.
        # R of rows = Q R has the same right singular vectors; the left ones, half of the work, nobody needs.
        _, _, vectors = torch.linalg.svd(torch.linalg.qr(exact, mode="r").R, full_matrices=False)
        self.components.copy_(vectors[:rank].T)

    def encode(self, rows: Tensor) -> Tensor:
        """Codes (B, rank)."""
        return rows @ self.components

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstructions (B, n)."""
        return codes @ self.components.T

    def forward(self, rows: Tensor) -> Tensor:
        return self.decode(self.encode(rows))

    losses = squared_error
