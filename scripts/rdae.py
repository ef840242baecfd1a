"""Robust autoencoders against other methods: `python -m scripts.rdae outliers|denoise --data_path DIR --out DIR`.

`outliers`: which images of a mixture are of another class than most. `denoise`: what a method makes of noisy images
that it was fitted to. Both report the mean and the standard deviation over seeds; a seed draws the data, the weights
and the order of the images. Each fit is a line of a file in --out, so that the same command goes on after whatever
happened; tables and pictures are made of the lines that its flags name.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, command
from common.files import write_json, write_text, write_whole
from common.flags import class_choice
from common.run import describe_program
from datasets import DATASETS, DataSource, Split, split_one_class
from datasets.corrupt import CorruptSpec
from datasets.table import Table
from evals.robust import curve, flag_metrics, ranking_metrics
from evals.robust_report import draw_sheet
from models.autoencoder.robust import Threshold
from scripts.rdae_methods import (
    DENOISERS,
    DETECTORS,
    PLAIN,
    SPLITTERS,
    Fit,
    dead_outputs,
    encode,
    fits,
)
from scripts.results import comma_separated, markdown
from scripts.tables import cell

Facts = dict[str, Any]
# Best F1 over thresholds on 4859 fours and 265 others of MNIST, as published; the labels have chosen the threshold.
PUBLISHED = {"published: slides": 0.6083, "published: authors' program": 0.687}
_PUBLISHED_SET = {"dataset": "mnist", "first_images": 50_000, "one_class_idx": 4, "outliers": 265}
_FOURS = 4859
# Trees of the classifiers, and the images of which one learns to read clean digits.
_TREES, _READ = 100, 10_000
PLACES = ("all", "corrupted", "intact")


class Store:
    """Fits on disk, a line of JSON each: what it was (`of`) and what was measured (`found`).

    Raises: UserError for a file with other lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, Facts] = {}
        if path.is_file():
            *whole, torn = path.read_text().split("\n")
            try:
                entries = [json.loads(line) for line in whole]
                self.lines = {_key(entry["of"]): entry["found"] for entry in entries}
            except (ValueError, KeyError, TypeError):
                raise UserError(f"--out: {path} holds no fits of this study; give another folder") from None
            if torn:  # by a process that was killed in the middle of it
                write_text(path, "".join(f"{line}\n" for line in whole))

    def __contains__(self, of: Facts) -> bool:
        return _key(of) in self.lines

    def add(self, of: Facts, found: Facts) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"of": of, "found": found}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[_key(of)] = found

    def found(self, ofs: Sequence[Facts]) -> list[Facts]:
        """What was measured of each that is there."""
        return [self.lines[_key(of)] for of in ofs if of in self]


def _key(of: Facts) -> str:
    return json.dumps(of, sort_keys=True)


def numbers(text: str) -> list[float]:
    """`4.725`, or `2:7:0.075`: from 2 to at most 7 in steps."""
    try:
        first, *more = map(float, text.split(":"))
        last, step = more or (first, 1.0)
        count = int((last - first) / step + 1e-9)
        found = [round(first + step * n, 6) for n in range(count + 1)]
    except (ValueError, ZeroDivisionError, OverflowError):
        found = []
    if not found or not all(0 < value < float("inf") for value in found):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number > 0 nor FIRST:LAST:STEP")
    return found


def title(threshold: Threshold) -> float | str:
    """What a threshold is called in a line: t itself, `q0.05`, or `none`."""
    if threshold == PLAIN:
        return "none"
    return f"q{threshold.contamination:g}" if threshold.value is None else threshold.value


def read_split(args: argparse.Namespace) -> Split:
    """The data set of the command, whose seeds are still to be set. Raises: UserError for a class it does not have."""
    source = DataSource(data_path=args.data_path)
    split = split_one_class(args.dataset, source, args.one_class_idx, None)
    return replace(split, outliers=args.outliers, first_images=args.first_images)


# Outliers.


