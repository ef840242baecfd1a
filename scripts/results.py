"""Collect the results of many runs into one table: `python -m scripts.results logs`.

Rows are the normal classes and their mean, columns the scores. Published means, where there are any, stand below.
"""

import argparse
import csv
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from common.errors import UserError, command
from common.files import write_text

# Mean AUROC in percent as published (Chiou et al. 2023; Tack et al. 2020), by data set and score.
PUBLISHED = {
    "cifar10": {"simclr": 87.9, "rot_trans": 89.8, "CSI": 94.3, "CSI_sr": 95.4},
    "cifar100": {"rot_trans": 79.8, "CSI": 89.6, "CSI_sr": 91.6},
    "imagenet": {"rot_trans": 77.9, "CSI": 91.6, "CSI_sr": 92.8},
}
# Of the recorded settings: what makes a row, or has a name of its own among the facts.
_NAMED = {"mode", "ood_score", "dataset", "ood_dataset", "one_class_idx", "seed", "model", "epochs"}


@dataclass
class Result:
    """What the table takes from a file. None, or no entry, is what a file of an older version does not say.

    data: by name of a set, what identifies its images. facts: what sets numbers of one score and mode apart.
    Its place in the table: `of`, the data set; `normal`, its class; `others`, the sets it is compared with; `column`.
    """

    score: str
    mode: str
    dataset: str
    one_class_idx: int | None
    seed: int | None
    device: str
    mean: float
    aurocs: dict[str, float]
    class_name: str | None
    data: dict[str, str]
    flags: dict[str, Any]
    facts: dict[str, Any]
    of: str = ""
    normal: str = ""
    others: dict[str, str] = field(default_factory=dict)
    column: str = ""

    @classmethod
    def of_file(cls, found: Any) -> "Result":
        """Raises: ValueError, KeyError, TypeError, AttributeError for what is no result."""
        dataset, idx, aurocs = found["dataset"], found["one_class_idx"], found["auroc"]
        flags, weights = found.get("flags", {}), Path(found.get("checkpoint") or "")
        settings = found.get("settings", {})
        # Autoencoders have no backbone; --model is a default that nothing has read.
        model, start = flags.get("model"), f"{dataset}_{flags.get('model')}_"
        if "autoencoder" in settings:
            model, start = None, f"{dataset}_"
        facts = {
            "weights": found.get("weights") or weights.stem or None,
            "model": model,
            "epochs": found["epochs"],
            "run": _run(weights.parent.name, start, f"_one_class_{idx}"),
        }
        facts = {name: value for name, value in facts.items() if value is not None}
        facts |= {name: value for name, value in settings.items() if name not in _NAMED}
        data = {name: of["fingerprint"] or f"{of['images']} images" for name, of in found.get("data", {}).items()}
        same = {name: found[name] for name in ("score", "mode", "dataset", "one_class_idx", "seed", "device")}
        mean, class_name = float(found["mean"]), found.get("class_name")
        return cls(**same, mean=mean, aurocs=aurocs, class_name=class_name, data=data, flags=flags, facts=facts)


def _run(folder: str, start: str, end: str) -> str | None:
    """Of a run folder's name what is neither data set, model nor class: the mode of training and the suffix."""
    return folder.removeprefix(start).replace(end, "", 1) if folder.startswith(start) else None


