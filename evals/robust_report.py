"""The writer of `evals.robust`: JSON, CSV and pictures of a data matrix and its parts."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common.files import write_json, write_text, write_whole
from evals.report import result_facts, result_place, table_text
from evals.result import Result, nested
from evals.trained import Trained
from evals.writing import set_name

_DPI = 110


def write_separation(result: Result, trained: Trained, begun: float) -> None:
    """`result_<mode>.json`, `scores_<mode>_<set>.csv`, `<mode>.png`, and a line of numbers."""
    mode = trained.flags.mode
    facts = {**result_facts(result, trained, begun), **nested(result.metrics)}
    path = result_place(trained, f"result_{mode}", ".json", facts)
    stem = path.stem.removeprefix("result_")
    tables = {title: f"scores_{stem}_{set_name(title)}.csv" for title in result.per_image}
    for title, table in tables.items():
        write_text(path.with_name(table), table_text(result.per_image[title]))
    write_json(path, {**facts, "scores": tables})
    numbers = ", ".join(f"{name} {_number(name, value)}" for name, value in result.metrics.items())
    print(f"{trained.split.dataset}, {trained.split.title}: {numbers}")
    if result.arrays:
        picture = path.with_name(f"{stem}.png")
        {"denoise": draw_sheet, "outliers": draw_curves, "features": draw_maps}[result.name](result.arrays, picture)
        print(f"wrote {picture}")
    print(f"wrote {path}", flush=True)


def _number(name: str, value: float) -> str:
    if name == "flagged":
        return f"{value:.0f}"
    return f"{value:.2f} dB" if name.startswith("psnr") else f"{value:.4g}"


def _picture(image: np.ndarray) -> np.ndarray:
    """(channels, H, W) as matplotlib shows it: (H, W), or (H, W, 3)."""
    return image[0] if len(image) == 1 else np.moveaxis(image, 0, 2)


def draw_sheet(rows: Mapping[str, np.ndarray], path: Path) -> None:
    """Images side by side, a row for each title: (n, channels, H, W) in [0, 1]; `S` is shown around grey."""
    from matplotlib.figure import Figure

    count = max(map(len, rows.values()))
    figure = Figure(figsize=(0.95 * count + 1.2, 0.95 * len(rows) + 0.15), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(rows), count, squeeze=False))
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
        # Positive and negative entries of S are told apart; those of a picture are clipped as a screen does.
        shown = images / 2 + 0.5 if title == "S" else images
        for axis, image in zip(line, shown.clip(0, 1), strict=False):
            axis.imshow(_picture(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))


def draw_curves(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Precision, recall and F1 against the threshold; the best F1 is marked as what labels alone can tell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    styles = {"precision": ("#0072B2", "--"), "recall": ("#009E73", ":"), "f1": ("#D55E00", "-")}
    for name, (color, style) in styles.items():
        axes.plot(arrays["threshold"], arrays[name], color=color, ls=style, label="F1" if name == "f1" else name)
    best = int(arrays["f1"].argmax())
    x, y = arrays["threshold"][best], arrays["f1"][best]
    axes.plot([x], [y], "o", color="#D55E00")
    axes.set_title(f"best F1 {y:.3f} at threshold {x:.3g}: oracle, found by the labels", fontsize=11)
    axes.set_xlabel("threshold, of the norm of a row of X - L")
    axes.set_ylim(-0.02, 1.05)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))


def draw_maps(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Maps of features (channels, H, W) side by side; of colour images, the sum over channels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(arrays), 3.3), layout="constrained")
    for axis, (title, values) in zip(np.atleast_1d(figure.subplots(1, len(arrays))), arrays.items(), strict=True):
        shown = values.any(0) if values.dtype == bool else values.sum(0)
        style = {"cmap": "gray", "vmin": 0, "vmax": 1} if title == "an image" else {"cmap": "viridis"}
        axis.imshow(shown, interpolation="nearest", **style)
        axis.set_title(title if values.dtype != bool else f"{title} ({int(values.sum())})", fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))