def detect(args: argparse.Namespace) -> None:
    """Carry out the study of outliers."""
    split, store = read_split(args), Store(args.out / "outliers.jsonl")
    if not all(0 < q < 1 for q in args.contamination):
        raise UserError("--contamination must lie in (0, 1)")
    wanted = [PLAIN, *map(Threshold, sorted({t for part in args.thresholds for t in part}))]
    wanted += [Threshold(None, q) for q in args.contamination]
    for seed in () if args.tables_only else args.seeds:
        table = replace(split, corrupt=CorruptSpec(data_seed=seed)).train_table()
        positive = (~split.normal(table.labels)).numpy()
        if _of_data(args) == _PUBLISHED_SET and (~positive).sum() != _FOURS:
            raise UserError(f"--data_path: MNIST has {_FOURS} fours here, these data {(~positive).sum()}")
        print(f"seed {seed}: {len(table)} images, {positive.sum()} of them outliers", flush=True)
        for method in args.methods:
            of = partial(_outlier_line, args, method, seed)
            missing = [t for t in _thresholds(method, wanted) if of(t) not in store]
            if not missing:
                continue
            begun = time.monotonic()
            for threshold, found in _detections(table, method, seed, missing):
                found |= _judged(found.pop("score"), found.pop("flagged", None), positive)
                store.add(of(threshold), found)
            print(f"  {method}: {len(missing)} fits, {time.monotonic() - begun:.0f} s", flush=True)
    _report_outliers(args, store, wanted)


def _report_outliers(args: argparse.Namespace, store: Store, wanted: list[Threshold]) -> None:
    """Tables and curves of the fits that are there."""
    lines = {method: _by_threshold(args, store, method, _thresholds(method, wanted)) for method in args.methods}
    header, rows = outlier_table(lines)
    if _of_data(args) == _PUBLISHED_SET:
        rows += [[name, f"{value:.4g}", *[""] * (len(header) - 2)] for name, value in PUBLISHED.items()]
    write_tables(args.out, "outliers", header, rows, _of_data(args) | {"seeds": args.seeds})
    curves = {method: _curves(found) for method, found in lines.items()}
    draw_curves({method: found for method, found in curves.items() if len(found["threshold"]) > 1}, args.out)


def _of_data(args: argparse.Namespace) -> Facts:
    return {name: getattr(args, name) for name in _PUBLISHED_SET}


def _outlier_line(args: argparse.Namespace, method: str, seed: int, threshold: Threshold) -> Facts:
    setting = asdict(SPLITTERS[method]) if method in SPLITTERS else {}
    return _of_data(args) | {"method": method, "setting": setting, "seed": seed, "threshold": title(threshold)}


def _thresholds(method: str, wanted: list[Threshold]) -> list[Threshold]:
    """A method that splits nothing off has none."""
    return wanted if method in SPLITTERS and SPLITTERS[method].rounds > 1 else [PLAIN]


def _detections(
    table: Table, method: str, seed: int, thresholds: Sequence[Threshold]
) -> Iterator[tuple[Threshold, Facts]]:
    """Of each threshold the scores (N,), high for outliers, and the flags (N,) of a method that has a threshold."""
    if method in DETECTORS:
        begun = time.monotonic()
        score = DETECTORS[method](table.rows.numpy(), seed)
        yield PLAIN, {"score": score, "seconds": time.monotonic() - begun}
        return
    for fit in fits(table.rows, table.shape, SPLITTERS[method], seed, "l21_rows", thresholds):
        found = {"score": (table.rows - fit.parts.L).norm(dim=1).numpy(), "t": fit.parts.threshold}
        found["dead_outputs"] = dead_outputs(table.rows, fit.parts.L)
        if fit.threshold != PLAIN:
            found["flagged"] = (fit.parts.S != 0).any(1).numpy()
            found["c2"] = fit.parts.history["c2"][-1]
        yield fit.threshold, found


