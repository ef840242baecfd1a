"""The writer of `evals.sparse_inside`: JSON and two pictures."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_json, write_whole
from evals.report import result_facts, result_place
from evals.result import Result, family, nested
from evals.trained import Trained

_DPI = 110
_BEFORE, _AFTER, _LINE = "#0072B2", "#D55E00", "#000000"


def write_sparse_inside(result: Result, trained: Trained, begun: float) -> None:
    """`result_<mode>.json`, `<mode>_blocked.png`, `<mode>_channels.png`, and a line for each operator."""
    facts = {**result_facts(result, trained, begun), **nested(result.metrics)}
    path = result_place(trained, f"result_{trained.flags.mode}", ".json", facts)
    stem = path.stem.removeprefix("result_")
    pictures = {name: path.with_name(f"{stem}_{name}.png") for name in ("blocked", "channels")}
    shares = family(result.metrics, "blocked")
    draw_shares(shares, facts, pictures["blocked"])
    draw_channels(result.arrays, facts, pictures["channels"])
    write_json(path, {**facts, "pictures": {name: picture.name for name, picture in pictures.items()}})
    print(f"share of values that are replaced, alpha {facts['alpha']:g}, {facts['measured']} training images:")
    for name, share in shares.items():
        print(f"  {name:<32} {100 * share:5.1f} %")
    for place in (*pictures.values(), path):
        print(f"wrote {place}", flush=True)


def draw_shares(shares: Mapping[str, float], facts: Mapping[str, Any], path: Path) -> None:
    """Bars by operator, in the order of the network, and what Gaussian values would have."""
    from matplotlib.figure import Figure

    places = np.arange(len(shares))
    figure = Figure(figsize=(6.4, 1.6 + 0.22 * len(shares)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(places, 100 * np.array(list(shares.values())), color=_BEFORE)
    gaussian = 100 * math.erf(facts["alpha"] / math.sqrt(2))
    axes.axvline(gaussian, color=_LINE, ls="--", lw=1.2, label=f"Gaussian values: {gaussian:.1f} %")
    axes.set_yticks(places, list(shares), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"share of values that are replaced in %, alpha {facts['alpha']:g}")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))


def draw_channels(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], path: Path) -> None:
    """Histograms of a channel of each operator, before and after it."""
    from matplotlib.figure import Figure

    edges = family(arrays, "edges")
    figure = Figure(figsize=(4.2 * len(edges), 3.6), layout="constrained")
    for place, (name, own) in enumerate(edges.items(), 1):
        axes, channel = figure.add_subplot(1, len(edges), place), facts["channels"][name]
        for kind, color, style in (("after", _AFTER, {"lw": 1.6}), ("before", _BEFORE, {"lw": 1.2, "ls": "--"})):
            axes.stairs(np.maximum(arrays[f"{kind}/{name}"], 0.5), own, color=color, label=kind, **style)
        axes.set_yscale("log")
        axes.axvline(channel["mean"], color=_LINE, lw=0.8, alpha=0.5)
        axes.set_title(f"{name}, channel {channel['channel']}", fontsize=10)
        axes.set_xlabel("value")
        if place == 1:
            axes.set_ylabel("values, logarithmic")
            axes.legend(frameon=False)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))
