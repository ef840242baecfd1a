"""The command line: every flag of every script, in groups, with the published names and defaults.

All scripts share one parser, since users share one file of flags between them; only the choices of `--mode` differ.
A flag that was given and that nothing read is told to the user, once (`Flags.unread`).
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from common.errors import UserError

Spec = TypeVar("Spec")

# Experimental switches of the published programs that no published command uses.
REFUSED = {
    "pretrained_model": "it downloads weights; give a local file with --pretrained_path",
    "invert_sr_feature": "no published command uses it; --invert_sr_feature_norm is the inversion of the paper",
    "invert_sr_feature_mean": "no published command uses it; --invert_sr_feature_norm is the inversion of the paper",
    "invert_sr_feature_DNT": "no published command uses it; --invert_sr_feature_norm is the inversion of the paper",
    "invert_sr_coef_DNT": "no published command uses it",
    "loss_lambda_dict_contra_sr": "it had no effect in the published program, and no published command uses it",
}
_FLIPMIX = "no published command uses it; rot_smix mixes an image with its own rotations"
_MODE_SR = "no published command uses it; ood_pre_cocsr codes in trained dictionaries, ood_pre_multi_sr in fitted ones"
_BIT = "the published fine-tuning of downloaded weights is left out; timm_resnetv2_50x1_bit names an architecture"
REFUSED_VALUES: dict[str, dict[str, str]] = {
    "shift_trans_type": {"flipmix": _FLIPMIX, "rot_flipmix": _FLIPMIX},
    "mode": {"ood_pre_sr": _MODE_SR, "ood_pre_sr_refmix": _MODE_SR},
    "model": {"timm_resnetv2_bit": _BIT, "timm_swinv2": "name a model of timm: timm_swinv2_tiny_window8_256, say"},
}


def _not_refused(flag: str) -> Callable[[str], str]:
    """A type for argparse: the value itself, unless it is refused by name."""

    def check(value: str) -> str:
        if value in REFUSED_VALUES[flag]:
            raise argparse.ArgumentTypeError(f"{value} is refused: {REFUSED_VALUES[flag][value]}")
        return value

    return check


def _one_component(flag: str) -> Callable[[str], str]:
    """A type for argparse: a value that becomes part of a folder's name, and that no path hides in."""

    def check(value: str) -> str:
        if "/" in value or os.sep in value or "\0" in value:
            raise argparse.ArgumentTypeError(f"{value!r} becomes part of a folder's name; leave out / in it")
        return _not_refused(flag)(value) if flag in REFUSED_VALUES else value

    return check


def _outlier_set(value: str) -> str:
    """A type for argparse: ~ in the path of `folder:<path>` is the home folder."""
    kind, colon, path = value.partition(":")
    return f"{kind}{colon}{os.path.expanduser(path)}"


def class_choice(value: str) -> int | str:
    """A type for argparse: the number of a class, or its name."""
    try:
        return int(value)
    except ValueError:
        return value


class _Names(list[str]):
    """Known names, and any that begins with `prefix`."""

    def __init__(self, names: Iterable[str], prefix: str, what: str):
        super().__init__([*sorted(names), prefix + what])
        self._prefix = prefix

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(self._prefix))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class Flags:
    """Parsed flags as attributes, read-only, that remember which were given and which were read."""

    def __init__(self, values: Mapping[str, Any], given: Iterable[str] = ()):
        self._values = dict(values)
        self._given = frozenset(given)
        self._read: set[str] = set()

    def filled(self, defaults: Mapping[str, Any]) -> "Flags":
        """The same with `defaults`, those of a mode, in place of the program's where the user gave none."""
        own = {name: value for name, value in defaults.items() if name not in self._given}
        flags = Flags({**self._values, **own}, self._given)
        flags._read |= self._read
        return flags

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

    def unread_notes(self) -> list[str]:
        """A line for each flag that has no effect."""
        where = f"--mode {self._values['mode']}, --dataset {self._values['dataset']}"
        return [f"note: --{name} has no effect here ({where})" for name in self.unread()]

    def as_dict(self) -> dict[str, Any]:
        """All values, without counting as a reading."""
        return dict(self._values)


