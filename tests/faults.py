"""What becomes of runs when machines fail: `python -m tests.faults`. Minutes; the tests do a few of each.

Runs on digits, both stages, are interrupted at random moments by SIGKILL and SIGTERM and started again until they are
done: weights and curves must be those of runs left alone, bit for bit. Checkpoints are truncated or altered by a bit:
each must be told. A disk is filled while a run writes to it: the last checkpoint must load, and the run go on from it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import load_tensors
from tests.conftest import ROOT, SHIFT, TINY

_STEPS = "--batch_size 16 --save_minutes 0.0005 --save_step 4".split()
_SPARSE = "--sr_dict_size 24 --sr_lambda 1e-3 --loss_lambda_sr_l1 1e-3 --invert_sr_feature_norm".split()


@dataclass(frozen=True)
class Stage:
    """A command whose run is interrupted. args: (folder of runs, stage-1 run or None) -> its arguments."""

    name: str
    script: str
    args: Callable[[Path, Path | None], list[str]]
    weights: str

    def command(self, logs: Path, stage1: Path | None) -> list[str]:
        return [sys.executable, str(ROOT / self.script), *self.args(logs, stage1)]

    def folder(self, logs: Path) -> Path:
        """The run folder below `logs`, which holds no other of this script."""
        return next(path.parent for path in logs.glob("*/args.json"))


def _stage1(logs: Path, stage1: Path | None) -> list[str]:
    return [*TINY, *SHIFT, *_STEPS, *"--mode simclr_CSI --simclr_dim 32 --epochs 5 --log_root".split(), str(logs)]


def _stage2(logs: Path, stage1: Path | None) -> list[str]:
    resume = ["--resume_path", str(stage1), "--epoch", "15", "--ini_sr_dict_train", "--log_root", str(logs)]
    return [*TINY, *SHIFT, *_STEPS, *_SPARSE, *resume]


STAGES = (
    Stage("stage 1", "train.py", _stage1, "last.model"),
    Stage("stage 2", "train_cocsr.py", _stage2, "last.cocsr_model"),
)


@dataclass(frozen=True)
class Whole:
    """A run left alone: its folder, and the seconds it trained."""

    folder: Path
    seconds: float


def whole_run(stage: Stage, logs: Path, stage1: Path | None) -> Whole:
    """Carry a run out without a fault."""
    subprocess.run(stage.command(logs, stage1), check=True, capture_output=True)
    folder = stage.folder(logs)
    times = [(folder / name).stat().st_mtime for name in ("args.json", stage.weights)]
    return Whole(folder, times[1] - times[0])


def interrupted_run(
    stage: Stage, logs: Path, stage1: Path | None, seconds: float, kind: signal.Signals, times: int, rng: random.Random
) -> int:
    """Start a run again and again, and interrupt it `times` times at random moments of its training; then let it end.

    Returns how often it was hit before its end. Raises: AssertionError for an exit code that fits neither.
    """
    hits = 0
    for _ in range(times):
        process = subprocess.Popen(stage.command(logs, stage1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        begun = time.time()
        while process.poll() is None and not _started_since(logs, begun):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, seconds / 2))
        process.send_signal(kind)
        _, errors = process.communicate()
        hit = process.returncode in ((-signal.SIGKILL,) if kind == signal.SIGKILL else (143, -signal.SIGTERM))
        assert hit or process.returncode == 0, (process.returncode, errors.decode())
        hits += hit
        if not hit:
            break
    last = subprocess.run(stage.command(logs, stage1), capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    return hits


def _started_since(logs: Path, begun: float) -> bool:
    """Whether a run below `logs` has written its flags, which it does when it begins to train."""
    return any(path.stat().st_mtime >= begun for path in logs.glob("*/args.json"))


def same_end(stage: Stage, whole: Path, parts: Path) -> None:
    """Raises: AssertionError unless weights and curves of both runs are equal, bit for bit."""
    a, b = (torch.load(folder / stage.weights, weights_only=True) for folder in (whole, parts))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"
    a_rows, b_rows = (_curves(folder) for folder in (whole, parts))
    assert a_rows == b_rows, "curves differ"


# Of a curve what a clock makes, and a GPU's memory, which a restart empties.
_NOT_TRAINED = {"train/batch_time", "train/images_per_second", "train/peak_memory_gib"}


def _curves(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{tag: value for tag, value in row.items() if tag not in _NOT_TRAINED} for row in rows]


def damaged(path: Path, rng: random.Random) -> str:
    """Truncate a file, or turn over one of its bits, at random; says which."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if rng.random() < 0.5:
        path.write_bytes(content[:at])
        return f"cut to {at} bytes"
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"a bit of byte {at} of {len(content)}"


