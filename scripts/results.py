"""Collect the results of many runs into one table: `python -m scripts.results logs`.

Rows are the normal classes and their mean, columns the scores. Published means, where there are any, stand below.
"""

import argparse
import csv
import io
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
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


_KEYS = ("mode", "score", "dataset", "one_class_idx", "seed", "epochs", "device")


def _model(result: dict[str, Any]) -> str | None:
    return result.get("flags", {}).get("model")


def read_results(roots: Sequence[Path]) -> list[dict[str, Any]]:
    """Every result_*.json below the folders. Raises: UserError where there is none, or one cannot be read."""
    paths = sorted(path for root in roots for path in root.rglob("result_*.json"))
    if not paths:
        raise UserError(f"no result_*.json below {', '.join(map(str, roots))}; eval.py writes them")
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text())
            mean = float(result["mean"])
            facts = {key: result[key] for key in _KEYS}
            results.append({**facts, "mean": mean, "auroc": result["auroc"], "model": _model(result)})
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a result of eval.py") from None
    return results


def tabulate(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one table: mean AUROC in percent by normal class (rows) and mode and score (columns).

    Where all classes are normal there is a row for each set they are told apart from, too.
    Several runs of one cell (seeds, epochs) are averaged and their number is shown.
    """
    cells: dict[tuple[str, int | None], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    against: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        column = f"{result['score']} ({result['mode']})"
        cells[result["dataset"], result["one_class_idx"]][column].append(100 * result["mean"])
        for name, value in result["auroc"].items() if result["one_class_idx"] is None else ():
            against[result["dataset"], name][column].append(100 * value)
    columns = sorted({column for row in cells.values() for column in row})
    rows = []
    for dataset in sorted({dataset for dataset, _ in cells}):
        keys = sorted((key for key in cells if key[0] == dataset), key=lambda k: (k[1] is None, k[1] or 0))
        for key in keys:
            if key[1] is None:
                others = [(name, row) for (of, name), row in against.items() if of == dataset]
                rows += [[dataset, f"all, not {n}", *(_cell(row.get(c, [])) for c in columns)] for n, row in others]
            title = "all classes" if key[1] is None else f"class {key[1]}"
            rows.append([dataset, title, *(_cell(cells[key].get(column, [])) for column in columns)])
        classes = [cells[key] for key in keys if key[1] is not None]
        if len(classes) > 1:
            means = [[fmean(row[column]) for row in classes if column in row] for column in columns]
            rows.append([dataset, f"mean of {len(classes)}", *(_mean(m, len(classes)) for m in means)])
        published = PUBLISHED.get(dataset)
        if published:
            # The published CSI_sr is that of stage 2, not of dictionaries that were fitted after the fact.
            known = ["" if "multi_sr" in column else published.get(column.split()[0], "") for column in columns]
            rows.append([dataset, "published mean", *map(str, known)])
    return ["data set", "normal", *columns], rows


def footnotes(results: Sequence[dict[str, Any]]) -> str:
    """A line per column: which networks, epochs, seeds and devices its numbers come from."""
    seen: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for result in results:
        for key in ("model", "epochs", "seed", "device"):
            if result[key] is not None:
                seen[f"{result['score']} ({result['mode']})"][key].add(str(result[key]))
    lines = []
    for column, values in sorted(seen.items()):
        lines.append(f"{column}: " + "; ".join(f"{key} {', '.join(sorted(found))}" for key, found in values.items()))
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
    results = read_results(args.folders)
    text = render(*tabulate(results))
    print(text, end="")
    if args.format == "markdown":
        print(f"Mean AUROC in percent.\n{footnotes(results)}", end="")
    if args.out:
        write_text(args.out, text)


if __name__ == "__main__":
    sys.exit(main())
