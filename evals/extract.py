"""From images to draw-averaged outputs of a network. `Extractor` rows are at the end.

Letters: N images, b of a batch, T draws, K shifts, C classes, F features, P projection, M atoms.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.device import Amp, autocast
from common.dist import SINGLE, World
from common.errors import UserError
from common.flags import DeviceSpec, Flags, Spec, WeightsSpec
from common.progress import progress
from common.seed import generator
from datasets import ImageSet, ShiftSpec
from datasets.augment import AlignedSpec
from datasets.shifts import Shift, rotations_and_translations
from datasets.views import DrawSpec, PassSpec, SetDraw, batches_of, draw_set, set_views
from evals.coding import CROSS, Coder, FittedDictionaries, Outputs, TrainedDictionaries, code_outputs
from evals.levels import level_outputs, transformations_of
from evals.specs import AverageSpec, FittedSpec
from evals.trained import Trained, evaluation_mode
from models import ModelSpec
from models.autoencoder.networks import AutoencoderSpec
from models.autoencoder.robust_net import RobustNet
from models.checkpoint import State, autoencoder_spec, kind_of, load_net
from models.feature_net import (
    BackboneNet,
    Classifier,
    CocsrNet,
    FeatureNet,
    FeatureTransform,
    RotTransNet,
    full_precision,
)
from models.level_net import LevelNet
from models.sparse.dictionary import SparseSpec, ToleranceSpec

# What a network makes of views (b, K, 3, H, W): outputs (b, K, .).
Reader = Callable[[Tensor], Outputs]

# Draws of all images whose numbers, some 36 bytes a view each, are held at a time.
_TOGETHER = 32


def net_outputs(net: FeatureNet | RotTransNet) -> Reader:
    """h (b, K, F), z (b, K, P), shift (b, K, K) of a stage-1 network.

    Or the logits of Rot+Trans: rotation (b, K, 4), vertical and horizontal (b, K, 3).
    """

    def outputs(views: Tensor) -> Outputs:
        named = net(views.flatten(0, 1))._asdict()
        return {name: value.unflatten(0, views.shape[:2]) for name, value in named.items()}

    return outputs


def feature_outputs(net: BackboneNet) -> Reader:
    """h (b, K, F) of any network with a backbone."""
    return lambda views: {"h": net.features(views.flatten(0, 1)).unflatten(0, views.shape[:2])}


def class_outputs(net: FeatureNet | Classifier) -> Reader:
    """Logits linear (b, K, C) of the class, joint (b, K, 4 C) of class + C * rotation, unless it is a `Classifier`."""

    def outputs(views: Tensor) -> Outputs:
        h = net.features(views.flatten(0, 1))
        logits = {"linear": net.linear(h)}
        if isinstance(net, FeatureNet):
            logits["joint"] = net.joint_distribution_layer(h)
        return {name: full_precision(value).unflatten(0, views.shape[:2]) for name, value in logits.items()}

    return outputs


def cocsr_outputs(net: CocsrNet) -> Reader:
    """s and h (b, K, F), codes (b, K, M), shift (b, K, K), gap (b, K, 1) of a stage-2 network.

    Each feature is coded in the dictionary of its own shift only. The dictionaries are taken as they are now.
    """
    system = net.sr_nets.system()

    def outputs(views: Tensor) -> Outputs:
        features = net(views.flatten(0, 1))
        s, shift, h = (x.unflatten(0, views.shape[:2]) for x in features)
        return {**code_outputs(net.sr_nets, s, system), "shift": shift, "h": h}

    return outputs


def autoencoder_outputs(net: RobustNet) -> Reader:
    """h (b, K, F): codes. error (b, K, 1): the norm of the reconstruction error of an image, flattened.

    Raises: UserError for images of another size than the network was trained on.
    """
    if net.shape is None:
        raise UserError("--load_path: it was trained on a table, and here are pictures; --mode rdae_outliers scores it")
    channels, *size = net.shape

    def outputs(views: Tensor) -> Outputs:
        images = views.flatten(0, 1)
        if list(images.shape[2:]) != size:
            asked, there = ("x".join(map(str, sides)) for sides in (images.shape[2:], size))
            raise UserError(f"--image_size: the network takes {there} pixels, the images have {asked}")
        rows = (images if channels == 3 else luma(images)).flatten(1)
        autoencoder: Any = net.autoencoder
        found = {"h": autoencoder.encode(rows), "error": (rows - net(rows)).norm(dim=1, keepdim=True)}
        return {name: value.unflatten(0, views.shape[:2]) for name, value in found.items()}

    return outputs


def luma(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in grey, (N, 1, H, W), by ITU-R 601; grey ones stay exactly what they are."""
    weights = torch.tensor((0.299, 0.114), device=images.device).view(2, 1, 1, 1)
    red, green, blue = images.unbind(1)
    return (green + weights[0] * (red - green) + weights[1] * (blue - green))[:, None]


