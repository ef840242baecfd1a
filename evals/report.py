"""The writer of results: tables as text, JSON, CSV and pictures, beside the checkpoint or in --out."""

import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.attacks.specs import radius_text
from common.device import device_name, peak_memory
from common.files import write_json, write_text, write_whole
from common.flags import file_name
from common.run import describe_program
from datasets.noise import SEVERITIES
from evals.attacked import SIDES
from evals.result import Result, family, nested
from evals.specs import ImagesSpec, PlaceSpec, ScoreSpec
from evals.trained import Trained
from evals.weighing import Weighing
from evals.writing import place_for, read_json, set_name
from models.sparse.dictionary import FAR

# Writes one result: (result, the network it is of, `time.monotonic()` at the start).
Write = Callable[[Result, Trained, float], None]

_QUANTILES = np.linspace(0, 1, 11)
# Okabe and Ito's palette, which most colour-blind readers can distinguish; drawn in this order, atoms on top.
_STYLE: dict[str, dict[str, Any]] = {
    "anomalous test": {"c": "#E69F00", "marker": ".", "s": 14, "alpha": 0.55},
    "normal training": {"c": "#999999", "marker": ".", "s": 14, "alpha": 0.7},
    "normal test": {"c": "#0072B2", "marker": ".", "s": 22, "alpha": 0.9},
    "atoms": {"c": "#D55E00", "marker": "*", "s": 45, "alpha": 1.0, "edgecolors": "black", "linewidths": 0.4},
}
# The whole palette, and what tells classes of one colour apart. Classes beyond all pairs have a scale of colours.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
_MARKERS = ("o", "^", "s", "D", "v")
# The key of a picture's facts in its file.
_FACTS = "Comment"


def write_detection(result: Result, trained: Trained, begun: float) -> None:
    """`result_<mode>_<score>.json`, with --save_score a CSV of every set, and a table of AUROC."""
    flags, spec = trained.flags, trained.flags.of(ScoreSpec)
    facts = {"score": result.name, **result_facts(result, trained, begun)}
    path = result_place(trained, f"result_{flags.mode}_{result.name}", ".json", facts)
    tables = write_tables(result, trained, path.with_name(path.name.replace("result_", "scores_", 1)))
    write_json(path, {**facts, **nested(result.metrics), "scores": tables})
    _show(result, trained)
    if spec.print_score:
        for title, scores in _groups(result, trained).items():
            print(f"quantiles of {result.name}, {title}: {quantile_line(scores)}")
    print(f"wrote {path}", flush=True)


def write_classification(result: Result, trained: Trained, begun: float) -> None:
    """`accuracy_<mode>.json`, with the name of a condition that is not `clean`, a line, with --save_score a CSV."""
    flags = trained.flags
    facts = {**result_facts(result, trained, begun), **result.metrics}
    name = "" if result.name == "clean" else f"_{file_name(result.name)}"
    path = result_place(trained, f"accuracy_{flags.mode}{name}", ".json", facts)
    tables = write_tables(result, trained, path.with_name(path.name.replace("accuracy_", "predictions_", 1)))
    write_json(path, {**facts, "predictions": tables})
    under = "" if result.name == "clean" else f" ({result.name})"
    under += "".join(f", --{name} {facts['settings'][name]}" for name in _SEEN_UNDER if name in facts["settings"])
    numbers = ", ".join(f"{_WORDS[key]} {100 * value:.1f} %" for key, value in result.metrics.items())
    print(f"{trained.split.dataset}, {facts['n']} test images of {facts['classes']} classes{under}: {numbers}")
    for place in [*map(path.with_name, tables.values()), path]:
        print(f"wrote {place}", flush=True)


# Settings that change what the network sees.
_SEEN_UNDER = ("test_noise", "test_noise_level", "stem_lambda")


def write_tables(result: Result, trained: Trained, path: Path) -> dict[str, str]:
    """With --save_score a CSV of every set, named after `path`. Returns the names of the files by set."""
    if not trained.flags.of(ImagesSpec).save_score:
        return {}
    tables = {title: f"{path.stem}_{set_name(title)}.csv" for title in result.per_image}
    for title, table in tables.items():
        write_text(path.with_name(table), table_text(result.per_image[title]))
    return tables


_WORDS = {
    "accuracy": "accuracy",
    "ece": "expected calibration error",
    "clean_accuracy": "clean accuracy",
}


def write_picture(result: Result, trained: Trained, begun: float) -> None:
    """`<mode>_<layer>_shift<k>.png`, a scatter plot whose facts are kept in the file."""
    facts = result_facts(result, trained, begun)
    path = result_place(trained, f"{trained.flags.mode}_{result.name}", ".png", facts, _read_facts)
    by_class = class_styles(len(result.per_image)) if result.facts["by_class"] else []
    styles = by_class or [_STYLE[name] for name in result.per_image]
    draw_points(result.per_image, path, title=facts.pop("title"), facts=facts, styles=styles)
    print(f"wrote {path}", flush=True)