def _judged(score: np.ndarray, flagged: np.ndarray | None, positive: np.ndarray) -> Facts:
    """What the labels say: of the flags, and of the score by itself, also at its quantiles."""
    by_cut = curve(score, positive)
    found: Facts = {"score": ranking_metrics(score, positive) | {"oracle_f1": float(by_cut["f1"].max())}}
    for q in (0.05, 0.1):
        found["score"][f"f1_at_q{q:g}"] = flag_metrics(score > np.quantile(score, 1 - q), positive)["f1"]
    if flagged is not None:
        found["flags"] = flag_metrics(flagged, positive) | {"flagged": int(flagged.sum())}
    return found


def _by_threshold(
    args: argparse.Namespace, store: Store, method: str, thresholds: Sequence[Threshold]
) -> dict[float | str, list[Facts]]:
    """What was measured, of each threshold over the seeds."""
    lines = {title(t): store.found([_outlier_line(args, method, s, t) for s in args.seeds]) for t in thresholds}
    return {name: found for name, found in lines.items() if found}


_OUTLIER_HEADER = [
    "method", "oracle F1", "F1 at q=0.05", "F1 at q=0.1", "ROC-AUC", "PR-AUC",
    "oracle F1 of the score", "F1 of the top 5 %", "oracle F1 over thresholds and cuts", "dead outputs",
]  # fmt: skip
# Of the score, and what the labels choose where they choose the threshold.
_RANKED, _ORACLES = ("roc_auc", "pr_auc", "oracle_f1", "f1_at_q0.05"), (("flags", "f1"), ("score", "oracle_f1"))


def outlier_table(lines: Mapping[str, Mapping[float | str, list[Facts]]]) -> tuple[list[str], list[list[str]]]:
    """A row for each method as it flags by thresholds, and one for its score where nothing is split off.

    `oracle F1`: of the flags, at the best threshold of each seed. The score is the norm of the rows of X - L at the
    largest share q that was tried; its oracle flags what lies above the best cut. The last column has the best
    threshold and the best cut of each seed.
    """
    rows = []
    for method, found in lines.items():
        sweep = [seeds for t, seeds in found.items() if not isinstance(t, str)]
        if sweep:
            by_seed = [*zip(*(seeds for seeds in sweep if len(seeds) == max(map(len, sweep))), strict=True)]
            best = [[max(one[of][name] for one in seed) for seed in by_seed] for of, name in _ORACLES]
            flags = [[one["flags"]["f1"] for one in found.get(q, [])] for q in ("q0.05", "q0.1")]
            shares = sorted(float(t[1:]) for t in found if isinstance(t, str) and t != "none")
            scored = found[f"q{shares[-1]:g}"] if shares else []
            scores = [[one["score"][name] for one in scored] for name in _RANKED]
            rows.append([method, *map(cell, [best[0], *flags, *scores, best[1]]), ""])
        if "none" in found:
            names = ("oracle_f1", "f1_at_q0.05", "f1_at_q0.1", *_RANKED)
            name = f"{method}, nothing split off" if sweep else method
            dead = cell([one["dead_outputs"] for one in found["none"] if "dead_outputs" in one], 1)
            rows.append([name, *(cell([one["score"][of] for one in found["none"]]) for of in names), "", dead])
    return _OUTLIER_HEADER, rows


def _curves(found: Mapping[float | str, list[Facts]]) -> dict[str, np.ndarray]:
    """threshold (T,), and precision, recall, F1 (T, seeds) of the flags."""
    by_t = {t: seeds for t, seeds in sorted((t, s) for t, s in found.items() if not isinstance(t, str))}
    count = max(map(len, by_t.values()), default=0)
    by_t = {t: seeds for t, seeds in by_t.items() if len(seeds) == count}
    names = {"precision": "precision", "recall": "recall", "f1": "F1"}
    values = {
        shown: np.array([[one["flags"][name] for one in of_t] for of_t in by_t.values()])
        for name, shown in names.items()
    }
    return {"threshold": np.array(list(by_t)), **values}


