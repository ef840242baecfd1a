"""The writer of `evals.noise_lambda`: JSON, lines, CSV, a table as text and two pictures."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_json, write_text, write_whole
from evals.noise_lambda import COLUMNS
from evals.report import result_facts, result_place, table_text
from evals.result import Result, nested
from evals.stem_lambda import write_lines
from evals.trained import Trained
from models.lambda_line import LambdaLine

_DPI = 110
# Okabe and Ito's palette. Columns of the table: colour, style of the line, marker, title.
_COLUMNS = {
    "control": ("#999999", "-", "s", "control, without sparse coding"),
    "fixed": ("#0072B2", "-", "o", "lambda of training"),
    "energy_set": ("#009E73", "--", "^", "predicted for the set, energy"),
    "energy_image": ("#E69F00", "-", "v", "predicted for each image, energy"),
    "highpass_image": ("#D55E00", "-", "D", "predicted for each image, highpass"),
    "oracle": ("#000000", ":", "", "oracle: the best lambda by the test labels"),
}
# Kinds of noise: colour, marker, what a level is.
_NOISES = {
    "gaussian": ("#0072B2", "o", "standard deviation"),
    "shot": ("#D55E00", "s", "Poisson rate"),
    "speckle": ("#009E73", "^", "standard deviation"),
    "impulse": ("#CC79A7", "D", "share of entries"),
}
# Measures of the residual, as axes name them.
_MEASURES = {"energy": "energy: mean of |r|^2", "highpass": "highpass: mean absolute second difference of r"}


def write_noise_lambda(result: Result, trained: Trained, begun: float) -> None:
    """`result_<mode>.json`, `table_<mode>.csv`, `<mode>.png`, `<mode>_lines.png`, `lambda_line.json`, and the table."""
    mode = trained.flags.mode
    facts = {**result_facts(result, trained, begun), **nested(result.metrics)}
    path = result_place(trained, f"result_{mode}", ".json", facts)
    stem, rows = path.stem.removeprefix("result_"), result.per_image["table"]
    table, curves, points = (path.with_name(name) for name in (f"table_{stem}.csv", f"{stem}.png", f"{stem}_lines.png"))
    write_text(table, table_text(rows))
    draw_accuracies(rows, curves)
    draw_lines(facts, points)
    lines = _write_lines(trained, facts)
    # Last: where it is, all is.
    write_json(path, {**facts, "table": table.name})
    of = f"{trained.split.dataset}, {trained.split.normal_title}"
    print(f"accuracy in %, {of}, {facts['n']} test images, lambda {facts['lambda']:g} in training:")
    for line in table_lines(rows):
        print(f"  {line}")
    print("  * the best lambda of the grid for the set by the test labels: what nobody knows, not a method")
    for note in line_notes(facts):
        print(note)
    for place in (table, curves, points, lines, path):
        print(f"wrote {place}", flush=True)


def line_notes(facts: Mapping[str, Any]) -> Iterator[str]:
    """What speaks against lines: more noise must ask for a larger lambda."""
    for kind, lines in facts["lines"].items():
        for measure, line in lines.items():
            if line["a"] <= 0:
                yield (
                    f"note: the line of {kind} noise by {measure} does not rise: {facts['n_calibration']} images do not"
                    " show that more noise asks for a larger lambda; hold out more, or leave --stem_lambda auto"
                )


def _write_lines(trained: Trained, facts: Mapping[str, Any]) -> Path:
    shared = {
        "mode": trained.flags.mode,
        "protocol": facts["settings"]["noise_protocol"],
        "images": facts["n_calibration"],
        "seed": trained.flags.seed,
    }
    points = ("levels", "residual", "best")
    lines = {
        kind: {**of_kind, **shared, **{name: facts["calibration"][kind][name] for name in points}}
        for kind, of_kind in facts["lines"].items()
    }
    return write_lines(trained, lines)


def table_lines(rows: Mapping[str, np.ndarray]) -> Iterator[str]:
    """The table as text: for each noise its levels and the mean over them. Columns without numbers are left out."""
    columns = [name for name in COLUMNS if not np.isnan(rows[name]).any()]
    measured, plain = (name.partition("_") for name in columns), {"oracle": "oracle*"}
    heads = [(first, second) if second else ("", plain.get(first, first)) for first, _, second in measured]
    yield f"{'':<22}" + "".join(f"{first:>10}" for first, _ in heads)
    yield f"{'noise':<9}{'level':<13}" + "".join(f"{second:>10}" for _, second in heads)
    for kind in dict.fromkeys(rows["noise"].tolist()):
        of_kind = {name: column[rows["noise"] == kind] for name, column in rows.items()}
        names = ["clean", *(f"{n} ({x:g})" for n, x in zip(of_kind["number"][1:], of_kind["level"][1:], strict=True))]
        values = np.stack([of_kind[name] for name in columns], 1)
        for name, line in zip([*names, "mean 1.."], [*values, values[1:].mean(0)], strict=True):
            yield f"{kind:<9}{name:<13}" + "".join(f"{100 * value:>10.1f}" for value in line)


def draw_accuracies(rows: Mapping[str, np.ndarray], path: Path) -> None:
    """A panel for each kind of noise: accuracy against level, of the columns that are told apart by eye.

    Predictions per batch lie close to those per set, and so do those by the other measure.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(rows["noise"].tolist()))
    columns = [name for name in _COLUMNS if not np.isnan(rows[name]).any()]
    values = 100 * np.concatenate([rows[name] for name in columns])
    margin = max(1.0, 0.05 * float(np.ptp(values)))
    across = min(2, len(kinds))
    down = -(-len(kinds) // across)
    figure = Figure(figsize=(max(6.4, 4.6 * across), 3.4 * down + 0.8), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    for panel, kind in zip(panels, kinds, strict=False):
        of_kind = {name: column[rows["noise"] == kind] for name, column in rows.items()}
        places = np.arange(len(of_kind["level"]))
        for name in columns:
            color, style, marker, title = _COLUMNS[name]
            panel.plot(places, 100 * of_kind[name], color=color, ls=style, marker=marker, ms=5, lw=1.6, label=title)
        panel.set_xticks(places, ["clean", *(f"{level:g}" for level in of_kind["level"][1:])])
        panel.set_xlabel(f"{kind} noise, {_NOISES[kind][2]}")
        panel.set_ylim(values.min() - margin, values.max() + margin)
        panel.grid(alpha=0.3)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    for panel in panels[::across]:
        panel.set_ylabel("accuracy in %")
    handles, titles = panels[0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=across, frameon=False)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))


