"""Histograms of feature distances: `python -m scripts.robust_figures RUN ...`.

RUN is a folder that `eval.py --mode feature_distance --save_score` has written to, or a file of its results.
Four panels, a histogram of each run in each: cosine similarity and L2 distance of the features of an image and of the
same image attacked (positive pairs), and of an image and one of another class (negative pairs). The mean of each is in
the legend, and in a table.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, command
from common.files import write_whole
from common.flags import class_choice, file_name
from evals.distance import QUANTITIES
from evals.writing import read_json
from scripts.results import markdown
from scripts.robust import method_of

_BINS, _DPI = 20, 110
# Okabe and Ito's palette. Outlines of several styles, for histograms that lie upon each other.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
# Settings that distances depend on.
_SETTINGS = ("epsilon", "num_steps", "step_size", "strategy")
_REMEDY = "make it by eval.py --mode feature_distance --save_score --load_path"


@dataclass(frozen=True)
class Measured:
    """One result. title: of its training. columns: of each image, `label` and `QUANTITIES`, (N,)."""

    path: Path
    title: str
    facts: Mapping[str, Any] = field(repr=False)
    columns: Mapping[str, np.ndarray] = field(repr=False)

    @classmethod
    def of(cls, run: Path, target: int | str | None) -> "Measured":
        """The result of a run folder, or that file; of all classes, or of one, its number or its name.

        Raises: UserError where there is none, and where it has no values of each image.
        """
        path, facts = _result(run, target)
        if not facts["pairs"]:
            raise UserError(f"{path} has no values of each image: {_REMEDY} {facts['checkpoint']}")
        columns: dict[str, list[float]] = {"label": [], **{name: [] for name in QUANTITIES}}
        for table in facts["pairs"].values():
            try:
                with path.with_name(table).open() as file:
                    for row in csv.DictReader(file):
                        for name, values in columns.items():
                            values.append(float(row[name]))
            except (OSError, ValueError, KeyError):
                raise UserError(f"{path.with_name(table)} cannot be read: {_REMEDY} {facts['checkpoint']}") from None
        arrays = {name: np.array(values) for name, values in columns.items()}
        if target is not None:
            arrays = {name: values[arrays["label"] == _label(facts, target)] for name, values in arrays.items()}
        try:
            title = method_of(facts["trained_by"])[-1]
        except KeyError:
            title = path.parent.name
        return cls(path, title, facts, arrays)

    def means(self) -> dict[str, float]:
        """Of each quantity, over the pairs that there are."""
        return {name: float(np.nanmean(self.columns[name])) for name in QUANTITIES}


def _result(run: Path, target: int | str | None) -> tuple[Path, Mapping[str, Any]]:
    """The file: of all classes rather than of one, of the last weights rather than of others."""
    paths = [run] if run.is_file() else sorted(run.glob("result_feature_distance*.json"))
    found = {path: facts for path in paths if _is_result(facts := read_json(path))}
    fitting = {
        path: (facts["target"] is not None, facts["weights"] != "last", path)
        for path, facts in found.items()
        if (facts["target"] is None if target is None else _label(facts, target) is not None)
    }
    if not fitting:
        of = "all classes" if target is None else f"class {target}"
        raise UserError(f"{run} holds no feature distances of {of}: {_REMEDY} {run}")
    path = min(fitting, key=lambda path: fitting[path])
    return path, found[path]


def _is_result(facts: Any) -> bool:
    return isinstance(facts, dict) and {"target", "classes", "pairs", "weights", "settings"} <= facts.keys()


def _label(facts: Mapping[str, Any], target: int | str) -> int | None:
    """The label of a class that was measured, by its number or its name."""
    classes = facts["classes"]
    return classes.get(str(target)) if target not in classes.values() else int(target)


def titled(found: Sequence[Measured], titles: Sequence[str] | None) -> dict[str, Measured]:
    """By title, `titles` if given; where two are the same, with the name of the run folder.

    Raises: UserError for another number of titles, and for one that is given twice."""
    if titles is not None and (len(titles) != len(found) or len(set(titles)) < len(titles)):
        raise UserError(f"--titles: give {len(found)} different ones, one for each RUN")
    own = [one.title for one in found]
    names = titles or [
        name if own.count(name) == 1 else f"{name}, {one.path.parent.name}"
        for name, one in zip(own, found, strict=True)
    ]
    if len(set(names)) < len(names):
        raise UserError("RUN: two of them are the same; give each once, or --titles")
    return dict(zip(names, found, strict=True))


def draw(runs: Mapping[str, Measured], path: Path, *, title: str) -> None:
    """A panel for each quantity; 20 bins of each run between its own smallest and largest value, as published."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    for axes, name in zip(figure.subplots(2, 2).flatten(), QUANTITIES, strict=True):
        kind, _, what = name.partition("_")
        for n, (run, measured) in enumerate(runs.items()):
            values = measured.columns[name]
            values = values[~np.isnan(values)]
            density, edges = np.histogram(values, _BINS, density=True)
            color, line = _COLORS[n % len(_COLORS)], _LINES[n % len(_LINES)]
            axes.stairs(density, edges, fill=True, color=color, alpha=0.25)
            axes.stairs(density, edges, color=color, ls=line, lw=1.6, label=f"{run}, mean {values.mean():#.3g}")
        axes.set_title(f"{kind} pairs", fontsize=11)
        axes.set_xlabel("cosine similarity" if what == "cosine" else "L2 distance")
        axes.set_ylabel("density")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.robust_figures", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or a file of a result")
    parser.add_argument("--target_label", type=class_choice, help="images of this class alone, its number or its name")
    parser.add_argument("--titles", nargs="+", help="of the runs, in their order (default: by their training)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the picture (the current one)")
    args = parser.parse_args(argv)
    runs = titled([Measured.of(run, args.target_label) for run in args.runs], args.titles)
    first = next(iter(runs.values())).facts
    for name, measured in runs.items():
        other = [s for s in _SETTINGS if measured.facts["settings"][s] != first["settings"][s]]
        other += ["data"] if measured.facts["data"] != first["data"] else []
        if other:
            print(f"note: {name} was measured with other {', '.join(other)} than {next(iter(runs))}")
    one = args.target_label is not None
    of = f"class {args.target_label}" if one else "all classes"
    attack = f"PGD-{first['settings']['num_steps']} at {255 * first['settings']['epsilon']:.3g}/255"
    title = f"features of test images, {first['dataset']}, {of}: {attack}, negatives {first['settings']['strategy']}"
    tail = f"_class_{file_name(str(args.target_label))}" if one else ""
    path = args.out / f"feature_distance{tail}.png"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(runs, path, title=title)
    except OSError as error:
        raise UserError(f"--out: cannot write {path} ({error.strerror})") from None
    header = ["training", *(name.replace("_", " ").replace("l2", "L2") for name in QUANTITIES)]
    rows = [[name, *(f"{mean:.3f}" for mean in measured.means().values())] for name, measured in runs.items()]
    print(markdown(header, rows), end="")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
