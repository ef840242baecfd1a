"""Jobs of a sweep: commands one after the other, with a log, and a record on disk of what became of them."""

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import BUSY, hold, release, write_json
from scripts.recipes import KINDS, Step

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Job:
    """The commands of one class and seed; `file` records what became of them, `log` what they said."""

    one_class_idx: int
    seed: int
    steps: tuple[Step, ...]
    place: Path

    @property
    def title(self) -> str:
        return f"class {self.one_class_idx}, seed {self.seed}"

    @property
    def file(self) -> Path:
        return self.place / f"class_{self.one_class_idx}_seed_{self.seed}.json"

    @property
    def log(self) -> Path:
        return self.file.with_suffix(".log")

    def step(self, kind: str) -> Step | None:
        return next((step for step in self.steps if step.kind == kind), None)


class Record:
    """What became of a job's commands, on disk at every moment.

    Of each command, by its key: seconds spent on it over all attempts, whether it is done.
    """

    def __init__(self, job: Job):
        self._job = job
        self._now: dict[str, Any] = {"steps": {}}
        if job.file.is_file():
            try:
                self._now = json.loads(job.file.read_text())
                self._spent_before_a_crash()
            except (ValueError, KeyError, TypeError, OSError):
                raise UserError(f"--out: {job.file} cannot be read; remove it, and its job looks again") from None

    def _spent_before_a_crash(self) -> None:
        running = self._now.pop("running", None)
        if running and self._job.log.is_file():
            seconds = self._job.log.stat().st_mtime - running["begun"]
            self._now["steps"][running["key"]]["seconds"] += max(0.0, seconds)

    def done(self, step: Step) -> bool:
        return self._now["steps"].get(step.key, {}).get("done", False)

    @property
    def seconds(self) -> dict[str, float]:
        """By key."""
        return {key: step["seconds"] for key, step in self._now["steps"].items()}

    @property
    def failure(self) -> str | None:
        """Why the last attempt ended early."""
        return self._now.get("failure")

    def begin(self, step: Step) -> None:
        # What the same command made of other flags is written over, so that is no longer done.
        for other in self._now["steps"].values():
            other["done"] = other["done"] and other["kind"] != step.kind
        self._now["steps"].setdefault(step.key, {"kind": step.kind, "seconds": 0.0, "done": False})
        self._now |= {"running": {"key": step.key, "begun": time.time()}, "failure": None}
        self._write()

    def end(self, step: Step, code: int) -> None:
        running = self._now.pop("running")
        self._now["steps"][step.key]["seconds"] += time.time() - running["begun"]
        self._now["steps"][step.key]["done"] = code == 0
        if code != 0:
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            what = f"{step.arguments[0]} --mode {KINDS[step.kind].mode}"
            self._now["failure"] = f"{what}, {how}: {self._last()}"
        self._write()

    def _last(self) -> str:
        lines = self._job.log.read_text(errors="replace").splitlines() if self._job.log.is_file() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def _write(self) -> None:
        write_json(self._job.file, self._now)


def work(
    job: Job, env: dict[str, str], retries: int, stop: Callable[[], bool] = lambda: False
) -> Iterator[subprocess.Popen]:
    """Start the commands of a job that are not done, one after the other; each is to be waited for before the next.

    A command that dies is started again up to `retries` times, since runs go on from their checkpoints; one that ends
    with exit code 2 is not, since its input is wrong. stop: looked at before each. A job at which another process is at
    work is left to it.
    """
    job.place.mkdir(parents=True, exist_ok=True)
    job.log.touch()
    lock = hold(job.log)
    if lock == BUSY:
        return
    try:
        yield from _commands(job, env, retries, stop)
    finally:
        release(lock)


def _commands(job: Job, env: dict[str, str], retries: int, stop: Callable[[], bool]) -> Iterator[subprocess.Popen]:
    record = Record(job)
    for step in job.steps:
        for attempt in range(1 + retries):
            if record.done(step):
                break
            if stop():
                return
            record.begin(step)
            with job.log.open("ab") as log:
                log.write(f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(step.arguments)}\n".encode())
                log.flush()
                process = subprocess.Popen(
                    [sys.executable, *step.arguments],
                    cwd=ROOT,
                    env={**os.environ, **env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # an interrupt from the keyboard is the sweep's to pass on
                    preexec_fn=end_with_parent,
                )
            yield process
            record.end(step, process.returncode)
            if process.returncode == 2 or attempt == retries:
                break
        if not record.done(step):
            return


def end_with_parent() -> None:
    """Linux: if who started this process dies, it is asked to save and end, so that its folder is free for the next."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
