"""Signals, alone or to the group as clusters send them: what can be saved is, and one true line says so."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import train
from common.errors import RunStopped
from common.signals import whole_imports
from tests.conftest import ROOT, SHIFT, TINY
from tests.datasets.test_pictures import photographs

# A step in which the process sends itself a signal, or its whole group.
SENDS = """
import os, signal, sys, training.loop as loop, train
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.{before})
signal.signal(signal.SIGINT, signal.default_int_handler)
real = loop.descend
def descend(recipe, batch, world):
    if (batch.epoch, batch.step) == (2, 0):
        os.{send}(os.{whom}(), signal.{name})
    return real(recipe, batch, world)
loop.descend = descend
sys.exit(train.main(sys.argv[1:]))
"""


def sent(name: str, args: list[str], *, group: bool, before: str = "SIG_DFL") -> subprocess.CompletedProcess:
    send, whom = ("killpg", "getpgrp") if group else ("kill", "getpid")
    code = SENDS.format(send=send, whom=whom, name=name, before=before)
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, start_new_session=True, timeout=120)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """Training whose pictures two processes load, and where it ends when nothing interrupts it."""
    root = tmp_path_factory.mktemp("data")
    photographs(root, {"one_class_train/acorn": 9, "one_class_train/tank": 9})
    args = ["--dataset", "imagenet", "--model", "resnet8", "--image_size", "16", *SHIFT, "--data_path", str(root)]
    args += "--one_class_idx tank --mode simclr_CSI --batch_size 3 --epochs 2 --num_worker 2".split()
    assert train.main([*args, "--log_root", str(root / "whole")]) == 0
    (whole,) = (root / "whole").iterdir()
    return args, torch.load(whole / "last.model", weights_only=True)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_group_saves_although_other_processes_load_the_pictures(name, streamed, tmp_path):
    args, whole = streamed
    ended = sent(name, [*args, "--log_root", tmp_path], group=True)
    assert ended.returncode == 128 + getattr(signal, name), ended.stderr
    assert ended.stderr.count("\n") == 1 and "saved after step 1" in ended.stderr
    if name != "SIGTERM":
        return
    (folder,) = tmp_path.iterdir()
    assert train.main([*args, "--log_root", str(tmp_path)]) == 0
    state = torch.load(folder / "last.model", weights_only=True)
    assert all(torch.equal(state[key], value) for key, value in whole.items())


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_signal_to_the_process_saves(name, tmp_path):
    ended = sent(name, [*TINY, "--epochs", 2, "--log_root", tmp_path], group=False)
    assert ended.returncode == 128 + getattr(signal, name)
    assert ended.stderr.count("\n") == 1 and "saved after step 1" in ended.stderr


def test_what_is_ignored_from_the_start_stays_ignored(tmp_path):
    """As under nohup."""
    ended = sent("SIGHUP", [*TINY, "--epochs", 2, "--log_root", tmp_path], group=False, before="SIG_IGN")
    assert ended.returncode == 0 and ended.stderr == ""


# Signals that are ignored in a background job of a shell are heard again.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def test_an_interrupt_during_an_import_comes_after_it(tmp_path, monkeypatch):
    """A package that swallows it, as some compiled ones do: nothing would end."""
    (tmp_path / "swallows.py").write_text(
        "import signal, time\n"
        "try:\n    signal.raise_signal(signal.SIGINT); time.sleep(0.2)\n"
        "except KeyboardInterrupt:\n    pass\n"
        "whole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), whole_imports():
            import swallows

            assert swallows.whole
            time.sleep(5)
        with pytest.raises(KeyboardInterrupt), whole_imports():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("after", [0.02, 0.5, 1.5])
def test_an_interrupt_in_the_first_seconds_ends_in_one_line(after, tmp_path):
    code = (
        f"{HEARS}import os, sys, threading, train\n"
        f"threading.Timer({after}, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    args = [*TINY, "--epochs", "1000", "--log_root", str(tmp_path)]
    ended = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 130 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith(("interrupted; ", "stopped: asked to stop"))


EVALUATES = """
import os, signal, sys, evals.extract as features, {script} as script
real, seen = features.set_views, []
def set_views(*args):
    seen.append(args)
    if len(seen) == 3: os.kill(os.getpid(), signal.SIGINT)
    return real(*args)
