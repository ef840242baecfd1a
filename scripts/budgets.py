"""AUROC against training time: `python -m scripts.budgets SWEEP SWEEP ... --picture budgets.png`.

Each SWEEP is the folder (--out) of a `python -m scripts.sweep minutes --times T` of its own, of the same classes and
seeds. A line for each method, at the minutes that every method of a sweep has had; bars are 95 % bootstrap intervals
over test images.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError, command
from common.files import write_whole


class Point(NamedTuple):
    """Minutes of training, and the mean AUROC with its interval, in percent."""

    minutes: float
    mean: float
    low: float
    high: float


def read_sweeps(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The tables of sweeps at equal training time, the shortest first.

    Raises: UserError for a folder without one, where sweeps differ in data set, classes or seeds, and for two of the
    same length.
    """
    tables = []
    for folder in folders:
        try:
            table = json.loads((folder / "table.json").read_text())
            table = {name: table[name] for name in ("minutes", "dataset", "classes", "seeds", "means")}
            float(table["minutes"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder} has no table of `python -m scripts.sweep minutes`") from None
        tables.append(table)
    for name in ("dataset", "classes", "seeds"):
        if any(table[name] != tables[0][name] for table in tables):
            raise UserError(f"the sweeps differ in their {name}; give those of the same")
    minutes = [table["minutes"] for table in tables]
    if twice := sorted({n for n in minutes if minutes.count(n) > 1}):
        raise UserError(f"several sweeps have {', '.join(f'{n:g}' for n in twice)} minutes; give one of each length")
    return sorted(tables, key=lambda table: table["minutes"])


def points(tables: Sequence[Mapping[str, Any]], methods: Sequence[str] | None = None) -> dict[str, list[Point]]:
    """Of each method, or of those named, in the order of the tables; a method without all classes is left out.

    Raises: UserError for a method that no table has, and without any method.
    """
    found: dict[str, list[Point]] = {}
    for table in tables:
        for row in table["means"]:
            if row["classes"] == len(table["classes"]) and (methods is None or row["method"] in methods):
                values = (100 * row[name] for name in ("mean", "low", "high"))
                found.setdefault(row["method"], []).append(Point(table["minutes"], *values))
    if missing := [method for method in methods or () if method not in found]:
        raise UserError(f"--methods {' '.join(missing)}: not in these tables with all of their classes")
    if not found:
        raise UserError("no method of these sweeps has all of its classes yet; let them end")
    return found


def draw(path: Path, found: Mapping[str, Sequence[Point]], title: str) -> None:
    """A line for each method, to the file `path` (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    ticks = sorted({point.minutes for of_method in found.values() for point in of_method})
    for n, (method, of_method) in enumerate(found.items()):
        # Side by side, so that bars do not hide each other.
        x = [point.minutes * 1.01 ** (n - (len(found) - 1) / 2) for point in of_method]
        bars = [[p.mean - p.low for p in of_method], [p.high - p.mean for p in of_method]]
        axes.errorbar(x, [p.mean for p in of_method], bars, fmt="o-", capsize=3, label=method)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="minutes of training of one CPU core, stage 2 included", ylabel="mean AUROC (%)")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.budgets", description=__doc__)
    parser.add_argument("sweeps", nargs="+", type=Path, help="folders of sweeps")
    parser.add_argument("--methods", nargs="+", help="these alone")
    parser.add_argument("--picture", type=Path, default=Path("budgets.png"))
    args = parser.parse_args(argv)
    tables = read_sweeps(args.sweeps)
    found = points(tables, args.methods)
    classes, seeds = (", ".join(map(str, tables[0][name])) for name in ("classes", "seeds"))
    for method in sorted({row["method"] for table in tables for row in table["means"]} - found.keys()):
        if args.methods is None:
            print(f"note: {method} is left out; it has not all classes in any of these sweeps")
    try:
        draw(args.picture, found, f"{tables[0]['dataset']}, normal classes {classes}, seeds {seeds}")
    except OSError as error:
        raise UserError(f"--picture: cannot write {args.picture} ({error.strerror})") from None
    for method, of_method in found.items():
        print(
            f"{method}: " + ", ".join(f"{p.minutes:g} min {p.mean:.1f} [{p.low:.1f}, {p.high:.1f}]" for p in of_method)
        )
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    sys.exit(main())
