"""The subcommands as a user runs them: exit codes, files, one-line errors."""

import csv
import json
import os

import numpy as np
import pytest
from PIL import Image

import detect
from detector.detector import Detector
from tests.detector.conftest import BACKBONE, stripes


def test_from_a_folder_to_verdicts(pictures, backbone_file, tmp_path, capsys):
    out = tmp_path / "new" / "parts.detector"
    flags = ["--backbone", BACKBONE, "--weights", str(backbone_file), "--image_size", "64", "--hold_out", "0.4"]
    assert detect.main(["fit", str(pictures), "--out", str(out), *flags]) == 0
    told = capsys.readouterr().out
    assert "train/good only" in told and "needs 299 pictures held out, here are 16" in told
    assert (out.parent / "parts.html").read_text().startswith("<!DOCTYPE html>")
    good, holes = str(pictures / "test/good/000.png"), str(pictures / "test/hole")
    assert detect.main(["score", str(out), good]) == 0
    assert capsys.readouterr().out.startswith("normal   score")
    assert detect.main(["score", str(out), good, holes, "--fdr", "0.5", "--num_worker", "1"]) == 1
    told = capsys.readouterr().out
    assert "1 normal, 8 anomalous, 0 unreadable" in told and "--fdr 0.5: 8 pictures" in told
    assert detect.main(["test", str(out), str(pictures), "--json", str(tmp_path / "x.json")]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["auroc"] > 0.95
    capsys.readouterr()
    assert detect.main(["show", str(out)]) == 0
    told = capsys.readouterr().out
    assert "40 pictures of" in told and "limits:" in told and "checksum" in told and BACKBONE in told


def test_odd_names_survive_in_every_output(file, tmp_path, capsys):
    names = [
        "=cmd.png",
        'a,"b".png',
        "new\nline.png",
        "<script>alert(1)</script>.png".replace("/", "_"),
        "ä 🦜.png",
        "-x.png",
    ]
    for name in [*names, os.fsdecode(b"\xff.png")]:
        Image.fromarray(stripes(1)).save(tmp_path / name)
    table, page, heat = tmp_path / "out" / "t.csv", tmp_path / "out" / "r.html", tmp_path / "out" / "heat"
    argv = ["score", str(file), str(tmp_path), "--csv", str(table), "--report", str(page), "--heatmaps", str(heat)]
    assert detect.main([*argv, "--json"]) in (0, 1)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    rows = list(csv.DictReader(table.open(newline="")))
    assert len(rows) == len(printed) == 7 and {row["path"] for row in rows} == {row["path"] for row in printed}
    found = {os.path.basename(row["path"]) for row in rows}
    assert set(names) <= found and "\\xff.png" in found
    assert "<script>alert" not in page.read_text() and len(list(heat.iterdir())) == 7
    assert np.asarray(Image.open(next(heat.iterdir()))).shape == (64, 64, 3)


def test_names_that_are_formulas_are_no_formulas_in_a_table(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(stripes(1)).save("=1+1.png")
    assert detect.main(["score", str(file), "=1+1.png", "--csv", "t.csv"]) in (0, 1)
    assert next(csv.DictReader(open("t.csv")))["path"] == "'=1+1.png"


def test_a_threshold_by_known_defects_promises_nothing(pictures, backbone_file, tmp_path, capsys):
    out = tmp_path / "parts.detector"
    flags = ["--backbone", BACKBONE, "--weights", str(backbone_file), "--image_size", "64", "--num_worker", "1"]
    assert detect.main(["fit", str(pictures), "--out", str(out), *flags, "--calibrate_on", str(pictures)]) == 0
    assert "set by 8 known defects, of which it finds 100 %" in capsys.readouterr().out
    found = Detector.load(out)
    good, holes = (found.score_samples(sorted((pictures / "test" / n).iterdir())) for n in ("good", "hole"))
    assert holes.max() < found.threshold.value < good.min()
    assert detect.main(["fit", str(pictures), "--out", str(out), *flags, "--calibrate_on", str(tmp_path)]) == 2
    assert "--calibrate_on: " in capsys.readouterr().err


def test_errors_are_rows_and_the_exit_code(file, pictures, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    assert (
        detect.main(["score", str(file), str(bad), str(pictures / "test/hole"), "--csv", str(tmp_path / "t.csv")]) == 2
    )
    told = capsys.readouterr().out
    assert "error " in told and "8 anomalous, 1 unreadable" in told
    first = next(csv.DictReader((tmp_path / "t.csv").open()))
    assert first["verdict"] == "error" and first["score"] == "" and "empty" in first["error"]


def test_other_pictures_are_noticed(file, tmp_path, capsys):
    for i in range(60):
        Image.fromarray(255 - stripes(i) // 2).save(tmp_path / f"{i}.png")
    detect.main(["score", str(file), str(tmp_path)])
    assert "not like those" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, told",
    [
        ([], "arguments are required"),
        (["fit", "/nowhere"], "DIR: no folder and no file /nowhere"),
        (["score", "FILE", "/nowhere"], "PATH: no file"),
        (["score", "/nowhere", "x"], "/nowhere: cannot be read (no such file)"),
        (["test", "FILE", "/tmp"], "a folder good"),
        (["export", "FILE"], "--onnx"),
        (["fit", "DIR", "--false_alarms", "2"], "--false_alarms must lie in"),
        (["fit", "DIR", "--method", "other"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(file, pictures, argv, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [{"FILE": str(file), "DIR": str(pictures)}.get(word, word) for word in argv]
    assert detect.main(argv) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_interrupted_table_is_not_there(file, pictures, tmp_path, monkeypatch):
    def interrupted(self, *args, **more):
        yield next(iter(rows(self, *args, **more)))
        raise KeyboardInterrupt

    rows = Detector.rows
    monkeypatch.setattr(Detector, "rows", interrupted)
    assert detect.main(["score", str(file), str(pictures / "test"), "--csv", str(tmp_path / "t.csv")]) == 130
    assert not list(tmp_path.iterdir())
