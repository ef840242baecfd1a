"""The command line, made from specs: frozen dataclasses whose fields are flags.

A field says its default, help, range and choices once: `knn_k: int = flag(5, "...", above=0)`. The parser of every
script has the flags of all specs, since users share one file of flags between scripts; only the choices of --mode
differ. A mode reads a spec by `flags.of(Spec)`; flags that were given and that nothing read are reported.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

from common.errors import UserError

# What an evaluation, or a training that starts from weights, makes of a flag that is recorded in them:
# "fixed": the recorded value counts, and another is an error. "network": the default is the recorded value.
# "data": likewise, while --dataset is the recorded one. "place": likewise, and a difference is of no interest.
# "compared": a difference is reported, nothing more.
Origin = Literal["fixed", "network", "data", "place", "compared"]
_KEY = "flag"


@dataclass(frozen=True)
class FlagInfo:
    """What a spec's field says of its flag.

    type: text -> value; None: on/off. choices: allowed values; with `prefix`, also all that begin with it. refused:
    values that are refused, with the reason. above, at_least, at_most: range of a number. nargs, metavar, aliases: as
    for argparse. help None: not listed.
    """

    default: Any
    help: str | None
    type: Callable[[str], Any] | None
    choices: Callable[[], Iterable[Any]] | None = None
    prefix: str | None = None
    placeholder: str = "<name>"
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf
    nargs: str | int | None = None
    metavar: Any = None
    aliases: tuple[str, ...] = ()
    origin: Origin | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises: UserError that names the flag where a number, or one of several, is out of range or no number."""
        if (self.above, self.at_least, self.at_most) == (-math.inf, -math.inf, math.inf):
            return
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                continue
            if not (self.above < number and self.at_least <= number <= self.at_most):
                raise UserError(f"--{name} must {self._range()}, got {number}")

    def _range(self) -> str:
        if self.at_most < math.inf:
            low = f"({self.above:g}" if self.above > -math.inf else f"[{self.at_least:g}"
            return f"lie in {low}, {self.at_most:g}]"
        if self.at_least > -math.inf:
            return f"be >= {self.at_least:g}"
        return f"be > {self.above:g}"