def draw_curves(curves: Mapping[str, Mapping[str, np.ndarray]], out: Path) -> None:
    """`outliers.png`: a panel for each method; lines are means over seeds, bands reach from the least to the most."""
    if not curves:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(curves) + 0.4, 3.4), layout="constrained")
    styles = {"precision": ("#0072B2", "--"), "recall": ("#009E73", ":"), "F1": ("#D55E00", "-")}
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (method, found) in zip(panels, curves.items(), strict=True):
        for name, (color, style) in styles.items():
            mean = found[name].mean(1)
            axes.plot(found["threshold"], mean, color=color, ls=style, label=name)
            axes.fill_between(found["threshold"], found[name].min(1), found[name].max(1), color=color, alpha=0.2, lw=0)
        best = int(found["F1"].mean(1).argmax())
        x, y = found["threshold"][best], found["F1"].mean(1)[best]
        axes.plot([x], [y], "o", color="#D55E00", ms=5)
        axes.set(title=f"{method}: best mean F1 {y:.3f} at {x:.3g}", xlabel="threshold", ylim=(-0.02, 1.02))
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    write_whole(out / "outliers.png", lambda file: figure.savefig(file, format="png", dpi=110))


# Noise.


def denoise(args: argparse.Namespace) -> None:
    """Carry out the study of noise."""
    split, store = read_split(args), Store(args.out / "denoise.jsonl")
    reader: Reader | None = None
    for seed in () if args.tables_only else args.seeds:
        for points in args.points:
            missing = {m: [t for t in _levels(args, m, points) if _noise_line(args, m, points, seed, t) not in store]
                       for m in args.methods}  # fmt: skip
            if not any(missing.values()):
                continue
            reader = reader or Reader(split, args.first_images or 0)
            noisy = replace(split, corrupt=CorruptSpec("normal", points, data_seed=seed))
            table = noisy.train_table()
            table, test = table.where(torch.arange(len(table)) >= args.skip), noisy.test_table()
            for method, thresholds in missing.items():
                if not thresholds:
                    continue
                begun = time.monotonic()
                for fit in fits(table.rows, table.shape, DENOISERS[method].setting, seed, "l1", thresholds):
                    found = restored(table, fit) | reader.judge(fit.parts.L, table.labels, split.one_class_idx)
                    if split.one_class_idx is None:
                        codes = [encode(fit.step, part.rows) for part in (table, test)]
                        found["code_accuracy"] = code_accuracy(codes[0], table.labels, codes[1], test.labels)
                    store.add(_noise_line(args, method, points, seed, fit.threshold), found)
                    if seed == args.seeds[0]:
                        _keep_pictures(args.out, points, method, table, fit.parts.L)
                print(f"seed {seed}, {points} points, {method}: {time.monotonic() - begun:.0f} s", flush=True)
    lines = {
        (points, method, title(threshold)): store.found(
            [_noise_line(args, method, points, seed, threshold) for seed in args.seeds]
        )
        for points in args.points
        for method in args.methods
        for threshold in _levels(args, method, points)
    }
    facts = _of_data(args) | {"skip": args.skip, "seeds": args.seeds}
    write_tables(args.out, "denoise", *noise_table(lines), facts)
    draw_pictures(args)


def _levels(args: argparse.Namespace, method: str, points: int) -> list[Threshold]:
    """The thresholds of a method: those of the command, if any; else the one that was chosen on other images."""
    denoiser = DENOISERS[method]
    if denoiser.thresholds and args.thresholds:
        return [Threshold(t) for part in args.thresholds for t in part]
    return [denoiser.threshold(points)]


def _noise_line(args: argparse.Namespace, method: str, points: int, seed: int, threshold: Threshold) -> Facts:
    of = _of_data(args) | {"skip": args.skip, "points": points, "method": method, "seed": seed}
    return of | {"setting": asdict(DENOISERS[method].setting), "threshold": title(threshold)}


