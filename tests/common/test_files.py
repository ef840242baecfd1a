import os
import pickle
import threading
import time

import pytest
import torch

from common.errors import UserError
from common.files import (
    BUSY,
    hold,
    in_turn,
    load_state_dict,
    load_tensors,
    published_epoch,
    release,
    save_tensors,
    write_text,
    write_whole,
)


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
def test_truncated_files_are_told(tmp_path, share, legacy):
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
