"""The writer of `evals.inside`: JSON, and pictures of inversions, of atoms and of the sparsity of each layer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.files import write_json, write_whole
from evals.display import around_grey
from evals.inside import IMAGES
from evals.report import result_facts, result_place
from evals.result import Result, family, nested
from evals.trained import Trained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 110
# Inches: the longest side of a sheet, and the largest side of an image in it.
_SHEET, _CELL = 14.0, 1.1
# Images side by side.
_COLUMNS = 16
# Pixels of a side of an image in a sheet, at least.
_PIXELS = 96
_SHARE, _RESIDUAL = "#0072B2", "#E69F00"


def write_inside(result: Result, trained: Trained, begun: float) -> None:
    """`result_<mode>.json` and `<mode>_inversions.png`, `_atoms.png`, `_sparsity.png`, and a line for each layer."""
    mode = trained.flags.mode
    facts = {**result_facts(result, trained, begun), **nested(result.metrics)}
    path = result_place(trained, f"result_{mode}", ".json", facts)
    stem = path.stem.removeprefix("result_")
    pictures = {name: path.with_name(f"{stem}_{name}.png") for name in ("inversions", "atoms", "sparsity")}
    keeps_mean = result.facts["settings"]["keep_mean"]
    rows = family(result.arrays, "inversions")
    correlation = family(result.metrics, "correlation" if keeps_mean else "centred_correlation")
    classes = [image["class"] for image in result.facts["shown"]]
    draw_inversions(rows, classes, correlation, pictures["inversions"], title=_title(result, trained))
    draw_atoms(result.arrays["atoms"], result.arrays["used"], pictures["atoms"])
    share, residual = family(result.metrics, "nonzero"), family(result.metrics, "residual")
    draw_sparsity(share, residual, pictures["sparsity"], images=result.facts["measured"])
    # Last: where it is, all is.
    write_json(path, {**facts, "pictures": {name: picture.name for name, picture in pictures.items()}})
    for name in share:
        print(f"{layer_title(name):<16} {100 * share[name]:5.1f} % of the code non-zero, residual {residual[name]:.3g}")
    for picture in pictures.values():
        print(f"wrote {picture}")
    print(f"wrote {path}", flush=True)


def tap_title(name: str) -> str:
    """`stage 2 block 1` for 2.1."""
    stage, dot, block = name.partition(".")
    return f"stage {stage} block {block}" if dot else name


def layer_title(name: str) -> str:
    """`2.1 conv1` for layer2.0.conv1, `stem` for conv1."""
    parts = name.split(".")
    if len(parts) == 3 and parts[0].startswith("layer") and parts[1].isdigit():
        return f"{parts[0].removeprefix('layer')}.{int(parts[1]) + 1} {parts[2]}"
    return "stem" if name == "conv1" else name


def _title(result: Result, trained: Trained) -> str:
    """Of the sheet of inversions."""
    facts, settings = result.facts, result.facts["settings"]
    how = "" if settings["keep_mean"] else ", without the mean over images"
    how += ", histograms equalised" if settings["equalise"] else ""
    of = f"{facts['model']}, training images of {trained.split.dataset}"
    return f"{of}\nrebuilt from the codes of each place{how}\nr: correlation with the image, mean of the row"


def draw_inversions(
    rows: Mapping[str, np.ndarray], classes: Sequence[str], correlation: Mapping[str, float], path: Path, *, title: str
) -> None:
    """A sheet: a row for the images and one for each place, (N, C, H, W) in [0, 1]; columns in the order of `classes`.

    correlation: of each place, written beside its row.
    """
    from matplotlib.figure import Figure

    lines, columns = len(rows), min(len(classes), _COLUMNS)
    blocks = math.ceil(len(classes) / columns)
    cell = min(_CELL, _SHEET / columns)
    size = (max(cell * columns + 1.7, 7), (cell * lines + 0.4) * blocks + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10)
    labels = [name if name == IMAGES else f"{tap_title(name)}\nr {correlation[name]:.2f}" for name in rows]
    sheet = np.stack([*rows.values()])
    for block, axes in enumerate(figure.subplots(blocks, squeeze=False)[:, 0]):
        part = slice(block * columns, (block + 1) * columns)
        images, names = sheet[:, part], classes[part]
        missing = [(0, 0)] * 5
        missing[1] = (0, columns - len(names))
        _show(axes, mosaic(np.pad(images, missing, constant_values=1)), lines, columns)
        axes.set_yticks(np.arange(lines) + 0.5, labels, fontsize=10)
        # A name over each run of images of one class: there may be no room for more.
        first = [n for n, name in enumerate(names) if n == 0 or names[n - 1] != name]
        axes.set_xticks([n + 0.5 for n in first], [names[n] for n in first], fontsize=9)
    _write(figure, path)


def atoms_title(shape: Sequence[int]) -> str:
    """Of the sheet of atoms of this shape (M, C, k, k)."""
    count, channels, side = shape[:3]
    how = "each divided by its largest value, zero is mid grey"
    if channels not in (1, 3):
        how = f"the norm over their {channels} channels, each divided by its largest value"
    caption = "below each: how many entries of its code are not zero"
    return f"{count} atoms of the stem, {side} x {side} pixels, most used first\n{how}\n{caption}"


def draw_atoms(atoms: np.ndarray, used: np.ndarray, path: Path) -> None:
    """A sheet of atoms (M, C, k, k), each with the share of its code's entries that are not zero, `used` (M,)."""
    from matplotlib.figure import Figure

    shown = around_grey(torch.from_numpy(atoms)).numpy()
    columns = math.ceil(math.sqrt(len(shown)))
    lines = math.ceil(len(shown) / columns)
    sheet = np.ones((lines * columns, *shown.shape[1:]), np.float32)
    sheet[: len(shown)] = shown
    figure = Figure(figsize=(max(0.8 * columns + 0.3, 5), 0.8 * lines + 0.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(atoms_title(atoms.shape), fontsize=9)
    _show(axes, mosaic(sheet.reshape(lines, columns, *shown.shape[1:]), gap=0.15), lines, columns)
    for n, share in enumerate(used):
        place = (n % columns + 0.5, n // columns + 0.965)
        axes.text(*place, f"{100 * share:.1f} %", fontsize=7, ha="center", va="center")
    _write(figure, path)


def draw_sparsity(share: Mapping[str, float], residual: Mapping[str, float], path: Path, *, images: int) -> None:
    """Bars of each layer: the share of its code's entries that are not zero, and the relative residual of its input."""
    from matplotlib.figure import Figure

    names = [layer_title(name) for name in share]
    figure = Figure(figsize=(8.5, 0.27 * len(names) + 1.5), layout="constrained")
    figure.suptitle(f"Sparse coding layers, mean of {images} training images", fontsize=11)
    panels = {
        "non-zero entries of the code": (100 * np.array([*share.values()]), _SHARE, "{:.1f} %"),
        r"relative residual $|x - A(z)|^2 \, / \, |x|^2$": (np.array([*residual.values()]), _RESIDUAL, "{:.3f}"),
    }
    for axis, (title, (values, color, form)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        bars = axis.barh(range(len(names)), values, color=color, height=0.7)
        axis.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1.2 * max(float(values.max()), 1e-9))
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(len(names) - 0.4, -0.6)
    _write(figure, path)


def _write(figure: "Figure", path: Path) -> None:
    # The layout leaves no room for the names of rows beside pictures of a fixed aspect; `tight` makes it.
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.1))


def mosaic(images: np.ndarray, gap: float = 0.04) -> np.ndarray:
    """Images (lines, columns, C, H, W) on white, (lines * side, columns * side, C), each with a margin of `gap` of its
    own height and width. One picture is drawn many times faster than many.

    Images of few pixels are enlarged by a whole number, so that their pixels stay square and of equal size.
    """
    factor = math.ceil(_PIXELS / images.shape[-1])
    images = images.repeat(factor, -2).repeat(factor, -1)
    margin = [(0, 0)] * 3 + [(math.ceil(gap * side),) * 2 for side in images.shape[-2:]]
    framed = np.pad(images, margin, constant_values=1)
    lines, columns, channels, height, width = framed.shape
    return framed.transpose(0, 3, 1, 4, 2).reshape(lines * height, columns * width, channels)


def _show(axes: "Axes", picture: np.ndarray, lines: int, columns: int) -> None:
    """A mosaic, cell (line, column) at [column, column + 1] x [line, line + 1]; names of columns stand above."""
    extent = (0, columns, lines, 0)
    shown = picture[:, :, 0] if picture.shape[2] == 1 else picture
    height, width = picture.shape[0] / lines, picture.shape[1] / columns
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="antialiased", extent=extent, aspect=height / width)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
