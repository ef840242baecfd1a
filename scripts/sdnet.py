"""Tables of SDNets: `python -m scripts.sdnet logs` reads the runs of scripts/sdnet_sweep.sh and SDNET_Detector.sh.

Accuracy on clean images, accuracy under noise x lambda, AUROC of the detector under noise; mean and standard deviation
over seeds. Gains are of one network over another by seed, so that their spread is not that of the two networks.
"""

import argparse
import csv
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from common.errors import UserError, command
from common.files import write_text
from scripts.results import markdown
from scripts.tables import cell

CLASSIFIER, DETECTOR = "supervised", "simclr_CSI"
CLEAN, MEAN = "clean", "mean"
# What lambda is predicted for, and what else a table of `noise_lambda` compares it with.
PER = ("set", "batch", "image")
_OTHERS = {"control": "control", "fixed": "lambda of training", "oracle": "oracle"}
# Flags that runs of one row may differ in.
_FREE = frozenset(
    "seed suffix model batch_size log_root data_path num_worker save_step save_minutes device dry_run overwrite"
    " image_cache max_megapixels download_data local_rank skip_bad_images".split()
)
# What a table of noise depends on besides networks and seed.
_STUDY = ("noise_protocol", "noise_levels", "noises", "lambdas", "calibration_images", "line_of", "measures")
_OLDER = "it is of an older version; remove it and evaluate again"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder. flags: those that its training has read. data: of its training images. images_per_second: the
    median over epochs. memory: the largest, GiB; None where it is not known."""

    folder: Path
    flags: Row = field(repr=False)
    data: str = ""
    images_per_second: float | None = None
    memory: float | None = None

    @property
    def model(self) -> str:
        return self.flags["model"]

    @property
    def seed(self) -> int:
        return self.flags["seed"]

    @property
    def group(self) -> tuple[str, str, int]:
        """What networks have to share to be compared: data, and the length of training."""
        return self.flags["dataset"], self.data, self.flags["epochs"]

    @classmethod
    def of(cls, folder: Path) -> "Run":
        """Raises: OSError, ValueError, KeyError, TypeError for what is no run folder."""
        config = json.loads((folder / "args.json").read_text())
        # Which mode it is says whether the others are there.
        flags = {name: config["flags"][name] for name in {*config["used"], "mode", "seed", "one_class_idx"}}
        metrics = folder / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        speeds = [row["train/images_per_second"] for row in rows if "train/images_per_second" in row]
        memory = [row["train/peak_memory_gib"] for row in rows if "train/peak_memory_gib" in row]
        data = str((config.get("data") or {}).get("fingerprint", ""))
        return cls(folder, flags, data, median(speeds) if speeds else None, max(memory, default=None))


def control_of(model: str) -> str:
    """The network without sparse coding that has the blocks and widths of an SDNet: resnet18 for sdnet18_all.

    Of a network that is no SDNet: itself.
    """
    if not model.startswith("sdnet"):
        return model
    for part in ("_all", "_noshortcut"):
        model = model.replace(part, "", 1)
    return model.replace("sdnet", "resnet", 1)


def read_runs(roots: Iterable[Path], mode: str) -> list[Run]:
    """The runs of a training mode below the folders, sorted by network and seed.

    Raises: UserError for a run folder that cannot be read, and for runs of one network that differ in more than a seed.
    """
    runs = []
    for config in sorted({path for root in roots for path in root.rglob("args.json")}):
        try:
            run = Run.of(config.parent)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{config} is not that of a run folder; move it elsewhere") from None
        runs += [run] if run.flags["mode"] == mode else []
    return sorted(runs, key=lambda run: (run.group, *_in_order(run.model), run.seed))


def _in_order(model: str) -> tuple[str, bool, int]:
    """Sorts a control before its SDNets, and these by how many layers are of sparse coding."""
    return control_of(model), model.startswith("sdnet"), len(model)


def grouped(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Runs that are compared with each other. Raises: UserError as `check_alike`."""
    found: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        found[(*run.group, run.flags["one_class_idx"])].append(run)
    for group in found.values():
        check_alike(group)
        yield group