def read_results(roots: Sequence[Path]) -> list[Result]:
    """Every result_*.json of a detection below the folders. Raises: UserError where there is none, or one cannot be
    read."""
    paths = sorted({path for root in roots for path in root.rglob("result_*.json")})
    if not paths:
        raise UserError(f"no result_*.json below {', '.join(map(str, roots))}; eval.py writes them")
    results = []
    for path in paths:
        try:
            found = json.loads(path.read_text())
            # What `evals.robust` finds in training data has no score of test images.
            results += [] if "trained_on" in found else [Result.of_file(found)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not a result of eval.py") from None
    if not results:
        raise UserError(f"no AUROC in the result_*.json below {', '.join(map(str, roots))}; ood_reconstruction has it")
    for group in _grouped(results, lambda r: r.dataset):
        _separate_data(group)
    for group in _grouped(results, lambda r: (r.dataset, r.of, r.one_class_idx)):
        _separate_classes(group)
    for group in _grouped(results, lambda r: (r.score, r.mode)):
        _separate_columns(group)
    return results


def _grouped(results: Iterable[Result], key: Callable[[Result], Any]) -> list[list[Result]]:
    found = defaultdict(list)
    for result in results:
        found[key(result)].append(result)
    return list(found.values())


def _filled(values: Iterable[str | None], unknown: str = "unknown") -> list[str]:
    """What is not known is taken to be what is known of the others, where that is one thing."""
    values = list(values)
    known = {value for value in values if value is not None}
    blank = min(known) if len(known) == 1 else unknown
    return [blank if value is None else value for value in values]


def _short(images: str) -> str:
    return images[:6] if re.fullmatch("[0-9a-f]{16}", images) else images


def _separate_data(group: Sequence[Result]) -> None:
    """Of one name of data sets: by their test images, or by where these lie, where it stands for several."""
    name = group[0].dataset
    paths = [Path(result.flags.get("data_path", "")) for result in group]
    known: list[str | None] = [result.data.get(name) for result in group]
    if name == "folder":  # any images, while other names stand for one data set as far as older files say
        at: dict[Path, set[str]] = defaultdict(set)
        for path, images in zip(paths, known, strict=True):
            at[path] |= {images} if images else set()
        guesses = [min(at[path]) if len(at[path]) == 1 else str(path) if path.parts else None for path in paths]
        known = [images or guess for images, guess in zip(known, guesses, strict=True)]
    found = _filled(known)
    parts = {images: path.parts for images, path in zip(found, paths, strict=True) if path.parts}
    lengths = range(1, 1 + max(map(len, parts.values()), default=0))
    ends = ({images: "/".join(of[-length:]) for images, of in parts.items()} for length in lengths)
    titles = next((end for end in ends if len(set(end.values())) == len(set(found))), {})
    for result, images in zip(group, found, strict=True):
        result.of = f"{name} ({titles.get(images, _short(images))})" if len(set(found)) > 1 else name


def _separate_classes(group: Sequence[Result]) -> None:
    """Of one data set and class: by its name and training images; and other sets by their images."""
    idx = group[0].one_class_idx
    names = _filled((result.class_name for result in group), str(idx))
    trained = _filled(result.data.get("training") for result in group)
    for result, name, training in zip(group, names, trained, strict=True):
        result.normal = "all classes" if idx is None else f"class {idx}" + (f" ({name})" if name != str(idx) else "")
        result.normal += f", training {_short(training)}" if len(set(trained)) > 1 else ""
    for other in dict.fromkeys(name for result in group for name in result.aurocs):
        having = [result for result in group if other in result.aurocs]
        found = _filled(result.data.get(other) for result in having)
        for result, images in zip(having, found, strict=True):
            result.others[other] = f"{other} ({_short(images)})" if len(set(found)) > 1 else other
    for result in group if idx is None else ():
        result.facts["against"] = " ".join(sorted(result.others.values()))  # its mean is over these


def _separate_columns(group: Sequence[Result]) -> None:
    """Of one score and mode: a column for each combination of facts, whose title names those that differ."""
    names = dict.fromkeys(name for result in group for name in result.facts)
    # An older file has all flags, but does not say which its numbers depend on.
    facts = [{name: r.flags[name] for name in names if name in r.flags and name != "epochs"} | r.facts for r in group]
    texts = {name: _filled(_text(name, of[name]) if name in of else None for of in facts) for name in names}
    differing = [values for values in texts.values() if len(set(values)) > 1]
    for i, result in enumerate(group):
        result.column = f"{result.score} ({', '.join([result.mode, *(values[i] for values in differing)])})"


def _text(name: str, value: Any) -> str:
    """A fact in a column's title."""
    if name in ("weights", "model", "run"):
        return str(value)
    if value is None or isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def tabulate(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one table: mean AUROC in percent by normal class (rows) and mode and score (columns).

    Where all classes are normal there is a row for each set they are compared with, too. A cell is the mean over
    seeds, whose number is shown.
    """
    columns = sorted({result.column for result in results})

    def row(found: Iterable[tuple[Result, float]]) -> list[list[float]]:
        cells: dict[str, list[float]] = {column: [] for column in columns}
        for result, value in found:
            cells[result.column].append(100 * value)
        return list(cells.values())

    rows = []
    ordered = sorted(results, key=lambda r: (r.dataset, r.of, r.one_class_idx or 0, r.normal))
    for data in _grouped(ordered, lambda r: (r.dataset, r.of)):
        of = data[0].of
        classes = _grouped((r for r in data if r.one_class_idx is not None), lambda r: (r.one_class_idx, r.normal))
        found = [row((result, result.mean) for result in group) for group in classes]
        rows += [[of, group[0].normal, *map(_cell, cells)] for group, cells in zip(classes, found, strict=True)]
        # Where a class has several rows, nothing says which goes with the other classes.
        if len(classes) > 1 and len({group[0].one_class_idx for group in classes}) == len(classes):
            means = [[fmean(values) for values in column if values] for column in zip(*found, strict=True)]
            rows.append([of, f"mean of {len(classes)}", *(_mean(values, len(classes)) for values in means)])
        for group in _grouped((r for r in data if r.one_class_idx is None), lambda r: r.normal):
            for other in dict.fromkeys(title for result in group for title in result.others.values()):
                named = ((r, r.aurocs[name]) for r in group for name, title in r.others.items() if title == other)
                rows.append([of, f"all, not {other}", *map(_cell, row(named))])
            rows.append([of, group[0].normal, *map(_cell, row((result, result.mean) for result in group))])
        if published := PUBLISHED.get(data[0].dataset):
            # The published CSI_sr is that of stage 2, not of dictionaries that were fitted after the fact; published
            # superclasses are not those of CIFAR-100.
            own = {result.column for result in data if result.facts.get("superclasses") == "standard"}
            others = [c in own or "multi_sr" in c for c in columns]
            told = ["" if other else published.get(c.split()[0], "") for c, other in zip(columns, others, strict=True)]
            rows.append([of, "published mean", *map(str, told)])
    return ["data set", "normal", *columns], rows


def footnotes(results: Sequence[Result]) -> str:
    """A line per column: which networks, epochs, seeds and devices its numbers come from."""
    lines = []
    for group in sorted(_grouped(results, lambda r: r.column), key=lambda group: group[0].column):
        facts = [{**result.facts, "seed": result.seed, "device": result.device} for result in group]
        told = []
        for name in ("model", "epochs", "seed", "device"):
            values = sorted({str(of[name]) for of in facts if of.get(name) is not None})
            told += [f"{name} {', '.join(values)}"] if values else []
        lines.append(f"{group[0].column}: {'; '.join(told)}")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.1f}" + (f" ({len(values)} runs)" if len(values) > 1 else "")


def _mean(values: list[float], classes: int) -> str:
    if not values:
        return ""
    return f"{fmean(values):.1f}" + (f" ({len(values)} of {classes})" if len(values) < classes else "")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)]) + "\n"


def comma_separated(header: list[str], rows: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.results", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders to search for result_*.json")
    parser.add_argument("--format", choices=("markdown", "csv"), default="markdown")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    args = parser.parse_args(argv)
    render = {"markdown": markdown, "csv": comma_separated}[args.format]
    results = read_results([folder.expanduser() for folder in args.folders])
    text = render(*tabulate(results))
    if args.out:
        try:
            write_text(args.out.expanduser(), text)
        except OSError as error:
            raise UserError(f"--out: cannot write {args.out} ({error.strerror})") from None
    print(text, end="")
    if args.format == "markdown":
        print(f"Mean AUROC in percent.\n{footnotes(results)}", end="")


if __name__ == "__main__":
    sys.exit(main())
