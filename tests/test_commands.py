"""The four commands as a user types them: the whole chain on real digits, its files, and what happens on bad input."""

import csv
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch

import eval as evaluate
import train
import train_cocsr
import tsne
from evals.metrics import auroc
from models.sparse.admm import RidgeSystem
from tests.conftest import ROOT, SHIFT, TINY
from tests.datasets.test_folder import fill

SPARSE = "--invert_sr_feature_norm --sr_lambda 1e-3".split()
VIEWS = "--ood_samples 2 --resize_factor 0.54 --resize_fix".split()


def run_eval(*args: object) -> int:
    return evaluate.main([*TINY, *SHIFT, *VIEWS, *map(str, args)])


# ---------------------------------------------------------------------------------------------------- the chain


def test_stage_1_leaves_a_complete_run_folder(stage1):
    names = {p.name for p in stage1.iterdir() if not p.name.startswith("events")}
    assert names == {"args.json", "log.txt", "metrics.jsonl", ".lock"} | {
        f"{which}.{kind}" for which in ("last", "previous") for kind in ("model", "resume")
    }
    rows = [json.loads(line) for line in (stage1 / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    tags = {"train/loss_sim", "train/loss_shift", "train/loss_cls", "train/lr", "train/grad_norm", "train/batch_time"}
    # 122 images in two steps.
    assert rows[0]["train/images_per_second"] * rows[0]["train/batch_time"] == pytest.approx(61)
    assert tags <= set(rows[0]) and rows[1]["train/loss_cls"] < rows[0]["train/loss_cls"]
    assert json.loads((stage1 / "args.json").read_text())["flags"]["simclr_dim"] == 32
    assert torch.load(stage1 / "last.model", weights_only=True)["simclr_layer.2.weight"].shape == (32, 64)


def test_stage_2_trains_the_dictionary_and_nothing_else(stage1, stage2):
    """Trap 1: published, the k-means dictionary never trained."""
    before = torch.load(stage1 / "last.model", weights_only=True)
    start, end = (torch.load(stage2 / f"{name}.cocsr_model", weights_only=True) for name in ("start", "last"))
    for key, value in before.items():
        assert torch.equal(value, end[f"feature_net.{key}"]), key
    a, b = start["sr_nets.dictionary"], end["sr_nets.dictionary"]
    assert a.shape == (5, 64, 24) and (b - a).norm() / a.norm() > 1e-3
    torch.testing.assert_close(a.norm(dim=1), torch.ones(5, 24))
    rows = [json.loads(line) for line in (stage2 / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [3, 4]  # epochs count on from stage 1
    tags = {"train/loss_sr", "train/loss_sr_l1", "train/loss_sr_dict", "sr/gap", "sr/atom_norm", "sr/sparsity"}
    assert tags <= set(rows[0])
    assert "frozen network unchanged, bit for bit" in (stage2 / "log.txt").read_text()


def test_frozen_dictionaries_stay_the_k_means_atoms(stage1, tmp_path):
    args = [*TINY, *SHIFT, *SPARSE, "--resume_path", stage1, "--epochs", 3, "--log_root", tmp_path]
    args += "--sr_dict_size 8 --ini_sr_dict_train --freeze_sr_dict".split()
    assert train_cocsr.main([str(a) for a in args]) == 0
    (run,) = tmp_path.iterdir()
    start, end = (torch.load(run / f"{name}.cocsr_model", weights_only=True) for name in ("start", "last"))
    assert torch.equal(start["sr_nets.dictionary"], end["sr_nets.dictionary"])
    assert "--freeze_sr_dict" in (run / "log.txt").read_text()


def test_evaluation_writes_results_that_agree_with_each_other(stage2, capsys):
    args = ["--mode", "ood_pre_cocsr_refmix", "--load_path", stage2 / "last.cocsr_model", *SPARSE]
    assert run_eval(*args, "--ood_score", "CSI_sr", "simclr_sr", "--save_score", "--print_score") == 0
    told = capsys.readouterr().out
    result = json.loads((stage2 / "result_ood_pre_cocsr_refmix_CSI_sr.json").read_text())
    rows = list(csv.DictReader((stage2 / "scores_ood_pre_cocsr_refmix_CSI_sr_digits.csv").open()))
    assert list(rows[0]) == ["index", "label", "score", "class"] and len(rows) == 599
    assert all(row["class"] == row["label"] for row in rows)  # names of digits
    scores = {label: np.array([float(r["score"]) for r in rows if int(r["label"]) == label]) for label in range(10)}
    others = [c for c in range(10) if c != 3]
    for c in others:
        assert result["auroc"][f"one_class_{c}"] == pytest.approx(auroc(scores[3], scores[c]), abs=1e-12)
    assert result["mean"] == pytest.approx(np.mean(list(result["auroc"].values())), abs=1e-12)
    pooled = auroc(scores[3], np.concatenate([scores[c] for c in others]))
    assert result["pooled"] == pytest.approx(pooled, abs=1e-12)
    assert (result["n_in"], result["n_out"], result["epochs"], result["seed"]) == (61, 538, 4, 0)
    assert f"{100 * result['pooled']:5.1f}" in told and "quantiles of CSI_sr, normal test" in told
    assert (stage2 / "result_ood_pre_cocsr_refmix_simclr_sr.json").is_file()


def test_dictionaries_are_inverted_once_in_an_evaluation(stage2, monkeypatch):
    """Of the training images and of the test images."""
    made = []
    of = RidgeSystem.of
    monkeypatch.setattr(RidgeSystem, "of", lambda *args: made.append(of(*args)) or made[-1])
    assert run_eval("--mode", "ood_pre_cocsr", "--load_path", stage2, *SPARSE) == 0
    assert len(made) == 1


@pytest.mark.parametrize("mode, score", [("ood_pre", "CSI"), ("ood_pre_refmix", "simclr"), ("ood_pre_cocsr", "CSI_sr")])
def test_every_mode_gives_the_same_number_again_whatever_the_batch_size(stage2, mode, score, tmp_path):
    means = []
    for batch_size in (100, 37):
        folder = tmp_path / str(batch_size)
        shutil.copytree(stage2, folder)
        args = ["--mode", mode, "--load_path", folder, "--ood_score", score, "--ood_batch_size", batch_size]
        assert run_eval(*args, *SPARSE) == 0
        means.append(json.loads((folder / f"result_{mode}_{score}.json").read_text())["pooled"])
    assert means[0] == pytest.approx(means[1], abs=2e-4)  # only the rounding of other matrix shapes may differ


def test_a_tolerance_lets_codes_converge_where_40_steps_do_not(stage2, tmp_path, capsys):
    args = ["--mode", "ood_pre_cocsr", "--load_path", shutil.copytree(stage2, tmp_path / "run"), *SPARSE]
    gaps = []
    for more in ([], ["--sr_admm_stage", 20000, "--sr_tol", "0.01"]):
        assert run_eval(*args, *more) == 0
        gaps.append(float(re.search(r"mean optimality gap (\S+) lambda", capsys.readouterr().out)[1]))
    assert gaps[1] <= 0.01 < gaps[0]


def test_tsne_draws_one_picture_per_shift(stage2, capsys):
    args = [*TINY, *SHIFT, *SPARSE, "--mode", "ood_pre_tsne_dict_refmix", "--load_path", str(stage2)]
    assert tsne.main([*args, "--ood_layer", "penultimate", "--ood_score", "CSI_sr", "--tsne_points", "20"]) == 0
    pictures = sorted(stage2.glob("ood_pre_tsne_dict_refmix_penultimate_shift*.png"))
    assert len(pictures) == 5
    from PIL import Image

    for path in pictures:
        with Image.open(path) as picture:
            assert min(picture.size) >= 600 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert "--ood_score has no effect" in capsys.readouterr().out


def test_tsne_of_stage_1_features(stage1):
    args = [*TINY, *SHIFT, "--mode", "ood_pre_tsne", "--load_path", str(stage1), "--tsne_points", "10"]
    assert tsne.main([*args, "--ood_layer", "simclr"]) == 0
    assert (stage1 / "ood_pre_tsne_simclr_shift0.png").stat().st_size > 10_000


def test_a_finished_run_says_so_and_another_configuration_is_refused(stage1, capsys):
    args = [*TINY, *SHIFT, "--mode", "simclr_CSI", "--simclr_dim", "32", "--epochs", "2"]
    args += ["--log_root", str(stage1.parent)]
    before = (stage1 / "last.model").read_bytes()
    assert train.main(args) == 0 and "is finished" in capsys.readouterr().out
    assert train.main([*args, "--temperature", "0.2"]) == 2
    assert "--temperature was 0.5, is 0.2" in capsys.readouterr().err
    assert (stage1 / "last.model").read_bytes() == before


def test_simclr_and_every_shift_train_and_are_evaluated(tmp_path):
    from datasets import SHIFTS

    small = [*TINY, "--epochs", "1", "--log_root", str(tmp_path)]
    for shift in SHIFTS:
        mode = "simclr" if shift == "none" else "simclr_CSI"
        assert train.main([*small, "--mode", mode, "--shift_trans_type", shift]) == 0
    for run in tmp_path.iterdir():
        shift = run.name.split("_shift_")[1].split("_one")[0] if "_shift_" in run.name else "none"
        args = [*TINY, "--mode", "ood_pre", "--load_path", str(run), "--shift_trans_type", shift]
        assert evaluate.main([*args, "--ood_score", "simclr" if shift == "none" else "CSI"]) == 0
    assert len(list(tmp_path.glob("*/result_ood_pre_*.json"))) == len(SHIFTS)


def test_a_folder_of_pictures_with_outliers_only_in_test(tmp_path, capsys):
    """What a practitioner has: one folder of good pictures, and a few bad ones to try."""
    rng = np.random.default_rng(0)
    from PIL import Image

    for name, count in {"train/good": 9, "test/good": 4, "test/scratch": 3}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for n in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"data/{name}/{n}.png")
    common = f"--dataset folder --data_path {tmp_path}/data --image_size 16 --model resnet8 --log_root {tmp_path}/logs"
    args = [*common.split(), *SHIFT]
    assert train.main([*args, "--mode", "simclr_CSI", "--batch_size", "4", "--epochs", "1"]) == 0
    run = tmp_path / "logs/folder_resnet8_unsup_simclr_CSI_shift_rot_bmix"
    assert evaluate.main([*args, "--load_path", str(run), "--save_score"]) == 0
    result = json.loads((run / "result_ood_pre_CSI.json").read_text())
    assert set(result["auroc"]) == {"one_class_1"} and (result["n_in"], result["n_out"]) == (4, 3)
    rows = list(csv.DictReader((run / "scores_ood_pre_CSI_folder.csv").open()))
    assert rows[-1]["path"].endswith("scratch/2.png") and "one_class_1 (scratch)" in capsys.readouterr().out


def test_other_data_sets_can_be_distinguished(stage1, capsys):
    args = [
        "--mode",
        "ood_pre",
        "--load_path",
        stage1,
        "--ood_dataset",
        "mnist",
        "--data_path",
        ROOT / "../shared/data",
    ]
    if not (ROOT / "../shared/data/MNIST").is_dir():
        pytest.skip("MNIST is not on this machine")
    assert run_eval(*args, "--ood_samples", 1) == 0
    result = json.loads((stage1 / "result_ood_pre_CSI.json").read_text())
    assert "mnist" in result["auroc"] and result["n_out"] == 538  # published means are over the other classes alone
    classes = [value for name, value in result["auroc"].items() if name.startswith("one_class_")]
    assert len(classes) == 9 and result["mean"] == pytest.approx(np.mean(classes))


# ------------------------------------------------------------------------- published weights and what files decide


def test_weights_from_published_programs_load_for_stage_2_and_evaluation(stage1, tmp_path, capsys):
    """Bare weights under DataParallel's prefix, the epoch in a pickled last.config; rho as an integer."""
    state = torch.load(stage1 / "last.model", weights_only=True)
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "last.model")
    (tmp_path / "last.config").write_bytes(pickle.dumps({"epoch": 1000}, protocol=pickle.HIGHEST_PROTOCOL))
    args = [*TINY, *SHIFT, *SPARSE, "--sr_dict_size", "8", "--log_root", str(tmp_path / "logs")]
    assert train_cocsr.main([*args, "--resume_path", str(tmp_path), "--epoch", "1000"]) == 2
    assert "--epochs 1000: stage 1 ended at epoch 1000" in capsys.readouterr().err
    assert train_cocsr.main([*args, "--resume_path", str(tmp_path), "--epoch", "1001"]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    published = torch.load(run / "last.cocsr_model", weights_only=True)
    published["sr_nets.rho"] = torch.tensor(1)
    torch.save(published, tmp_path / "bare.cocsr_model")
    assert run_eval("--mode", "ood_pre_cocsr", "--load_path", tmp_path / "bare.cocsr_model", *SPARSE) == 0


def test_given_flags_win_where_they_can_and_are_errors_where_the_file_decides(stage2, capsys):
    args = ["--mode", "ood_pre_cocsr", "--load_path", stage2, "--ood_samples", 1]
    assert run_eval(*args, "--sr_lambda", "0.5", "--sr_rho", 3, "--mix_alpha", 0.3) == 0
    told = capsys.readouterr().out
    for expected in ("--sr_lambda 0.001, evaluated with 0.5", "--sr_rho 1, evaluated with 3", "--mix_alpha 0.2,"):
        assert f"trained with {expected}" in told
    for flag, value in (("--sr_dict_size", 512), ("--simclr_dim", 128), ("--model", "resnet18")):
        refused(capsys, run_eval(*args, flag, value), flag)
    # What was not given is the file's: --invert_sr_feature_norm, say.
    assert "invert" not in told


def test_weights_without_a_record_decide_and_what_differs_is_reported(stage2, tmp_path, capsys):
    from common.files import load_state_dict

    file = tmp_path / "last.cocsr_model"
    torch.save(load_state_dict(stage2 / file.name, flag="load_path"), file)
    args = ["--mode", "ood_pre_cocsr", "--load_path", file, "--ood_samples", 1, "--invert_sr_feature_norm"]
    assert run_eval(*args, "--sr_dict_size", 512, "--simclr_dim", 128) == 0
    told = capsys.readouterr().out
    assert "note: --sr_dict_size 512:" in told and "note: --simclr_dim 128:" in told


def test_a_run_goes_on_from_another_with_the_flags_of_its_own(stage1, tmp_path, capsys):
    args = [*TINY, *SHIFT, "--mode", "simclr_CSI", "--resume_path", str(stage1), "--log_root", str(tmp_path)]
    assert (
        train.main([*args, "--epochs", "3", "--weight_decay", "0.5", "--temperature", "0.2", "--sim_lambda", "2"]) == 0
    )
    told = capsys.readouterr().out
    assert "epoch 3/3" in told and "no effect" not in told and "epoch 2/3" not in told
    assert "trained with --temperature 0.5, this run has 0.2" in told and "trained with --sim_lambda 1.0" in told
    state = torch.load(next(tmp_path.glob("*/last.resume")), weights_only=True)
    assert state["optimizers"][0]["param_groups"][0]["weight_decay"] == 0.5
    refused(capsys, train.main([*args, "--optimizer", "adam", "--epochs", "3", "--suffix", "a"]), "--resume_path")
    refused(capsys, train.main([*args, "--epochs", "2", "--suffix", "b"]), "--epochs 2")
    assert train.main([*args, "--resume_path", str(stage1 / "last.model"), "--epochs", "3", "--suffix", "c"]) == 0


def test_a_run_that_goes_on_takes_its_moving_average_along(tmp_path, capsys):
    args = [*TINY, *SHIFT, "--mode", "simclr_CSI", "--ema_decay", "0.9", "--log_root", str(tmp_path)]
    assert train.main([*args, "--epochs", "1"]) == 0
    (first,) = tmp_path.iterdir()
    assert train.main([*args, "--epochs", "2", "--resume_path", str(first), "--suffix", "more"]) == 0
    (second,) = set(tmp_path.iterdir()) - {first}
    steps = [torch.load(run / "last.resume", weights_only=True)["average"]["steps"] for run in (first, second)]
    assert steps[1] == 2 * steps[0] > 0
    assert "--ema_decay" not in capsys.readouterr().out
    args = [*TINY, *SHIFT, "--mode", "simclr_CSI", "--log_root", str(tmp_path), "--epochs", "2", "--suffix", "without"]
    assert train.main([*args, "--resume_path", str(first)]) == 0
    assert "trained with --ema_decay 0.9, this run has None" in capsys.readouterr().out


def test_a_classifier_of_the_shift_that_was_not_trained_is_no_score(tmp_path, capsys):
    args = [*TINY, *SHIFT, "--mode", "simclr_CSI", "--epochs", "1", "--shift_lambda", "0", "--log_root", str(tmp_path)]
    assert train.main(args) == 0
    (run,) = tmp_path.iterdir()
    for score in ("shift_logit", "shift_logsoftmax"):
        refused(capsys, evaluate.main(["--load_path", str(run), "--ood_score", score]), "--shift_lambda 0")
    assert evaluate.main(["--load_path", str(run), "--ood_score", "CSI"]) == 0


def test_the_penalty_by_the_gap_goes_with_the_weights(stage1, tmp_path, capsys):
    """Chosen in training, kept by the file whatever an interruption rounds, and told where evaluation has another."""
    args = [*TINY, *SHIFT, *SPARSE, "--resume_path", str(stage1), "--sr_dict_size", "12", "--log_root", str(tmp_path)]
    assert train_cocsr.main([*map(str, args), "--epochs", "3", "--sr_rho_auto", "--sr_rho", "30"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("rho "))
    (run,) = tmp_path.iterdir()
    state = torch.load(run / "last.cocsr_model", weights_only=True)
    rho = float(state["sr_nets.rho"])
    assert rho < 30 and f"rho {rho:.3g}: " in line
    evaluated = ["--mode", "ood_pre_cocsr", "--load_path", run, *SPARSE]
    assert run_eval(*evaluated) == 0
    assert "evaluated with" not in capsys.readouterr().out
    assert run_eval(*evaluated, "--sr_rho", "30") == 0
    told = capsys.readouterr().out
    assert f"was trained with --sr_rho {rho:.4g}, evaluated with 30" in told and told.count("evaluated with") == 1
    assert run_eval(*evaluated, "--sr_rho", "7", "--sr_lambda", "0.5") == 0
    told = capsys.readouterr().out
    assert told.count("evaluated with") == 2 and "--sr_lambda 0.001, evaluated with 0.5" in told


def test_fitted_dictionaries_choose_their_penalty_by_the_gap(stage1, capsys):
    args = ["--mode", "ood_pre_multi_sr", "--load_path", stage1, *SPARSE, "--sr_dict_size", 12, "--sr_fit_steps", 2]
    assert run_eval(*args, "--sr_rho_auto") == 0
    told = capsys.readouterr().out
    assert "\nrho " in told and "--sr_rho_auto has no effect" not in told


def test_two_checkpoints_of_one_folder_keep_their_results_apart(stage2):
    for name in ("last", "start"):
        args = ["--mode", "ood_pre_cocsr", "--load_path", stage2 / f"{name}.cocsr_model", *SPARSE]
        assert run_eval(*args, "--ood_samples", 1) == 0
    last, start = (stage2 / f"result_ood_pre_cocsr_CSI_sr{tag}.json" for tag in ("", "_start"))
    assert json.loads(last.read_text())["mean"] != json.loads(start.read_text())["mean"]


def test_no_strict_says_what_it_left_out_and_refuses_what_does_not_fit_at_all(stage1, tmp_path, capsys):
    state = torch.load(stage1 / "last.model", weights_only=True)
    del state["linear.bias"]
    torch.save(state, tmp_path / "last.model")
    refused(capsys, run_eval("--load_path", tmp_path), "--no_strict")
    assert run_eval("--load_path", tmp_path, "--no_strict") == 0
    assert "fresh: linear.bias" in capsys.readouterr().out
    for key in [k for k in state if k.split(".")[0] not in ("linear", "simclr_layer", "shift_cls_layer")]:
        del state[key]
    torch.save(state, tmp_path / "last.model")
    refused(capsys, run_eval("--load_path", tmp_path, "--no_strict"), "--no_strict: no tensor")


def test_unlabelled_training_needs_no_test_images(tmp_path, capsys):
    fill(tmp_path / "data", {"train/a": 3, "train/b": 3})
    args = f"--dataset folder --data_path {tmp_path}/data --image_size 8 --model resnet8 --epochs 1 --error_step 1"
    assert train.main([*args.split(), "--log_root", str(tmp_path / "l")]) == 0
    assert "the linear probe is not tested" in capsys.readouterr().out
    fill(tmp_path / "data", {"test/c": 2})
    assert train.main([*args.split(), "--log_root", str(tmp_path / "m")]) == 0
    fill(tmp_path / "data", {"test/b": 2})
    assert train.main([*args.split(), "--log_root", str(tmp_path / "n")]) == 0
    row = json.loads(next((tmp_path / "n").glob("*/metrics.jsonl")).read_text())
    assert row["test/probe_error"] in (0.0, 0.5, 1.0)


def test_weights_that_are_non_finite_are_reported(stage1, tmp_path, capsys):
    state = torch.load(stage1 / "last.model", weights_only=True)
    state["conv1.weight"] *= torch.nan
    torch.save(state, tmp_path / "last.model")
    refused(capsys, run_eval("--load_path", tmp_path), "--load_path", "tensor conv1.weight holds non-finite numbers")
    assert not list(tmp_path.glob("result_*"))


# ---------------------------------------------------------------------------------------------------- bad input


def refused(capsys, code: int, *flags: str) -> str:
    """One line on standard error that names the flags, exit code 2."""
    told = capsys.readouterr().err
    assert code == 2 and told.count("\n") == 1 and "Traceback" not in told, told
    assert all(flag in told for flag in flags), told
    return told


def test_no_data_at_the_path(tmp_path, capsys):
    for dataset in ("cifar10", "folder"):
        args = [
            "--dataset",
            dataset,
            "--data_path",
            str(tmp_path),
            "--model",
            "resnet8",
            "--log_root",
            str(tmp_path / "l"),
        ]
        refused(capsys, train.main(args), "--data_path", str(tmp_path))
    assert not (tmp_path / "l").exists()


def test_class_index_out_of_range(tmp_path, capsys):
    code = train.main([*TINY, "--one_class_idx", "10", "--log_root", str(tmp_path)])
    refused(capsys, code, "--one_class_idx", "0..9")


@pytest.mark.parametrize("change, flag", [(["--shift_trans_type", "rotation"], "--shift_trans_type")])
def test_stage_2_from_a_checkpoint_of_another_number_of_shifts(stage1, tmp_path, capsys, change, flag):
    code = train_cocsr.main(
        [*TINY, *change, "--resume_path", str(stage1), "--log_root", str(tmp_path), "--epochs", "9"]
    )
    assert "trained with 5" in refused(capsys, code, flag)
    assert not list(tmp_path.iterdir())


def test_stage_2_from_a_checkpoint_of_another_model(stage1, tmp_path, capsys):
    args = [*TINY, *SHIFT, "--model", "resnet18", "--resume_path", str(stage1), "--log_root", str(tmp_path)]
    assert "--model resnet8" in refused(capsys, train_cocsr.main([*args, "--epochs", "9"]), "--model")


def test_stage_2_without_a_start_and_evaluation_without_weights(stage1, tmp_path, capsys):
    refused(capsys, train_cocsr.main([*TINY, *SHIFT, "--log_root", str(tmp_path)]), "--resume_path")
    refused(capsys, evaluate.main([*TINY, *SHIFT]), "--load_path")
    refused(capsys, run_eval("--load_path", tmp_path / "nothing"), "--load_path", "nothing")
    refused(capsys, run_eval("--mode", "ood_pre_cocsr", "--load_path", stage1), "--load_path", "last.cocsr_model")
    code = run_eval("--mode", "ood_pre_cocsr", "--load_path", stage1 / "last.model")
    refused(capsys, code, "--load_path", "no dictionaries")


def test_truncated_checkpoints(stage1, stage2, tmp_path, capsys):
    for source in (stage1 / "last.model", stage2 / "last.cocsr_model"):
        path = tmp_path / source.name
        path.write_bytes(source.read_bytes()[:-1000])
        mode = "ood_pre_cocsr" if "cocsr" in source.name else "ood_pre"
        refused(capsys, run_eval("--mode", mode, "--load_path", path), "--load_path", str(path), "truncated")
    args = [*TINY, *SHIFT, "--resume_path", str(tmp_path / "last.model"), "--log_root", str(tmp_path / "l")]
    refused(capsys, train_cocsr.main(args), "--resume_path", "truncated")


def test_a_checkpoint_that_would_run_code(tmp_path, capsys):
    from tests.common.test_files import Bomb

    torch.save({"conv1.weight": Bomb(tmp_path / "trace")}, tmp_path / "last.model")
    refused(capsys, run_eval("--load_path", tmp_path / "last.model"), "--load_path", "refused")
    assert not (tmp_path / "trace").exists()


def test_batch_of_one_under_batch_mix(tmp_path, capsys):
    code = train.main([*TINY, *SHIFT, "--mode", "simclr_CSI", "--batch_size", "1", "--log_root", str(tmp_path)])
    refused(capsys, code, "--batch_size 1", "rot_bmix")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(tmp_path, capsys):
    refused(capsys, train.main([*TINY, "--device", "cuda", "--log_root", str(tmp_path)]), "--device cuda")


def test_rho_of_zero(stage1, tmp_path, capsys):
    args = [*TINY, *SHIFT, "--resume_path", str(stage1), "--sr_rho", "0", "--log_root", str(tmp_path)]
    refused(capsys, train_cocsr.main(args), "--sr_rho must be > 0")


def test_more_that_cannot_work(stage1, tmp_path, capsys):
    log = ["--log_root", str(tmp_path / "l")]
    stage2 = [*TINY, *SHIFT, "--resume_path", str(stage1), "--epochs", "9", *log]
    cases = {
        "--sr_lr": lambda: train_cocsr.main([*stage2, "--sr_lr", "-1"]),
        "--sr_decay_lr": lambda: train_cocsr.main([*stage2, "--sr_decay_lr", "-1"]),
        "--sr_dict_size": lambda: train_cocsr.main([*stage2, "--sr_dict_size", "0"]),
        "--shift_trans_type": lambda: train.main([*TINY, "--mode", "simclr_CSI", *log]),
        "--mix_alpha": lambda: train.main([*TINY, *SHIFT, "--mode", "simclr_CSI", "--mix_alpha", "2", *log]),
        "--lr_init": lambda: train.main([*TINY, "--lr_init", "0", *log]),
        "--sr_admm_stage": lambda: run_eval("--load_path", stage1, "--sr_admm_stage", 0),
        "--image_size": lambda: train.main([*TINY, "--image_size", "2", *log]),
        "--ood_score": lambda: run_eval("--load_path", stage1, "--ood_score", "CSI_sr"),
        "--ood_layer": lambda: tsne.main([*TINY, *SHIFT, "--load_path", str(stage1), "--ood_layer", "conv1"]),
    }
    for flag, call in cases.items():
        refused(capsys, call(), flag)
    fill(tmp_path / "data", {"train/good": 3, "test/good": 2})
    folder = ["--dataset", "folder", "--data_path", str(tmp_path / "data"), "--image_size", "8", *SHIFT]
    code = evaluate.main([*folder, "--model", "resnet8", "--load_path", str(stage1)])
    refused(capsys, code, "--one_class_idx", "--ood_dataset")
    assert not (tmp_path / "l").exists()


def test_bad_input_from_a_shell_has_no_traceback_and_code_2(shell, tmp_path):
    done = shell("train.py", *TINY, "--sr_rho", "1", "--one_class_idx", "77", "--log_root", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--one_class_idx" in done.stderr


def test_importing_a_script_does_nothing_and_a_pipe_needs_no_terminal(shell, tmp_path):
    done = shell("-c", "import train, train_cocsr, eval, tsne; print('quiet')")
    assert done.stdout == "quiet\n" and done.returncode == 0
    done = shell("train.py", *TINY, "--epochs", "1", "--log_root", tmp_path)
    assert done.returncode == 0 and "\r" not in done.stdout + done.stderr, done.stderr
