"""The table of a sweep: rows are normal classes, columns methods, over seeds; as Markdown, CSV and JSON."""

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import write_json, write_text
from evals.metrics import LEVELS, mean_aurocs, resampled
from scripts.results import comma_separated, markdown


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation, or nothing."""
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


@dataclass(frozen=True)
class Entry:
    """One evaluation. mean: AUROC in [0, 1], over the other classes. scores: CSV with index, label and score of every
    test image. score: what the published tables know the method by. images: fingerprint of the test images, "" where it
    is not known."""

    method: str
    score: str
    one_class_idx: int
    seed: int
    mean: float
    scores: Path
    device: str
    images: str = ""


@dataclass(frozen=True)
class Cell:
    """AUROC over seeds: mean, standard deviation (None for one seed), interval of the mean, how many seeds."""

    mean: float
    std: float | None
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, by_seed: Sequence[float], samples: np.ndarray) -> "Cell":
        """samples: bootstrap samples of the mean over seeds."""
        std = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
        low, high = np.percentile(samples, LEVELS).tolist()
        return cls(float(np.mean(by_seed)), std, low, high, len(by_seed))

    def text(self, seeds: int) -> str:
        """In percent; says where some of so many seeds are missing."""
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        missing = f" ({self.seeds} of {seeds} seeds)" if self.seeds < seeds else ""
        return f"{100 * self.mean:.1f}{spread} [{100 * self.low:.1f}, {100 * self.high:.1f}]{missing}"


@dataclass(frozen=True)
class Summary:
    """samples: of each entry. cells: by (class, method). means: over classes, by method, with how many classes."""

    samples: dict[Entry, np.ndarray]
    cells: dict[tuple[int, str], Cell]
    means: dict[str, tuple[Cell, int]]


def summarise(entries: Iterable[Entry], times: int) -> Summary:
    """Means over seeds and over classes with bootstrap intervals.

    Every entry sees the same `times` samples of test images, so that means of several are resampled as one. The mean
    over classes is of the seeds that have all classes there are; where none has (`seeds` 0), of the classes' means.
    """
    entries = list(entries)
    samples = _bootstrap(entries, times)
    grouped: dict[tuple[int, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        grouped[entry.one_class_idx, entry.method].append(entry)
    cells = {
        key: Cell.of([entry.mean for entry in group], np.mean([samples[entry] for entry in group], 0))
        for key, group in grouped.items()
    }
    means = {}
    for method in dict.fromkeys(entry.method for entry in entries):
        classes = {idx for idx, of in cells if of == method}
        by_seed: dict[int, list[Entry]] = defaultdict(list)
        for entry in entries:
            if entry.method == method:
                by_seed[entry.seed].append(entry)
        whole = [group for group in by_seed.values() if len(group) == len(classes)]
        # Where no seed has them all: of what each class has, which says nothing of how seeds differ.
        groups = whole or [grouped[idx, method] for idx in classes]
        found = [float(np.mean([entry.mean for entry in group])) for group in groups]
        mean_samples = np.mean([np.mean([samples[entry] for entry in group], 0) for group in groups], 0)
        cell = Cell.of(found, mean_samples)
        means[method] = cell if whole else replace(cell, std=None, seeds=0), len(classes)
    return Summary(samples, cells, means)


def behind(summary: Summary, method: str, reference: str) -> tuple[Cell, int] | None:
    """By how much the AUROC of `method` is behind that of `reference`, the mean over the runs (class and seed) that
    both have, and how many these are.

    The interval is that of differences on the same samples of test images. None without anything in common.
    """
    runs = {(entry.one_class_idx, entry.seed, entry.method): entry for entry in summary.samples}
    pairs = [
        (runs[idx, seed, reference], entry)
        for (idx, seed, of), entry in runs.items()
        if of == method and (idx, seed, reference) in runs
    ]
    if not pairs:
        return None
    samples = np.mean([summary.samples[a] - summary.samples[b] for a, b in pairs], 0)
    return Cell.of([float(np.mean([a.mean - b.mean for a, b in pairs]))], samples), len(pairs)


def _bootstrap(entries: Sequence[Entry], times: int) -> dict[Entry, np.ndarray]:
    """Samples (times,) of the mean AUROC of each entry."""
    found: dict[Entry, np.ndarray] = {}
    counts: dict[tuple[int, ...], np.ndarray] = {}
    for entry in entries:
        scores, labels = _read_scores(entry.scores)
        # Test images by class in the order of the data set: the same samples for whatever class is the normal one.
        key = tuple(labels.tolist())
        if key not in counts:
            counts[key] = resampled(labels, times)
        found[entry] = mean_aurocs(scores, labels, entry.one_class_idx, counts[key])
    return found


def _read_scores(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels by index. Raises: UserError for a file that is not `--save_score`'s."""
    try:
        with path.open(newline="") as file:
            rows = sorted((int(row["index"]), int(row["label"]), float(row["score"])) for row in csv.DictReader(file))
        _, labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--out: {path} is no file of scores; remove its job's record in jobs/ to evaluate again"
        ) from None
    return scores, labels


