"""The command line: every flag of every script, in groups, with the published names and defaults.

All scripts share one parser, since users share one file of flags between them; only the choices of `--mode` differ.
A flag that was given and that nothing read is told to the user, once (`Flags.unread`).
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common.errors import UserError

Spec = TypeVar("Spec")

# Experimental switches of the published programs that no published command uses, or that are not built yet.
REFUSED = {
    "pretrained_model": "start from weights of your own with --resume_path",
    "invert_sr_feature": "no published command uses it; --invert_sr_feature_norm is the inversion of the paper",
    "invert_sr_feature_mean": "no published command uses it; --invert_sr_feature_norm is the inversion of the paper",
    "invert_sr_feature_DNT": "no published command uses it; --invert_sr_feature_norm is the inversion of the paper",
    "invert_sr_coef_DNT": "no published command uses it",
    "loss_sr_deep_supervision": "it had no effect in the published program and is not supported yet",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


class Flags:
    """Parsed flags as attributes, read-only, that remember which were given and which were read."""

    def __init__(self, values: Mapping[str, Any], given: Iterable[str] = ()):
        self._values = dict(values)
        self._given = frozenset(given)
        self._read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(name)
        self._read.add(name)
        return self._values[name]

    def given(self, name: str) -> bool:
        """Whether the user wrote the flag, whatever its value."""
        return name in self._given

    def unread(self) -> list[str]:
        """Flags that were given and that nothing has read so far: they have no effect."""
        return sorted(self._given - self._read)

    def used(self) -> list[str]:
        """Flags that something has read so far: what a run depends on."""
        return sorted(self._read)

    def tell_unread(self) -> list[str]:
        """A line for each flag that has no effect."""
        return [f"note: --{name} has no effect in --mode {self._values['mode']}" for name in self.unread()]

    def as_dict(self) -> dict[str, Any]:
        """All values, without counting as a reading."""
        return dict(self._values)


def pick(spec: type[Spec], flags: Any) -> Spec:
    """Fill the dataclass `spec` from the flags that bear its field names."""
    return spec(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(spec)})  # type: ignore[arg-type]


def positive(**values: float) -> None:
    """Raise UserError for the first value that is not above zero; keyword = name of its flag."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"--{name} must be > 0, got {value}")