def add_outputs(sums: Outputs, outputs: Outputs) -> None:
    """Add the outputs (b, K, .) of one more draw of the same images to `sums`, which starts empty."""
    for name, value in outputs.items():
        sums[name] = sums[name].add_(value) if name in sums else value.clone()


def mean_outputs(sums: Outputs, draws: int) -> Outputs:
    """The means (b, K, .) over so many draws; changes sums."""
    return {name: value.div_(draws) for name, value in sums.items()}


class Look(NamedTuple):
    """One draw of all images of a set. reference (1, 3, H, W): what they mix with; None: each with its neighbour."""

    draw: SetDraw
    reference: Tensor | None


def looks(images: ImageSet, spec: DrawSpec, draws: Iterable[int], references: Tensor | None) -> list[Look]:
    """The draws of these numbers. references (R, 3, H, W): each mixes with one of them, chosen by the seed."""
    return [Look(draw_set(images, spec, t), _reference(references, spec.seed, t)) for t in draws]


@dataclass(frozen=True)
class Part:
    """A batch of a set. index (b,). pixels (b, 3, H, W): what is seen in place of these images, None: they are."""

    index: Tensor
    pixels: Tensor | None = None


def see(outputs: Reader, images: ImageSet, spec: DrawSpec, seen: Iterable[Look], part: Part, sums: Outputs) -> None:
    """Add the outputs (b, K, .) of each draw to `sums`, which starts empty. Gradients flow to the pixels."""
    for draw, reference in seen:
        views = set_views(images, spec, draw, part.index, reference, part.pixels)
        add_outputs(sums, outputs(views.unflatten(0, (-1, len(spec.shifts)))))


@torch.no_grad()
def draw_means(
    outputs: Reader,
    images: ImageSet,
    spec: DrawSpec,
    draws: int,
    *,
    label: str,
    references: Tensor | None = None,
    world: World = SINGLE,
    parts: Sequence[Part] | None = None,
) -> Iterator[Outputs]:
    """Every output averaged over `draws` draws, batch by batch of the images: (b, K, .) each, on their device.

    references (R, 3, H, W): draw t mixes every image with one of them, chosen by the seed; without, an image mixes with
    its neighbour by index. The draws of a batch come together, so that what they give is held for one batch only; past
    `_TOGETHER` draws, whose numbers then take more than that, sums are held for all images instead.
    world: of several ranks each takes some of the batches. parts: the batches of this rank, where they are others.
    """
    if parts is None:
        parts = [Part(index) for index in world.shard_list(batches_of(images, spec))]
    sums: list[Outputs] = [{} for _ in parts]
    rounds = [(first, i) for first in range(0, draws, _TOGETHER) for i in range(len(parts))]
    for first, i in progress(rounds, total=len(rounds), label=label):
        if i == 0:
            last = min(first + _TOGETHER, draws)
            seen = looks(images, spec, range(first, last), references)
        see(outputs, images, spec, seen, parts[i], sums[i])
        if last == draws:
            found, sums[i] = sums[i], {}
            yield mean_outputs(found, draws)


def concatenate(blocks: Iterable[Outputs]) -> Outputs:
    """One set of outputs (N, ...) of those of its batches."""
    parts = list(blocks)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def select(outputs: Outputs, needs: Collection[str], device: torch.device | str) -> Outputs:
    """The outputs that are needed, on `device`."""
    return {name: value.to(device) for name, value in outputs.items() if name in needs}


def _reference(references: Tensor | None, seed: int, t: int) -> Tensor | None:
    if references is None:
        return None
    choice = int(torch.randint(len(references), (), generator=generator(seed, "reference", t)))
    return references[choice : choice + 1]


def reference_pool(train: ImageSet, size: int, seed: int) -> Tensor:
    """`size` training images (or all there are), chosen by the seed: (R, 3, H, W) in [0, 1]."""
    order = torch.randperm(len(train), generator=generator(seed, "reference pool"))
    return train.batch(order[:size].to(train.device))


FitCoder = Callable[[Outputs, World], Coder]