def write_tables(
    out: Path,
    dataset: str,
    entries: Sequence[Entry],
    *,
    classes: Sequence[int],
    seeds: Sequence[int],
    methods: Sequence[str],
    seconds: dict[str, float],
    notes: dict[str, Any],
    times: int,
    published: dict[str, float] | None = None,
) -> str:
    """Write table.md, table.csv and table.json to `out`; the first as text.

    published: means in percent, by score. seconds: spent on each method, what it shares with others included. notes:
    what the table depends on, printed below it.
    """
    summary = summarise(entries, times)
    devices = sorted({entry.device for entry in entries})
    unit = "hours" if any(device.startswith("cpu") for device in devices) else "GPU-hours"
    keys = {entry.method: entry.score for entry in entries}
    # The published numbers of dictionaries are those of stage 2.
    known = {m: v for m, key in keys.items() if m != "ICS-2020" and (v := (published or {}).get(key))}
    hours = {method: seconds.get(method, 0.0) / 3600 for method in methods}

    def row(title: str, cell: Callable[[str], str]) -> list[str]:
        return [title, *map(cell, methods)]

    def of_class(idx: int) -> Callable[[str], str]:
        return lambda method: summary.cells[idx, method].text(len(seeds)) if (idx, method) in summary.cells else ""

    def mean(method: str) -> str:
        if method not in summary.means:
            return ""
        cell, count = summary.means[method]
        return cell.text(len(seeds)) + (f" ({count} of {len(classes)} classes)" if count < len(classes) else "")

    rows = [row(f"class {idx}", of_class(idx)) for idx in classes] + [row(f"mean of {len(classes)}", mean)]
    reference, runs = methods[-1], len(classes) * len(seeds)
    differences = {method: gap for method in methods[:-1] if (gap := behind(summary, method, reference)) is not None}

    def difference(method: str) -> str:
        if method not in differences:
            return ""
        cell, count = differences[method]
        return cell.text(1) + (f" ({count} of {runs} runs)" if count < runs else "")

    if differences:
        rows.append(row(f"behind {reference}", difference))
    if known:
        rows.append(row("published mean", lambda method: str(known.get(method, ""))))
    rows.append(row(unit, lambda method: f"{hours[method]:.2f}"))
    text = markdown(["normal", *methods], rows) + (
        "AUROC in percent: mean ± standard deviation over seeds [95 % bootstrap interval over test images].\n"
        f"{dataset}, seeds {', '.join(map(str, seeds))}, on {', '.join(devices) or 'nothing yet'}; "
        + "; ".join(f"{name} {value}" for name, value in notes.items())
        + "\n"
    )
    write_text(out / "table.md", text)
    numbers = [(f"behind {reference}", {m: cell.mean for m, (cell, _) in differences.items()})] if differences else []
    numbers += [("published mean", {m: v / 100 for m, v in known.items()}), (unit, hours)]
    write_text(out / "table.csv", comma_separated(*_columns(summary, classes, methods, dict(numbers))))
    each = [
        {
            **{name: getattr(entry, name) for name in ("method", "one_class_idx", "seed", "mean", "device")},
            "interval": np.percentile(summary.samples[entry], LEVELS).tolist(),
        }
        for entry in entries
    ]
    cells = [{"one_class_idx": idx, "method": m, **vars(cell)} for (idx, m), cell in sorted(summary.cells.items())]
    means = [{"method": m, "classes": count, **vars(cell)} for m, (cell, count) in summary.means.items()]
    gaps = [
        {"method": m, "reference": reference, "runs": count, "mean": cell.mean, "low": cell.low, "high": cell.high}
        for m, (cell, count) in differences.items()
    ]
    facts = {"dataset": dataset, "seeds": list(seeds), "classes": list(classes), **notes}
    found = {"each": each, "cells": cells, "means": means, "behind": gaps, "published": known, "hours": hours}
    write_json(out / "table.json", {**facts, **found})
    return text


def _columns(
    summary: Summary, classes: Sequence[int], methods: Sequence[str], more: dict[str, dict[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of numbers, a few columns for each method. more: rows of one number for each."""
    names = ("mean", "std", "low", "high", "seeds")

    def numbers(cell: Cell | None) -> list[str]:
        values = [getattr(cell, name) if cell else None for name in names]
        return ["" if value is None else repr(value) for value in values]

    def row(title: str, cells: Iterable[Cell | None]) -> list[str]:
        return [title, *(number for cell in cells for number in numbers(cell))]

    header = ["normal", *(f"{method} {name}" for method in methods for name in names)]
    rows = [row(f"class {idx}", (summary.cells.get((idx, method)) for method in methods)) for idx in classes]
    means = (summary.means[method][0] if method in summary.means else None for method in methods)
    rows.append(row("mean", means))
    for title, found in more.items():
        blank = [""] * (len(names) - 1)
        rows.append([title, *(cell for m in methods for cell in (repr(found[m]) if m in found else "", *blank))])
    return header, rows
