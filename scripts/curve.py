"""AUROC against epochs: `python -m scripts.curve --train "--mode simclr_CSI" --evaluate "--mode ood_pre_refmix" -- ...`

Trains stage 1 with the flags after `--` and those of --train, and evaluates the network every so many minutes, at the
end of an epoch and in the same process, with the former and those of --evaluate. Writes `curve.csv` and `curve.png`
into the run folder; started again, it goes on with both.
"""

import argparse
import csv
import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from common.dist import SINGLE, World
from common.errors import Terminated, UserError, command
from common.files import write_text, write_whole
from common.flags import Flags, build_parser, parse
from datasets import Split
from evals import EVALS, Eval
from evals.result import Result
from evals.trained import Trained
from program import SPECS
from train import train
from training import STAGE1
from training.keeper import Observer
from training.launch import Job, Script, read_job
from training.optim import LengthSpec
from training.recipe import Recipe

# Of a row of the curve: what is no score.
_FACTS = ["epoch", "minutes"]
_SCRIPT = Script("train.py", STAGE1, "simclr", "last.model", "last.resume")

Row = dict[str, float]


def row_of(epoch: int, minutes: float, results: Iterator[Result]) -> Row:
    """Epoch, minutes of training, and mean AUROC in percent of each score."""
    scores = {result.name: round(100 * result.metrics["mean"], 3) for result in results}
    return {"epoch": epoch, "minutes": round(minutes, 2), **scores}


class Curve:
    """The curve of one run: rows on disk and in a picture, continued from what is there.

    evaluate: flags of the evaluation. every, limit: minutes of training between evaluations, and in all.
    Raises: UserError for flags that do not parse, modes without an AUROC, or a file that is no curve.
    """

    def __init__(self, folder: Path, evaluate: Sequence[str], every: float, limit: float):
        self.folder = folder
        self.rows = read_rows(folder / "curve.csv")
        self._every, self._limit = every, limit
        self._minutes = self.rows[-1]["minutes"] if self.rows else 0.0
        self._began = time.monotonic()
        flags = parse(evaluate, build_parser("eval.py", EVALS, "ood_pre", SPECS))
        self._row: Eval = EVALS[flags.mode]
        self._flags: Flags = flags
        if not self._row.scores:
            raise UserError("--evaluate: choose a --mode that scores images")

    @property
    def reached_limit(self) -> bool:
        return self._minutes >= self._limit

    def observer(self, job: Job, recipe: Recipe, split: Split, world: World) -> Observer:
        """What training calls."""
        trained = Trained.of(recipe.result, self._inherited(job.flags), split, world)
        self._began = time.monotonic()

        def measure(epoch: int) -> Row:
            self._minutes += (time.monotonic() - self._began) / 60
            row = row_of(epoch, self._minutes, self._row.measure(replace(trained, epoch=epoch)))
            if world.is_main:
                self.add(row)
            if self.reached_limit:
                os.kill(os.getpid(), signal.SIGTERM)  # Training saves and ends, as if it were asked to from outside.
            self._began = time.monotonic()
            return {f"auroc/{name}": value for name, value in row.items() if name not in _FACTS}

        return Observer(min(self._every, max(self._limit - self._minutes, 1e-3)), measure)

    def evaluate_finished(self) -> None:
        """Evaluate the weights in the folder, of a run that was finished before the curve was."""
        flags = self._row.inherited(self._flags.filled({"load_path": str(self.folder)}))
        trained = self._row.load(flags, SINGLE)
        self.add(row_of(trained.epoch or 0, self._minutes, self._row.measure(trained)))

    def _inherited(self, training: Flags) -> Flags:
        return self._flags.inherited(training.recorded(), self.folder, flag="evaluate")

    def add(self, row: Row) -> None:
        """Write a row in place of those from its epoch on, and draw."""
        # From disk: --overwrite has emptied the folder since this was made.
        before = read_rows(self.folder / "curve.csv")
        self.rows = [*(r for r in before if r["epoch"] < row["epoch"]), row]
        write_rows(self.folder / "curve.csv", self.rows)
        draw(self.folder / "curve.png", self.rows, self.folder.name)


def columns(rows: Sequence[Row]) -> list[str]:
    """All there are, in order of appearance: a score that was added later is not in the rows before."""
    return list(dict.fromkeys(name for row in rows for name in row))


def read_rows(path: Path) -> list[Row]:
    """Blank cells are left out. Raises: UserError for a file that is no curve."""
    if not path.is_file():
        return []
    try:
        table = csv.DictReader(path.read_text().splitlines())
        rows = [{name: float(value) for name, value in row.items() if value} for row in table]
    except (ValueError, TypeError):
        rows = [{}]
    if not all(row.keys() >= set(_FACTS) for row in rows):
        raise UserError(f"--log_root: {path} is no curve; remove it, and a new one begins")
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, columns(rows), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """A line for each score, over the epochs at which it is known."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for score in [name for name in columns(rows) if name not in _FACTS]:
        known = [row for row in rows if score in row]
        axes.plot([row["epoch"] for row in known], [row[score] for row in known], "o-", label=score)
    axes.set(xlabel="epochs of stage 1", ylabel="mean AUROC (%)")
    axes.set_title(title, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.curve", description=__doc__)
    parser.add_argument("--every", type=float, default=5, help="minutes of training between evaluations")
    parser.add_argument("--limit", type=float, default=float("inf"), help="minutes of training in all")
    parser.add_argument("--train", default="", help="flags of train.py alone, in one string")
    parser.add_argument("--evaluate", default="", help="flags of eval.py alone, in one string")
    parser.add_argument("flags", nargs="*", help="flags of both, after --")
    args = parser.parse_args(argv)
    if not args.every > 0 or not args.limit > 0:
        raise UserError("--every and --limit must be > 0")
    training, evaluation = ([*args.flags, *shlex.split(own)] for own in (args.train, args.evaluate))
    job = read_job(training, _SCRIPT, SPECS)
    curve = Curve(job.folder, evaluation, args.every, args.limit)
    if not curve.reached_limit:
        try:
            train(training, _SCRIPT, curve.observer)
        except Terminated:
            if not curve.reached_limit:
                raise
        epochs = job.flags.of(LengthSpec).epochs
        if not curve.reached_limit and (not curve.rows or curve.rows[-1]["epoch"] < epochs):
            curve.evaluate_finished()
    for row in curve.rows:
        print("  ".join(f"{name} {value:g}" for name, value in row.items()))
    print(f"wrote {curve.folder / 'curve.csv'} and curve.png")


if __name__ == "__main__":
    sys.exit(main())
