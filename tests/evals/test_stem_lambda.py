"""--stem_lambda: another lambda of the stem in every evaluation, and the file that predicts it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import eval as evaluate
import train
from common.files import load_state_dict, save_tensors
from common.flags import build_parser, parse
from evals import EVALS
from evals.classify import linear_logits
from evals.stem_lambda import write_lines
from models.checkpoint import load_net
from models.lambda_line import LambdaLine, adaptive, fixed
from program import SPECS

DATA = "--dataset digits --image_size 8".split()
NOISE = "--noises gaussian shot --noise_protocol imagenetc --noise_levels 2 4 --lambdas 0.1 0.6 1.2".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An sdnet8 of a few epochs on digits, with held-out images, calibrated under two kinds of noise."""
    logs = tmp_path_factory.mktemp("logs")
    args = [*DATA, *"--mode supervised --model sdnet8 --epochs 3 --batch_size 64 --lr_init 0.05".split()]
    assert train.main([*args, "--log_root", str(logs)]) == 0
    (folder,) = logs.iterdir()
    assert evaluate.main([*NOISE, "--mode", "noise_lambda", "--load_path", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def accuracy(folder: Path, *flags: str) -> list[dict]:
    """The results of `test_acc` in the folder, that of these flags the last."""
    before = set(folder.glob("accuracy_test_acc*.json"))
    assert evaluate.main(["--mode", "test_acc", "--load_path", str(folder), *flags]) == 0
    new = sorted(set(folder.glob("accuracy_test_acc*.json")) - before)
    return [json.loads(path.read_text()) for path in [*sorted(before), *new]]


def by_hand(folder: Path, setting) -> float:
    from datasets import DATASETS, DataSource

    path = folder / "last.model"
    net = load_net("classifier", load_state_dict(path, flag="x"), model="sdnet8", path=path, flag="x").eval()
    test = DATASETS["digits"].load(DataSource(data_path="", image_size=8), "test", None)
    with torch.no_grad(), setting(net):
        named = linear_logits(net, test.with_channels(3).images.float() / 255).argmax(1)
    return float((named == test.labels).double().mean())


def test_a_number_is_used_recorded_and_overwrites_no_result_of_another(copy):
    plain, other, third = accuracy(copy), accuracy(copy, "--stem_lambda", "1.2"), accuracy(copy, "--stem_lambda", "0.6")
    assert (len(plain), len(other), len(third)) == (1, 2, 3)
    assert "stem_lambda" not in plain[0]["settings"] and other[0]["accuracy"] == plain[0]["accuracy"]
    assert other[1]["settings"]["stem_lambda"] == 1.2 and third[2]["settings"]["stem_lambda"] == 0.6
    assert plain[0]["accuracy"] == pytest.approx(by_hand(copy, lambda net: fixed(net, 0.1)))
    assert other[1]["accuracy"] == pytest.approx(by_hand(copy, lambda net: fixed(net, 1.2)))
    assert plain[0]["accuracy"] != other[1]["accuracy"]
    # What was there before is found again.
    assert len(accuracy(copy, "--stem_lambda", "1.2")) == 3


def test_auto_predicts_lambda_of_each_image_by_the_line_of_the_run(copy):
    edited(copy, lambda written: written["lines"]["gaussian"]["highpass"].update(a=1.0, b=0.1))
    edited(copy, lambda written: written["lines"]["shot"]["energy"].update(a=-0.005, b=1.9))
    lines = json.loads((copy / "lambda_line.json").read_text())["lines"]
    found = {accuracy(copy)[0]["accuracy"]}
    other = ["--lambda_line", "shot", "--lambda_measure", "energy"]
    for kind, measure, flags in (("gaussian", "highpass", []), ("shot", "energy", other)):
        line = lines[kind][measure]
        result = accuracy(copy, "--stem_lambda", "auto", *flags, "--ood_batch_size", "50")[-1]
        own = {"line": line, "lambda_line": kind, "lambda_measure": measure, "stem_lambda": "auto"}
        assert result["settings"] | own == result["settings"]
        assert result["accuracy"] == pytest.approx(
            by_hand(copy, lambda net, line=line: adaptive(net, LambdaLine(**line)))
        )
        found.add(result["accuracy"])
    assert len(found) == 3


def edited(folder: Path, change) -> None:
    path = folder / "lambda_line.json"
    written = json.loads(path.read_text())
    change(written)
    path.write_text(json.dumps(written))


def of_gaussian(written: dict) -> dict:
    return written["lines"]["gaussian"]["highpass"]


@pytest.mark.parametrize(
    "spoil, flags, match",
    [
        (lambda f: (f / "lambda_line.json").unlink(), [], "--stem_lambda auto: there is no "),
        (lambda f: (f / "lambda_line.json").write_text("{"), [], "lambda_line.json is corrupt"),
        (lambda f: (f / "lambda_line.json").write_text("[]"), [], "lambda_line.json is corrupt"),
        (lambda f: edited(f, lambda d: of_gaussian(d).pop("b")), [], "lambda_line.json is corrupt"),
        (lambda f: edited(f, lambda d: of_gaussian(d).update(high=-1)), [], "lambda_line.json is corrupt"),
        (lambda f: edited(f, lambda d: of_gaussian(d).update(a="x")), [], "lambda_line.json is corrupt"),
        (lambda f: edited(f, lambda d: d["lines"].update(gaussian=0.1)), [], "lambda_line.json is corrupt"),
        (lambda f: edited(f, lambda d: d["lines"]["gaussian"].pop("highpass")), [], "--lambda_measure highpass: "),
        (lambda f: edited(f, lambda d: d.update(weights_sha256="0")), [], "is of other weights than"),
        (lambda f: None, ["--lambda_line", "speckle"], "--lambda_line speckle: "),
    ],
)
def test_a_line_that_is_not_there_or_of_no_use_is_reported(spoil, flags, match, copy, capsys):
    spoil(copy)
    before = sorted(copy.iterdir())
    assert evaluate.main(["--mode", "test_acc", "--load_path", str(copy), "--stem_lambda", "auto", *flags]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and match in told and "noise_lambda" in told, told
    assert sorted(copy.iterdir()) == before


@pytest.mark.parametrize("value", ["-0.1", "nan", "inf", "much"])
def test_what_is_no_lambda_is_refused(value, copy, capsys):
    assert evaluate.main(["--mode", "test_acc", "--load_path", str(copy), "--stem_lambda", value]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "--stem_lambda: lambda must be a finite number >= 0" in told, told


def test_lines_of_other_kinds_stay_and_those_of_other_weights_go(copy):
    first = json.loads((copy / "lambda_line.json").read_text())["lines"]
    again = ["--mode", "noise_lambda", "--load_path", str(copy), *NOISE[3:]]
    assert evaluate.main([*again, "--noises", "impulse"]) == 0
    second = json.loads((copy / "lambda_line.json").read_text())["lines"]
    assert set(second) == {"gaussian", "shot", "impulse"} and second["shot"] == first["shot"]
    assert second["impulse"]["protocol"] == "imagenetc" and second["impulse"]["levels"] == [None, 0.06, 0.17]
    state = torch.load(copy / "last.model", weights_only=True)
    save_tensors(copy / "last.model", {**state, "linear.bias": state["linear.bias"] + 1}, facts={})
    assert evaluate.main([*again, *DATA, "--model", "sdnet8", "--held_out", "auto", "--noises", "shot"]) == 0
    assert set(json.loads((copy / "lambda_line.json").read_text())["lines"]) == {"shot"}


def test_the_best_weights_have_lines_of_their_own_and_out_is_where_they_go(copy, tmp_path):
    path = str(shutil.copy(copy / "last.model", copy / "best.model"))
    flags = ["--load_path", path, "--out", str(tmp_path / "out")]
    assert evaluate.main(["--mode", "noise_lambda", *flags, *NOISE]) == 0
    assert [p.name for p in (tmp_path / "out").glob("lambda_line*")] == ["lambda_line_best.json"]
    assert evaluate.main(["--mode", "test_acc", *flags, "--stem_lambda", "auto"]) == 0
    (result,) = (tmp_path / "out").glob("accuracy_*.json")
    assert json.loads(result.read_text())["settings"]["stem_lambda"] == "auto"


def test_what_noise_lambda_writes(run):
    names = {path.name for path in run.iterdir()}
    stem = "noise_lambda"
    assert {f"result_{stem}.json", f"table_{stem}.csv", f"{stem}.png", f"{stem}_lines.png", "lambda_line.json"} <= names
    result = json.loads((run / f"result_{stem}.json").read_text())
    assert result["lambda"] == pytest.approx(0.1) and result["n_calibration"] == 119
    assert set(result["test"]) == {"gaussian", "shot"} and len(result["test"]["shot"]["4"]["accuracy"]) == 3
    assert (run / f"table_{stem}.csv").read_text().count("\n") == 1 + 2 * 3
    assert result["oracle"]["gaussian"] >= result["fixed"]["gaussian"]


def test_networks_without_sparse_coding_have_no_stem_whose_lambda_could_change(tmp_path, capsys):
    args = [*DATA, *"--mode supervised --model resnet8 --epochs 1 --batch_size 64".split()]
    assert train.main([*args, "--log_root", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    capsys.readouterr()
    assert evaluate.main(["--mode", "test_acc", "--load_path", str(folder), "--stem_lambda", "0.5"]) == 0
    assert "note: --stem_lambda has no effect here" in capsys.readouterr().out
    (result,) = folder.glob("accuracy_*.json")
    assert "stem_lambda" not in json.loads(result.read_text())["settings"]
    assert evaluate.main(["--mode", "noise_lambda", "--load_path", str(folder), *NOISE]) == 2
    assert "no layer of sparse coding" in capsys.readouterr().err


def test_lines_of_other_measures_stay_and_what_is_replaced_is_said(copy, capsys):
    trained = EVALS["test_acc"].load(
        parse(["--load_path", str(copy), "--mode", "test_acc", "--dataset", "digits", "--image_size", "8", "--model",
               "sdnet8"], build_parser("x", EVALS, "test_acc", SPECS))
    )  # fmt: skip
    before = json.loads((copy / "lambda_line.json").read_text())["lines"]
    new = {**before["gaussian"]["highpass"], "a": 7.0}
    capsys.readouterr()
    write_lines(trained, {"gaussian": {"highpass": new}})
    told, after = capsys.readouterr().out, json.loads((copy / "lambda_line.json").read_text())["lines"]
    assert "had other lines of gaussian noise (highpass), which are replaced" in told
    assert after["gaussian"]["highpass"] == new and after["gaussian"]["energy"] == before["gaussian"]["energy"]
    assert after["shot"] == before["shot"]
    write_lines(trained, {"gaussian": {"highpass": new}})
    assert not capsys.readouterr().out