def pick(spec: type[Spec], flags: Any, only: Iterable[str] | None = None) -> Spec:
    """Fill the dataclass `spec` from the flags that bear its field names.

    only: read these alone, so that others that were given are told to have no effect; their fields keep the defaults.
    """
    names = [f.name for f in dataclasses.fields(spec)] if only is None else only  # type: ignore[arg-type]
    return spec(**{name: getattr(flags, name) for name in names})


def positive(**values: float) -> None:
    """Raise UserError for the first value that is not above zero; keyword = name of its flag."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"--{name} must be > 0, got {value}")


def not_negative(**values: float) -> None:
    """Raise UserError for the first value that is not zero or above; keyword = name of its flag."""
    for name, value in values.items():
        if not value >= 0:
            raise UserError(f"--{name} must be >= 0, got {value}")


def parse(argv: Sequence[str] | None, parser: argparse.ArgumentParser) -> Flags:
    """Parse `argv` (default: the command line).

    Raises: UserError for a flag that is refused or that does not parse.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    values = vars(parser.parse_args(argv))
    nothing = object()
    blank = argparse.Namespace(**dict.fromkeys(values, nothing))
    given = {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not nothing}
    for name in sorted(given & REFUSED.keys()):
        raise UserError(f"--{name} is refused: {REFUSED[name]}")
    positive(**{name: values[name] for name in _POSITIVE})
    flags = Flags(values, given)
    # Read by every script, or a launcher's business: never worth a word.
    for name in ("local_rank", "dry_run", "dataset", "model", "mode"):
        getattr(flags, name)
    return flags


# Bytes; file systems allow 255, temporary files add to it.
_LONGEST_NAME = 230

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
    "knn_k",
    "sr_fit_steps",
)


class Tables(NamedTuple):
    """Names of the rows that flags choose from; `common` knows no other package, so they come as an argument."""

    datasets: Iterable[str]
    outliers: Iterable[str]
    models: Iterable[str]
    shifts: Iterable[str]


