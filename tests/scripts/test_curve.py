import json

import pytest

from scripts import curve
from tests.conftest import SHIFT, TINY


def test_a_curve_is_drawn_while_training_goes_on(tmp_path, capfd):
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
    # Started again it trains no more, and the row of the same epoch takes the place of the old one.
    assert not curve.main(args)
    assert len(table.read_text().splitlines()) == 2
    capfd.readouterr()


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