def restored(table: Table, fit: Fit) -> Facts:
    """How far L and X lie from the rows before noise, how well S marks the noise, and dead outputs."""
    assert table.clean is not None and table.mask is not None
    L, S = fit.parts.L, fit.parts.S
    error, before = (L - table.clean).square(), (table.rows - table.clean).square()
    places = dict(zip(PLACES, (torch.ones_like(table.mask), table.mask, ~table.mask), strict=True))
    found: Facts = {"mse": {name: float(error[place].double().mean()) for name, place in places.items()}}
    found["noisy_mse"] = {name: float(before[place].double().mean()) for name, place in places.items()}
    if fit.threshold != PLAIN:
        found["support"] = flag_metrics((S != 0).flatten().numpy(), table.mask.flatten().numpy())
    return found | {"dead_outputs": dead_outputs(table.clean, L)}


def psnr(mse: float) -> float:
    """Of a mean squared error, in dB, for a peak of 1; at most 200."""
    return -10 * math.log10(max(mse, 1e-20))


def code_accuracy(codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor) -> float:
    """How often a random forest that has seen the codes (N, k) of training images tells the class of test images."""
    found = _forest(codes, labels).predict(test_codes.numpy())
    return float((found == test_labels.numpy()).mean())


def _forest(rows: Tensor, labels: Tensor) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(_TREES, random_state=0).fit(rows.numpy(), labels.numpy())


class Reader:
    """A random forest that has learnt clean images of the training set, from `first` on: others than are denoised."""

    def __init__(self, split: Split, first: int) -> None:
        table = replace(split, one_class_idx=None, outliers=0, first_images=None).train_table()
        rows = slice(first, first + _READ)
        if not len(table.rows[rows]):
            raise UserError("--first_images: give fewer; a classifier is trained on the images that follow")
        self._forest = _forest(table.rows[rows], table.labels[rows])

    def judge(self, L: Tensor, labels: Tensor, nominal: int | None) -> Facts:
        """How often it reads L (N, n) as what it is; and, of images of other classes, as the nominal one."""
        read, truth = self._forest.predict(L.numpy()), labels.numpy()
        found = {"read": float((read == truth).mean())}
        if nominal is not None:
            others = truth != nominal
            found["others_read"] = float((read == truth)[others].mean())
            found["others_read_as_nominal"] = float((read[others] == nominal).mean())
        return found


def noise_table(lines: Mapping[tuple[int, str, float | str], list[Facts]]) -> tuple[list[str], list[list[str]]]:
    """A row for each number of points, method and threshold; before those of a number, X itself."""
    extra = {
        "accuracy on codes": "code_accuracy",
        "read right": "read",
        "others read as nominal": "others_read_as_nominal",
        "dead outputs": "dead_outputs",
    }
    header = ["points", "method", "threshold", *(f"PSNR {place}" for place in PLACES), *(f"MSE {p}" for p in PLACES)]
    header += ["precision of S", "recall of S", *extra]
    rows: list[list[str]] = []

    def add(points: int, method: str, t: str, seeds: Sequence[Facts], mse: str) -> None:
        errors = [[one[mse][place] for one in seeds] for place in PLACES]
        row = [str(points), method, t, *(cell([*map(psnr, of)], 2) for of in errors), *(cell(of, 4) for of in errors)]
        own = seeds if mse == "mse" else []
        row += [cell([one["support"][name] for one in own if "support" in one]) for name in ("precision", "recall")]
        rows.append(row + [cell([one[name] for one in own if name in one]) for name in extra.values()])

    known = {of: seeds for of, seeds in lines.items() if seeds}
    for points in dict.fromkeys(points for points, *_ in known):
        of_points = {of[1:]: seeds for of, seeds in known.items() if of[0] == points}
        add(points, "noisy image", "", next(iter(of_points.values())), "noisy_mse")
        for (method, t), seeds in of_points.items():
            add(points, method, "" if t == "none" else f"{t:g}", seeds, "mse")
    return header, rows


