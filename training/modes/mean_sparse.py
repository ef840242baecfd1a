"""MeanSparse (arXiv 2406.05927) behind the training of any network with a backbone: operators and their statistics. No
weight changes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from common.dist import SINGLE, World
from common.errors import UserError
from common.flags import Flags, Spec, WeightsSpec, flag
from common.progress import progress
from common.run import Run, epoch_of, recorded_flags
from datasets import ImageSet, PictureSet, ShiftSpec, Split
from datasets.augment import AlignedSpec
from datasets.shifts import rotations_and_translations
from datasets.views import DrawSpec, batches_of, draw_views
from models import ModelSpec
from models.checkpoint import find_weights, kind_of, load_net, read_state
from models.mean_sparse import (
    STATISTICS,
    AlphaSpec,
    gather,
    insert,
    merged,
    operator_names,
    operators,
    put_statistics,
    sparsify,
)
from models.placements import PLACEMENTS
from training.modes.setup import own_device
from training.optim import LengthSpec
from training.recipe import Recipe, no_step
from training.specs import StepSpec

T = TypeVar("T")
# Flags of this mode, which the weights do not say of their training.
_OWN = ("placement", "stats", "ms_alpha")
# Of a run folder, the weights that are taken.
FILES = ("last.model",)
# What weights that do not say what they were trained by are taken to be trained by.
_ASSUMED = {
    "classifier": "supervised",
    "ra_classifier": "adv_trades",
    "feature": "simclr_CSI",
    "rot_trans": "rot_trans",
}
# Networks without a backbone of their own, and what to do instead.
_REFUSED = {
    "cocsr": "holds dictionaries of stage 2; sparsify the stage-1 run, and train stage 2 on that",
    "autoencoder": "is an autoencoder; MeanSparse is for networks with a backbone",
}


@dataclass(frozen=True)
class PlacementSpec(Spec, group="MeanSparse"):
    """Where operators go, and how their statistics are estimated."""

    placement: str = flag(
        "activations",
        "meansparse: before activations, or in the blocks of wide residual networks and Swin (second version)",
        choices=lambda: sorted(PLACEMENTS),
    )
    stats: str = flag("exact", "meansparse: statistics; batchwise as published", choices=lambda: STATISTICS)


def name(flags: Flags) -> list[str]:
    """Of the run's name: the mode and the placement."""
    return [flags.mode, flags.of(PlacementSpec, only=["placement"]).placement]


def build(flags: Flags, split: Split, world: World = SINGLE) -> Recipe:
    """The recipe of `meansparse`: nothing is trained. Operators get the statistics of all training images, under the
    shifts that the network's score looks at, not augmented.

    The weights say that they are of the network's own training. Raises: UserError for weights that have operators
    already, or are of a network without a backbone or of other shifts; where there is no place for an operator.
    """
    load_path = flags.of(WeightsSpec, only=["load_path"]).load_path
    if not load_path:
        raise UserError(f"--load_path: --mode {flags.mode} works on a trained network; give its run folder")
    file = find_weights(load_path, FILES, flag="load_path")
    state = read_state(file, flag="load_path")
    if operator_names(state):
        raise UserError(f"--load_path: {file} has MeanSparse operators already; give the weights before them")
    try:
        kind = kind_of(state)
    except ValueError as error:
        raise UserError(f"--load_path: {file}: {error}") from None
    if kind in _REFUSED:
        raise UserError(f"--load_path: {file} {_REFUSED[kind]}")
    if epochs := flags.of(LengthSpec).epochs:
        raise UserError(f"--epochs {epochs}: --mode {flags.mode} trains nothing; leave it out")
    for unused in filter(flags.given, ("compile", "amp")):  # They are read with other flags, without a word.
        print(f"note: --{unused} has no effect here: statistics take one pass in float32")
    shifts = ShiftSpec.of(flags).functions() if kind != "rot_trans" else rotations_and_translations()
    sizes: dict[str, Any] = {"n_shifts": len(shifts)} if kind == "feature" else {}
    model = flags.of(ModelSpec, only=["model"]).model
    net = load_net(kind, state, model=model, path=file, flag="load_path", **sizes)
    spec, alpha = flags.of(PlacementSpec), flags.of(AlphaSpec).ms_alpha or 0.0
    try:
        insert(net, spec.placement)
    except ValueError as error:
        raise UserError(f"--placement {spec.placement}: {error}") from None
    device, seed = own_device(flags, world), flags.seed
    # Not decoded as a whole where training does not do so either.
    data, net = split.stream(AlignedSpec()).to(device), net.to(device).eval()
    views = DrawSpec(shifts, None, seed, batch_size=flags.of(StepSpec).batch_size)
    with world.raise_together():
        own = _or_refused(lambda: gather(net, _views(data, views, world), rule=spec.stats))
    found = merged(world.all_gather_object(own))
    _or_refused(lambda: put_statistics(net, found))
    _or_refused(lambda: sparsify(net, alpha))

    def begin(run: Run) -> None:
        run.say(f"{len(operators(net))} operators, statistics of {len(data)} images, alpha {alpha:g}")

    return Recipe(
        net,
        data,
        no_step,
        begin=begin,
        first_epoch=epoch_of(file, flag="load_path") or 0,
        recorded={"mode": _ASSUMED[kind], **_origin(recorded_flags(file))},
    )


def _or_refused(do: Callable[[], T]) -> T:
    try:
        return do()
    except ValueError as error:
        raise UserError(f"--load_path: {error}") from None


def _views(data: ImageSet | PictureSet, spec: DrawSpec, world: World) -> Iterator[Tensor]:
    """The views of this rank's images, batch by batch."""
    own = len(world.shard_list(batches_of(data, spec)))
    found = draw_views(data, spec, 0, world=world)
    return (views for _, views in progress(found, total=own, label="statistics"))


def _origin(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights are to say of their training: what those that they come from say."""
    return {name: value for name, value in recorded.items() if name not in _OWN}