def result_facts(result: Result, trained: Trained, begun: float) -> dict[str, Any]:
    """What every result says of where it comes from, and its own facts."""
    flags, split = trained.flags, trained.split
    return {
        "mode": flags.mode,
        "dataset": trained.split.dataset,
        "one_class_idx": split.one_class_idx,
        "class_name": split.class_name,
        "seed": flags.seed,
        "checkpoint": str(_path(trained)),
        "weights": _path(trained).stem,
        **result.facts,
        "settings": {**result.facts.get("settings", {}), **trained.settings},
        "seconds": round(time.monotonic() - begun, 2),
        "device": device_name(trained.device),
        **peak_memory(trained.device),
        "processes": trained.world.size,
        "epochs": trained.epoch,
        "flags": flags.as_dict(),
        **describe_program(),
    }


def _path(trained: Trained) -> Path:
    if trained.path is None:
        raise ValueError("results of a network in memory have no place")
    return trained.path


def result_place(
    trained: Trained,
    stem: str,
    ending: str,
    facts: Mapping[str, Any],
    read: Callable[[Path], Any] = read_json,
) -> Path:
    """Where a result goes; two checkpoints of one folder keep theirs apart."""
    path = _path(trained)
    place = trained.flags.of(PlaceSpec)
    folder = Path(place.out) if place.out else path.parent
    tag = "" if path.stem == "last" else f"_{path.stem}"
    return place_for(folder, f"{stem}{tag}", ending, facts, read)


def _show(result: Result, trained: Trained) -> None:
    """The table of a detection."""
    names, metrics, facts = trained.split.class_names, result.metrics, result.facts
    if "gap" in metrics:
        share, zeros, gap = metrics["lambda_share"], 100 * metrics["zeros"], metrics["gap"]
        advice = " (far from optimal; see --sr_rho_auto and --sr_admm_stage of training)" if gap > FAR else ""
        print(
            f"codes: lambda {share:.2g} of lambda_max, {zeros:.0f} % zeros (medians), mean optimality gap {gap:.3g}"
            f" lambda{advice}"
        )
    for line in Weighing.of_facts(facts["weighing"]).lines if "weighing" in facts else []:
        print(line)
    of = trained.split.normal_title
    print(f"AUROC of {result.name}, {trained.split.dataset}, {of} normal, {facts['n_in']} against {facts['n_out']}:")
    for name, value in family(metrics, "auroc").items():
        label = name.removeprefix("one_class_")
        title = f"{name} ({names[int(label)]})" if label.isdigit() else name
        print(f"  {title:<32} {100 * value:5.1f}")
    low, high = (100 * metrics[f"auroc_interval/{end}"] for end in ("low", "high"))
    print(f"  {'one_class_mean':<32} {100 * metrics['mean']:5.1f}  95 % interval {low:.1f} to {high:.1f}")
    print(f"  {'One_class_real_mean (pooled)':<32} {100 * metrics['pooled']:5.1f}")
    numbers = [f"{title} {100 * metrics[f'{name}/pooled']:.1f}" for name, title in _POOLED.items()]
    print(f"  pooled: {', '.join(numbers)}", flush=True)
    for line in (*corruption_lines(result), *attack_lines(result)):
        print(line, flush=True)


_POOLED = {
    "aupr_normal": "AUPR of normal images",
    "aupr_anomalous": "of anomalous ones",
    "fpr_at_95_recall": "FPR at 95 % recall",
}


def corruption_lines(result: Result) -> Iterator[str]:
    """The table of AUROC under corruptions, where there are any: kind by severity, and means."""
    if "corruptions" not in result.facts:
        return
    yield f"AUROC of {result.name} under corruptions of test images, by severity:"
    yield f"  {'':<16} {' '.join(f'{severity:>6}' for severity in SEVERITIES)}   mean"
    for kind, row in result.facts["corruptions"].items():
        numbers = " ".join(f"{100 * value:6.1f}" for value in (*row, result.metrics[f"corrupted/{kind}"]))
        yield f"  {kind:<16} {numbers}"
    yield f"  {'mean':<16} {'':>34} {100 * result.metrics['corrupted/mean']:6.1f}"