def one_of_each(labels: Tensor) -> Tensor:
    """The place of the first image of each class."""
    return torch.tensor([int((labels == label).nonzero()[0]) for label in labels.unique()])


def _keep_pictures(out: Path, points: int, method: str, table: Table, L: Tensor) -> None:
    """Of one image of each class: before noise, with noise, restored."""
    assert table.clean is not None
    some, shape = one_of_each(table.labels), (-1, *(table.shape or ()))
    images = {"original": table.clean[some], "noisy": table.rows[some], "L": L[some]}
    arrays: dict[str, Any] = {name: rows.reshape(shape).numpy() for name, rows in images.items()}
    write_whole(_pictures(out, points, method), lambda file: np.savez(file, **arrays))


def _pictures(out: Path, points: int, method: str) -> Path:
    return out / f"images_{points}_{method}.npz"


def draw_pictures(args: argparse.Namespace) -> None:
    """`denoise.png`: original images; for each number of points the noisy ones and what each method makes of them."""
    rows: dict[str, np.ndarray] = {}
    for points in args.points:
        for method in args.methods:
            if (path := _pictures(args.out, points, method)).is_file():
                with np.load(path) as images:
                    rows.setdefault("original", images["original"])
                    rows.setdefault(f"{points} points", images["noisy"])
                    rows[f"{points}: {method}"] = images["L"]
    if rows:
        draw_sheet(rows, args.out / "denoise.png")


def write_tables(out: Path, name: str, header: list[str], rows: list[list[str]], facts: Facts) -> None:
    """The table as Markdown, CSV and JSON, and on the screen."""
    text = markdown(header, rows)
    write_text(out / f"{name}.md", text)
    write_text(out / f"{name}.csv", comma_separated(header, rows))
    table = [dict(zip(header, row, strict=True)) for row in rows]
    write_json(out / f"{name}.json", facts | {"table": table} | describe_program())
    print(text, end="")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.rdae", description=__doc__)
    studies = parser.add_subparsers(dest="study", required=True)
    for name, run, methods in (("outliers", detect, [*SPLITTERS, *DETECTORS]), ("denoise", denoise, list(DENOISERS))):
        study = studies.add_parser(name)
        study.set_defaults(run=run)
        study.add_argument("--data_path", type=os.path.expanduser, default="../Data/", help="folder of the data sets")
        study.add_argument("--dataset", choices=sorted(DATASETS), default="mnist")
        study.add_argument("--out", type=lambda text: Path(text).expanduser(), required=True, help="folder of results")
        study.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
        study.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD",
                           help=f"of {', '.join(methods)}")  # fmt: skip
        study.add_argument("--tables_only", action="store_true", help="of the fits that are there; make no more")
        study.add_argument("--thresholds", type=numbers, nargs="+", metavar="T", help="T, or FIRST:LAST:STEP")
    detecting, denoising = studies.choices["outliers"], studies.choices["denoise"]
    detecting.set_defaults(thresholds=[numbers("2:7:0.075"), numbers("4.5:5:0.075")])
    detecting.add_argument("--contamination", type=float, nargs="*", default=[0.05, 0.1, 0.3], metavar="Q")
    detecting.add_argument("--one_class_idx", type=class_choice, default=4, help="the nominal class")
    detecting.add_argument("--outliers", type=int, default=265, help="how many images of other classes")
    detecting.add_argument("--first_images", type=int, default=50_000, help="of the training images")
    denoising.add_argument("--points", type=int, nargs="+", default=[10, 100, 250], help="noisy pixels of an image")
    denoising.add_argument("--one_class_idx", type=class_choice, help="the nominal class, with --outliers others")
    denoising.add_argument("--outliers", type=int, default=0)
    denoising.add_argument("--first_images", type=int, default=5000, help="of the training images")
    denoising.add_argument("--skip", type=int, default=0, help="leave out so many of them, the first")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make {args.out} ({error.strerror})") from None
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
