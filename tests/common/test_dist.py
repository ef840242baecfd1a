"""What the environment says of processes, and who reports what is wrong with it."""

import errno
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluate
import train
from common.dist import World, processes
from common.errors import UserError
from tests.conftest import ROOT, SHIFT, TINY
from tests.test_commands import refused

ALL = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_what_a_launcher_says_is_taken_and_what_it_left_behind_is_reported():
    assert World.of(ALL) == World(1, 2, 1) and World.of({}) == World() and World.of({"WORLD_SIZE": "1"}) == World()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(UserError, match=f"WORLD_SIZE is 2 in the environment, without {name}: .*unset WORLD_SIZE"):
            World.of({key: value for key, value in ALL.items() if key != name})


def test_a_stray_world_size_ends_in_one_line(shell, tmp_path):
    for script in ("train.py", "eval.py"):
        done = shell(script, *TINY, "--log_root", tmp_path, WORLD_SIZE="4")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "unset WORLD_SIZE" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "tpu", "nonsense"])
def test_a_device_that_is_not_there_is_reported_by_one_process_of_a_machine(device, monkeypatch):
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("it is there")
    for name, value in ALL.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended, processes(device):
        pass
    assert ended.value.code == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=f"--device {device}"), processes(device):
        pass


def test_more_processes_than_gpus_are_reported_by_the_first(monkeypatch):
    """Which has a GPU itself."""
    for name, value in {**ALL, "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("common.dist.pick_device", lambda *args: pytest.fail("it takes memory of a GPU"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("common.dist._store", lambda world: pytest.fail("it joins the others"))
    with pytest.raises(UserError, match=r"2 processes here, but 1 GPU"), processes("cuda"):
        pass


def test_compile_without_a_compiler_ends_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    args = [*TINY, "--compile", "--epochs", "1", "--log_root", str(tmp_path / "l")]
    refused(capsys, train.main(args), "--compile", "g++")
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    refused(capsys, train.main(args), "--compile", "no-such-compiler")
    assert not (tmp_path / "l").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users here")
def test_folders_and_files_that_may_not_be_read_are_called_so(stage1, tmp_path, monkeypatch, capsys):
    """As another user than root, who may read everything."""
    closed = tmp_path / "closed"
    real = Path.is_dir

    def is_dir(self):
        if closed in (self, *self.parents):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    code = evaluate.main([*TINY, *SHIFT, "--load_path", str(closed / "run")])
    refused(capsys, code, "--load_path", "closed", "Permission denied")


def test_a_log_root_that_may_not_be_looked_at(tmp_path, monkeypatch, capsys):
    real = Path.exists

    def exists(self, **more):
        if tmp_path / "closed" in self.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, **more)

    monkeypatch.setattr(Path, "exists", exists)
    refused(capsys, train.main([*TINY, "--log_root", str(tmp_path / "closed")]), "--log_root", "Permission denied")


def test_who_waits_for_other_processes_says_so(tmp_path):
    """A WORLD_SIZE that is set with all that belongs to it, and nobody else comes."""
    code = "import sys, common.dist as d; d._REPORT_WAITING_S = 0.1; import train; sys.exit(train.main(sys.argv[1:]))"
    env = {**os.environ, **ALL, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    args = [*TINY, "--log_root", str(tmp_path)]
    run = subprocess.Popen([sys.executable, "-c", code, *args], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert select.select([run.stderr], [], [], 60)[0], "it says nothing"
        assert "waiting for all of 2 processes (WORLD_SIZE in the environment)" in run.stderr.readline()
    finally:
        run.kill()
        run.communicate()