@dataclass(frozen=True)
class Extractor:
    """One row: what is read off a network, and under which views of an image.

    files: names of checkpoints in a run folder, the preferred first.
    shifts: (flags, names of the outputs that are needed) -> the K transformations that every image is viewed under.
    load: (flags, state dict, its file, shifts=K) -> network.
    network: the part of a network that `read` takes. read: that part -> reader.
    coder: that part -> what averaged outputs go through. fit_coder: flags -> (averaged outputs of the training images,
    world) -> a coder that is fitted to them, which takes the place of the former.
    plain: views are shifted, and neither flipped nor augmented; there is one draw.
    specs: whose flags it reads. own: those of them whose flags are the evaluation's to say, whatever the weights have
    recorded. backbone: whether the network has that of --model, which decides the size of images.
    """

    files: tuple[str, ...]
    shifts: Callable[[Flags, Collection[str]], list[Shift]]
    load: Callable[..., nn.Module]
    network: Callable[[Any], nn.Module]
    read: Callable[[Any], Reader]
    coder: Callable[[Any], Coder] = lambda net: Coder()
    fit_coder: Callable[[Flags], FitCoder] | None = None
    plain: bool = False
    specs: tuple[type[Spec], ...] = ()
    own: tuple[type[Spec], ...] = ()
    backbone: bool = True


