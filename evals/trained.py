"""A trained network with its configuration: what every evaluation starts from."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.device import pick_device
from common.dist import SINGLE, World
from common.errors import UserError
from common.files import read_facts
from common.flags import DeviceSpec, Flags, WeightsSpec
from common.run import epoch_of, recorded_flags
from datasets import ImageSet, PictureSet, Split
from datasets.augment import AlignedSpec
from datasets.noise import TestNoiseSpec
from datasets.one_class import TEST, read_split
from evals.specs import PlaceSpec
from models import ModelSpec, model_size
from models.checkpoint import Misfit, State, find_weights, load_net, read_state
from models.mean_sparse import AlphaSpec, alpha_of, operators, sparsify
from models.mode import evaluation_mode as evaluation_mode

# Two names of one thing.
_UNIT = {"normalize_sr_dict_feature", "normalize_sr_feature"}
# Of these, weights know better than the flags of their training; whoever loads them reports other values.
_IN_WEIGHTS = {"sr_lambda", "sr_rho"}
# Flags that are read and that no number of a result depends on, or that a result has entries of its own for.
_NO_SETTINGS = frozenset(
    "mode dataset one_class_idx seed ood_score data_path ood_data_path load_path resume_path pretrained_path out"
    " log_root image_cache download_data num_worker max_megapixels device compile local_rank dry_run overwrite"
    " ood_batch_size print_score save_score skip_bad_images no_strict npz cifar10c control_path".split()
)
# Values that leave the data as they are: not among the settings, as in results from before these flags.
UNCHANGED = {
    "corrupt": "none",
    "outliers": 0,
    "first_images": None,
    "held_out": 0,
    "test_noise": "none",
    "stem_lambda": None,
    "projection": "tsne",
    "severity": None,
    "attack": None,
    "corruptions": None,
    "ms_alpha": None,
}


@dataclass(frozen=True)
class Trained:
    """A network, the flags it is evaluated under, the data it is evaluated on, and where.

    path: its file; None for a network that is in memory only. epoch: how long it was trained, where that is known.
    facts: what the file says of the images it was trained on. settings: what its numbers depend on besides flags.
    """

    net: nn.Module
    flags: Flags
    split: Split
    device: torch.device
    world: World = SINGLE
    path: Path | None = None
    epoch: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, net: nn.Module, flags: Flags, split: Split, world: World = SINGLE, *, epoch: int | None = None
    ) -> "Trained":
        """A network in memory, in the middle of its training, say. No evaluation changes its mode or its weights."""
        # A truncated SVD has no parameters.
        device = next(chain(net.parameters(), net.buffers())).device
        return cls(net, flags, split, device, world, epoch=epoch)

    @property
    def title(self) -> str:
        """What messages call it."""
        return "the network" if self.path is None else str(self.path)

    def train_images(self) -> ImageSet:
        """The normal training images; a line reports where they are others than the network was trained on."""
        train = self.split.train().to(self.device)
        here = self.split.facts(train)
        there = {name: self.facts.get(name) or value for name, value in here.items()}
        if there["dataset"] == here["dataset"] and there != here:
            what = f"{there['images']} there, {here['images']} here" if there["images"] != here["images"] else "content"
            print(f"note: scores are fitted to other images than {self.title} was trained on ({what})")
        return train

    def unseen_images(self, what: str) -> ImageSet | PictureSet:
        """The training images that were set aside. what: is done with them, for messages.

        Raises: UserError where there are none, and where the training may have seen them.
        """
        split = self.split
        recorded = recorded_flags(self.path) if self.path else {}
        if recorded.get("dataset") == split.dataset:
            changed = self.flags.differences(recorded)
            for name in changed.keys() & {"held_out", "data_seed", "first_images"}:
                there, here = changed[name]
                raise UserError(
                    f"--{name} {here}: {self.title} was trained with {there}, and {what} on images that training has"
                    " not seen; leave the flag out"
                )
        elif recorded:
            raise UserError(
                f"--dataset {split.dataset}: {self.title} was trained on {recorded.get('dataset', 'other images')}, and"
                f" {what} on images that its training has held out; leave the flag out"
            )
        train, held_out = split.training_parts(AlignedSpec())
        if held_out is None:
            raise UserError(
                f"--held_out: {self.title} was trained on all images, and {what} on training images that training has"
                " not seen; train with --held_out auto, or with a number of images"
            )
        if self.facts and split.facts(train) != {name: self.facts.get(name) for name in split.facts(train)}:
            raise UserError(
                f"--data_path: the training images are not those that {self.title} was trained on, so that it may have"
                " seen those that are held out now; give these images, or train again"
            )
        return held_out

    def test_images(self) -> ImageSet:
        """All test images as an evaluation sees them: with the noise of the split, and that of --test_noise.

        Raises: UserError as `TestNoiseSpec.of`.
        """
        noise = TestNoiseSpec.of(self.flags)
        return noise.applied(self.split.test(), TEST)


def load_trained(
    flags: Flags,
    world: World = SINGLE,
    *,
    files: Sequence[str],
    read: Callable[[Flags, State, Path], nn.Module],
    trained_by: Sequence[str],
    scores: Sequence[str] = (),
    backbone: bool = True,
) -> Trained:
    """Read the checkpoint of --load_path and look the data up as the flags say.

    files: names of checkpoints in a run folder, the preferred first. read: (flags, state dict, its file) -> network.
    trained_by: training modes whose weights fit. scores: names that are wanted, for the message. backbone: whether that
    of --model decides the size of images.
    Raises: UserError for a checkpoint that is not found, corrupt, or of another mode, model or number of shifts, and
    for data that is not found.
    """
    device = pick_device(flags.of(DeviceSpec).device, world.local_rank if world.size > 1 else None)
    path = weights_of(flags, files)
    net = read(flags, read_state(path, flag="load_path"), path)
    trained = recorded_flags(path)
    if trained.get("mode", trained_by[0]) not in trained_by:
        mode = " ".join([flags.mode, *scores])
        raise UserError(
            f"--load_path: {path} was trained by --mode {trained['mode']};"
            f" --mode {mode} is for weights of {', '.join(trained_by)}"
        )
    out = flags.of(PlaceSpec).out
    _check_writable(Path(out) if out else path.parent)
    size, fixed = model_size(flags, backbone=backbone)
    split = read_split(flags, training=False, model_size=size, fixed=fixed)
    facts = read_facts(path).get("data", {})
    split.check_trained(facts, path, flag="load_path")
    _report_training(flags, path, trained, known_class=bool(facts))
    return Trained(net.to(device).eval(), flags, split, device, world, path, _epoch(path), facts)


def with_ms_alpha(trained: Trained) -> Trained:
    """The network with alpha of --ms_alpha, which its results record; as it is without operators of MeanSparse.

    Raises: UserError for operators without statistics.
    """
    if not operators(trained.net):
        return trained
    alpha = trained.flags.of(AlphaSpec).ms_alpha
    try:
        if alpha is not None:
            sparsify(trained.net, alpha)
        here = alpha_of(trained.net)
    except ValueError as error:
        raise UserError(f"--ms_alpha: {trained.path}: {error}") from None
    return replace(trained, settings={**trained.settings, "ms_alpha": here})


def load_other(
    trained: Trained, place: str, *, flag: str, kind: Callable[[State], str], **sizes: Any
) -> tuple[nn.Module, Path]:
    """Another network, as it was trained, on the same device, and its file: that of --`flag`, a run folder or a file.

    kind: state dict -> row of `NETS`. Raises: Misfit where there is none. sizes: as `load_net`.
    Raises: UserError for a file that is not found, corrupt or of another kind, and for one of other classes.
    """
    path = find_weights(place, ("last.model",), flag=flag)
    state, recorded = read_state(path, flag=flag), recorded_flags(path)
    model = recorded.get("model") or trained.flags.of(ModelSpec, only=["model"]).model
    try:
        row = kind(state)
    except Misfit as why:
        raise UserError(f"--{flag}: {path} {why}") from None
    net = load_net(row, state, model=model, path=path, flag=flag, **sizes)
    trained.split.check_trained(read_facts(path).get("data", {}), path, flag=flag)
    return net.to(trained.device).eval(), path


def _check_writable(folder: Path) -> None:
    """Raises: UserError now, and not after the work, where results cannot be written."""
    place = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--out: results cannot be written to {folder}; give a folder that is writable")


def weights_of(flags: Flags, files: Sequence[str]) -> Path:
    """The file of --load_path, or of a run folder the first of `files`. Raises: UserError where there is none."""
    load_path = flags.of(WeightsSpec, only=["load_path"]).load_path
    if not load_path:
        raise UserError(f"--load_path: which weights to evaluate? Give a run folder or its {files[0]}")
    return find_weights(load_path, tuple(files), flag="load_path")


def _report_training(flags: Flags, path: Path, trained: Mapping[str, Any], *, known_class: bool) -> None:
    """Report which flags differ from those of training. known_class: the normal class has been compared already."""
    now = flags.as_dict()
    both = trained.keys() & set(flags.used())
    for name, (there, here) in flags.differences(trained).items():
        if name not in _UNIT | _IN_WEIGHTS and not (known_class and name in ("one_class_idx", "dataset")):
            print(f"note: {path} was trained with --{name} {there}, evaluated with {here}")
    if _UNIT <= both and any(trained[name] for name in _UNIT) != any(now[name] for name in _UNIT):
        was = "with" if any(trained[name] for name in _UNIT) else "without"
        print(f"note: {path} was trained {was} --normalize_sr_dict_feature, evaluated not so")


def _epoch(path: Path) -> int | None:
    try:
        return epoch_of(path, flag="load_path")
    except UserError as error:
        print(f"note: the epoch is not known ({error})")
        return None


def settings_of(flags: Flags, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The flags that numbers depend on, of those read so far. without: more that do not count."""
    values = flags.as_dict()
    found = {name: values[name] for name in flags.used() if name not in _NO_SETTINGS | without}
    return {name: value for name, value in found.items() if name not in UNCHANGED or value != UNCHANGED[name]}


def identity(images: ImageSet | PictureSet) -> dict[str, Any]:
    """What distinguishes a set of images from others, for results."""
    return {"images": len(images), "fingerprint": images.fingerprint}
