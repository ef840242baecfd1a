import json

import pytest
import torch

import eval as evaluate
import train
from scripts import curve
from tests.conftest import SHIFT, TINY

LOOK = "--mode ood_pre_refmix --ood_score CSI knn --ood_samples 2 --resize_factor 0.54 --resize_fix"


def arguments(logs, *own: str, every: str = "9", epochs: int = 4) -> list[str]:
    flags = ["--", *TINY, *SHIFT, "--log_root", str(logs)]
    train = f"--mode simclr_CSI --epochs {epochs} --save_step 1"
    return ["--every", every, *own, "--train", train, "--evaluate", LOOK, *flags]


def test_a_network_is_evaluated_while_it_trains_and_is_not_disturbed(tmp_path, capsys):
    assert not curve.main(arguments(tmp_path / "watched", every="1e-6"))
    (folder,) = (tmp_path / "watched").iterdir()
    rows = curve.read_rows(folder / "curve.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    # The same weights, bit for bit, as of a run that nobody looks at.
    args = [*TINY, *SHIFT, "--mode", "simclr_CSI", "--epochs", "4", "--save_step", "1"]
    assert train.main([*args, "--log_root", str(tmp_path / "alone")]) == 0
    (alone,) = (tmp_path / "alone").iterdir()
    a, b = (torch.load(place / "last.model", weights_only=True) for place in (folder, alone))
    assert all(torch.equal(a[key], b[key]) for key in a)
    # And the numbers of eval.py, of the last epoch.
    assert evaluate.main([*LOOK.split(), "--load_path", str(alone)]) == 0
    for score in ("CSI", "knn"):
        result = json.loads((alone / f"result_ood_pre_refmix_{score}.json").read_text())
        assert rows[-1][score] == pytest.approx(100 * result["mean"], abs=1e-3)
    recorded = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert recorded["auroc/CSI"] == rows[-1]["CSI"]


def test_a_limit_ends_training_and_a_later_start_goes_on(tmp_path, capsys):
    assert not curve.main(arguments(tmp_path, "--limit", "1e-4", every="1e-6"))
    (folder,) = tmp_path.iterdir()
    first = curve.read_rows(folder / "curve.csv")
    assert len(first) < 4 and "asked to stop" not in capsys.readouterr().err
    assert not curve.main(arguments(tmp_path))
    rows = curve.read_rows(folder / "curve.csv")
    assert rows[: len(first)] == first and rows[-1]["epoch"] == 4 and rows[-1]["minutes"] > first[-1]["minutes"]
    # A run that is finished without a curve is evaluated as it is.
    (folder / "curve.csv").unlink()
    assert not curve.main(arguments(tmp_path))
    (last,) = curve.read_rows(folder / "curve.csv")
    assert (last["epoch"], last["CSI"]) == (4, rows[-1]["CSI"])


def test_an_exact_autoencoder_is_looked_at_while_it_trains(tmp_path):
    """It has no parameters, by which to tell its device."""
    network = "--mode rdae --autoencoder svd --layers 5 --rounds 2 --eps 0"
    args = ["--every", "1e-6", "--train", network, "--evaluate", "--mode ood_reconstruction", "--"]
    more = ["--dataset", "digits", "--one_class_idx", "3", "--device", "cpu", "--log_root", str(tmp_path)]
    assert not curve.main([*args, *more])
    (folder,) = tmp_path.iterdir()
    rows = curve.read_rows(folder / "curve.csv")
    assert [row["epoch"] for row in rows] == [1, 2] and rows[-1]["reconstruction"] > 90


def test_a_score_that_is_added_later_has_a_column_and_blanks_before(tmp_path, monkeypatch, capsys):
    for epoch, found in ((3, {"CSI": 90.0}), (6, {"CSI": 91.0, "knn": 80.0}), (9, {"knn": 82.0})):
        drawing = curve.Curve(tmp_path, [], 5, 100)
        drawing.add({"epoch": epoch, "minutes": 1.0 * epoch, **found})
    header, *rows = [line.split(",") for line in (tmp_path / "curve.csv").read_text().splitlines()]
    assert header == ["epoch", "minutes", "CSI", "knn"]
    assert [[row[0], *row[2:]] for row in rows] == [["3.0", "90.0", ""], ["6.0", "91.0", "80.0"], ["9", "", "82.0"]]
    lines = drawn(tmp_path, curve.read_rows(tmp_path / "curve.csv"), monkeypatch)
    assert lines == {"CSI": [(3, 90), (6, 91)], "knn": [(6, 80), (9, 82)]}


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


def test_a_file_that_is_no_curve_is_reported(tmp_path, capsys):
    folder = tmp_path / "digits_resnet8_unsup_simclr_CSI_shift_rot_bmix_one_class_3"
    folder.mkdir()
    (folder / "curve.csv").write_text("epoch,minutes\nthree,1\n")
    assert curve.main(arguments(tmp_path)) == 2
    errors = capsys.readouterr().err
    assert "curve.csv is no curve" in errors and errors.count("\n") == 1


def test_flags_that_training_or_evaluation_refuses(tmp_path, capsys):
    assert curve.main(["--every", "0", "--", *TINY]) == 2
    assert curve.main(["--train", "--batch_size -1", "--", *TINY]) == 2
    assert curve.main(["--evaluate", "--mode test_acc", "--", *TINY, "--log_root", str(tmp_path)]) == 2
    assert "--evaluate" in capsys.readouterr().err and not list(tmp_path.iterdir())
