"""What is on disk when the power fails, and who may write: synchronisation, full disks, other processes, damage."""

import errno
import os
from pathlib import Path

import pytest
import torch

from common.errors import RunStopped, Terminated, UserError, command
from common.files import BUSY, disk_errors, hold, is_whole, load_tensors, previous, release, save_tensors, write_whole
from tests.common.test_run import run_in


@pytest.fixture
def begun(tmp_path) -> Path:
    """A run folder that stands at epoch 2 of 4."""
    run = run_in(tmp_path / "run")
    run.open()
    run.save({"w": torch.ones(2)}, {"epoch": 2})
    run.close()
    return tmp_path / "run"


@pytest.fixture
def events(monkeypatch) -> list[tuple]:
    """Synchronisations (inode, bytes) and renames (inode, new name), in order."""
    seen: list[tuple] = []
    sync, replace = os.fsync, os.replace

    def watched_sync(handle):
        handle = handle if isinstance(handle, int) else handle.fileno()
        found = os.fstat(handle)
        seen.append(("sync", found.st_ino, found.st_size))
        return sync(handle)

    def watched_replace(source, target, **settings):
        seen.append(("rename", os.stat(source).st_ino, os.fspath(target)))
        return replace(source, target, **settings)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    return seen


@pytest.mark.parametrize("there", [False, True])
def test_a_file_is_on_disk_before_it_gets_its_name_and_its_name_before_the_write_is_over(there, tmp_path, events):
    path, keep = tmp_path / "a.model", tmp_path / "before.model"
    if there:
        path.write_bytes(b"old")
    write_whole(path, lambda file: file.write(b"new" * 1000), keep=keep)
    inode = path.stat().st_ino
    written = events.index(("sync", inode, 3000))
    named = events.index(("rename", inode, str(path)))
    folder = [n for n, event in enumerate(events) if event[:2] == ("sync", tmp_path.stat().st_ino)]
    assert written < named < folder[-1]
    assert path.read_bytes() == b"new" * 1000 and (keep.read_bytes() == b"old" if there else not keep.exists())


def test_the_checkpoint_before_is_kept_whole(tmp_path):
    path = tmp_path / "last.resume"
    for epoch in (1, 2, 3):
        save_tensors(path, {"epoch": epoch}, keep=True)
    assert load_tensors(path, flag="x")["epoch"] == 3 and load_tensors(previous(path), flag="x")["epoch"] == 2


def test_any_byte_of_a_checkpoint_that_changes_is_reported(tmp_path):
    path = tmp_path / "last.model"
    save_tensors(path, {"w": torch.arange(50.0)})
    whole = path.read_bytes()
    assert is_whole(path)
    for at in range(0, len(whole), 41):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"--load_path: .*last\.model"):
            load_tensors(path, flag="load_path")


@pytest.mark.parametrize("number, full", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_a_full_disk_or_quota_ends_the_run_and_other_errors_stay_what_they_are(number, full, tmp_path):
    with pytest.raises(RunStopped if full else OSError) as told, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert not full or (str(tmp_path) in str(told.value) and "start the same command again" in str(told.value))


@pytest.mark.parametrize(
    "error, code",
    [(UserError("--x"), 2), (RunStopped("no"), 1), (Terminated("saved"), 143), (KeyboardInterrupt(), 130), (None, 0)],
)
def test_exit_codes_say_how_a_command_ended(error, code, capsys):
    @command
    def main(argv):
        if error is not None:
            raise error

    assert main([]) == code and capsys.readouterr().err.count("\n") == (error is not None)


# --------------------------------------------------------------------------------------------------- run folders


def test_a_run_that_another_process_took_further_meanwhile_is_left_alone(begun):
    """Two starts look at one folder; the first trains and ends before the second opens it."""
    late = run_in(begun)
    first = run_in(begun)
    first.open()
    first.save({"w": torch.zeros(2)}, {"epoch": 3})
    first.close()
    with pytest.raises(UserError, match="--log_root: another process went on"):
        late.open()
    late.close()
    again = run_in(begun)
    assert again.state == {"epoch": 3}
    again.open()
    again.close()


def test_a_folder_in_which_another_process_is_at_work_is_refused(begun, monkeypatch):
    import common.run as module

    monkeypatch.setattr(module, "_PATIENCE_S", 0.1)
    run = run_in(begun)
    handle = hold(begun)
    assert handle not in (None, BUSY)
    with pytest.raises(UserError, match="--log_root: another process is at work"):
        run.open()
    release(handle)
    run.open()
    run.close()


def test_a_damaged_checkpoint_gives_way_to_the_one_before_for_good(begun, capsys):
    run = run_in(begun)
    run.open()
    run.save({"w": torch.zeros(2)}, {"epoch": 3})
    run.close()
    path = begun / "last.resume"
    path.write_bytes(path.read_bytes()[:-9])
    run = run_in(begun)
    assert run.state == {"epoch": 2} and "going on from previous.resume" in capsys.readouterr().out
    run.open()  # and is killed before it saves
    run.close()
    assert load_tensors(path, flag="x") == {"epoch": 2} and run_in(begun).state == {"epoch": 2}


@pytest.mark.parametrize("changed", [{"epochs": 5}, {"mode": "simclr_CSI"}, {"dataset": "mnist"}, {"seed": 1}])
def test_every_flag_that_was_read_belongs_to_the_configuration(changed, tmp_path):
    name, value = next(iter(changed.items()))
    first = run_in(tmp_path / "run", seed=0)
    assert first.flags.seed == 0  # it has been read
    first.open()
    first.close()
    with pytest.raises(UserError, match=f"--{name} was .*, is {value}"):
        run_in(tmp_path / "run", **{"seed": 0, **changed})
