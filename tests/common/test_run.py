import json

import pytest
import torch

from common.errors import UserError
from common.flags import Flags
from common.run import Run, start_epoch

VALUES = {"mode": "simclr", "dataset": "digits", "data_path": "a", "epochs": 4, "lr_init": 0.1, "save_step": 10}
VALUES |= {"overwrite": False}


def run_in(folder, **changes) -> Run:
    return Run(folder, Flags({**VALUES, **changes}), weights="last.model", resume="last.resume")


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
