"""All classes x seeds of a recipe: `python -m scripts.sweep cifar10 --data_path ../Data --seeds 0 1 2`.

Each class and seed is a job: its commands one after the other, as many jobs at a time as there are GPUs (or --jobs).
Start the same command again after whatever happened: what is finished is left alone, what was interrupted goes on. A
job that fails is reported at the end, with a non-zero exit code, and holds no other up. All of it lies below --out: a
log for each job in jobs/, the runs by seed, and table.md, table.csv and table.json.

Flags after `--` go to every command: `-- --dataset folder` for pictures in folders, `-- --device cpu --model resnet8`.
"""

import argparse
import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import RunStopped, Terminated, UserError, command
from common.files import BUSY, hold, release
from datasets.one_class import SplitSpec
from scripts.jobs import Job, Record, work
from scripts.recipes import METHODS, RECIPES, Recipe, planned_minutes, refuse_own, steps_of
from scripts.results import PUBLISHED
from scripts.tables import Entry, write_tables

_POLL_S = 0.2
# How far training time may be from that of a sweep at equal time before a note says so, as a share.
_UNEVEN = 0.1
# What asks a sweep to stop.
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def places(jobs: int | None) -> list[dict[str, str]]:
    """The environment of each job that runs at the same time: a GPU each, or a share of the cores."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    gpus = gpus if torch.cuda.is_available() else []
    count = jobs or max(1, len(gpus))
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    found = [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)} for _ in range(count)]
    for i, env in enumerate(found if gpus else []):
        env["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
    return found


def run_here(jobs: Sequence[Job], slots: list[dict[str, str]], retries: int) -> None:
    """Carry the jobs out, as many at a time as there are slots.

    Raises: Terminated when asked to stop, once the jobs at work have saved and ended.
    """
    asked: list[int] = []
    signalled: set[int] = set()
    # nohup has SIGHUP ignored, and so it stays.
    heard = [number for number in _STOPS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in heard}
    waiting, ended, begun = list(jobs), 0, time.monotonic()
    active: dict[int, tuple[Job, Iterator[subprocess.Popen], subprocess.Popen | None]] = {}
    try:
        while (waiting and not asked) or active:
            free = [slot for slot in range(len(slots)) if slot not in active]
            for slot in free[: 0 if asked else len(waiting)]:
                job = waiting.pop(0)
                active[slot] = (job, work(job, slots[slot], retries, lambda: bool(asked)), None)
            for slot, (job, steps, process) in list(active.items()):
                if process is not None and process.poll() is None:
                    if asked and slot not in signalled:  # once: it saves meanwhile
                        process.terminate()
                        signalled.add(slot)
                elif (process := next(steps, None)) is not None:
                    _report(job, _named(process))
                    active[slot] = (job, steps, process)
                else:
                    del active[slot]
                    ended += 1
                    left = (time.monotonic() - begun) / ended * (len(jobs) - ended)
                    failure = Record(job).failure
                    state = f"FAILED ({failure})" if failure else "done"
                    _report(job, f"{state}; {ended} of {len(jobs)} jobs ended, about {left / 60:.0f} min left")
            time.sleep(_POLL_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise Terminated("asked to stop; the jobs at work have saved. The same command goes on from there", asked[0])


def _named(process: subprocess.Popen) -> str:
    words = [str(word) for word in process.args]  # type: ignore[union-attr]
    return f"{words[1]} --mode {words[words.index('--mode') + 1]}"  # no other --mode: `refuse_own`


def _report(job: Job, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {job.title}: {text}", flush=True)


def run_submitted(jobs: Sequence[Job], cluster: str, settings: dict[str, Any], retries: int, out: Path) -> None:
    """Carry the jobs out as a Slurm job array (cluster "slurm"), or in processes of this machine in the same way.

    settings: of submitit, such as slurm_partition; without, a job has a day (timeout_min) and, under Slurm, a GPU
    (gpus_per_node). Raises: UserError without submitit.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(f"--executor {cluster}: submitit is not installed; pip install submitit") from None
    executor = submitit.AutoExecutor(folder=out / "submitit", cluster=cluster)
    usual = {"timeout_min": 24 * 60, **({"gpus_per_node": 1} if cluster == "slurm" else {})}
    try:
        executor.update_parameters(**{**usual, **settings})
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"--set: {error}") from None
    handles = executor.map_array(_CarryOut(), jobs, [retries] * len(jobs))
    for job, handle in zip(jobs, handles, strict=True):
        _report(job, f"submitted as {handle.job_id}")
    for job, handle in zip(jobs, handles, strict=True):
        handle.wait()
        _report(job, f"FAILED ({failure})" if (failure := _failure(job, handle)) else "done")