def build_parser(
    script: str,
    modes: Iterable[str],
    default_mode: str,
    tables: Tables,
) -> argparse.ArgumentParser:
    """The parser of one script."""
    # allow_abbrev off: `--epoch` is an alias, not a prefix that a later `--epochs_x` would break.
    parser = _Parser(
        prog=script, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, argument_default=None
    )
    on: dict[str, Any] = {"action": "store_true"}
    path: dict[str, Any] = {"type": os.path.expanduser}

    g = parser.add_argument_group("what to run")
    choices: dict[str, Any] = {"type": _not_refused("mode"), "choices": sorted(modes)}
    g.add_argument("--mode", **choices, default=default_mode, help="what to train or evaluate")
    g.add_argument("--suffix", type=_one_component("suffix"), help="appended to the run's name")
    g.add_argument("--seed", type=int, default=0, help="every random draw follows from it")
    g.add_argument("--log_root", **path, default="./logs", help="folder of the run folders")
    g.add_argument("--overwrite", help="replace a run folder of the same name", **on)
    g.add_argument("--dry_run", help="print what would run as JSON, touch nothing", **on)
    g.add_argument("--resume_path", **path, help="run folder or weights to start from (stage 2: the stage-1 run)")
    g.add_argument("--load_path", **path, help="weights to evaluate (or to put linear heads on), or their folder")
    g.add_argument("--out", **path, help="evaluation: folder for results (default: that of the weights)")
    g.add_argument("--no_strict", help="load weights although keys are missing or left over", **on)

    g = parser.add_argument_group("data")
    g.add_argument("--dataset", choices=sorted(tables.datasets), default="cifar10", help="data set")
    g.add_argument("--data_path", **path, default="../Data/", help="folder of the data sets")
    g.add_argument("--download_data", help="download (or unpack) the data set into --data_path", **on)
    normal = "the normal class, its number or its name; without it all classes, unlabelled"
    g.add_argument("--one_class_idx", type=class_choice, help=normal)
    groups = "cifar100, one class: groups of the published tables (13 of 20 hold a foreign class), or CIFAR-100's own"
    g.add_argument("--superclasses", choices=("published", "standard"), default="published", help=groups)
    g.add_argument("--image_size", type=int, help="pixels on a side (default: what the data set or the model is for)")
    g.add_argument("--num_worker", type=int, default=4, help="threads or processes that decode pictures")
    g.add_argument("--skip_bad_images", help="leave out pictures that cannot be read, and count them", **on)
    g.add_argument("--image_cache", **path, help="imagenet: folder to keep decoded training pictures in, built once")
    g.add_argument("--max_megapixels", type=float, default=100.0, help="larger pictures are refused")
    between = "16-bit and float pictures: values that become black and white (default: found from training pictures)"
    g.add_argument("--value_range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=between)

    g = parser.add_argument_group("network and device")
    choices = {"type": _one_component("model"), "choices": _Names(tables.models, "timm_", "<name>")}
    g.add_argument("--model", **choices, default="resnet18", help="backbone")
    g.add_argument("--pretrained_path", **path, help="local file of weights to start the backbone from")
    g.add_argument("--simclr_dim", type=int, default=128, help="outputs of the projector")
    g.add_argument("--pretrained_model", help=argparse.SUPPRESS)
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto", help="auto: bf16 on GPUs that have it")
    g.add_argument("--compile", help="torch.compile network and views (needs a C++ compiler on a CPU)", **on)
    g.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)

    g = parser.add_argument_group("shifts and augmentation")
    choices = {"type": _not_refused("shift_trans_type"), "choices": list(tables.shifts)}
    g.add_argument("--shift_trans_type", **choices, default="none", help="shifting transformations")
    g.add_argument("--mix_alpha", type=float, default=0.5, help="weight of the partner in a mixed image")
    g.add_argument("--color_jitter_strength", type=float, default=1.0, help="strength of the colour jitter")
    g.add_argument("--resize_factor", type=float, default=0.08, help="smallest share of the area that a crop keeps")
    g.add_argument("--resize_fix", help="every crop keeps exactly --resize_factor of the area", **on)
    g.add_argument("--cropmix_resize_factor", type=float, default=0.08, help="rot_cropmix: as --resize_factor")
    g.add_argument("--cropmix_resize_fix", help="rot_cropmix: as --resize_fix", **on)
    g.add_argument("--cropmix_crop_aug", help="rot_cropmix: crop the mixed image once more", **on)

    g = parser.add_argument_group("training")
    g.add_argument("--epochs", "--epoch", type=int, default=1000, help="last epoch (stage 2 counts on from stage 1)")
    g.add_argument("--batch_size", type=int, default=128, help="images per step (of each process)")
    pieces = "images per piece of a step: gradient of the whole, batch norm by piece; less memory, more time"
    g.add_argument("--micro_batch", type=int, help=pieces)
    g.add_argument("--optimizer", choices=("lars", "sgd", "adam", "torchlars"), default="lars", help="stage 1")
    g.add_argument("--lr_scheduler", choices=("cosine", "step_decay"), default="cosine", help="stage 1")
    g.add_argument("--warmup", type=int, default=10, help="epochs of warm-up, from --lr_init to ten times that")
    g.add_argument("--lr_init", type=float, default=0.1, help="learning rate before warm-up")
    g.add_argument("--weight_decay", type=float, default=1e-6, help="stage 1")
    g.add_argument("--temperature", type=float, default=0.5, help="of the contrastive loss (labelled modes: 0.07)")
    g.add_argument("--sim_lambda", type=float, default=1.0, help="weight of the contrastive loss")
    g.add_argument("--save_step", type=int, default=10, help="epochs between checkpoints")
    g.add_argument("--save_minutes", type=float, default=15.0, help="minutes between checkpoints, 0: none by time")
    g.add_argument("--error_step", type=int, default=5, help="epochs between tests of the linear probe (multi-class)")
    g.add_argument("--test_batch_size", type=int, default=100, help="images per batch of that test, and of interp")

    g = parser.add_argument_group("stage 2: dictionaries")
    g.add_argument("--sr_dict_size", type=int, default=512, help="atoms of each dictionary (M)")
    g.add_argument("--sr_lambda", type=float, default=0.01, help="l1 weight inside the coding problem")
    g.add_argument("--sr_rho", type=float, default=1.0, help="ADMM penalty")
    g.add_argument("--sr_admm_stage", type=int, default=40, help="unrolled ADMM steps")
    g.add_argument("--sr_tol", type=float, help="evaluation: stop coding at this optimality gap, relative to lambda")
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
    g.add_argument("--loss_sr_deep_supervision", help="further ADMM steps, counted from 0, to take the loss at: 9,19")
    g.add_argument("--invert_sr_feature", **on, help=argparse.SUPPRESS)
    g.add_argument("--invert_sr_feature_mean", **on, help=argparse.SUPPRESS)
    g.add_argument("--invert_sr_feature_DNT", **on, help=argparse.SUPPRESS)
    g.add_argument("--invert_sr_coef_DNT", **on, help=argparse.SUPPRESS)

    g = parser.add_argument_group("evaluation")
    g.add_argument("--ood_score", nargs="+", help="scores (default: the mode's own)")
    sets = _Names({*tables.datasets, *tables.outliers}, "folder:", "<path>")
    g.add_argument("--ood_dataset", nargs="+", type=_outlier_set, choices=sets, help="other data sets to tell apart")
    g.add_argument("--ood_data_path", **path, help="folder of those data sets (default: --data_path)")
    g.add_argument("--ood_layer", nargs="+", default=["penultimate"], help="t-SNE: penultimate or simclr")
    g.add_argument("--ood_samples", type=int, default=1, help="augmented draws per test image")
    g.add_argument("--ood_batch_size", type=int, default=100, help="images per batch of evaluation")
    g.add_argument("--refmix_batch_size", type=int, default=128, help="training images to take reference partners from")
    g.add_argument("--knn_k", type=int, default=5, help="score knn: distance to which nearest training image")
    g.add_argument("--sr_fit_steps", type=int, default=300, help="multi_sr: iterations of fitting a dictionary")
    g.add_argument("--disable_sim_score", help="leave out the similarity or reconstruction part of a score", **on)
    g.add_argument("--disable_shi_score", help="leave out the shift part of a score", **on)
    g.add_argument("--print_score", help="print quantiles of the scores of every set", **on)
    g.add_argument("--save_score", help="write every image's score as CSV", **on)
    g.add_argument("--tsne_points", type=int, default=1000, help="t-SNE: points of each group at most")
    return parser


