"""The writer of `evals.attack`: JSON, the table, the health line and the curve as a picture; images as CSV."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.attacks.masked import HEADLINE
from common.attacks.specs import radius_text
from common.files import write_json, write_whole
from evals.attack import ADAPTIVE, BASE, STANDARD
from evals.report import result_facts, result_place, write_tables
from evals.result import Result, family, nested
from evals.trained import Trained

_DPI = 110
_NORMS = {"linf": "L-inf", "l2": "L2"}
# Okabe and Ito's palette. Metrics at epsilon: colour, marker, title.
_MARKS = {
    f"worst/{STANDARD}": ("#E69F00", "s", "worst case of attacks on the final logits"),
    "worst_case": ("#D55E00", "D", "worst case of all attacks"),
}


def write_attack(result: Result, trained: Trained, begun: float) -> None:
    """`result_<mode>.json`, the table, with a curve `<mode>.png`, with --save_score `images_<mode>_<set>.csv`."""
    facts = {**result_facts(result, trained, begun), **nested(result.metrics)}
    path = result_place(trained, f"result_{trained.flags.mode}", ".json", facts)
    places = [path]
    tables = write_tables(result, trained, path.with_name(path.name.replace("result_", "images_", 1)))
    if facts["radii"]:
        picture = path.with_name(f"{path.stem.removeprefix('result_')}.png")
        draw_curve(result, picture)
        facts["picture"] = picture.name
        places.append(picture)
    write_json(path, {**facts, "images": tables})
    print(f"accuracy in %, {trained.split.dataset}, {facts['n']} test images, {title_of(facts)}, {facts['precision']}:")
    for line in attack_lines(result):
        print(f"  {line}")
    for place in [*map(path.with_name, tables.values()), *places]:
        print(f"wrote {place}", flush=True)


def title_of(facts: Mapping[str, Any]) -> str:
    """`L-inf 8/255`."""
    return f"{_NORMS[facts['norm']]} {radius_text(facts['epsilon'])}"


def attack_lines(result: Result) -> Iterator[str]:
    """The table as text, the curve, what attacks have warned of, and the health line."""
    metrics, facts = result.metrics, result.facts

    def line(name: str, what: str, value: float) -> str:
        return f"{name:<14}{what:<12}{100 * value:>6.1f}"

    yield line("natural", "", metrics["accuracy"])
    for name, left in family(metrics, "attacked").items():
        own = facts["attacks"][name]
        yield f"{line(name, own['group'], left)}{own['seconds']:>9.0f} s"
    for group in (STANDARD, ADAPTIVE):
        if f"worst/{group}" in metrics:
            yield line("worst case", group, metrics[f"worst/{group}"])
    yield line("worst case", "of all", metrics["worst_case"])
    if any(own["group"] == BASE for own in facts["attacks"].values()):
        yield "the headline is the worst case of all; rows of `base` are of the network without MeanSparse"
    yield f"of images that are right without an attack, {100 * metrics['robust_of_correct']:.1f} % are robust"
    curve = family(metrics, "curve")
    if curve:
        yield "radius  " + "".join(f"{radius:>9}" for radius in curve)
        yield "left    " + "".join(f"{100 * left:>9.1f}" for left in curve.values())
    for name, own in facts["attacks"].items():
        if "parts" in own:
            yield f"{name}, after each part: " + ", ".join(f"{part} {100 * x:.1f}" for part, x in own["parts"].items())
        yield from (f"warning of {name}: {text}" for text in own.get("warnings", ()))
    yield facts["health"]
    if facts["not_measured_without"]:
        yield f"not looked for, without attacks: {', '.join(facts['not_measured_without'])}"


def draw_curve(result: Result, path: Path) -> None:
    """What is left against the radius, and the worst cases at epsilon."""
    from matplotlib.figure import Figure

    metrics, facts = result.metrics, result.facts
    curve, radii = family(metrics, "curve"), np.array(facts["radii"])
    places = np.arange(len(radii))
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        places, 100 * np.array(list(curve.values())), color="#0072B2", marker="o", lw=1.6, label="APGD, cross-entropy"
    )
    for name, (color, marker, title) in _MARKS.items():
        if name in metrics:
            place = np.interp(facts["epsilon"], radii, places)
            label = f"{title}, {100 * metrics[name]:.1f} %"
            axes.plot(place, 100 * metrics[name], marker, color=color, ms=8, mfc="none", mew=1.8, label=label)
    axes.set_xticks(places, list(curve))
    axes.set_xlabel(f"radius of attacks, {_NORMS[facts['norm']]}")
    axes.set_ylabel("accuracy in %")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    health = HEADLINE if any(sign["shows"] for sign in facts["signs"]) else "no sign of masked gradients"
    axes.set_title(f"{facts['n']} images, {health}", fontsize=11)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))
