"""The robust autoencoder: X = L + S, where an autoencoder reconstructs L well and S is sparse.

Zhou & Paffenroth, "Anomaly Detection with Robust Deep Autoencoders", KDD 2017. In rounds: the autoencoder is trained on
X - S, L is what it makes of it, and S becomes prox(X - L). The order is borrowed from ADMM and alternating projections;
it is a heuristic, which descends no common objective, and nothing guarantees that it converges.

Letters: see `models.autoencoder`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from common.seed import generator, seed_of
from models.sparse.prox import soft, soft_group

# Rows that are reconstructed at a time.
_BLOCK = 4096


class Penalty(NamedTuple):
    """What makes S sparse, one of `PENALTIES`.

    prox(v, threshold): its proximal operator. sizes(v): what is compared with the threshold: absolute values of entries
    (N, n), norms of rows (N,) or of columns (n,).
    """

    prox: Callable[[Tensor, float], Tensor]
    sizes: Callable[[Tensor], Tensor]


def _norms(dim: int) -> Penalty:
    return Penalty(partial(soft_group, dim=dim), partial(torch.linalg.vector_norm, dim=dim))


# Entries: noise. Rows: outlying instances. Columns: corrupted features.
PENALTIES = {"l1": Penalty(soft, torch.abs), "l21_rows": _norms(1), "l21_cols": _norms(0)}

STOPS: dict[str, Callable[[bool, bool], bool]] = {
    "c2": lambda c1, c2: c2,
    "any": lambda c1, c2: c1 or c2,
    "all": lambda c1, c2: c1 and c2,
}


@dataclass(frozen=True)
class Threshold:
    """How the threshold t of the proximal operator is found; in the units of the data.

    value: t itself; None: in each round the (1 - contamination) quantile of the residual's entries, row norms or column
    norms, so that S has that share of them. No labels are needed for either. A quantile of the first round alone, kept
    for all, would soon flag nothing: the residuals shrink while training goes on.
    """

    value: float | None = None
    contamination: float = 0.1

    def __post_init__(self) -> None:
        if self.value is not None and not self.value > 0:
            raise ValueError(f"the threshold must be > 0, got {self.value}")
        if not 0 < self.contamination < 1:
            raise ValueError(f"the contamination must lie in (0, 1), got {self.contamination}")

    def of(self, residual: Tensor, penalty: Penalty) -> float:
        """t, from X - L (N, n) of a round."""
        if self.value is not None:
            return self.value
        return threshold_from_contamination(self.contamination, residual, penalty)


def threshold_from_contamination(contamination: float, residual: Tensor, penalty: Penalty) -> float:
    """The (1 - contamination) quantile of the sizes of X - L (N, n)."""
    sizes = penalty.sizes(residual).flatten().sort().values
    # torch.quantile refuses more than 16 million values.
    place = (1 - contamination) * (len(sizes) - 1)
    low = int(place)
    below, above = sizes[[low, min(low + 1, len(sizes) - 1)]].tolist()
    return below + (place - low) * (above - below)


def mu(X: Tensor) -> float:
    """mu = N n / (4 sum |X|), of the literature on robust PCA; infinite where X is 0."""
    return float(1 / (4 * X.abs().mean(1).mean()))


def threshold_from_lambda_mu(lam: float, X: Tensor) -> float:
    """lambda / mu: what the literature on robust PCA, and the authors' program for `l1`, make of a lambda."""
    return lam / mu(X)


def threshold_from_lambda_n(lam: float, rows: int) -> float:
    """lambda N: what the authors' program for the l2,1 penalties makes of a lambda."""
    return lam * rows


class Round(NamedTuple):
    """After one round: L and S (N, n), and how far they are from X and from the round before.

    c1 = |X - L - S| / |X|, c2 = |L' + S' - L - S| / |X| with L' + S' of the round before, X at first (Frobenius norms;
    not divided where X is 0). X - L - S is what the threshold has cut off: c1 goes to 0 only where the autoencoder
    reconstructs X - S exactly, c2 wherever L + S stands still.
    """

    L: Tensor
    S: Tensor
    c1: float
    c2: float
    threshold: float


def end_round(X: Tensor, L: Tensor, before: Tensor, penalty: Penalty, threshold: float) -> Round:
    """S and the criteria, from L, what the autoencoder has made of X - S.

    before: L + S of the round before, at first X.
    """
    S = penalty.prox(X - L, threshold)
    norm, both = _norm(X) or 1.0, L + S
    c1, c2 = (_norm(part - both) / norm for part in (X, before))
    return Round(L, S, c1, c2, threshold)


