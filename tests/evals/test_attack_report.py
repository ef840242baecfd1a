"""What `eval.py --mode attack` prints and writes, of a small network that was trained for it."""

import csv
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluate
import evals.attack as module
import train
from common.files import save_tensors
from evals.attack_report import attack_lines, draw_curve
from evals.result import Result
from tests.conftest import TINY

DIGITS = TINY[:-2]
QUICK = ["--attack_images", "40", "--attack_steps", "4", "--epsilon", "0.1"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Short runs: `plain`, and `ra`, one with reverse attention on attacked images."""
    logs = tmp_path_factory.mktemp("logs")
    for suffix, mode in {
        "plain": "--mode supervised --epochs 8".split(),
        "ra": "--mode adv_pgd --epochs 2 --ra --num_steps 1 --epsilon 0.05".split(),
    }.items():
        args = [*DIGITS, *mode, "--suffix", suffix, "--log_root", str(logs), "--device", "cpu"]
        assert train.main(args) == 0
        (folder,) = logs.glob(f"*_{suffix}")
        folder.rename(logs / suffix)
    return logs


@pytest.fixture
def run(logs, tmp_path, capsys):
    """Evaluate a copy of a run: its folder, the exit code, and what was printed."""

    def evaluated(name, *flags):
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(logs / name, folder)
        capsys.readouterr()
        code = evaluate.main(["--mode", "attack", "--load_path", str(folder), *flags])
        out, err = capsys.readouterr()
        return folder, code, out, err

    return evaluated


def written(folder):
    return {path.name for path in folder.iterdir() if "attack" in path.name}


def test_the_files_and_the_table_say_the_same(run):
    names = ["fgsm", "apgd_ce", "margins", "curve"]
    more = ["--epsilons", "0", "0.05", "8/255", "1", "--save_score"]
    folder, code, out, _ = run("plain", *QUICK, "--attacks", *names, *more)
    assert code == 0 and written(folder) == {"result_attack.json", "attack.png", "images_attack_digits.csv"}
    found = json.loads((folder / "result_attack.json").read_text())
    rows = list(csv.DictReader((folder / "images_attack_digits.csv").open()))
    assert len(rows) == found["n"] == 40 and found["images"] == {"digits": "images_attack_digits.csv"}
    right = {name: np.array([row[name] == row["label"] for row in rows]) for name in ("clean", *names)}
    assert found["accuracy"] == right["clean"].mean() > 0.5
    assert found["attacked"] == {name: right[name].mean() for name in names}
    robust = np.array([row["robust"] == "True" for row in rows])
    assert found["worst_case"] == robust.mean() <= min(found["attacked"].values())
    assert np.array_equal(robust, np.logical_and.reduce(list(right.values())))
    assert found["robust_of_correct"] == pytest.approx(robust.sum() / right["clean"].sum())
    groups = {"standard": ["clean", "fgsm", "apgd_ce", "curve"], "adaptive": ["clean", "margins"]}
    assert found["worst"] == {
        group: np.logical_and.reduce([right[name] for name in names]).mean() for group, names in groups.items()
    }
    radius = np.array([float(row["radius"]) for row in rows])
    assert found["curve"] == {
        text: (radius > eps).mean() for text, eps in {"0": 0, "8/255": 8 / 255, "0.05": 0.05, "1": 1}.items()
    }
    assert list(found["curve"].values()) == sorted(found["curve"].values(), reverse=True)
    assert (found["epsilon"], found["norm"], found["precision"]) == (0.1, "linf", "float32")
    assert found["settings"]["attack_steps"] == 4 and "square_queries" not in found["settings"]
    assert found["health"] in out and {sign["name"] for sign in found["signs"]} >= {"images without gradient"}
    assert f"natural                   {100 * found['accuracy']:>6.1f}" in out
    assert f"apgd_ce       standard    {100 * found['attacked']['apgd_ce']:>6.1f}" in out
    assert f"worst case    of all      {100 * found['worst_case']:>6.1f}" in out
    with Image.open(folder / "attack.png") as picture:
        assert picture.size == (704, 484)


def test_a_run_with_reverse_attention_is_attacked_as_it_was_trained(run):
    folder, code, out, _ = run("ra", "--attack_images", "20", "--attack_steps", "2", "--square_queries", "5")
    found = json.loads((folder / "result_attack.json").read_text())
    assert code == 0 and found["epsilon"] == 0.05
    assert {"aux_0", "mask_straight", "mask_soft", "mask_held", "temperature", "apgd_t"} <= set(found["attacked"])
    assert "autoattack" not in found["attacked"] and "pgd100" not in found["attacked"] and "note" not in out
    # The same again takes the place of it, and something else does not.
    assert run("ra", "--attack_images", "20", "--attack_steps", "2", "--square_queries", "5")[1] == 0
    assert written(folder) == {"result_attack.json", "attack.png"}
    assert run("ra", "--attack_images", "20", "--attacks", "fgsm")[1] == 0
    (other,) = written(folder) - {"result_attack.json", "attack.png"}
    assert other.startswith("result_attack_") and "picture" not in json.loads((folder / other).read_text())


def test_flags_of_attacks_that_do_not_run_are_reported(run):
    _, code, out, _ = run(
        "plain", *QUICK, "--attacks", "fgsm", "--square_queries", "3", "--epsilons", "0", "--attack_targets", "2"
    )
    told = {line for line in out.splitlines() if "has no effect" in line}
    assert code == 0 and {line.split()[1] for line in told} == {
        *("--square_queries", "--epsilons", "--attack_targets", "--attack_steps")
    }


def test_images_of_another_network_are_given_to_this_one(run, logs):
    """Here to a copy of the one they were made on, which they fool."""
    folder, code, _, _ = run("plain", *QUICK, "--attacks", "fgsm", "--transfer_path", str(logs / "plain"))
    found = json.loads((folder / "result_attack.json").read_text())
    assert code == 0 and set(found["attacked"]) == {"fgsm", "transfer"}
    assert any(sign["name"].startswith("transfer") for sign in found["signs"])
    assert found["attacked"]["transfer"] < found["accuracy"] - 0.2
    assert run("ra", *QUICK, "--attacks", "fgsm", "--transfer_path", str(logs / "plain"))[1] == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--attacks", "pgd30"], "argument --attacks: invalid choice: 'pgd30'"),
        (["--attacks", "autoattack"], "--attacks autoattack: AutoAttack and Square need the package pyautoattack"),
        (["--attacks", "square"], "--attacks square: AutoAttack and Square need the package pyautoattack"),
        (["--attacks", "mask_held"], "--attacks mask_held: it is for networks with reverse attention"),
        (["--epsilon=-1/255"], "--epsilon must lie in [0, 1], got -0.0039"),
        (["--epsilon", "8/0"], "argument --epsilon: '8/0' is neither a number nor a fraction"),
        (["--epsilons", "0", "-0.1"], "--epsilons must be >= 0, got -0.1"),
        (["--attack_steps", "0"], "--attack_steps must be > 0, got 0"),
        (["--norm", "l2"], "--norm l2: the radius of training is of linf"),
        (["--one_class_idx", "3"], "--one_class_idx: --mode attack names all classes; leave it out"),
        (["--transfer_path", "nowhere"], "--transfer_path: no checkpoint at nowhere"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(flags, message, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    folder, code, _, err = run("plain", *flags)
    assert code == 2 and err.count("\n") == 1 and message in err and not written(folder)


def test_weights_without_labels_and_sources_that_do_not_fit_are_refused(run, stage1, stage2, logs, tmp_path, capsys):
    assert evaluate.main(["--mode", "attack", "--load_path", str(stage1)]) == 2
    told = capsys.readouterr().err
    assert "--load_path: " in told and "was trained by --mode simclr_CSI; --mode attack is for weights of" in told
    state = {key: value[:7] if key.startswith("linear.") else value for key, value in _state(logs / "plain").items()}
    save_tensors(tmp_path / "seven.model", state, facts={"flags": {"model": "resnet8"}})
    assert evaluate.main(["--mode", "attack", "--load_path", str(tmp_path / "seven.model"), *DIGITS]) == 2
    assert "--dataset: it has 10 classes, but" in (told := capsys.readouterr().err) and told.count("\n") == 1
    for place, text in {
        stage2 / "last.cocsr_model": "holds no classifier",
        tmp_path / "seven.model": "knows 7 classes",
        tmp_path: "no last.model in",
    }.items():
        folder, code, _, err = run("plain", "--transfer_path", str(place))
        assert code == 2 and err.startswith("error: --transfer_path: ") and text in err and not written(folder)


def _state(folder):
    return torch.load(folder / "last.model", weights_only=True)


def test_an_interrupted_run_leaves_nothing(run, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(module.ATTACKS, "pgd20", replace(module.ATTACKS["pgd20"], run=interrupted))
    folder, code, out, err = run("plain", *QUICK, "--attacks", "fgsm", "pgd20", "--save_score")
    assert code == 130 and "fgsm: " in out and "interrupted" in err and not written(folder)


# ------------------------------------------------------------------------------------------------ lines and picture


def result(**more):
    facts = {
        "n": 500,
        "norm": "l2",
        "epsilon": 0.5,
        "radii": [0, 0.25, 0.5, 55.4],
        "health": "MASKED GRADIENTS: left at an unlimited radius 3.0 %",
        "signs": [{"name": "left at an unlimited radius", "number": 0.03, "shows": True}],
        "not_measured_without": ["transfer"],
        "attacks": {
            "autoattack": {
                "group": "ensemble",
                "seconds": 61.5,
                "warnings": ["Square helped"],
                "parts": {"apgd-ce": 0.5},
            },
        },
    }
    metrics = {
        "accuracy": 0.8,
        "worst_case": 0.4,
        "worst/standard": 0.45,
        "robust_of_correct": 0.5,
        "attacked/autoattack": 0.41,
        "curve/0": 0.8,
        "curve/0.25": 0.6,
        "curve/0.5": 0.5,
        "curve/55.4": 0.03,
    }
    return Result("attack", metrics, {}, {**facts, **more})


def test_the_lines_of_a_result():
    assert list(attack_lines(result())) == [
        "natural                     80.0",
        "autoattack    ensemble      41.0       62 s",
        "worst case    standard      45.0",
        "worst case    of all        40.0",
        "of images that are right without an attack, 50.0 % are robust",
        "radius          0     0.25      0.5     55.4",
        "left         80.0     60.0     50.0      3.0",
        "autoattack, after each part: apgd-ce 50.0",
        "warning of autoattack: Square helped",
        "MASKED GRADIENTS: left at an unlimited radius 3.0 %",
        "not looked for, without attacks: transfer",
    ]


def test_the_curve_is_drawn_and_says_whether_there_is_a_sign(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles, drawn = [], []
    real = Axes.plot
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **more: titles.append(text))
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **more: drawn.append(args) or real(self, *args, **more))
    draw_curve(result(), tmp_path / "a.png")
    draw_curve(result(signs=[], health="no sign: x"), tmp_path / "b.png")
    assert titles == ["500 images, MASKED GRADIENTS", "500 images, no sign of masked gradients"]
    assert drawn[0][1].tolist() == [80, 60, 50, 3] and drawn[0][0].tolist() == [0, 1, 2, 3]
    # At epsilon 0.5, the third of the radii.
    assert drawn[1][:2] == (2.0, 45.0) and drawn[2][:2] == (2.0, 40.0)
