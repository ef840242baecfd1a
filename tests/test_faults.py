"""A few faults of each kind; `python -m tests.faults` makes dozens."""

import random
import shutil
import signal
import subprocess
import sys

import pytest

import eval as evaluate
import train
from common.files import load_tensors, previous
from common.run import Run
from tests.conftest import ROOT, SHIFT, TINY
from tests.faults import STAGES, damaged, damages_reported, interrupted_run, same_end, whole_run


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Both stages, left alone."""
    root = tmp_path_factory.mktemp("whole")
    first = whole_run(STAGES[0], root / "1", None)
    return [first, whole_run(STAGES[1], root / "2", first.folder)]


@pytest.mark.parametrize("stage, kind, times", [(0, signal.SIGKILL, 2), (1, signal.SIGKILL, 1), (0, signal.SIGTERM, 1)])
def test_an_interrupted_run_ends_bit_for_bit_like_a_whole_one(wholes, tmp_path, stage, kind, times):
    what, whole, first = STAGES[stage], wholes[stage], wholes[0].folder if stage else None
    hits = interrupted_run(what, tmp_path, first, whole.seconds, kind, times, random.Random(times))
    assert hits >= 1
    same_end(what, whole.folder, what.folder(tmp_path))


def test_saves_fall_between_epochs_and_on_a_signal(wholes, tmp_path):
    """What SIGTERM leaves is the very step it came in, and a line says so."""
    logs = tmp_path / "logs"
    code = (
        "import os, signal, sys, training.loop as loop, train\n"
        "real, seen = loop.descend, []\n"
        "def descend(recipe, batch, world):\n"
        "    seen.append(batch)\n"
        "    if (batch.epoch, batch.step) == (2, 1): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(recipe, batch, world)\n"
        "loop.descend = descend\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    args = [a for a in STAGES[0].args(logs, None)]
    ended = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 143 and "saved after step 2" in ended.stderr and "Traceback" not in ended.stderr
    folder = STAGES[0].folder(logs)
    state = load_tensors(folder / "last.resume", flag="resume_path")
    assert (state["epoch"], state["step"]) == (1, 2) and state["meter"]["rows"].shape[0] == 2
    assert train.main(args) == 0
    same_end(STAGES[0], wholes[0].folder, folder)


def test_damaged_checkpoints_are_reported(wholes):
    rng = random.Random(0)
    for whole, stage in zip(wholes, STAGES, strict=True):
        for name in (stage.weights, stage.weights.replace("model", "resume")):
            assert damages_reported(whole.folder / name, 12, rng) == 12


def test_the_checkpoint_before_a_damaged_one_is_offered_or_taken(wholes, tmp_path, capsys):
    stage = STAGES[0]
    logs = tmp_path / "logs"
    shutil.copytree(wholes[0].folder, logs / wholes[0].folder.name)
    folder = stage.folder(logs)
    damaged(folder / "last.model", random.Random(1))
    args = [*TINY, *SHIFT, "--mode", "ood_pre", "--load_path", str(folder)]
    assert evaluate.main(args) == 2
    told = capsys.readouterr().err
    assert "last.model is truncated" in told and "previous.model, is whole" in told and told.count("\n") == 1
    # The run itself goes on from there, to the same end.
    damaged(folder / "last.resume", random.Random(2))
    before = load_tensors(previous(folder / "last.resume"), flag="resume_path")
    assert before["epoch"] < 5
    assert train.main(stage.args(logs, None)) == 0
    assert "last.resume is damaged" in capsys.readouterr().out
    same_end(stage, wholes[0].folder, folder)


def test_a_second_process_on_one_run_folder_is_refused(wholes, tmp_path, capsys, monkeypatch):
    logs = tmp_path / "logs"
    shutil.copytree(wholes[0].folder, logs / wholes[0].folder.name)
    args = [*STAGES[0].args(logs, None), "--overwrite"]
    code = "import sys, common.run; common.run._PATIENCE_S = 0.2; import train; sys.exit(train.main(sys.argv[1:]))"
    real, second = Run.save, []

    def save(self, *state):
        if not second:
            second.append(subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True))
        real(self, *state)

    monkeypatch.setattr(Run, "save", save)
    assert train.main(args) == 0
    assert second[0].returncode == 2 and "another process is at work" in second[0].stderr
    same_end(STAGES[0], wholes[0].folder, STAGES[0].folder(logs))