def run_name(flags: Any) -> str:
    """The folder name of a run: an interface, since later commands spell it out (specification, section 11).

    Only the modes `simclr_CSI` and `cocsr_dict` name their shift, and only the latter its dictionary settings.
    Labelled modes, `sup_*`, are not "unsup". A class bears the number or the name that the user gave.
    Raises: UserError for a name too long for a folder.
    """
    parts = [flags.dataset, flags.model, *([] if flags.mode.startswith("sup_") else ["unsup"]), flags.mode]
    if flags.mode in ("simclr_CSI", "cocsr_dict"):
        parts += ["shift", flags.shift_trans_type]
    if flags.mode == "cocsr_dict":
        parts += ["cocsr", f"ld{flags.sr_lambda}", f"lr{flags.sr_lr}"]
        parts += ["invf"] if flags.invert_sr_feature_norm else []
    if flags.one_class_idx is not None:
        parts += ["one_class", file_name(str(flags.one_class_idx))]
    if flags.suffix:
        parts.append(flags.suffix)
    name = "_".join(parts)
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise UserError(f"--suffix: the run's name would have more than {_LONGEST_NAME} bytes; give a shorter one")
    return name


def file_name(text: str) -> str:
    """Text as part of a file's name: what is no letter, digit, `_`, `-` or `.` becomes `_`."""
    return re.sub(r"[^\w.-]+", "_", text)


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
