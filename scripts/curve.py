"""AUROC against epochs: `python -m scripts.curve --train "--mode simclr_CSI" --evaluate "--mode ood_pre_refmix" -- ...`

Trains stage 1 with the flags after `--` and those of --train, stops it every so many minutes as SIGTERM does, evaluates
where it stands with the former and those of --evaluate, and lets it go on, to its last epoch or --limit. Writes
`curve.csv` and `curve.png` into the run folder; started again, it goes on with both.
"""

import argparse
import csv
import io
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import RunStopped, UserError, command
from common.files import write_text, write_whole
from scripts.jobs import ROOT, end_with_parent

# Of a row of the curve: what is no score.
_FACTS = ["epoch", "minutes"]

Row = dict[str, float]


def train_for(flags: Sequence[str], seconds: float) -> bool:
    """Train for so long, or to the end; whether that was reached. Raises: RunStopped where training fails or does not
    even begin in that time."""
    process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, preexec_fn=end_with_parent)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
    code = process.wait()
    if code == -signal.SIGTERM:
        raise RunStopped(f"training did not begin within {seconds:.0f} seconds; give a longer --every")
    if code not in (0, 143):  # 143: it has saved.
        raise RunStopped(f"train.py ended with exit code {code}")
    return code == 0


def run_folder(flags: Sequence[str]) -> Path:
    """Where train.py writes to. Raises: UserError for flags that it refuses; it has told why."""
    told = subprocess.run(
        [sys.executable, "train.py", *flags, "--dry_run"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if told.returncode:
        raise UserError("train.py refuses the flags of --train and after --")
    return ROOT / json.loads(told.stdout.splitlines()[-1])["run_dir"]


def evaluate(flags: Sequence[str], folder: Path) -> Row:
    """Epoch, and mean AUROC in percent of each score. Raises: RunStopped where eval.py fails."""
    begun = time.time()
    code = subprocess.run([sys.executable, "eval.py", *flags, "--load_path", str(folder)], cwd=ROOT).returncode
    fresh = [path for path in sorted(folder.glob("result_*.json")) if path.stat().st_mtime >= begun - 1]
    if code or not fresh:
        raise RunStopped(f"eval.py ended with exit code {code}")
    results = [json.loads(path.read_text()) for path in fresh]
    return {"epoch": results[0]["epochs"], **{r["score"]: round(100 * r["mean"], 3) for r in results}}


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
    train, look = ([*args.flags, *shlex.split(own)] for own in (args.train, args.evaluate))
    folder = run_folder(train)
    rows = read_rows(folder / "curve.csv")
    minutes, ended = (rows[-1]["minutes"] if rows else 0.0), False
    while not ended and minutes < args.limit:
        begun = time.monotonic()
        ended = train_for(train, 60 * min(args.every, args.limit - minutes))
        minutes += (time.monotonic() - begun) / 60
        found = evaluate(look, folder)
        row = {"epoch": found.pop("epoch"), "minutes": round(minutes, 2), **found}
        rows = [*(r for r in rows if r["epoch"] < row["epoch"]), row]
        write_rows(folder / "curve.csv", rows)
        draw(folder / "curve.png", rows, folder.name)
    for row in rows:
        print("  ".join(f"{name} {value:g}" for name, value in row.items()))
    print(f"wrote {folder / 'curve.csv'} and curve.png")


if __name__ == "__main__":
    sys.exit(main())