def draw_lines(facts: Mapping[str, Any], path: Path) -> None:
    """The best lambda of each level of noise against the residual, on calibration images, and the fitted lines.

    A panel for each measure of the residual.
    """
    from matplotlib.figure import Figure

    measures = list(next(iter(facts["lines"].values())))
    figure = Figure(figsize=(5.2 * len(measures), 5), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        _draw_lines_of(axes, measure, facts)
    of = f"of {facts['n_calibration']} training images"
    figure.suptitle(f"r = x - A(z) at lambda {facts['lambda']:g}, {of}", fontsize=11)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))


def _draw_lines_of(axes: Any, measure: str, facts: Mapping[str, Any]) -> None:
    for kind, lines in facts["lines"].items():
        color, marker, _ = _NOISES[kind]
        calibration, line = facts["calibration"][kind], LambdaLine(**lines[measure])
        x, y = np.array(calibration["residual"][measure]), np.array(calibration["best"])
        ends = np.linspace(x.min(), x.max(), 200)
        axes.plot(ends, np.clip(line.a * ends + line.b, line.low, line.high), color=color, lw=1.6)
        title = f"{kind}: {line.a:.3g} r {'-' if line.b < 0 else '+'} {abs(line.b):.3g}"
        # Open markers, since points of several kinds fall together.
        axes.plot(x, y, marker, color=color, ms=7, mfc="none", mew=1.6, label=title)
    axes.set_xlabel(_MEASURES[measure])
    axes.set_ylabel("lambda of the highest accuracy")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