@dataclass(frozen=True)
class Extraction:
    """An extractor at work: images -> draw-averaged outputs (N, K, .) in float32.

    fit_coder: makes the coder of the training images' outputs; None where it is there already. needs: names of the
    outputs that are handed on.
    """

    net: nn.Module
    read: Reader
    coder: Coder
    fit_coder: FitCoder | None
    draws: DrawSpec
    samples: int
    needs: frozenset[str]
    world: World = SINGLE

    @classmethod
    def of(cls, extractor: Extractor, trained: Trained, needs: Collection[str]) -> "Extraction":
        """Of a trained network, as its flags say: reads all of them."""
        flags = trained.flags
        shifts = extractor.shifts(flags, needs)
        aligned = None if extractor.plain else flags.of(AlignedSpec)
        # Many shifts make many views of an image; no result depends on how many images come at a time.
        batch_size = max(1, flags.of(PassSpec).ood_batch_size // max(1, len(shifts) // 8))
        seed = flags.seed
        draws = DrawSpec(shifts, aligned, seed, batch_size=batch_size)
        samples = 1 if extractor.plain else flags.of(AverageSpec).ood_samples
        net = extractor.network(trained.net)
        amp = autocast(flags.of(DeviceSpec, only=["amp"]).amp, trained.device)
        read = _in_float32(cache(partial(extractor.read, net)), amp)
        fit_coder = extractor.fit_coder and extractor.fit_coder(flags)
        return cls(net, read, extractor.coder(net), fit_coder, draws, samples, frozenset(needs), trained.world)

    def blocks(
        self,
        images: ImageSet,
        label: str,
        references: Tensor | None = None,
        parts: Sequence[Part] | None = None,
    ) -> Iterator[Outputs]:
        """Outputs of a batch at a time, on the CPU. Of several ranks each has some of the batches, in order.

        parts: the batches of this rank, where they are others.
        """
        for means in self._means(images, label, references, parts):
            yield self._finished(means)

    def run(self, images: ImageSet, first: int, references: Tensor | None, part: Part) -> Outputs:
        """Outputs of one batch by draws `first`, `first` + 1, ..., as many as `blocks` averages over (its first is 0).

        Gradients flow to the pixels of the part, through views, network, averages and codes. The network's mode is the
        caller's business.
        """
        sums: Outputs = {}
        seen = looks(images, self.draws, range(first, first + self.samples), references)
        see(self.read, images, self.draws, seen, part, sums)
        return self._finished(mean_outputs(sums, self.samples))

    @property
    def random(self) -> bool:
        """Whether anything is drawn for test images."""
        return self.draws.aligned is not None

    def batches(self, index: Tensor) -> list[Tensor]:
        """The indices, batch by batch, for all ranks; of all images of a set those that `blocks` goes by."""
        return list(index.split(self.draws.batch_size))

    def outputs(self, images: ImageSet, label: str, references: Tensor | None = None) -> Outputs:
        """Outputs of all images, on the CPU, in all ranks."""
        return self._gather(self.blocks(images, label, references), "cpu")

    def fit(self, train: ImageSet) -> tuple["Extraction", Outputs]:
        """The extraction with its coder, and outputs of the training images, which mix with their neighbours."""
        label = "training images"
        if self.fit_coder is None:
            return self, self.outputs(train, label)
        means = self._gather(self._means(train, label), train.device)
        fitted = replace(self, coder=self.fit_coder(means, self.world), fit_coder=None)
        return fitted, fitted._finished(means)

    def _finished(self, means: Outputs) -> Outputs:
        """What averaged outputs become."""
        found = self.coder(means)
        if CROSS in self.needs:
            found = {**found, **self.coder.cross(found)}
        return select(found, self.needs, "cpu")

    def _means(
        self,
        images: ImageSet,
        label: str,
        references: Tensor | None = None,
        parts: Sequence[Part] | None = None,
    ) -> Iterator[Outputs]:
        with evaluation_mode(self.net):
            yield from draw_means(
                self.read,
                images,
                self.draws,
                self.samples,
                label=label,
                references=references,
                world=self.world,
                parts=parts,
            )

    def _gather(self, blocks: Iterator[Outputs], device: torch.device | str) -> Outputs:
        if self.world.size == 1:
            return concatenate(blocks)
        parts = self.world.all_gather_object([{n: x.cpu() for n, x in block.items()} for block in blocks])
        found = concatenate(chain.from_iterable(parts))
        return {name: value.to(device) for name, value in found.items()}


def _in_float32(make: Callable[[], Reader], amp: Amp) -> Reader:
    """The reader that `make` makes when it is first called, under `amp`, with outputs in float32 (or float64)."""

    def read(views: Tensor) -> Outputs:
        with amp():
            return {name: full_precision(value) for name, value in make()(views).items()}

    return read


def _trained_shifts(flags: Flags, needs: Collection[str]) -> list[Shift]:
    return ShiftSpec.of(flags).functions(flags.of(AlignedSpec))


def _label_shifts(flags: Flags, needs: Collection[str]) -> list[Shift]:
    """The four rotations where something is marginalised over them, else the image as it is."""
    return ShiftSpec("rotation" if "joint" in needs else "none").functions()


def _common(flags: Flags, path: Path) -> dict[str, Any]:
    """What every kind of network is loaded with."""
    model, strict = flags.of(ModelSpec, only=["model"]).model, not flags.of(WeightsSpec, only=["no_strict"]).no_strict
    return {"model": model, "path": path, "flag": "load_path", "strict": strict}


def _load_stage1(flags: Flags, state: State, path: Path, shifts: int | None) -> nn.Module:
    # A stage-2 file holds the whole stage-1 network.
    inner = {k.removeprefix("feature_net."): v for k, v in state.items() if not k.startswith("sr_nets.")}
    asked = flags.asked(ModelSpec, "simclr_dim", "projector_layers")
    return load_net("feature", inner, n_shifts=shifts, **asked, **_common(flags, path))


def _load_labelled(flags: Flags, state: State, path: Path, shifts: int) -> nn.Module:
    """A classifier, or a stage-1 network, however many shifts it was trained with: its shift head is not read."""
    if "simclr_layer.2.weight" in state or "linear.weight" not in state:
        return _load_stage1(flags, state, path, None)
    return _load_classifier(flags, state, path, shifts)


def _load_classifier(flags: Flags, state: State, path: Path, shifts: int) -> nn.Module:
    """With reverse attention, where the file has it."""
    kind = "ra_classifier" if "ra_blocks" in state else "classifier"
    return load_net(kind, state, **_common(flags, path))


def _load_stage2(flags: Flags, state: State, path: Path, shifts: int) -> nn.Module:
    """The dictionaries are coded with the file's lambda and rho, or with those that were given."""
    transform, tol = flags.of(FeatureTransform), flags.of(ToleranceSpec).sr_tol
    steps = flags.of(SparseSpec, only=["sr_admm_stage"]).sr_admm_stage
    asked = flags.asked(ModelSpec, "simclr_dim", "projector_layers") | flags.asked(SparseSpec, "sr_dict_size")
    net: CocsrNet = load_net(
        "cocsr", state, n_shifts=shifts, transform=transform, steps=steps, tol=tol, **asked, **_common(flags, path)
    )
    coding, given = net.sr_nets.coding, flags.asked(SparseSpec, "sr_lambda", "sr_rho")
    for name, field in (("sr_lambda", "lam"), ("sr_rho", "rho")):
        there, value = getattr(coding, field), given.get(name)
        # A file has it as float32: the same number, rounded, is not another one.
        if value is None or isclose(value, there, rel_tol=1e-6):
            continue
        coding = replace(coding, **{field: value})
        print(f"note: {path} was trained with --{name} {there:.4g}, evaluated with {value:.4g}")
    net.sr_nets.coding = coding
    return net


def _load_rot_trans(flags: Flags, state: State, path: Path, shifts: int) -> nn.Module:
    return load_net("rot_trans", state, **_common(flags, path))


def _load_levels(flags: Flags, state: State, path: Path, shifts: int) -> nn.Module:
    return load_net("levels", state, **_common(flags, path))


def _read_levels(net: LevelNet) -> Reader:
    return level_outputs(
        net, transformations_of(net.feature_net, ShiftSpec("rotation" if len(net.known) > 1 else "none"))
    )


def _load_backbone_net(flags: Flags, state: State, path: Path, shifts: int) -> nn.Module:
    """Of whatever kind, with a backbone: the heads are not read."""
    try:
        load = _OF_KIND[kind_of(state)]
    except (ValueError, KeyError):
        raise UserError(f"--load_path: {path} holds no network with a backbone; give weights of an SDNet") from None
    return load(flags, state, path, shifts)


def _load_autoencoder(flags: Flags, state: State, path: Path, shifts: int) -> nn.Module:
    spec = autoencoder_spec(flags)
    return load_net("autoencoder", state, spec=spec, **_common(flags, path) | {"model": spec.autoencoder})


def _fit_dictionaries(flags: Flags) -> FitCoder:
    sparse = flags.of(SparseSpec, only=("sr_dict_size", "sr_lambda", "sr_lambda_rel", "sr_rho", "sr_rho_auto"))
    transform, rounds = flags.of(FeatureTransform), flags.of(FittedSpec).sr_fit_steps
    fit = partial(
        FittedDictionaries.fit,
        transform=transform,
        spec=sparse,
        rounds=rounds,
        seed=flags.seed,
    )
    return lambda train, world: fit(train, world=world)


def _feature_net(net: FeatureNet | CocsrNet) -> nn.Module:
    return net.feature_net if isinstance(net, CocsrNet) else net


def _itself(net: nn.Module) -> nn.Module:
    return net


_STAGE1_FILES = ("last.model", "last.cocsr_model")

_DRAWN = (ShiftSpec, AlignedSpec, AverageSpec)

CONTRASTIVE = Extractor(_STAGE1_FILES, _trained_shifts, _load_stage1, _feature_net, net_outputs, specs=_DRAWN)
SPARSE = Extractor(
    ("last.cocsr_model",),
    _trained_shifts,
    _load_stage2,
    _itself,
    cocsr_outputs,
    coder=lambda net: TrainedDictionaries(net.sr_nets),
    specs=(*_DRAWN, SparseSpec, ToleranceSpec, FeatureTransform),
)
FITTED_SPARSE = replace(
    CONTRASTIVE,
    fit_coder=_fit_dictionaries,
    specs=(*_DRAWN, SparseSpec, FeatureTransform, FittedSpec),
    own=(SparseSpec,),
)
LABELLED = Extractor(("last.model",), _label_shifts, _load_labelled, _itself, class_outputs, plain=True)
CLASSIFIER = Extractor(
    ("last.model",),
    lambda flags, needs: ShiftSpec("none").functions(),
    _load_classifier,
    _itself,
    feature_outputs,
    plain=True,
)
_OF_KIND = {
    "classifier": _load_classifier,
    "ra_classifier": _load_classifier,
    "feature": _load_labelled,
    "cocsr": _load_labelled,
    "rot_trans": _load_rot_trans,
}
BACKBONE = replace(CLASSIFIER, files=_STAGE1_FILES, load=_load_backbone_net)
ROT_TRANS = Extractor(
    ("last.model",),
    lambda flags, needs: rotations_and_translations(),
    _load_rot_trans,
    _itself,
    net_outputs,
    plain=True,
)
# The network makes its own views of an image.
LEVELS = replace(CLASSIFIER, files=("last.cocsr_model",), load=_load_levels, read=_read_levels)
PLAIN_ROT_TRANS = replace(ROT_TRANS, shifts=lambda flags, needs: ShiftSpec("none").functions(), read=feature_outputs)
AUTOENCODER = Extractor(
    ("last.model",),
    lambda flags, needs: ShiftSpec("none").functions(),
    _load_autoencoder,
    _itself,
    autoencoder_outputs,
    plain=True,
    specs=(AutoencoderSpec,),
    backbone=False,
)
