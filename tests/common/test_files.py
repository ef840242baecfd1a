import errno
import fcntl
import io
import os
import pickle
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.files import (
    BUSY,
    hold,
    in_turn,
    is_whole,
    load_state_dict,
    load_tensors,
    previous,
    published_epoch,
    read_facts,
    release,
    remove_leftovers,
    save_tensors,
    write_text,
    write_whole,
)
from tests.conftest import ROOT


class Bomb:
    """A pickle that makes a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(file):
        file.write(b"half of the new")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        write_whole(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_tensors_make_the_round_trip(tmp_path):
    state = {"epoch": 3, "model": {"w": torch.randn(2, 3)}, "list": [1.5, None, "x"]}
    save_tensors(tmp_path / "a", state)
    back = load_tensors(tmp_path / "a", flag="load_path")
    assert back["epoch"] == 3 and torch.equal(back["model"]["w"], state["model"]["w"]) and back["list"] == state["list"]


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, legacy):
    path, trace = tmp_path / "bad.model", tmp_path / "trace"
    torch.save({"w": Bomb(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"--load_path: .*bad\.model.*refused"):
        load_state_dict(path, flag="load_path")
    path.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(UserError, match="--load_path"):
        load_state_dict(path, flag="load_path")
    assert not trace.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_reported(tmp_path, share, legacy):
    path = tmp_path / "a.model"
    torch.save({"w": torch.randn(50, 50)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"--resume_path: .*a\.model (is truncated|.*or is damaged)"):
        load_state_dict(path, flag="resume_path")


def test_other_kinds_of_files_are_not_taken_for_code(tmp_path):
    path = tmp_path / "a.model"
    for content in (b"xx", b"<!DOCTYPE html><html>", b"\x89PNG\r\n\x1a\n", bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a checkpoint"):
            load_state_dict(path, flag="load_path")


def test_dataparallel_prefixes_are_taken_off_and_other_contents_refused(tmp_path):
    save_tensors(tmp_path / "a", {"module.w": torch.ones(1)})
    assert list(load_state_dict(tmp_path / "a", flag="load_path")) == ["w"]
    for value in ({"epoch": 3}, [torch.ones(1)], {}):
        save_tensors(tmp_path / "b", value)
        with pytest.raises(UserError, match="not a file of network weights"):
            load_state_dict(tmp_path / "b", flag="load_path")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_state_dict(tmp_path / "absent", flag="load_path")


def test_published_epoch_admits_nothing_but_a_dict_with_an_integer(tmp_path):
    path, trace = tmp_path / "last.config", tmp_path / "trace"
    assert published_epoch(path, flag="load_path") is None
    path.write_bytes(pickle.dumps({"epoch": 1000}, protocol=pickle.HIGHEST_PROTOCOL))
    assert published_epoch(path, flag="load_path") == 1000
    for bad in (Bomb(trace), {"epoch": Bomb(trace)}, {"epoch": "1"}, {"epoch": True}, [1], {}):
        path.write_bytes(pickle.dumps(bad))
        with pytest.raises(UserError, match="refused"):
            published_epoch(path, flag="load_path")
    path.write_bytes(b"\x80")
    with pytest.raises(UserError, match="refused"):
        published_epoch(path, flag="load_path")
    assert not trace.exists()


def test_safetensors_load_too(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, path)
    assert torch.equal(load_state_dict(path, flag="load_path")["w"], torch.ones(2))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="--load_path: .*truncated"):
        load_state_dict(path, flag="load_path")
    with pytest.raises(UserError, match="--load_path: no checkpoint"):
        load_state_dict(tmp_path / "b.safetensors", flag="load_path")


def test_what_one_holds_another_waits_for_and_children_do_not_keep(tmp_path):
    handle = hold(tmp_path)
    assert handle is not None and handle >= 0 and hold(tmp_path) == BUSY
    # A child that outlives its parent's hold has dropped it.
    child = os.fork()
    if child == 0:
        time.sleep(5)
        os._exit(0)
    time.sleep(0.1)
    threading.Timer(0.3, release, [handle]).start()
    begun = time.monotonic()
    second = hold(tmp_path, wait=4)
    assert second != BUSY and 0.2 < time.monotonic() - begun < 4
    release(second)
    os.kill(child, 9)
    os.waitpid(child, 0)
    with in_turn(tmp_path / "new"):
        assert hold(tmp_path / "new") == BUSY
    third = hold(tmp_path / "new")
    assert third != BUSY
    release(third)


def test_facts_travel_with_the_tensors_and_are_sealed_with_them(tmp_path):
    path = tmp_path / "a.model"
    facts = {"epoch": 3, "data": {"class_name": "Schöner Löffel", "images": 5}}
    save_tensors(path, {"w": torch.arange(4)}, facts=facts)
    assert read_facts(path) == facts and is_whole(path)
    assert torch.equal(torch.load(path, weights_only=True)["w"], torch.arange(4))  # any program reads it
    whole = path.read_bytes()
    for place in (whole.rindex(b"epoch"), len(whole) - 3, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not is_whole(path), place
    for end in (1, 9, 40, 200):
        path.write_bytes(whole[:-end])
        assert not is_whole(path), end
    torch.save({"w": torch.ones(1)}, path)
    assert read_facts(path) == {} and read_facts(tmp_path / "absent") == {}


def test_a_checkpoint_of_the_version_before_is_still_checked(tmp_path):
    path = tmp_path / "a.model"
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(4)}, buffer)
    body, seal = buffer.getvalue()[:-2], b"admm-srnet crc32 "
    body += (len(seal) + 8).to_bytes(2, "little")
    path.write_bytes(body + seal + f"{zlib.crc32(body):08x}".encode())
    assert is_whole(path) and torch.equal(load_tensors(path, flag="load_path")["w"], torch.arange(4))
    path.write_bytes(body[:100] + b"x" + body[101:] + seal + f"{zlib.crc32(body):08x}".encode())
    assert not is_whole(path)


def test_a_file_written_without_checksums_is_no_damaged_one(tmp_path):
    path = tmp_path / "a.model"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(100)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_state_dict(path, flag="load_path")["w"], torch.arange(100))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="truncated"):
        load_state_dict(path, flag="load_path")


def test_what_a_killed_process_was_writing_goes_and_what_is_being_written_stays(tmp_path):
    code = (
        "import os, sys, pathlib; from common.files import write_whole\n"
        "def write(file):\n"
        "    file.write(bytes(1000)); file.flush(); print('there', flush=True); sys.stdin.read()\n"
        "write_whole(pathlib.Path(sys.argv[1]), write)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "last.model"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as writing:
        assert killed.stdout.readline() == writing.stdout.readline() == b"there\n"
        killed.kill()
        killed.wait()
        (tmp_path / "last.model").write_bytes(b"the one before")
        assert len(list(tmp_path.glob(".last.model.*.tmp"))) == 2
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.glob(".last.model.*.tmp"))) == 1
        writing.communicate()
    assert writing.returncode == 0 and (tmp_path / "last.model").read_bytes() == bytes(1000)
    assert os.listdir(tmp_path) == ["last.model"]


def test_a_kill_between_keeping_the_old_file_and_the_new_one_leaves_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "last.model"
    for step in range(2):
        save_tensors(path, {"w": torch.tensor(step)}, keep=True)
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: real(a, b) if Path(b) != path else (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        save_tensors(path, {"w": torch.tensor(2)}, keep=True)
    assert path.samefile(previous(path))
    monkeypatch.undo()
    for step in (3, 4):
        save_tensors(path, {"w": torch.tensor(step)}, keep=True)
    assert sorted(os.listdir(tmp_path)) == ["last.model", "previous.model"]
    assert [int(torch.load(p, weights_only=True)["w"]) for p in (path, previous(path))] == [4, 3]


@pytest.mark.parametrize("mask, mode", [(0o002, 0o664), (0o077, 0o600), (0o022, 0o644)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_locks_are_asked_for_as_nfs_gives_them_and_their_absence_is_reported(tmp_path, monkeypatch, capsys):
    """NFS makes an exclusive flock a lock of bytes, for which a handle must be open for writing."""
    real = fcntl.flock

    def of_nfs(handle, operation):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    (tmp_path / "log").touch()
    for place in (tmp_path, tmp_path / "log"):
        handle = hold(place)
        assert handle is not None and handle >= 0 and hold(place) == BUSY
        release(handle)
    assert capsys.readouterr().out == ""

    def without(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    assert hold(tmp_path) is None and hold(tmp_path) is None
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and str(tmp_path) in told and "No locks available" in told


def test_weights_that_may_not_be_read_are_not_called_truncated(tmp_path, monkeypatch):
    path = tmp_path / "a.model"
    save_tensors(path, {"w": torch.ones(1)})
    real = Path.open

    def refused(self, *args, **kwargs):
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"--load_path: .*a\.model cannot be read \(Permission denied\)"):
        load_tensors(path, flag="load_path")


def test_text_that_is_no_utf8_is_escaped(tmp_path):
    write_text(tmp_path / "a.csv", f"path\n{os.fsdecode(b'b' + bytes([0xFF]))}.png\n")
    assert (tmp_path / "a.csv").read_text() == "path\nb\\udcff.png\n"
