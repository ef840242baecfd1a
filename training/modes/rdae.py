"""Autoencoders: robust (`rdae`), and without a sparse part plain (`dae`) and variational (`vae`).

The algorithm is in `models.autoencoder.robust`; the training loop does its L-step, the end of a round its S-step.
Letters: N images, n entries of each, B images of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common.dist import SINGLE, World
from common.errors import UserError
from common.flags import Flags
from common.run import Run
from datasets import Loading, Split
from datasets.table import Table
from models.autoencoder.networks import AutoencoderSpec, TruncatedSVD
from models.autoencoder.robust import (
    PENALTIES,
    adam,
    batch_losses,
    draw_weights,
    end_round,
    reconstruct,
    restart,
    stopped_by,
)
from models.autoencoder.robust_net import RobustNet
from models.autoencoder.specs import RoundsSpec, SeparationSpec
from models.checkpoint import autoencoder_spec
from training.modes.setup import own_device, sheet
from training.optim import RateSpec
from training.recipe import Batch, EpochEnd, Recipe, Shown, Step
from training.specs import CompileSpec

# The mode that trains an autoencoder without a sparse part; an exact one is for `rdae` alone.
_PLAIN = {"dense": "dae", "conv": "dae", "vae": "vae", "svd": "rdae"}
# Images in a picture of X, L and S.
_SHOWN = 8


def rounds_and_epochs(flags: Flags) -> int:
    """How many epochs `rdae` trains. Raises: UserError where --epochs asks for another number."""
    spec = _rounds(flags)
    if flags.given("epochs"):
        raise UserError(f"--epochs: --mode {flags.mode} trains --rounds times --inner_epochs epochs; leave it out")
    return spec.rounds * spec.inner_epochs


def _rounds(flags: Flags) -> RoundsSpec:
    """From the flags; an exact network is fitted once a round, whatever those of gradients say."""
    exact = flags.of(AutoencoderSpec, only=["autoencoder"]).autoencoder == "svd"
    spec = flags.of(RoundsSpec, only=["rounds", "stop", "eps", *([] if exact else ["inner_epochs", "reinit"])])
    return replace(spec, inner_epochs=1) if exact else spec


def robust_name(flags: Flags) -> Sequence[str]:
    """The part of a robust run's name: the network, the penalty and where the threshold comes from."""
    spec = flags.of(SeparationSpec)
    lam = "" if spec.threshold_from == "data" else f"_{spec.threshold_from}"
    cut = f"q{spec.contamination}" if spec.threshold is None else f"t{spec.threshold}{lam}"
    return [flags.of(AutoencoderSpec, only=["autoencoder"]).autoencoder, flags.mode, spec.penalty, cut]


def plain_name(flags: Flags) -> Sequence[str]:
    """The part of the name of `dae`: its network."""
    return [flags.of(AutoencoderSpec, only=["autoencoder"]).autoencoder, flags.mode]


def build(flags: Flags, split: Split, world: World = SINGLE) -> Recipe:
    """The recipe of `rdae`: epochs on X - S, and after every `inner_epochs` of them S <- prox(X - L).

    Raises: UserError for data and networks that do not fit.
    """
    sparse, spec = flags.of(SeparationSpec), _rounds(flags)
    if sparse.threshold is not None and flags.given("contamination"):
        raise UserError("--contamination: the threshold follows from it or is --threshold; leave one of them out")
    table, net, optimizers, make = _set_up(flags, split, world, robust=True)
    X, penalty, seed = table.rows.to(table.device), PENALTIES[sparse.penalty], flags.seed
    threshold = sparse.rule(X)

    def end_epoch(epoch: int) -> EpochEnd:
        number, within = divmod(epoch, spec.inner_epochs)
        if within:
            return EpochEnd()
        clean = X - net.S
        if isinstance(net.autoencoder, TruncatedSVD):
            net.autoencoder.fit(clean)
        L = reconstruct(net.autoencoder, clean)
        world.broadcast([L])  # Other hardware rounds otherwise; all ranks have to converge in the same round.
        before = X if number == 1 else net.L + net.S
        t = threshold.of(X - L, penalty)
        found = end_round(X, L, before, penalty, t)
        net.L.copy_(found.L)
        net.S.copy_(found.S)
        net.threshold.fill_(t)
        converged = world.broadcast_object(stopped_by(found.c1, found.c2, spec.stop, spec.eps) is not None)
        if spec.reinit and optimizers and not converged and number < spec.rounds:
            restart(net.autoencoder, optimizers[0], make, seed, number)
        kept = float((penalty.sizes(found.S) > 0).float().mean())
        values = {"rdae/c1": found.c1, "rdae/c2": found.c2, "rdae/threshold": t, "rdae/nonzero": kept}
        return EpochEnd(values, converged)

    def show(epoch: int) -> Shown:
        if table.shape is None:
            return Shown({}, {})
        some = [part[:_SHOWN].unflatten(1, table.shape) for part in (X, net.L, net.S.abs())]
        return Shown({"X, L, |S|": sheet(torch.stack(some).clamp(0, 1)).cpu()}, {})

    def begin(run: Run) -> None:
        if sparse.threshold_from != "data":
            lam = f"--threshold_from {sparse.threshold_from}: lambda {sparse.threshold}"
            run.say(f"{lam} is a threshold of {threshold.value:.6g}")

    return _recipe(flags, net, table, optimizers, end_epoch=end_epoch, show=show, begin=begin)


