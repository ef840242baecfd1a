import json
import os

import pytest
import torch

from common.errors import UserError
from common.flags import FlagInfo, Flags
from common.run import Run, launch_id, start_epoch

VALUES = {"mode": "simclr", "dataset": "digits", "data_path": "a", "epochs": 4, "lr_init": 0.1, "save_step": 10}
VALUES |= {"overwrite": False, "ood_samples": 1, "device": "auto", "model": "resnet8"}
USED = ("mode", "dataset", "data_path", "epochs", "lr_init", "save_step", "device")


def run_in(folder, **changes) -> Run:
    flags = Flags({**VALUES, **changes})
    flags.read(USED)
    replace = flags.as_dict()["overwrite"]
    return Run(folder, flags, weights="last.model", resume="last.resume", replace=replace)


@pytest.fixture
def half_done(tmp_path):
    run = run_in(tmp_path / "run")
    run.open()
    run.save({"w": torch.ones(2)}, {"epoch": 2})
    run.close()
    return tmp_path / "run"


def test_looking_changes_nothing(tmp_path):
    run = run_in(tmp_path / "run")
    assert run.state is None and not run.finished and not (tmp_path / "run").exists()


def test_an_unfinished_run_goes_on_and_a_finished_one_is_left_alone(half_done):
    again = run_in(half_done, save_step=3, data_path="moved")
    assert again.state == {"epoch": 2} and not again.finished
    again.open()
    again.save({"w": torch.ones(2)}, {"epoch": 4})
    assert run_in(half_done).finished


def test_another_configuration_is_refused_and_overwrite_replaces_it(half_done):
    with pytest.raises(UserError, match="--lr_init was 0.1, is 0.2.*--overwrite"):
        run_in(half_done, lr_init=0.2)
    new = run_in(half_done, lr_init=0.2, overwrite=True)
    assert new.state is None and (half_done / "last.model").exists()  # nothing is lost until the run opens
    new.open()
    assert not (half_done / "last.model").exists()
    assert json.loads((half_done / "args.json").read_text())["flags"]["lr_init"] == 0.2


def test_a_flag_that_an_older_version_did_not_have_counts_as_its_default(half_done):
    def with_new(value):
        flags = Flags({**VALUES, "copies": value}, given=["copies"], infos={"copies": FlagInfo(2, "", int)})
        flags.read((*USED, "copies"))
        return Run(half_done, flags, weights="last.model", resume="last.resume")

    with pytest.raises(UserError, match="--copies was 2, is 3"):
        with_new(3)
    assert with_new(2).state == {"epoch": 2}


def test_overwrite_has_its_effect_once_however_often_the_launcher_starts_the_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "476e83b0-e7d4-49aa-b2e0-dc9ff1e4f088")
    run = run_in(tmp_path / "run", overwrite=True)
    run.open()
    run.save({"w": torch.ones(2)}, {"epoch": 2})
    run.close()
    assert run_in(tmp_path / "run", overwrite=True).state == {"epoch": 2}
    assert "it goes on" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "576e83b0-e7d4-49aa-b2e0-dc9ff1e4f088")
    assert run_in(tmp_path / "run", overwrite=True).state is None
    # An id that the user chose stays the same from launch to launch; the launcher's process does not.
    assert launch_id({"TORCHELASTIC_RUN_ID": "run1"}) == f"run1 {os.getppid()}" and launch_id({}) is None


def test_flags_that_the_run_did_not_read_may_change_and_another_device_is_reported(half_done, capsys):
    assert run_in(half_done, ood_samples=10, device="cpu").state == {"epoch": 2}
    assert "--device was auto" in capsys.readouterr().out


def test_a_kill_between_the_two_files_of_a_save_never_leaves_old_weights_in_a_finished_run(half_done, monkeypatch):
    import common.run as module

    run, real, calls = run_in(half_done), module.save_tensors, []
    run.open()

    def killed(path, state, *, facts, keep):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, state, facts=facts, keep=keep)

    monkeypatch.setattr(module, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save({"w": torch.zeros(2)}, {"epoch": 4})
    assert calls == ["last.model", "last.resume"] and not run_in(half_done).finished


def test_rows_after_the_checkpoint_and_torn_rows_are_made_again(half_done):
    rows = [json.dumps({"epoch": e}) for e in (1, 2, 3)]
    (half_done / "metrics.jsonl").write_text("\n".join([*rows, '{"epo']))
    run = run_in(half_done)
    run.open()
    run.record(3, {"a": 1.0})
    run.close()
    assert [json.loads(r)["epoch"] for r in (half_done / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_place_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--log_root"):
        run_in(tmp_path / "file" / "run").open()
    with pytest.raises(UserError, match="--log_root"):
        run_in(tmp_path / "file")


def test_only_for_folders_does_the_path_say_which_data_it_is(tmp_path):
    run_in(tmp_path / "run", dataset="folder").open()
    with pytest.raises(UserError, match="--data_path"):
        run_in(tmp_path / "run", dataset="folder", data_path="b")


def test_a_folder_of_something_else_is_never_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no run folder"):
            run_in(tmp_path / "run", overwrite=overwrite)
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_metrics_and_log_are_written(half_done):
    run = run_in(half_done)
    run.open()
    run.say("hello")
    run.record(3, {"train/loss_sim": 0.5})
    run.close()
    assert "hello" in (half_done / "log.txt").read_text()
    assert json.loads((half_done / "metrics.jsonl").read_text()) == {"epoch": 3, "train/loss_sim": 0.5}
    assert list(half_done.glob("events.out.tfevents*"))


def test_epoch_of_weights_comes_from_the_run_or_a_published_config_or_is_0_and_said(half_done, tmp_path, capsys):
    import pickle

    assert start_epoch(half_done / "last.model") == 2
    (tmp_path / "last.config").write_bytes(pickle.dumps({"epoch": 1000}))
    assert start_epoch(tmp_path / "last.model") == 1000
    (tmp_path / "bare").mkdir()
    assert start_epoch(tmp_path / "bare" / "last.model") == 0
    assert "counting on from 0" in capsys.readouterr().out