features.set_views = set_views
sys.exit(script.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("script, mode", [("eval", "ood_pre"), ("tsne", "ood_pre_tsne")])
def test_an_interrupt_of_an_evaluation_ends_in_one_true_line(script, mode, stage1, tmp_path):
    args = [*TINY, *SHIFT, "--mode", mode, "--load_path", str(stage1), "--out", str(tmp_path / "new")]
    code = HEARS + EVALUATES.format(script=script)
    ended = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 130 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("interrupted; ") and "checkpoint" not in ended.stderr
    assert not (tmp_path / "new").exists()


def test_an_interrupt_of_the_group_while_a_cache_is_built_ends_in_one_line_and_leaves_no_part_of_it(streamed, tmp_path):
    args, _ = streamed
    code = HEARS + (
        "import os, sys, datasets.pictures as pictures, train\n"
        "real = pictures.progress\n"
        "def progress(items, **settings):\n"
        "    for n, item in enumerate(real(items, **settings)):\n"
        "        if n == 2: os.killpg(os.getpgrp(), signal.SIGINT)\n"
        "        yield item\n"
        "pictures.progress = progress\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    more = ["--image_cache", str(tmp_path / "cache"), "--log_root", str(tmp_path / "l")]
    command = [sys.executable, "-c", code, *args, *more]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, start_new_session=True, timeout=120)
    assert ended.returncode == 130 and ended.stderr.count("\n") == 1, ended.stderr
    assert os.listdir(tmp_path / "cache") == [".lock"] and not (tmp_path / "l").exists()


def test_a_process_that_loads_pictures_and_dies_is_reported(streamed, tmp_path):
    args, _ = streamed
    code = (
        "import os, signal, sys, datasets.pictures as pictures, train\n"
        "def read(path, short_side, *more):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pictures.read_upright = read\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, *args, "--log_root", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("stopped: a process that loads pictures has ended")


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
        " shared memory.",
        "unable to write to file </torch_12_34_5>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_1_2_3>: Resource temporarily unavailable (11)",
    ],
)
def test_a_small_shared_memory_is_reported_with_the_remedy(text, streamed, tmp_path, monkeypatch, capsys):
    from torch.utils.data import DataLoader

    def full(self):
        raise RuntimeError(text)

    monkeypatch.setattr(DataLoader, "__iter__", full)
    args, _ = streamed
    assert train.main([*args, "--log_root", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "--num_worker 0" in told and "/dev/shm" in told


def test_metrics_of_a_run_that_was_stopped_have_every_epoch_once(tmp_path):
    args = [*TINY, "--epochs", "2", "--log_root", str(tmp_path)]
    assert sent("SIGTERM", args, group=True).returncode == 143
    assert train.main(args) == 0
    (folder,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert not [p for p in os.listdir(folder) if p.endswith(".tmp")]


def test_batches_that_do_not_fit_shared_memory_are_reported_before_torch_waits(streamed, tmp_path, monkeypatch):
    import datasets.pictures as pictures

    args, _ = streamed
    room = 2 * 3 * 3 * 16 * 16  # a batch: two copies of three images
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * room - 1))
    with pytest.raises(RunStopped, match="--num_worker 0"):
        pictures._check_shared_memory(room, 2)
    pictures._check_shared_memory(room, 0)
    assert train.main([*args, "--log_root", str(tmp_path)]) == 1
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * room))
    pictures._check_shared_memory(room, 2)
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert train.main([*args, "--log_root", str(tmp_path)]) == 0


def test_a_second_interrupt_ends_at_once_unless_a_launcher_passed_the_first_one_on(monkeypatch):
    import common.signals as signals

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with signals.stop_signals() as stop:
        assert stop() == 0
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.5
        signal.raise_signal(signal.SIGINT)
        assert stop() == signal.SIGINT
        now[0] += 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler  # put back as it was
