"""The writer of `evals.alpha_scan`: JSON, the table, a picture, and the weights with the alpha that was chosen."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.files import write_json, write_whole
from evals.alpha_scan import COLUMNS, state_file, write_sparse
from evals.attack_report import title_of
from evals.report import result_facts, result_place
from evals.result import Result
from evals.trained import Trained

_DPI = 110
# Okabe and Ito's palette. Columns: colour, marker, title.
_MARKS = {
    "clean": ("#0072B2", "o", "without an attack"),
    "apgd_ce": ("#E69F00", "s", "APGD, plain gradient"),
    "straight": ("#D55E00", "D", "APGD, straight-through gradient"),
}
_CHOSEN = {"straight_through": ("#D55E00", "--"), "released": ("#E69F00", ":")}


def write_alpha_scan(result: Result, trained: Trained, begun: float) -> None:
    """`result_alpha_scan.json`, `alpha_scan.png`, `sparse.model`, and the table. What was kept to go on is removed."""
    facts = {**result_facts(result, trained, begun), "alpha": result.metrics["alpha"]}
    path = result_place(trained, f"result_{trained.flags.mode}", ".json", facts)
    stem = path.stem.removeprefix("result_")
    picture, weights = path.with_name(f"{stem}.png"), path.with_name(f"sparse{stem.removeprefix('alpha_scan')}.model")
    draw_scan(facts, picture)
    write_sparse(trained, facts["alpha"], weights)
    write_json(path, {**facts, "picture": picture.name, "sparse": weights.name})
    state_file(trained).unlink(missing_ok=True)
    print(f"accuracy in %, {trained.split.dataset}, {facts['n']} held-out training images, {title_of(facts)}:")
    for line in scan_lines(facts):
        print(f"  {line}")
    for place in (picture, weights, path):
        print(f"wrote {place}", flush=True)


def scan_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The table as text, and the choice."""
    yield "alpha   " + "".join(f"{name:>12}" for name in COLUMNS)
    for row in facts["table"]:
        mark = " <" if row["alpha"] == facts["alpha"] else ""
        yield f"{row['alpha']:<8g}" + "".join(f"{100 * row[name]:>12.1f}" for name in COLUMNS) + mark
    rule = facts["rule"]
    bound = f", at most {100 * rule['max_clean_drop']:g} points lost without an attack" if rule["bounded"] else ""
    yield f"chosen: {facts['alpha']:g}, by {rule['column']}{bound}; {_others(facts)}"


def _others(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"--select {name} chooses {alpha:g}" for name, alpha in facts["chosen_by"].items())


def draw_scan(facts: Mapping[str, Any], path: Path) -> None:
    """Accuracies against alpha, and where each rule chooses."""
    from matplotlib.figure import Figure

    alphas = [row["alpha"] for row in facts["table"]]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for name, (color, marker, title) in _MARKS.items():
        values = [100 * row[name] for row in facts["table"]]
        axes.plot(alphas, values, color=color, marker=marker, mfc="none", lw=1.6, label=title)
    for name, (color, style) in _CHOSEN.items():
        title = f"{facts['chosen_by'][name]:g}, chosen by --select {name}"
        axes.axvline(facts["chosen_by"][name], color=color, ls=style, lw=1.2, label=title)
    axes.set_xlabel("alpha, in standard deviations of a channel")
    axes.set_ylabel(f"accuracy in %, {facts['n']} held-out images, {title_of(facts)}")
    axes.set_ylim(0, 115 * max(row["clean"] for row in facts["table"]) + 1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))
