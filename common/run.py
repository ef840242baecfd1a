"""The run folder: flags, log, metrics, TensorBoard events and checkpoints of one run."""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import torch

from common.errors import UserError
from common.files import (
    BUSY,
    hold,
    is_leftover,
    is_whole,
    load_tensors,
    previous,
    published_epoch,
    read_facts,
    release,
    remove_leftovers,
    save_tensors,
    write_json,
    write_text,
)
from common.flags import Flags

# Flags that are read and do not change what a run computes: it may go on under other values of these.
_FREE = frozenset(
    "recipe overwrite dry_run num_worker image_cache log_root download_data local_rank"
    " save_step save_minutes error_step test_batch_size max_megapixels".split()
)
# How long a folder may still be held by a process that is about to go.
_PATIENCE_S = 10.0
# Flags that change numbers only as another machine does: a run may go on, and a line says so.
_MACHINE = frozenset(("device", "compile"))


class Run:
    """One folder. Looking at it changes nothing; `open()` creates it (or replaces it, with --overwrite).

    weights: name of the file of weights that other commands read ("last.model").
    resume: name of the file from which an interrupted run goes on ("last.resume").
    moved: flags that say where the data lies and that had another value when the run began.
    replace: --overwrite, a folder that is there makes way for this run.
    processes: how many train together, each on --batch_size images of a step.
    extensible: whether --resume_path trains a finished run of this mode for longer.
    """

    def __init__(
        self,
        folder: Path,
        flags: Flags,
        *,
        weights: str,
        resume: str,
        replace: bool = False,
        processes: int = 1,
        extensible: bool = False,
    ):
        self.folder = folder
        self.weights = folder / weights
        self.flags = flags
        self._resume = folder / resume
        self._log: TextIO | None = None
        self._metrics: TextIO | None = None
        self._board: Any = None
        self.state: dict[str, Any] | None = None
        self._replace = False
        self._damaged = False
        self._seen: tuple[int, int] | None = None
        self._lock: int | None = None
        self._launch = launch_id(os.environ)
        self._started: list[dict[str, Any]] = []
        self._processes = processes
        self._extensible = extensible
        self._data: dict[str, Any] | None = None
        self._facts: dict[str, Any] = {}
        self.moved: list[str] = []
        try:
            if folder.exists():
                self._look(replace)
        except OSError as error:
            raise UserError(f"--log_root: {folder} cannot be a run folder ({error.strerror})") from None

    def _look(self, replace: bool) -> None:
        config = self.folder / "args.json"
        if not config.is_file():
            # A run that was killed before it could write even that has left no more than these.
            if not all(is_leftover(path) for path in self.folder.iterdir()):
                raise UserError(
                    f"--log_root: {self.folder} exists and is no run folder of this program; choose another --suffix"
                )
            return
        try:
            written = json.loads(config.read_text())
            if replace and not self._started_again(written):
                self._replace = True
                return
            before = {name: written["flags"][name] for name in written["used"]}
            # Flags that an older version did not have.
            new = [name for name in self.flags.as_dict() if self.flags.given(name) and name not in written["flags"]]
            before |= {name: self.flags.default(name) for name in new}
            processes = written.get("processes", 1)
            self._data = written.get("data")
        except (OSError, ValueError, KeyError, TypeError):
            if replace:
                self._replace = True
                return
            raise UserError(f"--overwrite: {config} cannot be read; --overwrite replaces the run") from None
        now = self.flags.as_dict()
        changed = _differences(before, now, self._data, self.flags.filled_in)
        if processes != self._processes and "batch_size" in before:
            # What counts is how many images a step sees.
            steps = [f"{n} x {flags['batch_size']}" for n, flags in ((processes, before), (self._processes, now))]
            changed = [text for text in changed if not text.startswith("--batch_size ")]
            if processes * before["batch_size"] != self._processes * now["batch_size"]:
                changed.append(f"--batch_size was {steps[0]} (processes x images), is {steps[1]}")
            else:
                print(
                    f"note: a step was of {steps[0]} images, is of {steps[1]}; the run goes on with the same draws"
                    " (on CPUs batch normalisation sees the images of one process)"
                )
        self._started = written.get("started", [])
        self.moved = _moved(before, now)
        if changed:
            longer = ""
            if [text.split()[0] for text in changed] == ["--epochs"] and self._extensible:
                longer = f"; to train it for longer, --resume_path {self.folder} and another --suffix"
            raise UserError(
                f"--overwrite: {self.folder} holds a run with another configuration ({', '.join(changed)});"
                f" choose another --suffix, or --overwrite to replace it{longer}"
            )
        for name in sorted(_MACHINE & before.keys()):
            if before[name] != now[name]:
                print(f"note: --{name} was {before[name]}; the run goes on, not bit for bit as it would have")
        self.state = self._read_state()
        self._seen = _stamp(self._resume)

    def _started_again(self, written: dict[str, Any]) -> bool:
        """Whether the launcher started this very run again after a fault: then --overwrite has had its effect."""
        again = self._launch is not None and written.get("launch") == self._launch
        if again:
            print("note: --overwrite: the launcher has started this run again; it goes on")
        return again

    def _read_state(self) -> dict[str, Any] | None:
        """Of the last checkpoint, or of the one before it where the last is damaged."""
        before = previous(self._resume)
        if not self._resume.is_file():
            return None
        try:
            return load_tensors(self._resume, flag="overwrite")
        except UserError as error:
            if not before.is_file() or not is_whole(before):
                raise
            print(f"note: {self._resume} is damaged ({error}); going on from {before.name}")
            self._damaged = True
            return load_tensors(before, flag="overwrite")

    @property
    def finished(self) -> bool:
        """Whether this very run has been carried out already."""
        if self.state is None:
            return False
        return self.state["epoch"] >= self.flags.as_dict()["epochs"] or self.state.get("converged", False)

    def open(self, facts: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Create the folder (with --overwrite: anew) and start its log. Called once all input has been read.

        facts: what weights say of their origin, in JSON's types; `data` of them identifies the training images.
        Raises: UserError, and nothing is written, where a run would go on with other images than it began with.
        """
        data = facts.get("data")
        if self.state is not None:
            _same_data(self._data, data, self.folder)
        started = [*self._started, describe_program()]
        self._facts = dict(facts)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A process that was killed may leave one behind that goes within seconds.
            self._lock = hold(self.folder, wait=_PATIENCE_S)
            if self._lock == BUSY:
                raise UserError(
                    f"--log_root: another process is at work in {self.folder}; let it end, or give a --suffix"
                )
            remove_leftovers(self.folder)
            if self._replace:
                _empty(self.folder)
            elif _stamp(self._resume) != self._seen:
                raise UserError(f"--log_root: another process went on with {self.folder} meanwhile; start again")
            if self._damaged:
                previous(self._resume).replace(self._resume)
            config = {
                "flags": self.flags.as_dict(),
                "used": self.flags.used(),
                "processes": self._processes,
                "data": data,
                "launch": self._launch,
                "started": started,
            }
            write_json(self.folder / "args.json", config)
            self._log = (self.folder / "log.txt").open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
            _keep_rows(self.folder / "metrics.jsonl", self.state["epoch"] if self.state else 0)
            self._metrics = (self.folder / "metrics.jsonl").open("a", buffering=1)
        except OSError as error:
            self.close()
            raise UserError(f"--log_root: cannot write to {self.folder} ({error.strerror})") from None
        except UserError:
            self.close()
            raise
        for line in self.flags.unread_notes():
            self.say(line)

    def keep(self, name: str, tensors: dict[str, Any], epoch: int) -> None:
        """Write weights of `epoch` to a file of the folder."""
        save_tensors(self.folder / name, tensors, facts={**self._facts, "epoch": epoch})

    def say(self, text: str) -> None:
        """A line for the screen and for log.txt."""
        print(text, flush=True)
        if self._log:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def record(self, epoch: int, values: dict[str, float]) -> None:
        """One row of metrics.jsonl and one point of each TensorBoard curve; keys are tags ("train/loss_sim")."""
        if self._metrics:
            self._metrics.write(json.dumps({"epoch": epoch, **values}) + "\n")
        for tag, value in values.items():
            self._tensorboard(epoch).add_scalar(tag, value, epoch)

    def show(self, epoch: int, images: dict[str, torch.Tensor], histograms: dict[str, torch.Tensor]) -> None:
        """Images (3, H, W) in [0, 1] and distributions of values for TensorBoard, by tag."""
        for tag, image in images.items():
            self._tensorboard(epoch).add_image(tag, image, epoch)
        for tag, values in histograms.items():
            self._tensorboard(epoch).add_histogram(tag, values, epoch)

    def _tensorboard(self, epoch: int) -> Any:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # 1 s of import that only training needs

            self._board = SummaryWriter(str(self.folder), purge_step=epoch)
        return self._board

    def save(self, weights: dict[str, Any], state: dict[str, Any]) -> None:
        """Write both checkpoint files; `state["epoch"]` says how far the run is.

        The weights come first: a kill between the two leaves a run that has yet to make this epoch, never one that is
        finished with older weights.
        """
        facts = {**self._facts, "epoch": state["epoch"]}
        save_tensors(self.weights, weights, facts=facts, keep=True)
        save_tensors(self._resume, state, facts=facts, keep=True)

    def close(self) -> None:
        for stream in (self._log, self._metrics, self._board):
            if stream is not None:
                stream.close()
        self._log = self._metrics = self._board = None
        release(self._lock)
        self._lock = None


def launch_id(env: Mapping[str, str]) -> str | None:
    """What is the same for all starts by one launcher, torchrun, and different for the next; None without one."""
    run_id = env.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    # An id that the user gave, or none, says little: then it is the launcher's process that counts.
    return run_id if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", run_id) else f"{run_id} {os.getppid()}"


class NullRun(Run):
    """What a process has that is not the first of several: it knows the run, and says and writes nothing."""

    def __init__(self, folder: Path, flags: Flags, state: dict[str, Any] | None):
        self.folder = folder
        self.flags = flags
        self.state = state

    def open(self, facts: Mapping[str, Any] = MappingProxyType({})) -> None:
        pass

    def keep(self, name: str, tensors: dict[str, Any], epoch: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def record(self, epoch: int, values: dict[str, float]) -> None:
        pass

    def show(self, epoch: int, images: dict[str, torch.Tensor], histograms: dict[str, torch.Tensor]) -> None:
        pass

    def save(self, weights: dict[str, Any], state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if is_leftover(child):
            continue  # the lock is this process's own
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _same_data(before: dict[str, Any] | None, now: dict[str, Any] | None, folder: Path) -> None:
    """Raises: UserError where a run began with other training images than there are now, by what is known of them."""
    if not before or not now:
        return
    known = [name for name in now if name in before and before[name] and now[name]]
    changed = [name for name in known if before[name] != now[name]]
    if changed:
        words = {"fingerprint": "their content", "classes": "their classes"}
        what = ", ".join(words.get(name, f"{name} {before[name]}, now {now[name]}") for name in changed)
        place = "npz" if now.get("dataset") == "table" else "data_path"
        raise UserError(
            f"--{place}: the training images changed since the run in {folder} began ({what}); put the former ones"
            " back, or give another --suffix (--overwrite replaces the run)"
        )


def _differences(
    before: dict[str, Any], now: dict[str, Any], data: dict[str, Any] | None, filled: Collection[str]
) -> list[str]:
    """Flags that the run depended on and that differ now. data: what is known of its training images. filled: flags
    that have the mode's default."""

    def same(name: str) -> bool:
        if name in _FREE or name in _MACHINE:
            return True
        # The fingerprint identifies the images, wherever they lie. Without one only for folders
        # the path says which data set it is.
        if name in ("data_path", "npz") and (data or now["dataset"] not in ("folder", "table")):
            return True
        # What a mode fills in itself was not recorded before the images were.
        if name in filled and not data:
            return True
        if name in ("data_path", "npz", "resume_path", "load_path") and before[name] and now[name]:
            return Path(before[name]).resolve() == Path(now[name]).resolve()
        return before[name] == now[name]

    names = [name for name in before if name in now and not same(name)]
    return [f"--{name} was {before[name]}, is {now[name]}" for name in names]


def _moved(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Paths of the data that the run had and that are others now."""
    names = [name for name in ("data_path", "npz") if before.get(name) and now.get(name)]
    other = [name for name in names if Path(before[name]).resolve() != Path(now[name]).resolve()]
    return [f"--{name} was {before[name]}, is {now[name]}" for name in other]


def _keep_rows(path: Path, epoch: int) -> None:
    """Keep the whole rows of metrics.jsonl up to `epoch`: later ones are made again by a run that goes on."""
    if not path.is_file():
        return
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            rows += [line] if json.loads(line)["epoch"] <= epoch else []
    write_text(path, "".join(f"{row}\n" for row in rows))


def describe_program() -> dict[str, Any]:
    """What a result depends on besides its flags: command, code version, library versions, machine."""
    return {
        "command": " ".join(sys.argv),
        "git": _git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": platform.processor() or platform.machine(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_commit() -> str | None:
    try:
        here = Path(__file__).parent
        out = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() if out.returncode == 0 else None


def recorded_flags(weights: Path) -> dict[str, Any]:
    """The flags that the training of `weights` depended on: as the file has them, else as args.json beside it does.

    Empty for weights of the published programs. weights: a file of weights, or any in a run folder that has an
    args.json.
    """
    facts = read_facts(weights) if weights.is_file() else {}
    if "flags" in facts:
        return facts["flags"]
    try:
        written = json.loads((weights.parent / "args.json").read_text())
        return {name: written["flags"][name] for name in written["used"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def start_epoch(weights: Path, *, flag: str = "resume_path") -> int:
    """The epoch at which a run wrote `weights`: the file says so, else the state beside it, or a published last.config.

    Weights on their own count as epoch 0, and a line says so.
    """
    epoch = epoch_of(weights, flag=flag)
    if epoch is None:
        print(f"note: nothing beside {weights} gives its epoch; counting on from 0")
        return 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        meant = json.loads((weights.parent / "args.json").read_text())["flags"]["epochs"]
        if epoch < meant:
            print(f"note: {weights} is of an unfinished run, epoch {epoch} of {meant}")
    return epoch


def epoch_of(weights: Path, *, flag: str) -> int | None:
    """The epoch of a file of weights, where it is known.

    Raises: UserError for a corrupt file beside it.
    """
    facts = read_facts(weights)
    if "epoch" in facts:
        return int(facts["epoch"])
    if weights.suffix == ".resume":
        return int(load_tensors(weights, flag=flag)["epoch"])
    stem, _, kind = weights.name.rpartition(".")
    if kind in ("model", "cocsr_model"):
        resume = weights.with_name(f"{stem}.{kind.replace('model', 'resume')}")
        if resume.is_file():
            return int(load_tensors(resume, flag=flag)["epoch"])
        return published_epoch(weights.with_name(f"{stem}.{kind.replace('model', 'config')}"), flag=flag)
    return None
