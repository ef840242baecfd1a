"""Names and contents of files of results."""

import json
import shutil

import numpy as np
import pytest

from evals import EVALS
from evals.report import quantile_line, table_text, write_classification, write_detection
from evals.result import Result
from evals.trained import Trained
from tests.evals.test_trained import trained_of


def test_quantiles_go_by_tens():
    assert quantile_line(np.arange(101.0)) == "0 10 20 30 40 50 60 70 80 90 100  mean 50"


def test_a_table_has_a_row_an_image_and_floats_in_full():
    columns = {"index": np.array([4, 7]), "score": np.array([0.1, 1 / 3]), "path": np.array(["a,b", "c"], dtype=object)}
    assert table_text(columns) == 'index,score,path\n4,0.1,"a,b"\n7,0.3333333333333333,c\n'
    assert table_text({"score": np.array([0.1], np.float32)}) == "score\n0.10000000149011612\n"


def test_every_condition_has_a_file_of_its_own(stage1, tmp_path, capsys):
    trained = trained_of(shutil.copytree(stage1, tmp_path / "run"))
    common = {"data": {}, "settings": {}, "n": 5, "classes": 2}
    for name, metrics in (("clean", {"accuracy": 0.9, "ece": 0.1}), ("pgd at alpha 0.1", {"accuracy": 0.25})):
        write_classification(Result(name, metrics, {}, {**common, "condition": name, "at": ""}), trained, 0.0)
    names = ("accuracy_ood_pre.json", "accuracy_ood_pre_pgd_at_alpha_0.1.json")
    clean, attacked = (json.loads((tmp_path / "run" / name).read_text()) for name in names)
    assert (clean["accuracy"], clean["ece"], attacked["accuracy"]) == (0.9, 0.1, 0.25)
    told = capsys.readouterr().out
    assert "digits, 5 test images of 2 classes: accuracy 90.0 %, expected calibration error 10.0 %\n" in told
    assert "digits, 5 test images of 2 classes (pgd at alpha 0.1): accuracy 25.0 %\n" in told


def test_results_of_a_network_in_memory_have_no_place(stage1):
    loaded = trained_of(stage1)
    live = Trained.of(loaded.net, loaded.flags, loaded.split)
    (result,) = EVALS["ood_pre"].measure(live)
    with pytest.raises(ValueError, match="no place"):
        write_detection(result, live, 0.0)