def build_plain(flags: Flags, split: Split, world: World = SINGLE) -> Recipe:
    """The recipe of `dae` and `vae`: the same networks and updates without a sparse part.

    Raises: UserError for an autoencoder of another mode, and as `build`.
    """
    kind = flags.of(AutoencoderSpec, only=["autoencoder"]).autoencoder
    if flags.mode != _PLAIN[kind]:
        raise UserError(f"--autoencoder {kind}: --mode {flags.mode} has another; give --mode {_PLAIN[kind]}")
    table, net, optimizers, _ = _set_up(flags, split, world, robust=False)
    return _recipe(flags, net, table, optimizers)


def _set_up(
    flags: Flags, split: Split, world: World, *, robust: bool
) -> tuple[Table, RobustNet, tuple[Optimizer, ...], Callable[[], nn.Module]]:
    """The data matrix, the network with its buffers, its optimizers and what draws its weights."""
    device, spec, seed = own_device(flags, world), autoencoder_spec(flags), flags.seed
    table = split.train_table().to(device)
    kind = spec.autoencoder
    _check(spec, table, robust=robust)
    rows, features = table.rows.shape
    make = partial(spec.build, kind, features, table.shape)
    net = RobustNet(draw_weights(make, seed), rows if robust else 0, features, table.shape).to(device)
    if flags.of(CompileSpec).compile:
        net.autoencoder.compile()
    if kind == "svd":
        return table, net, (), make
    rates = flags.of(RateSpec)
    return table, net, (adam(net.autoencoder, rates.lr_init, rates.weight_decay),), make


def _recipe(flags: Flags, net: RobustNet, table: Table, optimizers: tuple[Optimizer, ...], **hooks: Any) -> Recipe:
    seed, robust = flags.seed, len(net.S) > 0

    def losses(batch: Batch) -> Step:
        own = batch.shard.indices(table.device)[: batch.shard.size]
        rows = batch.local_images[0].to(net.S.dtype)
        if robust:
            rows = rows - net.S[batch.index[own]]
        found = batch_losses(net.autoencoder, rows, seed, batch.epoch, batch.step, own, batch.shard.batch)
        return Step({"fit": batch.shard.all_gather(found).mean()}, {})

    loading = Loading(flip=False, channels=None)
    return Recipe(net, table, losses, optimizers, loading=loading, **hooks)


def _check(spec: AutoencoderSpec, table: Table, *, robust: bool) -> None:
    """Raises: UserError for a network that the data does not fit."""
    rows, features = table.rows.shape
    kind, code = spec.autoencoder, spec.layers[-1]
    bernoulli = kind == "vae" and spec.likelihood == "bernoulli"
    if bernoulli and robust:
        raise UserError("--likelihood bernoulli: X - S leaves [0, 1]; give --likelihood gaussian")
    if kind == "conv" and table.shape is None:
        raise UserError("--autoencoder conv: a table has no pictures to convolve; give dense or svd")
    if kind == "svd" and code > min(rows, features):
        raise UserError(
            f"--layers {code}: --autoencoder svd has at most {min(rows, features)} components here; give fewer"
        )
    if kind == "svd":
        return
    # Noise on pictures may leave [0, 1]; what is to be reconstructed does not.
    data = table.rows if kind == "vae" or table.clean is None else table.clean
    low, high = float(data.min()), float(data.max())
    outside = f"values of the data lie in [{low:.4g}, {high:.4g}], not in [0, 1]"
    if low < 0 or high > 1:
        if bernoulli:
            raise UserError(f"--likelihood bernoulli: {outside}; give --likelihood gaussian")
        if kind != "vae" and spec.output == "sigmoid":
            raise UserError(f"--output sigmoid: {outside}; give --output linear, or scale the data")
