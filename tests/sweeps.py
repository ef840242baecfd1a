"""A sweep of which one job is killed half-way and one class fails, started again: `python -m tests.sweeps`. Minutes;
the tests do a smaller one."""

import contextlib
import io
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from scripts.sweep import main

KILLED = 1


def arguments(out: Path, classes: str, seeds: list[int], *more: str) -> list[str]:
    """Short runs of the digits recipe, two at a time."""
    words = ["--classes", classes, "--seeds", *map(str, seeds), "--out", str(out), "--jobs", "2", "--retries", "0"]
    words += ["--epochs", "6", "--more", "1", "--methods", "CSI", *more]
    # Nothing is left to chance by the image size but time.
    flags = ["--", *"--image_size 8 --batch_size 16 --save_minutes 0.0005 --device cpu --ood_samples 1".split()]
    return ["digits", *words, *flags]


def sweep(words: list[str]) -> tuple[int, str, str]:
    """Exit code, and what was said on standard output and standard error."""
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.redirect_stderr(io.StringIO()) as errors:
        return main(words), told.getvalue(), errors.getvalue()


def killed_and_failed(out: Path, classes: str, seeds: list[int], failing: int) -> str:
    """Carry the sweep out; what was seen. Raises: AssertionError where something is not as it should be."""
    names = [
        out / f"seed_{seed}" / f"digits_resnet8_unsup_simclr_CSI_shift_rot_bmix_one_class_{failing}" for seed in seeds
    ]
    for folder in names:
        folder.mkdir(parents=True)
        (folder / "holiday.jpg").write_text("not a run")
    log = out / "jobs" / f"class_{KILLED}_seed_{seeds[0]}.log"
    ended = threading.Event()

    def kill() -> None:
        while not ended.is_set() and not (log.is_file() and "epoch 1/6" in log.read_text()):
            time.sleep(0.005)
        os.kill(_child(os.getpid(), KILLED, seeds[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    code, _, errors = sweep(arguments(out, classes, seeds))
    ended.set()
    killer.join()
    assert code == 1 and "Traceback" not in errors, errors
    assert f"failed: class {KILLED}, seed {seeds[0]}: train.py --mode simclr_CSI, killed by signal 9" in errors, errors
    for seed in seeds:
        assert f"failed: class {failing}, seed {seed}: train.py --mode simclr_CSI, exit code 2: error:" in errors, (
            errors
        )
    missing = 1 + len(seeds)
    assert f"{missing} of" in errors
    first = json.loads((out / "table.json").read_text())
    for folder in names:
        (folder / "holiday.jpg").unlink()
        folder.rmdir()
    code, told, errors = sweep(arguments(out, classes, seeds))
    assert code == 0, errors
    jobs = len(first["each"]) + missing
    assert f"{jobs} jobs, {jobs - missing} of them finished" in told
    assert told.count("train.py --mode") == missing  # nothing else was looked at again
    assert "continuing after epoch" in log.read_text()
    table = json.loads((out / "table.json").read_text())
    assert len(table["each"]) == jobs and all(cell in table["each"] for cell in first["each"])
    check_table(out, table, seeds)
    return f"{jobs} jobs: {missing} failed, were told, and were finished by the second start; the table is right"


def _child(parent: int, one_class_idx: int, seed: int) -> int:
    """The process of a sweep's job."""
    for pid in subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split():
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if f"--one_class_idx {one_class_idx} --seed {seed} " in " ".join(words):
            return int(pid)
    raise AssertionError("no such job at work")


def check_table(out: Path, table: dict, seeds: list[int]) -> None:
    """Raises: AssertionError unless the table is what the result files say, and its three forms agree."""
    found: dict[int, list[float]] = {}
    for seed in seeds:
        for path in sorted((out / f"seed_{seed}").glob("*/result_ood_pre_refmix_CSI*.json")):
            result = json.loads(path.read_text())
            assert result["seed"] == seed
            found.setdefault(result["one_class_idx"], []).append(result["mean"])
    assert sorted(found) == table["classes"]
    cells = {cell["one_class_idx"]: cell for cell in table["cells"]}
    text = (out / "table.md").read_text()
    for idx, values in found.items():
        cell = cells[idx]
        assert abs(cell["mean"] - np.mean(values)) < 1e-12 and cell["low"] < cell["mean"] < cell["high"]
        spread = "" if len(values) == 1 else f" ± {100 * np.std(values, ddof=1):.1f}"
        assert f"| class {idx} " in text and f"{100 * np.mean(values):.1f}{spread} [" in text
        assert repr(float(np.mean(values))) in (out / "table.csv").read_text()
    mean = np.mean(list(found.values()))
    assert abs(table["means"][0]["mean"] - mean) < 1e-12 and f"| mean of {len(found)} " in text


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(killed_and_failed(Path(place) / "sweep", "0-9", [0, 1], failing=7))