def flag(default: Any, help: str | None, *, type: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """A field of a spec, and with it a flag. type: by default that of `default`; more: as `FlagInfo`."""
    kind = type if type is not None or isinstance(default, bool) else _type_of(default)
    return dataclasses.field(default=default, metadata={_KEY: FlagInfo(default, help, kind, **more)})


def _type_of(default: Any) -> Callable[[str], Any]:
    return str if default is None or isinstance(default, tuple) else default.__class__


def path_flag(default: str | None, help: str | None, **more: Any) -> Any:
    """A flag that is a path; ~ is the home folder."""
    return flag(default, help, type=os.path.expanduser, **more)


class Spec:
    """Base of all specs. group: the flags' heading in --help.

    Constructing one checks the ranges of its fields. Raises: UserError that names the flag.
    """

    group: ClassVar[str] = ""

    def __init_subclass__(cls, group: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.group = group or cls.group

    def __post_init__(self) -> None:
        for name, info in flags_of(type(self)).items():
            info.check(name, getattr(self, name))


S = TypeVar("S")


def flags_of(spec: type) -> dict[str, FlagInfo]:
    """The flags of a spec by name, in order."""
    return {f.name: f.metadata[_KEY] for f in dataclasses.fields(spec) if _KEY in f.metadata}


def one_component(value: str) -> str:
    """A type for `flag`: a value that becomes part of a folder's name, and that no path hides in."""
    if "/" in value or os.sep in value or "\0" in value:
        raise argparse.ArgumentTypeError(f"{value!r} becomes part of a folder's name; leave out / in it")
    return value


@dataclass(frozen=True)
class RunSpec(Spec, group="what to run"):
    """What every command has."""

    mode: str = flag("", "what to train or evaluate")
    suffix: str | None = flag(None, "appended to the run's name", type=one_component)
    seed: int = flag(0, "every random draw follows from it")
    log_root: str = path_flag("./logs", "folder of the run folders")
    overwrite: bool = flag(False, "replace a run folder of the same name")
    dry_run: bool = flag(False, "print what would run as JSON, touch nothing")


@dataclass(frozen=True)
class WeightsSpec(Spec, group="what to run"):
    """Weights to start from."""

    resume_path: str | None = path_flag(None, "run folder or weights to start from (stage 2: the stage-1 run)")
    load_path: str | None = path_flag(None, "weights to evaluate (or to put linear heads on), or their folder")
    no_strict: bool = flag(False, "load weights although keys are missing or left over")


@dataclass(frozen=True)
class DeviceSpec(Spec, group="network and device"):
    """Where to compute, and in which precision."""

    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    amp: str = flag("auto", "auto: bf16 on GPUs that have it", choices=lambda: ("auto", "bf16", "off"))


@dataclass(frozen=True)
class LauncherSpec(Spec, group="network and device"):
    """What launchers of several processes pass."""

    local_rank: int = flag(0, None, aliases=("--local-rank",))


@dataclass(frozen=True)
class RefusedSpec(Spec, group="refused"):
    """Experimental switches of the published programs that no published command uses. They parse, so that the error can
    say why."""

    pretrained_model: str | None = flag(None, None)
    invert_sr_feature: bool = flag(False, None)
    invert_sr_feature_mean: bool = flag(False, None)
    invert_sr_feature_DNT: bool = flag(False, None)
    invert_sr_coef_DNT: bool = flag(False, None)
    loss_lambda_dict_contra_sr: float = flag(1.0, None)


_INVERSION = "no published command uses it; --invert_sr_feature_norm is the inversion of the paper"
REFUSED = {
    "pretrained_model": "it downloads weights; give a local file with --pretrained_path",
    "invert_sr_feature": _INVERSION,
    "invert_sr_feature_mean": _INVERSION,
    "invert_sr_feature_DNT": _INVERSION,
    "invert_sr_coef_DNT": "no published command uses it",
    "loss_lambda_dict_contra_sr": "it had no effect in the published program, and no published command uses it",
}
_MODE_SR = "no published command uses it; ood_pre_cocsr codes in trained dictionaries, ood_pre_multi_sr in fitted ones"
REFUSED_MODES = {"ood_pre_sr": _MODE_SR, "ood_pre_sr_refmix": _MODE_SR}


class Flags:
    """Parsed flags, read-only, that remember which were given and which were read.

    infos: what the specs say of each. given: flags that the user wrote.
    """

    def __init__(self, values: Mapping[str, Any], given: Iterable[str] = (), infos: Mapping[str, FlagInfo] = {}):
        self._values = dict(values)
        self._given = frozenset(given)
        self._read: set[str] = set()
        self._filled: frozenset[str] = frozenset()
        self._infos = infos

    def of(self, spec: type[S], only: Iterable[str] | None = None) -> S:
        """The spec, filled. only: read these flags alone, so that others are reported to have no effect; their fields
        keep the defaults. Raises: UserError as the spec."""
        names = list(flags_of(spec) if only is None else only)
        found = {name: self._values[name] for name in names}
        self.read(found)
        return spec(**{name: tuple(v) if isinstance(v, list) else v for name, v in found.items()})

    def read(self, names: Iterable[str]) -> None:
        """Count these flags as read."""
        self._read.update(names)

    def filled(self, defaults: Mapping[str, Any]) -> "Flags":
        """The same with `defaults`, those of a mode, in place of the program's where the user gave none."""
        own = {name: value for name, value in defaults.items() if name not in self._given}
        flags = self._with(own)
        flags._filled |= own.keys()
        return flags

    def implied(self, values: Mapping[str, Any]) -> "Flags":
        """The same with `values`, which follow from flags that were given, as if the user had given them, too."""
        own = {name: value for name, value in values.items() if name not in self._given}
        flags = self._with(own)
        flags._given |= own.keys()
        return flags

    def inherited(self, recorded: Mapping[str, Any], path: Path | str, *, flag: str) -> "Flags":
        """The same with what weights at `path` (of --`flag`) have recorded of their training as defaults.

        Which flags are inherited is said in their specs (`Origin`). `differences` are those with other values.
        Raises: UserError for another value of a fixed one.
        """
        same_data = "dataset" not in self._given or self._values["dataset"] == recorded.get("dataset")
        own: dict[str, Any] = {}
        for name, there in recorded.items():
            origin = self._infos[name].origin if name in self._infos else None
            if origin is None or (origin in ("data", "place") and not same_data):
                continue
            if name not in self._given:
                own |= {name: there} if origin != "compared" else {}
            elif origin == "fixed" and self._values[name] != there:
                raise UserError(
                    f"--{name} {self._values[name]}: {path} was trained with --{name} {there}; leave the flag out, or"
                    f" give another --{flag}"
                )
        return self._with(own)

    def differences(self, recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Flags read so far whose value decides what a network sees and is not the recorded one: (recorded, now)."""
        names = [
            n
            for n, info in self._infos.items()
            if info.origin not in (None, "place") and n in recorded and n in self._read
        ]
        return {n: (recorded[n], self._values[n]) for n in names if recorded[n] != self._values[n]}

    def _with(self, own: Mapping[str, Any]) -> "Flags":
        flags = Flags({**self._values, **own}, self._given, self._infos)
        flags.read(self._read)
        flags._filled = self._filled
        return flags

    @property
    def mode(self) -> str:
        """--mode."""
        return self.of(RunSpec, only=["mode"]).mode

    @property
    def seed(self) -> int:
        """--seed."""
        return self.of(RunSpec, only=["seed"]).seed

    @property
    def filled_in(self) -> frozenset[str]:
        """Flags that have a mode's default."""
        return self._filled

    def given(self, name: str) -> bool:
        """Whether the user wrote the flag, whatever its value."""
        return name in self._given

    def asked(self, spec: type[Spec], *names: str) -> dict[str, Any]:
        """Those of a spec's flags `names` that the user wrote, by name; others are for weights to say. Counts as
        reading them. Raises: UserError as the spec."""
        given = [name for name in names if self.given(name)]
        found = self.of(spec, only=given)
        return {name: getattr(found, name) for name in given}

    def default(self, name: str) -> Any:
        """The program's default of a flag, as it is recorded; None where no spec has it."""
        value = self._infos[name].default if name in self._infos else None
        return list(value) if isinstance(value, tuple) else value

    def inheritable(self, name: str) -> bool:
        """Whether weights decide the flag where the user does not."""
        return name in self._infos and self._infos[name].origin in ("fixed", "network", "data", "place")

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

    def recorded(self) -> dict[str, Any]:
        """What weights record: flags read so far, paths absolute."""
        values = {name: self._values[name] for name in self.used()}
        paths = [n for n in values if n in self._infos and self._infos[n].type is os.path.expanduser and values[n]]
        return values | {name: os.path.abspath(values[name]) for name in paths}


class _Names(list[str]):
    """Known names, and any that begins with `prefix`."""

    def __init__(self, names: Iterable[str], prefix: str, placeholder: str):
        super().__init__([*sorted(names), prefix + placeholder])
        self._prefix = prefix

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(self._prefix))


class Parser(argparse.ArgumentParser):
    infos: dict[str, FlagInfo]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser(script: str, modes: Iterable[str], default_mode: str | None, specs: Iterable[type[Spec]]) -> Parser:
    """The parser of one script: the flags of all specs, each once, under their groups' headings.

    default_mode None: the mode follows from the weights.
    """
    # allow_abbrev off: `--epoch` is an alias, not a prefix that a later `--epochs_x` would break.
    parser = Parser(
        prog=script, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, argument_default=None
    )
    groups: dict[str, Any] = {}
    parser.infos = {}
    for spec in dict.fromkeys(specs):
        for name, info in flags_of(spec).items():
            if name in parser.infos:
                if parser.infos[name] != info:
                    raise ValueError(f"two specs describe --{name}: say it in one of them")
                continue
            if name == "mode":
                info = dataclasses.replace(
                    info, default=default_mode, choices=partial(sorted, list(modes)), refused=REFUSED_MODES
                )
            parser.infos[name] = info
            group = groups.setdefault(spec.group, None) or parser.add_argument_group(spec.group)
            groups[spec.group] = group
            group.add_argument(f"--{name}", *info.aliases, **argument(info))
    return parser


def argument(info: FlagInfo) -> dict[str, Any]:
    """What argparse wants to know of a flag."""
    hint = argparse.SUPPRESS if info.help is None else info.help
    if info.type is None:
        return {"action": "store_true", "help": hint}
    default = list(info.default) if isinstance(info.default, tuple) else info.default
    found: dict[str, Any] = {"default": default, "help": hint, "type": _checked(info.type, info.refused)}
    if info.choices is not None:
        names = info.choices()
        found["choices"] = _Names(names, info.prefix, info.placeholder) if info.prefix else list(names)
    return found | {key: getattr(info, key) for key in ("nargs", "metavar") if getattr(info, key) is not None}


def _checked(kind: Callable[[str], Any], refused: Mapping[str, str]) -> Callable[[str], Any]:
    """A type for argparse: the value itself, unless it is refused by name."""
    if not refused:
        return kind

    def check(value: str) -> Any:
        if value in refused:
            raise argparse.ArgumentTypeError(f"{value} is refused: {refused[value]}")
        return kind(value)

    return check


def parse(argv: Sequence[str] | None, parser: Parser) -> Flags:
    """Parse `argv` (default: the command line).

    Raises: UserError for a flag that is refused, out of range or that does not parse.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    values = vars(parser.parse_args(argv))
    nothing = object()
    blank = argparse.Namespace(**dict.fromkeys(values, nothing))
    given = {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not nothing}
    for name in sorted(given & REFUSED.keys()):
        raise UserError(f"--{name} is refused: {REFUSED[name]}")
    for name, info in parser.infos.items():
        info.check(name, values[name])
    flags = Flags(values, given, parser.infos)
    # Read by every script, or a launcher's business: never worth a word.
    flags.read({"local_rank", "dry_run", "dataset", "model", "mode"} & values.keys())
    return flags


# Bytes; file systems allow 255, temporary files add to it.
_LONGEST_NAME = 230


def joined_name(parts: Iterable[str]) -> str:
    """The folder name of a run, of its parts. Raises: UserError for a name too long for a folder."""
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


def class_choice(value: str) -> int | str:
    """A type for `flag`: the number of a class, or its name."""
    with contextlib.suppress(ValueError):
        return int(value)
    return value
