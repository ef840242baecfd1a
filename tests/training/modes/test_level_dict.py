"""Stage 2 at several depths: what it refuses, and how terms get their weights."""

import math
from types import SimpleNamespace

import pytest
import torch

import eval as evaluate
import train
import train_cocsr
from common.files import load_tensors
from models.level_net import NEIGHBOURS, TRANSFORMATIONS, Reading, Transformations
from tests.conftest import TINY
from training.modes import level_dict
from training.modes.level_dict import calibrate, held_out_facts, turn

UNITS = ("means", "deviations", "weights")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of Rot+Trans on digits with images set aside."""
    logs = tmp_path_factory.mktemp("logs")
    args = [*TINY, "--mode", "rot_trans", "--epochs", "1", "--held_out", "12", "--log_root", str(logs)]
    assert train.main(args) == 0
    (folder,) = logs.iterdir()
    return folder


def stage2(run, tmp_path, *more: str) -> int:
    args = ["--mode", "level_dict", "--resume_path", str(run), "--log_root", str(tmp_path), "--sr_dict_size", "8"]
    return train_cocsr.main([*args, "--device", "cpu", *more])


def test_each_level_and_each_term_is_told(run, tmp_path, capsys):
    assert stage2(run, tmp_path) == 0
    told = capsys.readouterr().out
    assert "pixels: 8 atoms of 192 features, lambda " in told and "lambda_max" in told and "% zeros, gap" in told
    assert "held-out images, rotation: accuracy" in told and "held-out images, vertical: accuracy" in told
    assert "stages: 8 atoms" in told and "rho" not in told and "note: --sr_dict_size" not in told
    terms = [line.split()[1] for line in told.splitlines() if line.startswith("term ")]
    assert terms == ["transformations:", "neighbours:", "pixels:", "stages:"]


def test_a_dictionary_has_half_as_many_atoms_as_there_are_images_at_most(run, tmp_path, capsys):
    assert stage2(run, tmp_path, "--sr_dict_size", "56", "--sr_layer", "pixels") == 0
    told = capsys.readouterr().out
    # Of 122 images twelve are set aside.
    assert "note: --sr_dict_size 56: 55 atoms, half as many" in told and "pixels: 55 atoms of 192 features" in told
    (second,) = tmp_path.iterdir()
    assert evaluate.main(["--load_path", str(second)]) == 0


def test_the_penalty_is_chosen_by_the_gap_and_recorded(run, tmp_path, capsys):
    assert stage2(run, tmp_path, "--sr_rho_auto", "--sr_rho", "30", "--sr_layer", "pixels") == 0
    told = capsys.readouterr().out
    (rho,) = (float(line.split()[2].rstrip(":")) for line in told.splitlines() if line.startswith("pixels: rho"))
    (second,) = tmp_path.iterdir()
    kept = load_tensors(second / "last.cocsr_model", flag="load_path")["levels.pixels.bank.rho"].item()
    assert rho < 30 and kept == pytest.approx(rho, rel=1e-2)
    assert evaluate.main(["--load_path", str(second)]) == 0
    assert "of lambda_max, " in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--held_out", "0"], "--held_out: the terms of the score get units"),
        (["--epochs", "5"], "--epochs 5: --mode level_dict has no epochs of its own"),
        (
            ["--sr_layer", "pixels", "simclr"],
            "--sr_layer simclr: the network has no projector, which --mode simclr_CSI trains; choose of pixels, stages,"
            " penultimate\n",
        ),
    ],
)
def test_what_does_not_fit_is_refused(more, message, run, tmp_path, capsys):
    assert stage2(run, tmp_path, *more) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_mixed_shifts_are_refused(tmp_path, capsys):
    mixed = ["--mode", "simclr_CSI", "--shift_trans_type", "rot_bmix", "--epochs", "1", "--held_out", "12"]
    assert train.main([*TINY, *mixed, "--log_root", str(tmp_path / "a")]) == 0
    (folder,) = (tmp_path / "a").iterdir()
    assert stage2(folder, tmp_path / "b") == 2
    assert "--shift_trans_type rot_bmix: several depths are for stage 1" in capsys.readouterr().err


def test_rotations_of_csi_are_a_stage_1_too(tmp_path):
    turned = ["--mode", "simclr_CSI", "--shift_trans_type", "rotation", "--epochs", "1", "--held_out", "12"]
    assert train.main([*TINY, *turned, "--log_root", str(tmp_path / "a")]) == 0
    (folder,) = (tmp_path / "a").iterdir()
    assert stage2(folder, tmp_path / "b", "--sr_layer", "pixels", "simclr") == 0
    (second,) = (tmp_path / "b").iterdir()
    scores = ["levels", "levels_neighbours", "levels_simclr"]
    assert evaluate.main(["--load_path", str(second), "--ood_score", *scores]) == 0
    assert len(list(second.glob("result_ood_levels_*.json"))) == 3


def test_a_score_of_a_level_that_was_left_out_is_refused(run, tmp_path, capsys):
    assert stage2(run, tmp_path, "--sr_layer", "pixels") == 0
    (second,) = tmp_path.iterdir()
    assert evaluate.main(["--load_path", str(second), "--ood_score", "levels_stages"]) == 2
    assert "no dictionary of stages" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--data_seed", "5"], ["--held_out", "20"], []])
def test_images_set_aside_that_stage_1_has_seen_are_a_warning(more, run, tmp_path, capsys):
    assert stage2(run, tmp_path, "--sr_layer", "pixels", *more) == 0
    assert ("warning: stage 1 was trained on 110 images that are not the" in capsys.readouterr().out) == bool(more)


def test_training_images_that_are_all_alike_are_a_line(run, tmp_path, capsys, monkeypatch):
    real = level_dict.read_levels
    monkeypatch.setattr(level_dict, "read_levels", lambda net, x, *more: real(net, torch.zeros_like(x), *more))
    assert stage2(run, tmp_path, "--sr_layer", "pixels") == 1
    error = capsys.readouterr().err
    assert error.startswith("stopped: pixels: the 110 training images hardly differ") and error.count("\n") == 1


def test_images_are_turned_by_their_place_in_the_set():
    x = torch.rand(5, 3, 4, 4)
    turned = turn(x, torch.tensor([0, 1, 2, 3, 7]))
    for n, quarters in enumerate((1, 2, 3, 1, 2)):
        assert torch.equal(turned[n], torch.rot90(x[n], quarters, (1, 2)))


def test_held_out_images_are_told_apart_as_by_a_loop():
    logits = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0))
    truth = {"a": torch.tensor([2, 0, 1]), "alone": torch.tensor([0, 0, 0])}
    reading = Reading({"a": logits, "alone": torch.zeros(7, 3, 1)}, torch.zeros(7, 1, 2), {})
    (line,) = held_out_facts(reading, Transformations([], (), truth))
    right, bits = 0, 0.0
    for n in range(7):
        for k in range(3):
            right += int(logits[n, k].argmax()) == int(truth["a"][k])
            bits -= math.log2(logits[n, k].softmax(0)[truth["a"][k]])
    assert line == f"held-out images, a: accuracy {100 * right / 21:.1f} %, log-loss {bits / 21:.3g} bits"


def test_where_no_term_has_a_weight_all_but_the_transformations_count_alike():
    same = {name: torch.tensor([0.0, 1.0, 2.0]) for name in (TRANSFORMATIONS, NEIGHBOURS, "pixels")}
    same[TRANSFORMATIONS] = -same[TRANSFORMATIONS]
    model = SimpleNamespace(
        terms=tuple(same), values=lambda reading, views: reading, **{n: torch.zeros(3) for n in UNITS}
    )
    *_, line = calibrate(model, same, same, None)  # type: ignore[arg-type]
    assert model.weights.tolist() == [0, 1, 1] and line.startswith("warning: no term tells turned images")


def test_weights_follow_the_log_loss_and_the_stand_ins():
    """One bit of log-loss weighs 1, half a bit 4; other terms by how well they tell stand-ins from normal images."""
    bits = 0.5
    normal = {
        TRANSFORMATIONS: -bits * math.log(2) * torch.tensor([0.5, 1.0, 1.5]),
        NEIGHBOURS: torch.tensor([1.0, 2.0, 3.0]),
        "pixels": torch.tensor([0.0, 1.0, 2.0]),
        "stages": torch.tensor([4.0, 4.0, 4.0]),
    }
    turned = {
        TRANSFORMATIONS: torch.tensor([-5.0, -4.0, -3.0]),
        NEIGHBOURS: torch.tensor([0.0, 0.5, 2.5]),
        "pixels": torch.tensor([1.0, 2.0, 3.0]),
        "stages": torch.tensor([1.0, 1.0, 1.0]),
    }
    model = SimpleNamespace(
        terms=tuple(normal), values=lambda reading, views: reading, **{n: torch.zeros(4) for n in UNITS}
    )
    lines = list(calibrate(model, normal, turned, None))  # type: ignore[arg-type]
    assert model.weights.tolist() == pytest.approx([4.0, 5 / 9, 0.0, 0.0])
    assert model.means.tolist() == pytest.approx([-bits * math.log(2), 2.0, 1.0, 4.0])
    assert model.deviations[1].item() == pytest.approx(math.sqrt(2 / 3))
    assert "neighbours: weight 0.556; it tells turned images from upright ones by 77.8 %" in lines[1]