def check_alike(runs: Sequence[Run]) -> None:
    """Raises: UserError where two runs of a network have one seed, or other flags."""
    for of_model in by_model(runs).values():
        first = of_model[0]
        for other in of_model[1:]:
            names = (first.flags.keys() | other.flags.keys()) - _FREE
            differ = sorted(name for name in names if first.flags.get(name) != other.flags.get(name))
            if differ:
                raise UserError(f"{first.folder} and {other.folder} differ in --{differ[0]}; give one of them alone")
        seeds = [run.seed for run in of_model]
        for run in of_model:
            if seeds.count(run.seed) > 1:
                raise UserError(
                    f"{run.folder} is not the only run of {run.model} with seed {run.seed}; move one of them"
                )


def by_model(runs: Iterable[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.model].append(run)
    return found


def read_result(path: Path) -> Row:
    """Raises: UserError for a file that is no result."""
    try:
        found = json.loads(path.read_text())
        return dict(found) | {"settings": dict(found["settings"]), "weights": str(found["weights"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a result of eval.py") from None


# Clean accuracy.


def clean_accuracies(run: Run) -> dict[str, float]:
    """In percent, by weights: `last`, `best`. Under noise or another lambda does not count."""
    found = {}
    for path in sorted(run.folder.rglob("accuracy_test_acc*.json")):
        result = read_result(path)
        changed = {"test_noise", "stem_lambda", "corrupt"} & result["settings"].keys()
        if not changed and result.get("condition") == CLEAN:
            found[result["weights"]] = 100 * _number(result, "accuracy", path)
    return found


def _number(found: Row, name: str, path: Path) -> float:
    try:
        return float(found[name])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} has no {name}; {_OLDER}") from None


def accuracy_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows: a network each. None where no run has been tested."""
    found = {run.folder: clean_accuracies(run) for run in runs}
    tested = by_model(run for run in runs if found[run.folder])
    if not tested:
        return None
    last = {(run.model, run.seed): found[run.folder].get("last") for run in runs}
    rows = []
    for model, of_model in tested.items():
        kinds = [[found[run.folder].get(weights) for run in of_model] for weights in ("last", "best")]
        control = control_of(model)
        gains = [_less(last[model, run.seed], last.get((control, run.seed))) for run in of_model]
        speeds, memory = [run.images_per_second for run in of_model], [run.memory for run in of_model]
        rows.append(
            [
                model,
                str(len(of_model)),
                *(cell(_known(values), 2) for values in kinds),
                "" if control == model else signed(_known(gains), 2),
                _middle(speeds, ".0f"),
                _middle(memory, ".2f"),
            ]
        )
    header = [
        "network",
        "seeds",
        "last epoch",
        "best epoch",
        "last - control",
        "images/s",
        "peak memory, GiB",
    ]
    return header, rows


def _less(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and not math.isnan(value)]


def _middle(values: Iterable[float | None], form: str) -> str:
    known = _known(values)
    return format(median(known), form) if known else ""


def signed(values: Sequence[float], digits: int = 1) -> str:
    """As `cell`, with the sign of the mean."""
    text = cell(values, digits)
    return text if not text or text.startswith("-") else f"+{text}"


# Noise x lambda.


class Level(NamedTuple):
    """A row of a table of noise. level: `clean`, a number as text, or `mean`."""

    noise: str
    level: str


# seed -> level -> column of the file -> accuracy in percent, or a lambda.
BySeed = dict[int, dict[Level, dict[str, float]]]


class Study(NamedTuple):
    """What one set of flags of `noise_lambda` found. settings: JSON. networks: by model."""

    settings: str
    weights: str
    networks: dict[str, BySeed]


def noise_studies(runs: Sequence[Run]) -> list[Study]:
    """One for each set of flags and kind of weights, in the order in which they are met."""
    found: dict[tuple[str, str], dict[str, BySeed]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        for path in sorted(run.folder.glob("result_noise_lambda*.json")):
            result = read_result(path)
            if result.get("mode") != "noise_lambda":
                continue
            settings = {name: result["settings"][name] for name in _STUDY if name in result["settings"]}
            if any(name.startswith("CIFAR-10-C") for name in result.get("data", {})):
                settings["images"] = "CIFAR-10-C"
            key = json.dumps(settings), result["weights"]
            if run.seed in found[key][run.model]:
                raise UserError(f"{path} is not the only result of its flags in {run.folder}; remove one of them")
            found[key][run.model][run.seed] = read_levels(path.with_name(str(result.get("table"))))
    return [Study(settings, weights, dict(networks)) for (settings, weights), networks in found.items()]


def read_levels(path: Path) -> dict[Level, dict[str, float]]:
    """The table of a result: each level, and the mean over those with noise. Raises: UserError for another file."""
    found: dict[Level, dict[str, float]] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                level = CLEAN if int(row.pop("number")) == 0 else f"{float(row['level']):g}"
                noise = row.pop("noise")
                values = {
                    _named(name): float(text) * (1 if name.startswith("lambda_") else 100) for name, text in row.items()
                }
                if not _OTHERS.keys() <= values.keys() or not measures_of(values):
                    raise ValueError
                found[Level(noise, level)] = values
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no table of noise_lambda; {_OLDER}") from None
    for noise in dict.fromkeys(of.noise for of in found):
        noisy = [values for of, values in found.items() if of.noise == noise and of.level != CLEAN]
        if noisy:
            means = {name: math.fsum(values[name] for values in noisy) / len(noisy) for name in noisy[0]}
            found[Level(noise, MEAN)] = means
    return found


def _named(column: str) -> str:
    """A column; of tables from before there was another measure than energy, as it is called now."""
    return re.sub(rf"^(lambda_)?({'|'.join(PER)})$", r"\1energy_\2", column)


def measures_of(values: Row) -> list[str]:
    """By which measures of the residual lambda was predicted: `energy` for the column `energy_set`."""
    last = f"_{PER[-1]}"
    names = [name.removesuffix(last) for name in values if name.endswith(last) and not name.startswith("lambda_")]
    return [name for name in names if not math.isnan(values[f"{name}{last}"])]


def _levels(by_seed: BySeed) -> dict[Level, list[dict[str, float]]]:
    """What the seeds found, by level."""
    found: dict[Level, list[dict[str, float]]] = defaultdict(list)
    for of_seed in by_seed.values():
        for level, values in of_seed.items():
            found[level].append(values)
    return found


def noise_table(study: Study, *, means: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows: of every network, kind of noise and measure its levels, or the means over levels alone.

    A gain is of lambda predicted for the set or the image over that of training or the control.
    """
    rows = []
    for model, by_seed in study.networks.items():
        for level, seeds in _levels(by_seed).items():
            if means != (level.level == MEAN):
                continue
            for measure in measures_of(seeds[0]):
                predicted = {per: f"{measure}_{per}" for per in PER}
                names = ["control", "fixed", *predicted.values(), "oracle"]
                row = [model, level.noise, *([] if means else [level.level]), measure]
                row += [cell(_column(seeds, name), 1) for name in names]
                if means:
                    row += [signed(_gains(seeds, predicted[per], over)) for per, over in _GAINS]
                else:
                    lambdas = [f"lambda_{predicted['set']}", f"lambda_{predicted['image']}", "lambda_oracle"]
                    row += [cell(_column(seeds, name), 2) for name in lambdas]
                rows.append(row)
    columns = ["control", _OTHERS["fixed"], *(f"predicted, {per}" for per in PER), "oracle"]
    gains = [f"{per} - {'training' if over == 'fixed' else over}" for per, over in _GAINS]
    more = gains if means else ["lambda, set", "lambda, image", "lambda, oracle"]
    return ["network", "noise", *([] if means else ["level"]), "measure", *columns, *more], rows


_GAINS = (("set", "fixed"), ("image", "fixed"), ("set", "control"), ("image", "control"))


def _column(seeds: Sequence[Row], name: str) -> list[float]:
    return _known(values.get(name) for values in seeds)


def _gains(seeds: Sequence[Row], name: str, over: str) -> list[float]:
    return _known(_less(values.get(name), values.get(over)) for values in seeds)


def largest_gains(study: Study) -> list[str]:
    """Where predicted lambda gains most over that of training, and over the control, at one level of noise."""
    lines = []
    for over in ("fixed", "control"):
        found = {
            (model, level, f"{measure}, {per}"): gains
            for model, by_seed in study.networks.items()
            for level, seeds in _levels(by_seed).items()
            if level.level not in (MEAN, CLEAN)
            for measure in measures_of(seeds[0])
            for per in ("set", "image")
            if (gains := _gains(seeds, f"{measure}_{per}", over))
        }
        if found:
            (model, level, how), gains = max(found.items(), key=lambda item: math.fsum(item[1]) / len(item[1]))
            what = f"{model}, {level.noise} {level.level}, {how}"
            lines.append(f"largest gain over {_OTHERS[over]}: {signed(gains)} points ({what})")
    return lines


# The detector.


def detector_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows: AUROC of each network and way to choose lambda, a column for each level of noise."""
    found: dict[tuple[str, str, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        for path in sorted(run.folder.rglob("result_ood_pre_*.json")):
            result = read_result(path)
            settings, score = result["settings"], str(result.get("score"))
            if result.get("mode") != "ood_pre" or result["weights"] != "last":
                continue
            under = CLEAN
            if "test_noise" in settings:
                under = f"{settings['test_noise']} {settings.get('test_noise_level'):g}"
            lam = settings.get("stem_lambda")
            measure = f"predicted, image, {settings['lambda_measure']}" if "lambda_measure" in settings else ""
            title = {None: "as trained", "auto": measure or "predicted, image"}.get(lam, str(lam))
            cells = found[run.model, score, title if run.model.startswith("sdnet") else ""][under]
            if run.seed in cells:
                raise UserError(f"{path} is not the only result of its flags in {run.folder}; remove one of them")
            cells[run.seed] = 100 * _number(result, "mean", path)
    if not found:
        return None
    levels = sorted({under for cells in found.values() for under in cells}, key=_by_level)
    rows = [
        [model, score, lam, *(cell(list(cells[under].values()), 1) if under in cells else "" for under in levels)]
        for (model, score, lam), cells in sorted(found.items(), key=lambda row: (*_in_order(row[0][0]), row[0][1:]))
    ]
    return ["network", "score", "lambda", *levels], rows


def _by_level(under: str) -> tuple[str, float]:
    kind, _, level = under.partition(" ")
    return ("", 0.0) if kind == CLEAN else (kind, float(level))


# All of it.


def title_of(runs: Sequence[Run]) -> str:
    """What the runs of a table share: `cifar10, 220 epochs, seeds 0, 1`."""
    flags = runs[0].flags
    normal = "" if flags["one_class_idx"] is None else f", class {flags['one_class_idx']}"
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    return f"{flags['dataset']}{normal}, {flags['epochs']} epochs, seed{'s' if ',' in seeds else ''} {seeds}"


def study_title(study: Study) -> str:
    """What distinguishes one study from most others."""
    settings = json.loads(study.settings)
    shown = [
        f"{study.weights}.model",
        settings.get("images", "own noise"),
        f"levels of {settings.get('noise_protocol')}",
    ]
    return ", ".join(shown)


def study_flags(study: Study) -> str:
    """All flags of a study."""
    values = {name: value for name, value in json.loads(study.settings).items() if value is not None}
    texts = {name: " ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in values.items()}
    return "noise_lambda: " + ", ".join(f"{name} {text}" for name, text in texts.items())


def tables(roots: Sequence[Path]) -> str:
    """All tables as text. Raises: UserError where there is none, and as `read_runs`."""
    parts: list[str] = []

    def add(title: str, table: tuple[list[str], list[list[str]]], *notes: str) -> None:
        parts.append("\n".join([f"**{title}**", "", markdown(*table), *(f"{note}\n" for note in notes if note)]))

    for group in grouped(read_runs(roots, CLASSIFIER)):
        if table := accuracy_table(group):
            add(f"Clean accuracy in percent: {title_of(group)}", table)
        for study in noise_studies(group):
            title = f"{title_of(group)}; {study_title(study)}"
            add(
                f"Accuracy under noise in percent, mean over levels: {title}",
                noise_table(study, means=True),
                study_flags(study),
            )
            gains = "; ".join(largest_gains(study))
            add(f"At every level: {title}", noise_table(study, means=False), gains)
    for group in grouped(read_runs(roots, DETECTOR)):
        if table := detector_table(group):
            add(f"AUROC in percent: {title_of(group)}", table)
    if not parts:
        raise UserError(f"nothing to show below {', '.join(map(str, roots))}; scripts/SDNET_*.sh make it")
    return "\n".join(parts)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.sdnet", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders to search for runs")
    parser.add_argument("--out", type=Path, help="write the tables to this file as well")
    args = parser.parse_args(argv)
    text = tables([folder.expanduser() for folder in args.folders])
    if args.out:
        try:
            write_text(args.out.expanduser(), text)
        except OSError as error:
            raise UserError(f"--out: cannot write {args.out} ({error.strerror})") from None
    print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
