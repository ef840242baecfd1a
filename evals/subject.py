"""What an evaluation works on: a trained network, the data it is judged by, and its draw-averaged outputs."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from common.device import autocast, pick_device
from common.dist import SINGLE, World
from common.errors import UserError
from common.files import read_facts
from common.flags import Flags, pick
from common.run import epoch_of
from datasets import DataSource, ImageSet, Split, split_one_class
from datasets.augment import AlignedSpec
from datasets.views import DrawSpec
from evals.evidence import Evidence
from evals.features import Outputs, concatenate, draw_means, reference_pool
from models import backbone_spec

# Flags that decide what the network saw in training: evaluation under others is told.
_SEEN = (
    *("dataset", "shift_trans_type", "mix_alpha", "color_jitter_strength", "image_size", "one_class_idx"),
    *("sr_layer", "sr_admm_stage", "invert_sr_feature_norm"),
)
# Two names of one thing.
_UNIT = {"normalize_sr_dict_feature", "normalize_sr_feature"}


class Training(NamedTuple):
    """outputs: of the training images. references: those of them that test images mix with, (R, 3, H, W); None for
    their neighbours. data: `identity` of them, by the name `training`."""

    outputs: Outputs
    references: torch.Tensor | None
    data: dict[str, dict[str, Any]]


def identity(images: ImageSet) -> dict[str, Any]:
    """What tells images from others, for results."""
    return {"images": len(images), "fingerprint": images.fingerprint}


@dataclass(frozen=True)
class Subject:
    """net: what `evidence` reads.

    epochs: how long it was trained, where that is known. references: training images to take reference partners of test
    images from; 0: test images mix with their neighbours. folder: where results go. facts: what the checkpoint says of
    the images it was trained on.
    """

    evidence: Evidence
    net: nn.Module
    split: Split
    draws: DrawSpec
    samples: int
    checkpoint: Path
    epochs: int | None
    device: torch.device
    amp: str
    references: int
    folder: Path
    facts: Mapping[str, Any]
    world: World = SINGLE

    @property
    def tag(self) -> str:
        """What file names of results end in, so that two checkpoints of one folder keep theirs apart."""
        return "" if self.checkpoint.stem == "last" else f"_{self.checkpoint.stem}"

    @cached_property
    def _reads(self) -> Callable[[torch.Tensor], Outputs]:
        """Views -> outputs; with dictionaries, their inverse is made here, once for all sets."""
        return self.evidence.outputs(self.net)

    def blocks(self, images: ImageSet, label: str, references: torch.Tensor | None = None) -> Iterator[Outputs]:
        """Draw-averaged outputs (b, 1, K, .), batch by batch of the images, on the CPU in float32.

        Of several processes each has some of the batches, in order.
        """
        amp = autocast(self.amp, self.device)

        def function(views: torch.Tensor) -> Outputs:
            with amp():
                return {name: value.float() for name, value in self._reads(views).items()}

        blocks = draw_means(
            function, images, self.draws, self.samples, label=label, references=references, world=self.world
        )
        for block in blocks:
            yield {name: value.cpu() for name, value in block.items()}

    def outputs(self, images: ImageSet, label: str, references: torch.Tensor | None = None) -> Outputs:
        """Those of all images, (N, 1, K, .), in all processes."""
        parts = self.world.all_gather_object(list(self.blocks(images, label, references)))
        return concatenate(chain.from_iterable(parts))

    def training(self) -> "Training":
        """What is known of the normal training images, which always mix with their neighbours; nothing where no score
        is fitted to them."""
        if not self.evidence.fitted:
            return Training({}, None, {})
        train = self.split.train().to(self.device)
        self._report_other_images(train)
        pool = reference_pool(train, self.references, self.draws.seed) if self.references else None
        return Training(self.outputs(train, "training images"), pool, {"training": identity(train)})

    def _report_other_images(self, train: ImageSet) -> None:
        """Say where scores are fitted to other images than the network was trained on."""
        here = self.split.facts(train)
        there = {name: self.facts.get(name) or value for name, value in here.items()}
        if there["dataset"] == here["dataset"] and there != here:
            what = f"{there['images']} there, {here['images']} here" if there["images"] != here["images"] else "content"
            print(f"note: scores are fitted to other images than {self.checkpoint} was trained on ({what})")


def load_subject(
    flags: Flags,
    evidence: Evidence,
    *,
    trained_by: Sequence[str],
    reference: bool = False,
    names: Sequence[str] = (),
    world: World = SINGLE,
) -> Subject:
    """Read the checkpoint and look the data up as the flags say.

    trained_by: modes of training whose weights make sense. reference: test images mix with reference training images.
    names: the scores that are wanted.
    Raises: UserError for a missing or damaged checkpoint, one of another mode, model or number of shifts, missing data.
    """
    device = pick_device(flags.device, world.local_rank if world.size > 1 else None)
    shifts = evidence.shifts(flags, names)
    aligned = None if evidence.plain else pick(AlignedSpec, flags)
    net, path = evidence.load(flags, len(shifts))
    trained = _training_flags(path)
    if trained.get("mode", trained_by[0]) not in trained_by:
        raise UserError(
            f"--load_path: {path} was trained by --mode {trained['mode']};"
            f" --mode {flags.mode}{' ' + ' '.join(names) if names else ''} is for weights of {', '.join(trained_by)}"
        )
    folder = Path(flags.out) if flags.out else path.parent
    _check_writable(folder)
    backbone = backbone_spec(flags.model)
    source = DataSource.of(flags, flags.dataset)
    split = split_one_class(flags.dataset, source, flags.one_class_idx, backbone.image_size, fixed=backbone.fixed_size)
    facts = read_facts(path).get("data", {})
    split.check_trained(facts, path, flag="load_path")
    _report_training(flags, path, trained, known_class=bool(facts))
    # Many shifts make many views of an image; no result depends on how many images come at a time.
    batch_size = max(1, flags.ood_batch_size // max(1, len(shifts) // 8))
    draws = DrawSpec(shifts, aligned, flags.seed, batch_size=batch_size)
    net = net.to(device).eval()
    references = flags.refmix_batch_size if reference else 0
    samples = 1 if evidence.plain else flags.ood_samples
    epochs = _epochs(path)
    return Subject(
        evidence, net, split, draws, samples, path, epochs, device, flags.amp, references, folder, facts, world
    )


def _check_writable(folder: Path) -> None:
    """Raises: UserError now, and not after the work, where results cannot be written."""
    place = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--out: results cannot be written to {folder}; give a folder that is writable")


def _training_flags(path: Path) -> dict[str, Any]:
    """The flags that a checkpoint's training depended on, as args.json beside it has them; none without that file."""
    try:
        written = json.loads((path.parent / "args.json").read_text())
        return {name: written["flags"][name] for name in written["used"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _report_training(flags: Flags, path: Path, trained: Mapping[str, Any], *, known_class: bool) -> None:
    """Say which flags differ from those the checkpoint was trained with. known_class: its class has been compared."""
    now = flags.as_dict()
    both = (trained.keys() & set(flags.used())) - ({"one_class_idx", "dataset"} if known_class else set())
    for name in [name for name in _SEEN if name in both]:
        if trained[name] != now[name]:
            print(f"note: {path} was trained with --{name} {trained[name]}, evaluated with {now[name]}")
    if _UNIT <= both and any(trained[name] for name in _UNIT) != any(now[name] for name in _UNIT):
        was = "with" if any(trained[name] for name in _UNIT) else "without"
        print(f"note: {path} was trained {was} --normalize_sr_dict_feature, evaluated not so")


def _epochs(path: Path) -> int | None:
    try:
        return epoch_of(path, flag="load_path")
    except UserError as error:
        print(f"note: the epoch is not known ({error})")
        return None
