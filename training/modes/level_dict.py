"""Stage 2 at several depths: dictionaries of pixels, maps and features of a frozen stage-1 network.

Nothing is trained by gradients: dictionaries are fitted before the first epoch, and there is none. The terms of the
score get their units and weights from images that were held out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from common.dist import SINGLE, World
from common.errors import RunStopped, UserError
from common.files import read_facts
from common.flags import Flags, WeightsSpec
from common.progress import progress
from common.run import Run, epoch_of
from common.seed import generator
from datasets import ImageSet, PictureSet, ShiftSpec, Split
from datasets.augment import AlignedSpec
from datasets.views import DrawSpec, PassSpec, batches_of, draw_views
from evals.levels import transformations_of
from evals.weighing import turn, weigh
from models import ModelSpec
from models.checkpoint import find_weights, kind_of, load_net, read_state
from models.feature_net import FeatureNet, FeatureTransform, RotTransNet
from models.level_net import (
    SCALED,
    TOLERANCE,
    TRANSFORMATIONS,
    LevelNet,
    Reading,
    Transformations,
    levels_of,
    read_levels,
)
from models.sparse.dictionary import SparseSpec
from training.modes.setup import own_device, precision
from training.optim import LengthSpec
from training.recipe import Recipe, no_step

# Training images that dictionaries are fitted to, and neighbours are sought among, at most.
_IMAGES = 10_000


def build(flags: Flags, split: Split, world: World = SINGLE) -> Recipe:
    """The recipe of `level_dict`.

    Raises: UserError for weights of another kind or of other data, without held-out images, and for a level that the
    network does not have.
    """
    resume_path = flags.of(WeightsSpec, only=["resume_path"]).resume_path
    if not resume_path:
        raise UserError("--resume_path: stage 2 starts from a stage-1 run; give its folder or its last.model")
    file = find_weights(resume_path, ("last.model",), flag="resume_path")
    shifts = ShiftSpec.of(flags)
    net = _load_stage1(flags, file, shifts)
    views = transformations_of(net, shifts)
    trained = read_facts(file).get("data", {})
    split.check_trained(trained, file, flag="resume_path")
    first_epoch = epoch_of(file, flag="resume_path") or 0
    if (epochs := flags.of(LengthSpec).epochs) != first_epoch:
        raise UserError(f"--epochs {epochs}: --mode {flags.mode} has no epochs of its own; leave it out")
    device, amp, seed = own_device(flags, world), precision(flags, world), flags.seed
    data, held_out = split.training_parts(AlignedSpec())
    if held_out is None or len(held_out) < 2:
        raise UserError(
            "--held_out: the terms of the score get units and weights from training images that were set aside, and"
            " there are fewer than two; train stage 1 with --held_out auto, or with 2 or more"
        )
    data, held_out = data.to(device), held_out.to(device)
    sparse = flags.of(SparseSpec, only=["sr_dict_size", "sr_lambda_rel", "sr_rho", "sr_rho_auto"])
    share = sparse.sr_lambda_rel
    assert share is not None  # The mode has a default.
    names, batch = flags.of(FeatureTransform, only=["sr_layer"]).sr_layer, flags.of(PassSpec).ood_batch_size
    net = net.to(device).eval()

    @torch.no_grad()
    def read(
        images: ImageSet | PictureSet,
        seen: Transformations,
        label: str,
        turned: Callable[[Tensor, Tensor], Tensor] = lambda x, index: x,
    ) -> Reading:
        """What the network says of all images of a set, on all ranks. turned: (images, index) -> images."""
        spec = DrawSpec(ShiftSpec("none").functions(), None, seed, batch_size=batch)
        own = len(world.shard_list(batches_of(images, spec)))
        found = []
        for index, x in progress(draw_views(images, spec, 0, world=world), total=own, label=label):
            with amp():
                found.append(read_levels(net, turned(x, index), seen, names))
        if world.size > 1:
            found = list(chain.from_iterable(world.all_gather_object([part.to("cpu") for part in found])))
        return Reading.joined(found).to(device)

    chosen = _at_most(data, _IMAGES, seed)
    try:
        with torch.no_grad():
            one = read_levels(net, chosen.batch(torch.zeros(1, dtype=torch.long)), views, names)
    except ValueError as error:
        raise UserError(f"--sr_layer {error}; choose of {', '.join(levels_of(net))}") from None
    sizes = {name: x.shape[1] for name, x in one.levels.items()}
    # Of more centres than images, each would be an image.
    atoms = min(sparse.sr_dict_size, max(1, len(chosen) // 2))
    if atoms < sparse.sr_dict_size:
        print(f"note: --sr_dict_size {sparse.sr_dict_size}: {atoms} atoms, half as many as there are training images")
    known = (len(views.rotations), len(chosen), net.feature_dim)
    model = LevelNet(net, sizes, atoms, known, rho=sparse.sr_rho).to(device)

    def begin(run: Run) -> None:
        train = read(chosen, views.rotated, "training images")
        upright = read(held_out, views, "held-out images")
        turned = read(held_out, views, "held-out images, turned", turn)
        with world.raise_together():
            if world.is_main:
                draw = generator(seed, "k-means")
                for line in chain(
                    seen_before(data, trained, split.dataset),
                    held_out_facts(upright, views),
                    fit_levels(model, train, share, draw, choose_rho=sparse.sr_rho_auto),
                    calibrate(model, upright, turned, views),
                ):
                    run.say(line)
        world.broadcast(model.state_dict().values())
        for level in model.dictionaries.values():
            level.bank.follow_buffers()

    return Recipe(model, data, no_step, begin=begin, first_epoch=first_epoch)


def fit_levels(
    model: LevelNet, train: Reading, share: float, generator: Generator, *, choose_rho: bool = False
) -> Iterator[str]:
    """Fit dictionaries and neighbours to training images. share: lambda as a share of the median lambda_max.
    choose_rho: by the optimality gap of codes.

    Yields a line on each level, and a warning where its codes are not optimal.
    Raises: RunStopped where most images have the same features.
    """
    model.known.copy_(F.normalize(train.h, dim=2).transpose(0, 1))
    for name, level in model.dictionaries.items():
        x = train.levels[name]
        largest = level.fit(x, share=share, scaled=name in SCALED, generator=generator)
        if not largest.median() > 0:
            raise RunStopped(
                f"{name}: the {len(x)} training images hardly differ, so that there is nothing to code; give more of"
                f" them (--data_path, --held_out), or leave {name} out of --sr_layer"
            )
        if choose_rho:
            yield f"{name}: {level.bank.choose_rho(level.normalised(x).mT[None])}"
        _, of_codes = level.costs(x)
        gap, zeros = of_codes["gap"], of_codes["zeros"]
        low, median, high = (f"{largest.quantile(q).item():.4g}" for q in (0.1, 0.5, 0.9))
        atoms, lam = level.bank.dictionary.shape[2], level.bank.coding.lam
        yield (
            f"{name}: {atoms} atoms of {x.shape[1]} features, lambda {lam:.4g}, lambda_max {median} ({low} to {high}),"
            f" {100 * zeros.mean().item():.0f} % zeros, gap {gap.mean().item():.2g} lambda"
        )
        if gap.mean() > 10 * TOLERANCE:
            yield f"warning: the codes of {name} are not optimal; try --sr_rho_auto, or a smaller --sr_dict_size"


def seen_before(data: ImageSet | PictureSet, trained: Mapping[str, Any], dataset: str) -> Iterator[str]:
    """A warning where stage 1 was trained on other images of the data set, and may have seen those set aside here.

    trained: the `Split.facts` of stage 1; empty facts say nothing.
    """
    if trained.get("dataset") == dataset and trained.get("fingerprint", data.fingerprint) != data.fingerprint:
        yield (
            f"warning: stage 1 was trained on {trained['images']} images that are not the {len(data)} here, so it may"
            " have seen those that are set aside: units and weights of the terms are then biased. Train stage 1 on the"
            " images that are here, with the same --held_out and --data_seed"
        )


def held_out_facts(upright: Reading, views: Transformations) -> Iterator[str]:
    """How well stage 1 tells the transformations of held-out images: a line on each head that has several classes."""
    for name, truth in views.truth.items():
        logits_NKC, own = upright.logits[name], truth.to(upright.h.device).expand(len(upright.h), -1)
        if logits_NKC.shape[2] > 1:
            accuracy = (logits_NKC.argmax(2) == own).double().mean().item()
            loss = F.cross_entropy(logits_NKC.flatten(0, 1), own.flatten()).item() / math.log(2)
            yield f"held-out images, {name}: accuracy {100 * accuracy:.1f} %, log-loss {loss:.3g} bits"


def calibrate(model: LevelNet, upright: Reading, turned: Reading, views: Transformations) -> Iterator[str]:
    """Units and weights of the terms, by images that were held out and the same turned, as in `weigh`. Yields a line on
    each."""
    with torch.no_grad():
        normal, others = (
            {name: values[name].cpu().numpy() for name in model.terms}
            for values in (model.values(upright, views), model.values(turned, views))
        )
    found = weigh(normal, others, {TRANSFORMATIONS})
    for n, name in enumerate(model.terms):
        term = found.terms[name]
        model.means[n], model.deviations[n], model.weights[n] = term.mean, term.deviation, term.weight
    yield from found.lines


def _load_stage1(flags: Flags, file: Path, shifts: ShiftSpec) -> FeatureNet | RotTransNet:
    """Raises: UserError for weights that are of no stage 1."""
    state = read_state(file, flag="resume_path")
    try:
        kind = kind_of(state)
    except ValueError:
        kind = ""
    if kind not in ("rot_trans", "feature"):
        raise UserError(f"--resume_path: {file} holds no stage 1; give a run of --mode rot_trans or simclr_CSI")
    strict = not flags.of(WeightsSpec, only=["no_strict"]).no_strict
    sizes = {"n_shifts": shifts.count} if kind == "feature" else {}
    model = flags.of(ModelSpec, only=["model"]).model
    net: FeatureNet | RotTransNet = load_net(
        kind, state, model=model, path=file, flag="resume_path", strict=strict, **sizes
    )
    return net


def _at_most(data: ImageSet | PictureSet, images: int, seed: int) -> ImageSet | PictureSet:
    """So many images of a set, chosen by the seed, or all there are."""
    if len(data) <= images:
        return data
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[torch.randperm(len(data), generator=generator(seed, "known images"))[:images]] = True
    return data.where(chosen)
