"""What an evaluation works on: a trained network, the data it is judged by, and its draw-averaged outputs."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from common.device import autocast, pick_device
from common.errors import UserError
from common.files import load_state_dict, load_tensors, published_epoch
from common.flags import Flags, pick
from datasets import DataSource, ImageSet, ShiftSpec, Split, split_one_class
from datasets.augment import AlignedSpec
from datasets.views import DrawSpec
from evals.features import Outputs, cocsr_outputs, draw_means, net_outputs, reference_pool
from models import BACKBONES
from models.checkpoint import cocsr_from_state, find_weights, net_from_state
from models.feature_net import CocsrNet, FeatureNet, FeatureTransform

WEIGHTS = {False: ("last.model", "last.cocsr_model"), True: ("last.cocsr_model",)}
# Flags that decide what the network saw in training: evaluation under others is told.
_SEEN = ("dataset", "shift_trans_type", "mix_alpha", "color_jitter_strength", "image_size", "one_class_idx")
_SEEN_SPARSE = (*_SEEN, "sr_layer", "sr_admm_stage", "invert_sr_feature_norm")


@dataclass(frozen=True)
class Subject:
    """net: stage 1, or stage 2 where the mode is sparse.

    epochs: how long it was trained, where that is known. references: training images to take reference partners of test
    images from; 0: test images mix with their neighbours.
    """

    net: FeatureNet | CocsrNet
    split: Split
    draws: DrawSpec
    samples: int
    checkpoint: Path
    epochs: int | None
    device: torch.device
    amp: str
    references: int

    @property
    def tag(self) -> str:
        """What file names of results end in, so that two checkpoints of one folder keep theirs apart."""
        return "" if self.checkpoint.stem == "last" else f"_{self.checkpoint.stem}"

    @property
    def sr_lambda(self) -> float:
        """The l1 weight of the dictionaries."""
        assert isinstance(self.net, CocsrNet)
        return self.net.sr_nets.coding.lam

    @property
    def folder(self) -> Path:
        """Where results go: beside the checkpoint."""
        return self.checkpoint.parent

    def outputs(self, images: ImageSet, label: str, references: torch.Tensor | None = None) -> Outputs:
        """Draw-averaged outputs (N, 1, K, .), on the CPU in float32."""
        net = self.net
        function = cocsr_outputs(net) if isinstance(net, CocsrNet) else net_outputs(net)
        with autocast(self.amp, self.device)():
            means = draw_means(function, images, self.draws, self.samples, label=label, references=references)
        return {name: value.float().cpu() for name, value in means.items()}

    def outputs_of_sets(self, tests: dict[str, ImageSet]) -> tuple[Outputs, dict[str, Outputs]]:
        """Outputs of the normal training images, and of each set of test images.

        Training images always mix with their neighbours, test images with reference images where `references` says so.
        """
        train = self.split.train().to(self.device)
        pool = reference_pool(train, self.references, self.draws.seed) if self.references else None
        seen = self.outputs(train, "training images")
        return seen, {name: self.outputs(data, f"{name} test images", pool) for name, data in tests.items()}


def load_subject(flags: Flags, *, sparse: bool, reference: bool) -> Subject:
    """Read the checkpoint and look the data up as the flags say; tell which flags nothing has read by then.

    sparse: a stage-2 checkpoint is needed. reference: test images mix with reference training images.
    Raises: UserError for a missing or damaged checkpoint, one of another model or number of shifts, missing data.
    """
    device = pick_device(flags.device)
    shifts, aligned = pick(ShiftSpec, flags), pick(AlignedSpec, flags)
    if not flags.load_path:
        raise UserError("--load_path: which weights to evaluate? Give a run folder, its last.model or last.cocsr_model")
    path = find_weights(flags.load_path, WEIGHTS[sparse], flag="load_path")
    state = load_state_dict(path, flag="load_path")
    common = {"model": flags.model, "n_shifts": shifts.count, "path": path, "strict": not flags.no_strict}
    common["simclr_dim"] = flags.simclr_dim if flags.given("simclr_dim") else None
    net: FeatureNet | CocsrNet
    if sparse:
        transform = pick(FeatureTransform, flags)
        net = cocsr_from_state(state, transform=transform, steps=flags.sr_admm_stage, **common)
        _tell_coding(flags, net, path)
    else:
        # A stage-2 file holds the whole stage-1 network.
        inner = {k.removeprefix("feature_net."): v for k, v in state.items() if not k.startswith("sr_nets.")}
        net = net_from_state(inner, flag="load_path", **common)
    _tell_training(flags, path, _SEEN_SPARSE if sparse else _SEEN)
    _check_writable(path.parent)
    source = pick(DataSource, flags)
    split = split_one_class(flags.dataset, source, flags.one_class_idx, BACKBONES[flags.model].image_size)
    draws = DrawSpec(shifts.functions(), aligned, flags.seed, batch_size=flags.ood_batch_size)
    net = net.to(device).eval()
    references = flags.refmix_batch_size if reference else 0
    subject = Subject(net, split, draws, flags.ood_samples, path, _epochs(path), device, flags.amp, references)
    for line in flags.tell_unread():
        print(line)
    return subject


def _check_writable(folder: Path) -> None:
    """Raises: UserError now, and not after the work, where results cannot be written."""
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"--load_path: results go beside the checkpoint, but {folder} is not writable; copy it elsewhere"
        )


def _tell_coding(flags: Flags, net: CocsrNet, path: Path) -> None:
    """The file's dictionary settings count; say so where a flag was given that differs."""
    bank = net.sr_nets
    there = {"sr_lambda": bank.coding.lam, "sr_rho": bank.coding.rho, "sr_dict_size": bank.dictionary.shape[2]}
    for name, value in there.items():
        if flags.given(name) and abs(getattr(flags, name) - value) > 1e-6 * abs(value):
            print(f"note: --{name} {getattr(flags, name)}: {path} was trained with {value:.6g}, which is used")


def _tell_training(flags: Flags, path: Path, names: tuple[str, ...]) -> None:
    """Say which flags differ from those the checkpoint was trained with, as its folder's args.json has them."""
    try:
        trained = json.loads((path.parent / "args.json").read_text())["flags"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    now = flags.as_dict()
    for name in names:
        # `simclr` was trained without shifts, whatever the flag said.
        unused = name in ("shift_trans_type", "mix_alpha") and trained.get("mode") == "simclr"
        if name in trained and trained[name] != now[name] and not unused:
            print(f"note: {path} was trained with --{name} {trained[name]}, evaluated with {now[name]}")
    unit = [f["normalize_sr_dict_feature"] or f["normalize_sr_feature"] for f in (trained, now)]
    if names is _SEEN_SPARSE and unit[0] != unit[1]:
        print(
            f"note: {path} was trained {'with' if unit[0] else 'without'} --normalize_sr_dict_feature, evaluated not so"
        )


def _epochs(path: Path) -> int | None:
    resume = path.with_name(path.name.replace(".model", ".resume").replace(".cocsr_model", ".cocsr_resume"))
    try:
        if resume != path and resume.is_file():
            return int(load_tensors(resume, flag="load_path")["epoch"])
        config = "last.cocsr_config" if "cocsr" in path.name else "last.config"
        return published_epoch(path.parent / config, flag="load_path")
    except UserError as error:
        print(f"note: the epoch is not known ({error})")
        return None