def _failure(job: Job, handle: Any) -> str | None:
    error = handle.exception()
    return Record(job).failure or (str(error).strip().splitlines()[-1] if error else None)


class _CarryOut:
    """What a machine of the cluster does. At the end of its time it is submitted again, and goes on."""

    def __call__(self, job: Job, retries: int) -> None:
        for process in work(job, {}, retries):
            process.wait()

    def checkpoint(self, job: Job, retries: int) -> Any:
        """Called by submitit before a job is cut off."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job, retries)


def _seconds(job: Job, record: Record, method: str) -> float:
    """Spent on one column of one job, what it shares with other columns included."""
    step = job.step(METHODS[method][0])
    return sum(record.seconds.get(part.key, 0.0) for part in (*step.needs, step)) if step else 0.0


def _entries(job: Job, record: Record, methods: Sequence[str]) -> Iterator[Entry]:
    """What the evaluations of a job found, those that are done. Raises: UserError for a result that cannot be read."""
    for method in methods:
        kind, score = METHODS[method]
        step = job.step(kind)
        if step is None or not record.done(step):
            continue
        try:
            found, scores = step.result(score)
            images = found.get("data", {}).get(found["dataset"], {}).get("fingerprint", "")
            mean, device = float(found["mean"]), found["device"]
            yield Entry(method, score, job.one_class_idx, job.seed, mean, scores, device, images)
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = error if isinstance(error, OSError) else f"a result_*.json in {step.folder} cannot be read"
            raise UserError(f"--out: {why}; remove {job.file}, and the job looks again") from None


def _same_images(entries: Sequence[Entry]) -> None:
    """Raises: UserError where some evaluations saw other test images than the rest: they make no table together."""
    of = {entry.images: f"class {entry.one_class_idx}, seed {entry.seed}" for entry in entries if entry.images}
    if len(of) > 1:
        raise UserError(
            f"--data_path: the test images changed between jobs of this sweep ({'; '.join(of.values())} have different"
            " ones); put the former ones back, or give another --out"
        )


def uneven(recipe: Recipe, methods: Sequence[str], times: float) -> list[str]:
    """The methods whose training time, in whole epochs, is far from that of the sweep, each with its minutes; none in a
    family that is not at equal time."""
    if recipe.minutes is None:
        return []
    wanted, found = recipe.minutes * times, {method: planned_minutes(recipe, method, times) for method in methods}
    return [f"{method} {minutes:.2g}" for method, minutes in found.items() if abs(minutes / wanted - 1) > _UNEVEN]


def _classes(text: str) -> list[int]:
    """`0-9` or `0,3,5-7`."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(found))


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    with contextlib.suppress(ValueError):
        return name, int(value)
    return name, value


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--data_path", default="../Data/", help="folder of the data sets")
    parser.add_argument("--out", type=Path, help="folder of all that is made (default: logs/sweep_RECIPE)")
    parser.add_argument("--classes", type=_classes, help="such as 0-9 or 0,3,5-7 (default: all of the recipe)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["CSI", "ADMM-SRNet"])
    parser.add_argument("--epochs", type=int, help="of stage 1 (default: the recipe's)")
    parser.add_argument("--more", type=int, help="of stage 2 (default: the recipe's)")
    parser.add_argument("--times", type=float, default=1.0, help="minutes: train so many times as long")
    parser.add_argument("--jobs", type=int, help="how many at a time (default: one for each GPU, or one)")
    parser.add_argument("--retries", type=int, default=1, help="attempts after a command that died")
    parser.add_argument("--bootstrap", type=int, default=1000, help="samples for the intervals of the table")
    parser.add_argument(
        "--executor", choices=("here", "local", "slurm"), default="here", help="local, slurm: through submitit"
    )
    parser.add_argument("--set", type=_setting, nargs="+", default=[], help="submitit: NAME=VALUE ...")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, touch nothing")
    options = parser.parse_args(words[:cut])
    options.flags = words[cut + 1 :]
    return options


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = _options(argv)
    recipe = RECIPES[options.recipe]
    out = (options.out or Path("logs") / f"sweep_{options.recipe}").expanduser().absolute()
    options.data_path = str(Path(options.data_path).expanduser().absolute())
    for name in ("epochs", "more"):
        if recipe.minutes is not None and getattr(options, name) is not None:
            raise UserError(f"--{name}: {options.recipe} has epochs of its own for every command; give --times")
    if recipe.minutes is None and options.times != 1:
        raise UserError(f"--times: {options.recipe} is not at equal training time; give --epochs and --more")
    options.epochs = recipe.epochs if options.epochs is None else options.epochs
    options.more = recipe.more if options.more is None else options.more
    for name in ("jobs", "epochs", "more", "bootstrap"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be > 0, got {getattr(options, name)}")
    if not 0 < options.times < math.inf:
        raise UserError(f"--times must be a finite number > 0, got {options.times:g}")
    refuse_own(options.flags)
    methods = [method for method in METHODS if method in options.methods]
    classes = options.classes if options.classes is not None else list(range(recipe.classes))
    seeds = list(dict.fromkeys(options.seeds))
    jobs = [
        Job(idx, seed, steps_of(recipe, methods, idx, seed, out, options), out / "jobs")
        for seed in seeds
        for idx in classes
    ]
    if not jobs:
        raise UserError("--classes: no class in it")
    if options.dry_run:
        for job in jobs:
            print("\n".join(shlex.join(["python", *step.arguments]) for step in job.steps))
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make {out} ({error.strerror})") from None
    lock = hold(out)
    if lock == BUSY:
        raise UserError(f"--out: another sweep is at work in {out}; let it end, or give another folder")
    try:
        minutes = uneven(recipe, methods, options.times)
        if minutes:
            print(f"note: whole epochs are not equal time; minutes: {', '.join(minutes)}")
        todo = [job for job in jobs if not all(map(Record(job).done, job.steps))]
        print(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them finished; logs are in {out / 'jobs'}", flush=True)
        if todo and options.executor == "here":
            run_here(todo, places(options.jobs), options.retries)
        elif todo:
            run_submitted(todo, options.executor, dict(options.set), options.retries, out)
        records = {job: Record(job) for job in jobs}
        failed = [job for job in jobs if not all(map(records[job].done, job.steps))]
        for job in failed:
            why = records[job].failure or "not finished; another sweep may be at work on it"
            print(f"failed: {job.title}: {why}; see {job.log}", file=sys.stderr)
        first = jobs[0].steps[0].flags
        dataset = first.of(SplitSpec).dataset
        words = shlex.join(sys.argv[1:] if argv is None else argv)
        equal = recipe.minutes is not None
        length = (
            {"minutes": recipe.minutes * options.times} if equal else {"epochs": f"{options.epochs} + {options.more}"}
        )
        length |= {"minutes by whole epochs": ", ".join(minutes)} if minutes else {}
        notes = {**length, "command": f"python -m scripts.sweep {words}"}
        spent = {method: sum(_seconds(job, records[job], method) for job in jobs) for method in methods}
        entries = [entry for job in jobs for entry in _entries(job, records[job], methods)]
        _same_images(entries)
        comparable = set(classes) >= set(range(recipe.classes)) and first.as_dict()["superclasses"] == "published"
        table = write_tables(
            out,
            dataset,
            entries,
            classes=classes,
            seeds=seeds,
            methods=methods,
            seconds=spent,
            notes=notes,
            times=options.bootstrap,
            # They are means over all classes, of CIFAR-100 over the published groups.
            published=PUBLISHED.get(dataset) if comparable and not equal else None,
        )
        print(f"\n{table}", end="")
        print(f"table.md, table.csv and table.json are in {out}", flush=True)
    finally:
        release(lock)
    if failed:
        raise RunStopped(f"{len(failed)} of {len(jobs)} jobs failed; the same command tries them again")


if __name__ == "__main__":
    sys.exit(main())