def parse(argv: Sequence[str] | None, parser: argparse.ArgumentParser) -> Flags:
    """Parse `argv` (default: the command line).

    Raises: UserError for a refused flag; SystemExit(2) with one line for one that argparse refuses.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    values = vars(parser.parse_args(argv))
    nothing = object()
    blank = argparse.Namespace(**dict.fromkeys(values, nothing))
    given = {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not nothing}
    for name in sorted(given & REFUSED.keys()):
        raise UserError(f"--{name} is refused: {REFUSED[name]}")
    positive(**{name: values[name] for name in _POSITIVE})
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("torchrun: several processes are not supported yet; start one, or one per class")
    flags = Flags(values, given)
    # Read by every script, or a launcher's business: never worth a word.
    for name in ("local_rank", "log_root", "overwrite", "dry_run", "suffix", "dataset", "model", "mode"):
        getattr(flags, name)
    return flags


_POSITIVE = (
    "batch_size",
    "test_batch_size",
    "ood_batch_size",
    "refmix_batch_size",
    "epochs",
    "save_step",
    "ood_samples",
    "temperature",
    "simclr_dim",
    "sr_admm_stage",
    "tsne_points",
)


def build_parser(
    script: str,
    modes: Iterable[str],
    default_mode: str,
    *,
    datasets: Iterable[str],
    models: Iterable[str],
    shifts: Iterable[str],
) -> argparse.ArgumentParser:
    """The parser of one script. Tables reach it as arguments, since `common` knows no other package."""
    # allow_abbrev off: `--epoch` is an alias, not a prefix that a later `--epochs_x` would break.
    parser = _Parser(
        prog=script, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, argument_default=None
    )
    on: dict[str, Any] = {"action": "store_true"}

    g = parser.add_argument_group("what to run")
    g.add_argument("--mode", choices=sorted(modes), default=default_mode, help="what to train or evaluate")
    g.add_argument("--suffix", help="appended to the run's name")
    g.add_argument("--seed", type=int, default=0, help="every random draw follows from it")
    g.add_argument("--log_root", default="./logs", help="folder of the run folders")
    g.add_argument("--overwrite", help="replace a run folder of the same name", **on)
    g.add_argument("--dry_run", help="print what would run as JSON, touch nothing", **on)
    g.add_argument("--resume_path", help="run folder or weights to start from (stage 2: the stage-1 run)")
    g.add_argument("--load_path", help="weights to evaluate: last.model, last.cocsr_model or their folder")
    g.add_argument("--no_strict", help="load weights although keys are missing or left over", **on)

    g = parser.add_argument_group("data")
    g.add_argument("--dataset", choices=sorted(datasets), default="cifar10", help="data set")
    g.add_argument("--data_path", default="../Data/", help="folder of the data sets")
    g.add_argument("--download_data", help="download (or unpack) the data set into --data_path", **on)
    g.add_argument("--one_class_idx", type=int, help="the normal class; without it all classes, unlabelled")
    g.add_argument("--image_size", type=int, help="pixels on a side (default: what the data set or the model is for)")
    g.add_argument("--num_worker", type=int, default=4, help="threads that decode pictures")
    g.add_argument("--skip_bad_images", help="folder: leave out pictures that cannot be read, and count them", **on)

    g = parser.add_argument_group("network and device")
    g.add_argument("--model", choices=sorted(models), default="resnet18", help="backbone")
    g.add_argument("--simclr_dim", type=int, default=128, help="outputs of the projector")
    g.add_argument("--pretrained_model", help=argparse.SUPPRESS)
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto", help="auto: bf16 on GPUs that have it")
    g.add_argument("--compile", help="torch.compile the network (needs a C++ compiler on a CPU)", **on)
    g.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)

    g = parser.add_argument_group("shifts and augmentation")
    g.add_argument("--shift_trans_type", choices=list(shifts), default="none", help="shifting transformations")
    g.add_argument("--mix_alpha", type=float, default=0.5, help="weight of the partner in a mixed image")
    g.add_argument("--color_jitter_strength", type=float, default=1.0, help="strength of the colour jitter")
    g.add_argument("--resize_factor", type=float, default=0.08, help="smallest share of the area that a crop keeps")
    g.add_argument("--resize_fix", help="every crop keeps exactly --resize_factor of the area", **on)
    g.add_argument("--cropmix_resize_factor", type=float, default=0.08, help=argparse.SUPPRESS)
    g.add_argument("--cropmix_resize_fix", **on, help=argparse.SUPPRESS)
    g.add_argument("--cropmix_crop_aug", **on, help=argparse.SUPPRESS)

    g = parser.add_argument_group("training")
    g.add_argument("--epochs", "--epoch", type=int, default=1000, help="last epoch (stage 2 counts on from stage 1)")
    g.add_argument("--batch_size", type=int, default=128, help="images per step")
    g.add_argument("--optimizer", choices=("lars", "sgd", "adam", "torchlars"), default="lars", help="stage 1")
    g.add_argument("--lr_scheduler", choices=("cosine", "step_decay"), default="cosine", help="stage 1")
    g.add_argument("--warmup", type=int, default=10, help="epochs of warm-up, from --lr_init to ten times that")
    g.add_argument("--lr_init", type=float, default=0.1, help="learning rate before warm-up")
    g.add_argument("--weight_decay", type=float, default=1e-6, help="stage 1")
    g.add_argument("--temperature", type=float, default=0.5, help="temperature of the contrastive loss")
    g.add_argument("--sim_lambda", type=float, default=1.0, help="weight of the contrastive loss")
    g.add_argument("--save_step", type=int, default=10, help="epochs between checkpoints")
    g.add_argument("--error_step", type=int, default=5, help="epochs between tests of the linear probe (multi-class)")
    g.add_argument("--test_batch_size", type=int, default=100, help="images per batch of that test")

    g = parser.add_argument_group("stage 2: dictionaries")
    g.add_argument("--sr_dict_size", type=int, default=512, help="atoms of each dictionary (M)")
    g.add_argument("--sr_lambda", type=float, default=0.01, help="l1 weight inside the coding problem")
    g.add_argument("--sr_rho", type=float, default=1.0, help="ADMM penalty")
    g.add_argument("--sr_admm_stage", type=int, default=40, help="unrolled ADMM steps")
    g.add_argument("--sr_layer", choices=("penultimate", "simclr"), default="penultimate", help="features to code")
    g.add_argument("--sr_lr", type=float, default=1e-3, help="learning rate of the dictionaries (Adam)")
    g.add_argument("--sr_decay_lr", type=float, default=1e-6, help="weight decay of the dictionaries")
    g.add_argument("--ini_sr_dict_train", help="start from k-means of the training features", **on)
    g.add_argument("--freeze_sr_dict", help="keep the starting dictionaries (what published runs amounted to)", **on)
    g.add_argument("--invert_sr_feature_norm", help="code h / |h|^2 instead of h", **on)
    g.add_argument("--normalize_sr_dict_feature", help="then scale to unit norm", **on)
    g.add_argument("--normalize_sr_feature", help="the same step under the name published evaluation used", **on)
    g.add_argument("--loss_lambda_sr", type=float, default=1.0, help="weight of |s - D a|^2")
    g.add_argument("--loss_lambda_sr_l1", type=float, default=0.01, help="weight of |a|_1")
    g.add_argument("--loss_lambda_dict_constr", type=float, default=0.1, help="weight of the atoms' norm constraint")
    g.add_argument("--loss_dict_constr_mode", type=int, choices=(0, 1), default=0, help="0: norm = c, 1: norm <= c")
    g.add_argument("--loss_dict_constr_value", type=float, default=1.0, help="c of the norm constraint")
    g.add_argument("--loss_dict_detach_sr_coef", help="no gradient through the codes", **on)
    g.add_argument("--loss_dict_detach_feature", help="no gradient into the features: always so", **on)
    g.add_argument("--loss_lambda_dict_contra_sr", type=float, default=1.0, help=argparse.SUPPRESS)
    g.add_argument("--loss_sr_deep_supervision", help=argparse.SUPPRESS)
    g.add_argument("--invert_sr_feature", **on, help=argparse.SUPPRESS)
    g.add_argument("--invert_sr_feature_mean", **on, help=argparse.SUPPRESS)
    g.add_argument("--invert_sr_feature_DNT", **on, help=argparse.SUPPRESS)
    g.add_argument("--invert_sr_coef_DNT", **on, help=argparse.SUPPRESS)

    g = parser.add_argument_group("evaluation")
    g.add_argument("--ood_score", nargs="+", help="scores (default: the mode's own)")
    g.add_argument("--ood_dataset", nargs="+", choices=sorted(datasets), help="other data sets to tell apart")
    g.add_argument("--ood_layer", nargs="+", default=["penultimate"], help="t-SNE: penultimate or simclr")
    g.add_argument("--ood_samples", type=int, default=1, help="augmented draws per test image")
    g.add_argument("--ood_batch_size", type=int, default=100, help="images per batch of evaluation")
    g.add_argument("--refmix_batch_size", type=int, default=128, help="training images to take reference partners from")
    g.add_argument("--disable_sim_score", help="leave out the similarity or reconstruction part of a score", **on)
    g.add_argument("--disable_shi_score", help="leave out the shift part of a score", **on)
    g.add_argument("--print_score", help="print quantiles of the scores of every set", **on)
    g.add_argument("--save_score", help="write every image's score as CSV", **on)
    g.add_argument("--tsne_points", type=int, default=1000, help="t-SNE: points of each group at most")
    return parser


def run_name(flags: Any) -> str:
    """The folder name of a run: an interface, since later commands spell it out (specification, section 11).

    Only the modes `simclr_CSI` and `cocsr_dict` name their shift, and only the latter its dictionary settings.
    """
    parts = [flags.dataset, flags.model, "unsup", flags.mode]
    if flags.mode in ("simclr_CSI", "cocsr_dict"):
        parts += ["shift", flags.shift_trans_type]
    if flags.mode == "cocsr_dict":
        parts += ["cocsr", f"ld{flags.sr_lambda}", f"lr{flags.sr_lr}"]
        parts += ["invf"] if flags.invert_sr_feature_norm else []
    if flags.one_class_idx is not None:
        parts += ["one_class", str(flags.one_class_idx)]
    if flags.suffix:
        parts.append(flags.suffix)
    return "_".join(parts)


def print_dry_run(flags: Flags, *, script: str, run_dir: Path, shifts: int, views_per_step: int) -> None:
    """One JSON object that says what would run."""
    values = flags.as_dict()
    report = {
        "script": script,
        "mode": values["mode"],
        "run_dir": str(run_dir),
        "resume_path": values["resume_path"],
        "load_path": values["load_path"],
        "K": shifts,
        "views_per_step": views_per_step,
        "epochs": values["epochs"],
    }
    print(json.dumps(report))