def _norm(x: Tensor) -> float:
    """Frobenius norm, by rows: one sum of millions of squares in float32 is off by 1e-4."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=1)))


def stopped_by(c1: float, c2: float, stop: str, eps: float) -> str | None:
    """Which criterion ends the rounds: "c1", "c2", or None; "c1" where both do. stop: one of `STOPS`."""
    if not STOPS[stop](c1 < eps, c2 < eps):
        return None
    return "c1" if c1 < eps and stop != "c2" else "c2"


class LStep(Protocol):
    """What reconstructs rows (N, n), of any N; `fit` trains it, anew or further, in each round."""

    def fit(self, rows: Tensor) -> Any: ...

    def reconstruct(self, rows: Tensor) -> Tensor: ...


class Separation(NamedTuple):
    """X = L + S. history: of each round c1, c2 and the threshold. stopped_by: "c1", "c2" or "rounds"."""

    L: Tensor
    S: Tensor
    history: dict[str, list[float]]
    rounds: int
    stopped_by: str
    threshold: float


def separate(
    X: Tensor,
    step: LStep,
    *,
    penalty: str = "l21_rows",
    threshold: Threshold = Threshold(),
    rounds: int = 20,
    stop: str = "c2",
    eps: float = 1e-3,
) -> Separation:
    """The algorithm on X (N, n), with anything that can reconstruct in the autoencoder's place.

    penalty: one of `PENALTIES`. rounds: at most. stop: `c2`, `any` as in the paper, or `all` as in its programs;
    eps <= 0 never stops. Raises: ValueError for no rounds, and for a reconstruction that is not finite.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    rule, S, before, t = PENALTIES[penalty], torch.zeros_like(X), X, 0.0
    history: dict[str, list[float]] = {"c1": [], "c2": [], "threshold": []}
    for number in range(1, rounds + 1):
        clean = X - S
        step.fit(clean)
        L = step.reconstruct(clean)
        t = threshold.of(X - L, rule)
        found = end_round(X, L, before, rule, t)
        if not math.isfinite(found.c1):
            raise ValueError(f"the reconstruction of round {number} is not finite: lower lr, or scale the data")
        S, before = found.S, found.L + found.S
        for name, values in history.items():
            values.append(getattr(found, name))
        ended = stopped_by(found.c1, found.c2, stop, eps)
        if ended:
            break
    return Separation(found.L, S, history, number, ended or "rounds", t)


@torch.no_grad()
def reconstruct(net: nn.Module, rows: Tensor) -> Tensor:
    """Reconstructions (N, n), in blocks."""
    return torch.cat([net(block) for block in rows.split(_BLOCK)])


def adam(net: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam, in one kernel for all weights where the device has it."""
    parameters = list(net.parameters())
    return torch.optim.Adam(
        parameters, lr, weight_decay=weight_decay, fused=parameters[0].device.type in ("cpu", "cuda")
    )


def draw_weights(make: Callable[[], nn.Module], seed: int, turn: int = 0) -> nn.Module:
    """A network, made on the CPU, whose weights follow from the seed; turn: how often they have been drawn before.

    Torch's global state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds GPUs as well, for good.
        torch.default_generator.manual_seed(seed_of(seed, "weights", *([turn] if turn else [])))
        return make()


def restart(
    net: nn.Module, optimizer: torch.optim.Optimizer, make: Callable[[], nn.Module], seed: int, turn: int
) -> None:
    """Give a network fresh weights, and its optimizer no memory."""
    net.load_state_dict(draw_weights(make, seed, turn).state_dict())
    optimizer.state.clear()


@dataclass
class Gradients:
    """An `LStep` by mini-batches: `epochs` of Adam in each round, which go on from the weights of the round before.

    make: makes a network. reinit: draw its weights anew in each round. device, dtype: of the network, and of the rows
    that it is given. losses: of each round, the mean loss of its last epoch. Two runs of one seed agree, and they agree
    with a training run of `train.py --mode rdae`.
    """

    make: Callable[[], nn.Module]
    epochs: int
    lr: float
    batch_size: int
    seed: int
    reinit: bool = False
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.net = draw_weights(self.make, self.seed).to(self.device, self.dtype)
        self.optimizer = adam(self.net, self.lr)
        self._rounds = 0

    def fit(self, rows: Tensor) -> None:
        """Train on rows (N, n), shuffled in each epoch; appends to `losses`."""
        if self._rounds and self.reinit:
            restart(self.net, self.optimizer, self.make, self.seed, self._rounds)
        first = self._rounds * self.epochs + 1
        self._rounds += 1
        for epoch in range(first, first + self.epochs):
            order = torch.randperm(len(rows), generator=generator(self.seed, "order", epoch))
            shuffled = rows[order.to(rows.device, non_blocking=True)]
            # Read once a round: reading it waits for the device.
            total = torch.zeros((), device=rows.device)
            for step, batch in enumerate(batches(shuffled, self.batch_size)):
                loss = batch_losses(self.net, batch, self.seed, epoch, step).mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                total += loss.detach() * len(batch)
        self.losses.append(float(total) / len(rows))

    def reconstruct(self, rows: Tensor) -> Tensor:
        return reconstruct(self.net, rows)


def batches(rows: Tensor, size: int) -> Iterable[Tensor]:
    """Rows in batches, in order; a last one of a single row joins the one before, as in every training run."""
    ends = list(range(size, len(rows), size))
    if size > 1 and ends and len(rows) - ends[-1] == 1:
        del ends[-1]
    return rows.tensor_split(ends)


def batch_losses(
    net: Any, rows: Tensor, seed: int, epoch: int, step: int, own: Tensor | None = None, size: int | None = None
) -> Tensor:
    """The loss of each row (B,), with the draws of a step where the network samples.

    own: which rows of a larger batch of `size` they are, for a batch that several processes share.
    """
    latents = getattr(net, "latents", None)
    if latents is None:
        return net.losses(rows)
    gen = generator(seed, "latents", epoch, step, device=rows.device)
    eps = torch.randn(size or len(rows), latents, generator=gen, device=rows.device, dtype=rows.dtype)
    return net.losses(rows, eps if own is None else eps[own])
