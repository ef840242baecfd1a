import contextlib
import io
import json
import subprocess
from types import SimpleNamespace

import pytest

import eval as evaluate
import train
from scripts import curve
from tests.conftest import SHIFT, TINY


def test_a_curve_is_drawn_while_training_goes_on(tmp_path, monkeypatch, capfd):
    flags = [*TINY, *SHIFT, "--log_root", str(tmp_path)]
    look = "--mode ood_pre_refmix --ood_score CSI --ood_samples 2 --resize_factor 0.54 --resize_fix"
    args = ["--every", "9", "--train", "--mode simclr_CSI --epochs 4", "--evaluate", look, "--", *flags]
    assert not curve.main(args)
    (table,) = tmp_path.glob("*/curve.csv")
    header, row = table.read_text().splitlines()
    result = json.loads(table.with_name("result_ood_pre_refmix_CSI.json").read_text())
    assert header == "epoch,minutes,CSI" and row.startswith("4,")
    assert float(row.split(",")[2]) == pytest.approx(100 * result["mean"], abs=1e-3)
    assert table.with_name("curve.png").read_bytes().startswith(b"\x89PNG")
    # Started again (in this process) it trains no more, and the row of the same epoch takes the place of the old one.
    monkeypatch.setattr(curve, "subprocess", SimpleNamespace(run=in_process, PIPE=subprocess.PIPE))
    monkeypatch.setattr(curve, "train_for", lambda flags, seconds: train.main(flags) == 0)
    written = table.stat().st_mtime_ns
    assert not curve.main(args)
    assert len(table.read_text().splitlines()) == 2 and table.stat().st_mtime_ns > written
    capfd.readouterr()


def in_process(words, **settings) -> subprocess.CompletedProcess:
    """A script of the project without a process of its own."""
    script = {"train.py": train.main, "eval.py": evaluate.main}[words[1]]
    with contextlib.redirect_stdout(io.StringIO()) as told:
        code = script(words[2:])
    return subprocess.CompletedProcess(words, code, told.getvalue())


def test_training_is_stopped_evaluated_and_goes_on(tmp_path, monkeypatch, capsys):
    epochs, seen = iter([3, 3, 7, 9]), []
    ends = iter([False, False, False, True])
    monkeypatch.setattr(curve, "run_folder", lambda flags: tmp_path)
    monkeypatch.setattr(curve, "train_for", lambda flags, seconds: seen.append(seconds) or next(ends))
    monkeypatch.setattr(curve, "evaluate", lambda flags, folder: {"epoch": next(epochs), "CSI": 90.0 + len(seen)})
    assert not curve.main(["--every", "2", "--", "--mode", "simclr_CSI"])
    rows = curve.read_rows(tmp_path / "curve.csv")
    assert [(row["epoch"], row["CSI"]) for row in rows] == [(3, 92), (7, 93), (9, 94)]
    assert seen == [120.0] * 4


def test_a_score_that_is_added_later_has_a_column_and_blanks_before(tmp_path, monkeypatch, capsys):
    found = iter([{"CSI": 90.0}, {"CSI": 91.0, "knn": 80.0}, {"knn": 82.0}])
    epochs = iter([3, 6, 9])
    monkeypatch.setattr(curve, "run_folder", lambda flags: tmp_path)
    monkeypatch.setattr(curve, "train_for", lambda flags, seconds: True)
    monkeypatch.setattr(curve, "evaluate", lambda flags, folder: {"epoch": next(epochs), **next(found)})
    for _ in range(3):  # each reads what the one before it has written
        assert not curve.main(["--", "--mode", "simclr_CSI"])
    header, *rows = [line.split(",") for line in (tmp_path / "curve.csv").read_text().splitlines()]
    assert header == ["epoch", "minutes", "CSI", "knn"]
    assert [[row[0], *row[2:]] for row in rows] == [["3.0", "90.0", ""], ["6.0", "91.0", "80.0"], ["9", "", "82.0"]]
    lines = drawn(tmp_path, curve.read_rows(tmp_path / "curve.csv"), monkeypatch)
    assert lines == {"CSI": [(3, 90), (6, 91)], "knn": [(6, 80), (9, 82)]}
    capsys.readouterr()


def drawn(tmp_path, rows, monkeypatch) -> dict:
    """The points of each line of the picture, by its label."""
    from matplotlib.axes import Axes

    found, plot = {}, Axes.plot

    def look(self, x, y, *more, label):
        found[label] = list(zip(x, y, strict=True))
        return plot(self, x, y, *more, label=label)

    monkeypatch.setattr(Axes, "plot", look)
    curve.draw(tmp_path / "curve.png", rows, "title")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    return found


def test_a_file_that_is_no_curve_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "curve.csv").write_text("epoch,minutes\nthree,1\n")
    monkeypatch.setattr(curve, "run_folder", lambda flags: tmp_path)
    assert curve.main(["--", "--mode", "simclr_CSI"]) == 2
    errors = capsys.readouterr().err
    assert "curve.csv is no curve" in errors and errors.count("\n") == 1


def test_flags_that_training_refuses_and_training_that_fails(tmp_path, capfd):
    assert curve.main(["--every", "0", "--", *TINY]) == 2
    with pytest.raises(curve.RunStopped, match="exit code 2"):
        curve.train_for([*TINY, "--batch_size", "-1", "--log_root", str(tmp_path)], 100)
    with pytest.raises(curve.UserError, match="--train"):
        curve.run_folder([*TINY, "--batch_size", "-1"])
    capfd.readouterr()


@pytest.mark.parametrize("saves", [True, False])
def test_a_turn_ends_with_a_signal_that_training_has_to_be_ready_for(saves, tmp_path, monkeypatch):
    ready = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));" if saves else ""
    (tmp_path / "train.py").write_text(f"import signal, sys, time; {ready} time.sleep(60)")
    monkeypatch.setattr(curve, "ROOT", tmp_path)
    if saves:
        assert curve.train_for([], 4) is False
        return
    with pytest.raises(curve.RunStopped, match="--every"):
        curve.train_for([], 1)


@pytest.mark.parametrize("code", [129, 130, 138])
def test_training_that_another_has_asked_to_stop_ends_the_curve(code, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(f"import sys; sys.exit({code})")
    monkeypatch.setattr(curve, "ROOT", tmp_path)
    with pytest.raises(curve.RunStopped, match=f"exit code {code}"):
        curve.train_for([], 30)
