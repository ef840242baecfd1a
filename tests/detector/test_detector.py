"""Scores are a picture's own, files are what they were, and nothing altered is read."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from common.errors import UserError
from detector.detector import Detector
from tests.conftest import ROOT
from tests.detector.conftest import stripes


def test_scores_do_not_depend_on_neighbours_order_workers_or_threads(fitted, pictures):
    paths = sorted((pictures / "test").glob("*/*.png"))
    found = fitted.score_samples(paths)
    order = np.random.default_rng(0).permutation(len(paths))
    assert (fitted.score_samples([paths[i] for i in order]) == found[order]).all()
    assert (fitted.score_samples(paths, workers=2) == found).all()
    assert fitted.score_samples([paths[3]])[0] == found[3]
    assert fitted.score_samples([np.asarray(Image.open(paths[3]))])[0] == found[3]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert (fitted.score_samples(paths) == found).all() and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_file_gives_the_same_scores_in_another_process_and_place(fitted, file, pictures, tmp_path):
    paths = sorted((pictures / "test").glob("*/*.png"))
    found = fitted.score_samples(paths)
    loaded = Detector.load(file)
    assert (loaded.score_samples(paths) == found).all() and loaded.threshold == fitted.threshold
    code = (
        "import sys, json; from detector.detector import Detector;"
        "print(json.dumps(Detector.load(sys.argv[1]).score_samples(sys.argv[2:]).tolist()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(file), *map(str, paths)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, check=True, text=True,
    )  # fmt: skip
    assert json.loads(run.stdout) == found.tolist()


def test_verdicts_p_values_and_selection_are_of_the_scores(fitted, pictures):
    good, holes = (sorted((pictures / "test" / name).iterdir()) for name in ("good", "hole"))
    assert (fitted.predict(holes) == -1).all() and (fitted.predict(good) == 1).sum() >= 6
    m = len(fitted.calibration)
    assert fitted.p_values(holes).tolist() == [1 / (m + 1)] * 8
    assert fitted.select([*good, *holes], 0.5)[8:].all() and not fitted.select(good, 0.01).any()


def test_heat_is_where_the_defect_is(fitted):
    heat = fitted.heatmap(stripes(200, blob=True))
    assert heat.shape == (72, 72)
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert 34 <= y < 62 and 6 <= x < 34
    assert heat[40:56, 12:28].mean() > 3 + heat[:24, 40:].mean()


def rewritten(file, target, change_tensors=lambda t: None, change_header=lambda h: None):
    with safe_open(file, "pt") as f:
        tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
        header = json.loads(f.metadata()["detector"])
    change_tensors(tensors)
    change_header(header)
    save_file(tensors, target, metadata={"detector": json.dumps(header)})
    return target


def one_bit(tensors):
    tensors["net.terms.0.weight"].view(torch.int32).bitwise_xor_(1)


def nudged(tensors):
    tensors["calibration"][0] += 1e-12


@pytest.mark.parametrize(
    "tensors, header, told",
    [
        (one_bit, lambda h: None, "altered"),
        (nudged, lambda h: None, "altered"),
        (lambda t: t.pop("calibration"), lambda h: None, "altered"),
        (lambda t: None, lambda h: h.update(false_alarms=0.3), "altered"),
        (lambda t: None, lambda h: h.update(version=3), "version 3"),
        (lambda t: None, lambda h: h.update(format="other"), "no detector"),
        (lambda t: None, lambda h: h.clear(), "no detector"),
    ],
)
def test_altered_files_are_refused_in_one_line(file, tmp_path, tensors, header, told):
    with pytest.raises(UserError, match=told) as error:
        Detector.load(rewritten(file, tmp_path / "x.detector", tensors, header))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_files_of_another_kind_are_refused(file, tmp_path, content):
    path = tmp_path / "x.detector"
    path.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match="cannot be read"):
        Detector.load(path)
    with pytest.raises(UserError, match="cannot be read .no such file"):
        Detector.load(tmp_path / "gone")


def test_nothing_executable_is_in_the_file(file):
    with safe_open(file, "pt") as f:
        assert list(f.metadata()) == ["detector"] and json.loads(f.metadata()["detector"])["format"]


def test_rows_come_in_order_and_errors_do_not_stop_them(fitted, pictures, tmp_path):
    good, hole = pictures / "test/good/000.png", pictures / "test/hole/000.png"
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    rows = list(fitted.rows([good, bad, hole], workers=2, drawn=True))
    assert [row.verdict for row in rows] == ["normal", "error", "anomaly"] and rows[1].why
    assert rows[2].heat.shape == (64, 64) and rows[2].small.shape == (64, 64, 3)
    assert rows[0].score == fitted.score_samples([good])[0]


def test_pixels_of_another_form_are_refused(fitted):
    with pytest.raises(UserError, match="uint8"):
        fitted.score_samples([np.zeros((8, 8, 3))])
    with pytest.raises(UserError, match="cannot read"):
        fitted.score_samples(["/nowhere.png"])