def attack_lines(result: Result) -> Iterator[str]:
    """The table of AUROC under attack, where there is one: a line for each radius, what each attack leaves by itself,
    and the signs of masked gradients."""
    if "attack" not in result.facts:
        return
    facts = result.facts["attack"]
    counts = [sum(of[side] for of in facts["images"].values()) for side in ("normal", "anomalous")]
    how = f"{facts['steps']} steps" + (f", draws a gradient: {facts['draws']}" if facts["draws"] else "")
    of = f"{counts[0]} normal and {counts[1]} anomalous images, L-inf, {' and '.join(facts['by_attack'])}, {how}"
    yield f"AUROC of {result.name} under attack, {of}:"
    yield f"  {'radius':<10} {'clean':>9} {'normal':>9} {'anomalous':>9} {'both':>9}  attacked"
    for row in facts["curve"]:
        yield f"  {radius_text(row['epsilon']):<10} " + " ".join(f"{100 * row[side]['mean']:9.1f}" for side in SIDES)
    left = ", ".join(f"{attack} {100 * value:.1f}" for attack, value in facts["by_attack"].items())
    yield f"  both at {radius_text(facts['epsilon'])}, each attack by itself: {left}"
    yield f"  gradients: {facts['health_line']}"


def _groups(result: Result, trained: Trained) -> dict[str, np.ndarray]:
    """Scores of the normal test images, of each class under its published name, and of each other set."""
    own, *others = result.per_image
    label, scores = result.per_image[own]["label"], result.per_image[own]["score"]
    classes = [name for name in family(result.metrics, "auroc") if name not in others]
    found = {name: scores[label == int(name.removeprefix("one_class_"))] for name in classes}
    normal = scores[~np.isin(label, [int(name.removeprefix("one_class_")) for name in classes])]
    return {"normal test": normal, **found, **{title: result.per_image[title]["score"] for title in others}}


def quantile_line(scores: np.ndarray) -> str:
    """Quantiles 0, 10, ... 100 % of the scores, and their mean."""
    return " ".join(f"{q:.4g}" for q in np.quantile(scores, _QUANTILES)) + f"  mean {scores.mean():.4g}"


def table_text(columns: Mapping[str, np.ndarray]) -> str:
    """CSV with one row an image; floats in full."""
    values = [
        map(repr, column.tolist()) if column.dtype.kind == "f" else column.tolist() for column in columns.values()
    ]
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(columns)
    rows.writerows(zip(*values, strict=True))
    return out.getvalue()


def _read_facts(path: Path) -> Any:
    """What `draw_points` has written into a picture beside its pixels; None where there is nothing."""
    try:
        with Image.open(path) as picture:
            return json.loads(picture.info[_FACTS])
    except (OSError, ValueError, KeyError):
        return None


def class_styles(count: int) -> list[dict[str, Any]]:
    """Of each of so many classes its colour and marker; a scale of colours where there are not as many pairs."""
    if count <= len(_COLORS) * len(_MARKERS):
        looks = [(_COLORS[n % len(_COLORS)], _MARKERS[n // len(_COLORS)]) for n in range(count)]
        return [{"c": color, "marker": marker, "s": 12, "alpha": 0.8, "linewidths": 0} for color, marker in looks]
    from matplotlib import colormaps

    scale = colormaps["viridis"](np.linspace(0, 1, count))
    return [{"color": color, "marker": "o", "s": 12, "alpha": 0.8, "linewidths": 0} for color in scale]


# Characters of a legend in a row, and those that a marker and the space around it take.
_ROW, _MARKER = 110, 7


def legend_columns(labels: Sequence[str]) -> int:
    """All in one row where there is room, else five columns or as many as fit."""
    widths = [len(label) + _MARKER for label in labels]
    return len(labels) if sum(widths) <= _ROW else max(1, min(5, _ROW // max(widths)))


def draw_points(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    path: Path,
    *,
    title: str,
    facts: Mapping[str, Any],
    styles: Sequence[Mapping[str, Any]],
) -> None:
    """A scatter plot. groups: name -> columns x and y. facts: what it depends on, kept in its file. styles: of each.

    Many groups have a colour bar in place of a legend.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.add_subplot()
    for (name, points), style in zip(groups.items(), styles, strict=True):
        axes.scatter(points["x"], points["y"], label=f"{name} ({len(points['x'])})", **style)
    axes.set_title(title, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    if any("color" in style for style in styles):
        bar = ScalarMappable(Normalize(0, len(groups) - 1), "viridis")
        figure.colorbar(bar, ax=axes, label=f"class, of {len(groups)} by number", shrink=0.8, pad=0.01)
    else:
        labels = axes.get_legend_handles_labels()[1]
        # Markers of groups that are drawn small are small in the legend, too.
        scale = 1.6 if styles and styles[0]["s"] > 13 else 2.4
        how: dict[str, Any] = {"ncols": legend_columns(labels), "markerscale": scale, "frameon": False}
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), fontsize=10 if len(labels) < 6 else 9, **how)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120, metadata={_FACTS: json.dumps(facts)}))