def damages_reported(file: Path, times: int, rng: random.Random) -> int:
    """How many of so many damages of a copy of `file` are told, by its name. Raises: AssertionError for one that is
    not."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        for _ in range(times):
            shutil.copyfile(file, copy)
            how = damaged(copy, rng)
            try:
                load_tensors(copy, flag="load_path")
            except UserError as error:
                assert str(copy) in str(error), error
            else:
                raise AssertionError(f"{file.name}, {how}: loaded in silence")
    return times


def full_disk(stage: Stage, logs: Path, whole: Path) -> str:
    """Fill the disk of `logs`, a small one, while a run trains; make room and start it again.

    Returns what it said. Raises: AssertionError where it does not end as it should.
    """
    process = subprocess.Popen(stage.command(logs, None), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(logs.glob("*/last.resume")):
        time.sleep(0.01)
    filler = logs / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    _, errors = process.communicate()
    folder = stage.folder(logs)
    assert process.returncode == 1 and "no space left" in errors.lower() and "Traceback" not in errors, errors
    state = load_tensors(folder / "last.resume", flag="resume_path")
    load_tensors(folder / stage.weights, flag="load_path")
    filler.unlink()
    again = subprocess.run(stage.command(logs, None), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    same_end(stage, whole, folder)
    return f"{errors.strip().splitlines()[-1]} (at epoch {state['epoch']}, step {state['step']})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs over both stages")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERMs over both stages")
    parser.add_argument("--damages", type=int, default=20, help="of each checkpoint file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=Path, help="a mounted folder of a few MB to fill up")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        root, wholes, stage1 = Path(place), {}, None
        for stage in STAGES:
            wholes[stage.name] = whole_run(stage, root / stage.name, stage1)
            print(f"{stage.name}: {wholes[stage.name].seconds:.1f} s of training left alone", flush=True)
            stage1 = stage1 or wholes[stage.name].folder
        if args.disk:
            with tempfile.TemporaryDirectory(dir=args.disk) as logs:
                print(full_disk(STAGES[0], Path(logs), wholes["stage 1"].folder), flush=True)
        for kind, wanted in ((signal.SIGKILL, args.kills), (signal.SIGTERM, args.terms)):
            hits = runs = 0
            while hits < wanted:
                stage = STAGES[runs % 2]
                logs = root / f"{kind.name} {runs}"
                whole, first = wholes[stage.name], None if runs % 2 == 0 else stage1
                hits += interrupted_run(stage, logs, first, whole.seconds, kind, min(4, wanted - hits), rng)
                same_end(stage, whole.folder, stage.folder(logs))
                shutil.rmtree(logs)
                runs += 1
                print(f"{kind.name}: {hits} hits in {runs} runs, all ended bit for bit like the whole run", flush=True)
        for stage in STAGES:
            for file in sorted(wholes[stage.name].folder.glob("*[el]")):
                if file.suffix in (".model", ".resume", ".cocsr_model", ".cocsr_resume"):
                    print(f"{file.name}: {damages_reported(file, args.damages, rng)} damages, all told", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
