"""The studies of robust autoencoders, small: their fits, what is measured of them, and files that go on."""

import argparse
import csv
import json
import math
import os
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import eval as evaluate
import train
from common.flags import build_parser, parse
from datasets import DataSource, Split, split_one_class
from datasets.corrupt import CorruptSpec
from models.autoencoder.networks import AutoencoderSpec
from models.autoencoder.robust import Threshold, separate
from program import SPECS
from scripts import rdae
from scripts.rdae import Store, main, noise_table, numbers, one_of_each, outlier_table, restored, title
from scripts.rdae_methods import (
    DENOISERS,
    DETECTORS,
    PLAIN,
    SPLITTERS,
    Denoiser,
    Fit,
    Setting,
    dead_outputs,
    encode,
    fits,
    slides_net,
)
from scripts.recipes import Recipe
from scripts.tables import cell
from tests.conftest import ROOT
from training import STAGE1

SMALL = Setting("dense", AutoencoderSpec(layers=(16, 8)), rounds=3, epochs=2, lr=3e-3, batch_size=32)
EXACT = Setting("svd", AutoencoderSpec(layers=(4,)), rounds=3)
MNIST = ROOT.parent / "shared/data"


def digits(**more) -> Split:
    return replace(split_one_class("digits", DataSource(), more.pop("one_class_idx", None), None), **more)


@pytest.fixture
def methods(monkeypatch):
    """Small ones."""
    own = {"rdae": SMALL, "robust_pca": EXACT, "vae": replace(SMALL, kind="vae", rounds=1)}
    monkeypatch.setattr(rdae, "SPLITTERS", own)
    denoisers = {"rdae": Denoiser(SMALL, {4: 0.4, 10: 0.6}), "autoencoder": Denoiser(SMALL)}
    monkeypatch.setattr(rdae, "DENOISERS", denoisers)


@pytest.mark.parametrize(
    "setting", [SMALL, EXACT, replace(SMALL, kind="conv", net=AutoencoderSpec(layers=(8,), widths=(4,)))]
)
@pytest.mark.parametrize("reinit", [False, True])
def test_thresholds_that_share_the_first_round_give_what_each_gives_alone(setting, reinit):
    table = digits(first_images=200).train_table()
    setting = replace(setting, reinit=reinit)
    found = list(fits(table.rows, table.shape, setting, 3, "l21_rows", [Threshold(0.8), Threshold(1.2), PLAIN]))
    for fit in found:
        alone = setting.step(64, table.shape, 3)
        parts = separate(table.rows, alone, threshold=fit.threshold, rounds=3, eps=0)
        assert torch.equal(parts.L, fit.parts.L) and torch.equal(parts.S, fit.parts.S)
        assert parts.history == fit.parts.history
        assert torch.equal(alone.reconstruct(table.rows), fit.step.reconstruct(table.rows))
    assert not torch.equal(found[0].parts.L, found[1].parts.L)
    assert not found[2].parts.S.any()


def test_without_a_threshold_it_is_a_plain_autoencoder_with_as_many_updates():
    table = digits(first_images=200).train_table()
    (fit,) = fits(table.rows, table.shape, SMALL, 3, "l21_rows", [PLAIN])
    plain = replace(SMALL, rounds=1, epochs=6).step(64, None, 3)
    plain.fit(table.rows)
    assert torch.equal(plain.reconstruct(table.rows), fit.parts.L)
    assert title(PLAIN) == "none" and title(Threshold(None, 0.05)) == "q0.05" and title(Threshold(4.725)) == 4.725


def test_ranges_of_thresholds():
    found = numbers("2:7:0.075")
    assert len(found) == 67 and (found[0], found[1], found[-1]) == (2.0, 2.075, 6.95)
    assert numbers("4.5:5:0.075") == [4.5, 4.575, 4.65, 4.725, 4.8, 4.875, 4.95]
    assert numbers("4.87") == [4.87]
    for text in ("0", "x", "1:2", "2:1:0.1", "1:2:0", "nan", "-1:1:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="FIRST:LAST:STEP"):
            numbers(text)


@pytest.mark.parametrize("name", DETECTORS)
def test_every_baseline_gives_a_far_row_the_highest_score(name):
    X = np.random.default_rng(0).normal(size=(60, 8)) * 0.1
    X[:, 0] = np.linspace(0, 1, 60)
    X[17] = 3 * np.cos(np.arange(8))
    assert DETECTORS[name](X, 0).argmax() == 17


def test_the_neighbour_at_the_fifth_place_is_counted_without_the_row_itself():
    X = np.arange(10.0)[:, None]
    assert DETECTORS["nearest"](X, 0).tolist() == [5, 4, 3, 3, 3, 3, 3, 3, 4, 5]


def test_the_network_of_the_slides_has_relu_everywhere_and_their_number_of_parameters():
    net = slides_net(784)
    assert sum(p.numel() for p in net.parameters()) == 1_708_384
    rows = torch.rand(32, 784)
    assert net.encode(rows).min() == 0 and net(rows).min() == 0
    assert (net.encode(rows) == 0).float().mean() > 0.1


def test_dead_outputs_are_constant_where_the_data_are_not():
    X = torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 2.0]])
    L = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.1, 1.0]])
    assert dead_outputs(X, L) == 1


def test_a_restored_image_is_compared_with_the_one_before_noise():
    table = digits(first_images=50, corrupt=CorruptSpec("normal", 6)).train_table()
    assert table.clean is not None and table.mask is not None
    L, S = table.clean + 0.1, table.rows - table.clean
    S[0, table.mask[0].nonzero()[:2]] = 0  # two of 300 are missed
    S[1, (~table.mask[1]).nonzero()[:3]] = 1  # and three too many
    parts = separate(table.rows, EXACT.step(64, None, 0), penalty="l1", threshold=Threshold(1.0), rounds=1)
    found = restored(table, Fit(Threshold(1.0), parts._replace(L=L, S=S), None))
    assert found["mse"] == pytest.approx({"all": 0.01, "corrupted": 0.01, "intact": 0.01}, abs=1e-7)
    noise = (table.rows - table.clean)[table.mask].square().mean().item()
    assert found["noisy_mse"] == pytest.approx({"all": noise * 6 / 64, "corrupted": noise, "intact": 0.0})
    assert found["support"]["precision"] == pytest.approx(298 / 301)
    assert found["support"]["recall"] == pytest.approx(298 / 300)
    assert rdae.psnr(0.01) == pytest.approx(20) and rdae.psnr(0) == pytest.approx(200)


def test_codes_are_those_of_the_network():
    table = digits(first_images=100).train_table()
    for setting, k in ((SMALL, 8), (EXACT, 4)):
        (fit,) = fits(table.rows, table.shape, setting, 0, "l1", [PLAIN])
        codes = encode(fit.step, table.rows)
        assert codes.shape == (100, k) and codes.dtype == torch.float32
        decoded = fit.step.net.decode(codes.double() if setting is EXACT else codes)
        assert torch.allclose(decoded.float(), fit.parts.L, atol=1e-5)


def test_a_seed_draws_the_mixture_that_training_draws():
    split = digits(one_class_idx=4, outliers=10, first_images=1000)
    first, second = (replace(split, corrupt=CorruptSpec(data_seed=seed)).train_table() for seed in (0, 1))
    assert len(first) == len(second) and (first.labels != 4).sum() == 10
    assert not torch.equal(first.indices, second.indices)


@pytest.mark.skipif(not (MNIST / "MNIST").is_dir(), reason="needs ../shared/data/MNIST")
def test_the_published_mixture_has_4859_fours_among_5124_images():
    split = split_one_class("mnist", DataSource(data_path=str(MNIST)), 4, None)
    table = replace(split, outliers=265, first_images=50_000).train_table()
    assert (len(table), int((table.labels == 4).sum()), table.rows.shape[1]) == (5124, 4859, 784)


def outliers(out, *more: str) -> list[str]:
    return ["outliers", "--dataset", "digits", "--first_images", "1000", "--outliers", "10", "--out", str(out),
            "--seeds", "0", "1", "--methods", "rdae", "vae", "pca", "--thresholds", "0.6:1:0.2", *more]  # fmt: skip


def test_outliers_are_judged_by_their_labels_and_the_study_goes_on_where_it_was(tmp_path, methods, monkeypatch, capsys):
    assert main(outliers(tmp_path)) == 0
    text = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "outliers.jsonl").read_text().splitlines()]
    # A seed: three thresholds, three contaminations and none, and a fit of each baseline.
    assert len(lines) == 2 * (3 + 3 + 1 + 1 + 1)
    table = replace(
        digits(one_class_idx=4, outliers=10, first_images=1000), corrupt=CorruptSpec(data_seed=1)
    ).train_table()
    truth = (table.labels != 4).numpy()
    (fit,) = fits(table.rows, table.shape, SMALL, 1, "l21_rows", [Threshold(0.8)])
    flagged = fit.parts.S.norm(dim=1).numpy() > 0
    (line,) = [o for o in lines if o["of"]["method"] == "rdae" and o["of"]["seed"] == 1 and o["of"]["threshold"] == 0.8]
    assert line["found"]["flags"]["f1"] == pytest.approx(f1_score(truth, flagged))
    score = (table.rows - fit.parts.L).norm(dim=1).numpy()
    best = max(f1_score(truth, score >= cut) for cut in score)
    assert line["found"]["score"]["oracle_f1"] == pytest.approx(best)
    top = f1_score(truth, score > np.quantile(score, 0.9))
    assert line["found"]["score"]["f1_at_q0.1"] == pytest.approx(top)

    assert "published" not in text and (tmp_path / "outliers.png").stat().st_size > 5000
    rows = list(csv.DictReader((tmp_path / "outliers.csv").open()))
    assert [row["method"] for row in rows] == ["rdae", "rdae, nothing split off", "vae", "pca"]
    assert rows == json.loads((tmp_path / "outliers.json").read_text())["table"]

    monkeypatch.setattr(rdae, "fits", None)
    before = (tmp_path / "outliers.md").read_text()
    assert main(outliers(tmp_path, "--tables_only")) == 0 and (tmp_path / "outliers.md").read_text() == before

    # Killed in the middle of the last line: that fit is made again, the others are not.
    whole = (tmp_path / "outliers.jsonl").read_text()
    (tmp_path / "outliers.jsonl").write_text(whole[:-30])
    assert main(outliers(tmp_path)) == 0
    again = (tmp_path / "outliers.jsonl").read_text()
    assert again.splitlines()[:-1] == whole.splitlines()[:-1]
    last, before = (json.loads(text.splitlines()[-1]) for text in (again, whole))
    assert last["of"] == before["of"] and last["found"]["score"] == before["found"]["score"]


def test_a_changed_setting_is_another_fit(tmp_path, methods, monkeypatch):
    args = outliers(tmp_path)
    args[args.index("rdae") : args.index("pca")] = []
    assert main(args) == 0
    line = json.loads((tmp_path / "outliers.jsonl").read_text().splitlines()[0])["of"]
    store = Store(tmp_path / "outliers.jsonl")
    assert line in store and line | {"setting": {"lr": 1}} not in store


def test_a_file_of_something_else_is_not_overwritten(tmp_path, methods, capsys):
    (tmp_path / "outliers.jsonl").write_text('{"x": 1}\n')
    assert main(outliers(tmp_path)) == 2
    assert "--out: " in capsys.readouterr().err
    assert (tmp_path / "outliers.jsonl").read_text() == '{"x": 1}\n'


def flags(f1: float, auc: float = 0.9) -> dict:
    score = {"roc_auc": auc, "pr_auc": 0.5, "oracle_f1": 0.6, "f1_at_q0.05": 0.3, "f1_at_q0.1": 0.2}
    return {"flags": {"f1": f1}, "score": score}


def test_the_oracle_takes_the_best_threshold_of_each_seed():
    lines = {1.0: [flags(0.5), flags(0.7)], 2.0: [flags(0.6), flags(0.4)], 3.0: [flags(0.9)]}  # 3.0: one seed only
    lines |= {
        "q0.05": [flags(0.3, 0.1), flags(0.5, 0.1)],
        "q0.3": [flags(0.2, 0.8), flags(0.2, 0.9)],
        "none": [flags(0), flags(0)],
    }
    header, rows = outlier_table({"rdae": lines})
    row = dict(zip(header, rows[0], strict=True))
    assert row["oracle F1"] == f"0.650 ± {math.sqrt(0.005):.3f}"
    assert row["F1 at q=0.05"] == "0.400 ± 0.141" and row["F1 at q=0.1"] == ""
    assert row["ROC-AUC"] == "0.850 ± 0.071"  # of the largest share
    assert row["F1 of the top 5 %"] == "0.300 ± 0.000"
    assert row["oracle F1 over thresholds and cuts"] == "0.600 ± 0.000" and len(header) == len(set(header))
    assert rows[1][:3] == ["rdae, nothing split off", "0.600 ± 0.000", "0.300 ± 0.000"]
    assert cell([0.5]) == "0.500" and cell([]) == ""


def noise(out, *more: str) -> list[str]:
    return ["denoise", "--dataset", "digits", "--first_images", "300", "--out", str(out), "--seeds", "0", "1",
            "--points", "4", "10", "--methods", "rdae", "autoencoder", *more]  # fmt: skip


def test_noise_is_measured_and_drawn(tmp_path, methods, capsys):
    assert main(noise(tmp_path)) == 0
    rows = list(csv.DictReader((tmp_path / "denoise.csv").open()))
    assert [(row["points"], row["method"], row["threshold"]) for row in rows] == [
        ("4", "noisy image", ""), ("4", "rdae", "0.4"), ("4", "autoencoder", ""),
        ("10", "noisy image", ""), ("10", "rdae", "0.6"), ("10", "autoencoder", ""),
    ]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "denoise.jsonl").read_text().splitlines()]
    table = digits(first_images=300, corrupt=CorruptSpec("normal", 10, data_seed=1)).train_table()
    (fit,) = fits(table.rows, table.shape, SMALL, 1, "l1", [Threshold(0.6)])
    (line,) = [o for o in lines if (o["of"]["method"], o["of"]["seed"], o["of"]["points"]) == ("rdae", 1, 10)]
    assert table.clean is not None
    assert line["found"]["mse"]["all"] == pytest.approx((fit.parts.L - table.clean).square().mean().item(), rel=1e-6)
    assert line["found"]["noisy_mse"]["intact"] == 0 and 0 < line["found"]["code_accuracy"] < 1
    assert 0.1 < line["found"]["read"] < 1 and "others_read" not in line["found"]
    with np.load(tmp_path / "images_10_rdae.npz") as images:
        assert images["L"].shape == (10, 1, 8, 8)
        changed = (images["noisy"] != images["original"]).sum((1, 2, 3))
        assert (changed == 10).all()
    assert (tmp_path / "denoise.png").stat().st_size > 5000


def test_fours_and_others_are_read_as_what_a_method_makes_of_them(tmp_path, methods):
    args = noise(tmp_path, "--one_class_idx", "4", "--outliers", "9", "--seeds", "0", "--points", "4")
    assert main(args) == 0
    for line in (tmp_path / "denoise.jsonl").read_text().splitlines():
        found = json.loads(line)["found"]
        assert 0 <= found["others_read_as_nominal"] + found["others_read"] <= 1 and "code_accuracy" not in found


def test_images_may_be_left_out_and_thresholds_tried(tmp_path, methods):
    args = noise(tmp_path, "--skip", "250", "--thresholds", "0.4:0.6:0.1", "--seeds", "0", "--points", "4")
    assert main(args) == 0
    rows = list(csv.DictReader((tmp_path / "denoise.csv").open()))
    assert [row["threshold"] for row in rows] == ["", "0.4", "0.5", "0.6", ""]
    line = json.loads((tmp_path / "denoise.jsonl").read_text().splitlines()[0])
    assert line["of"]["skip"] == 250
    assert noise_table({})[1] == []


def test_one_image_of_each_class():
    assert one_of_each(torch.tensor([3, 1, 3, 0, 1])).tolist() == [3, 1, 0]


def test_settings_name_networks_that_fit_pictures_of_mnist():
    for setting in [*SPLITTERS.values(), *(denoiser.setting for denoiser in DENOISERS.values())]:
        step = setting.step(784, (1, 28, 28), 0)
        assert isinstance(step.net, torch.nn.Module)
    budgets = {name: d.setting.rounds * d.setting.epochs for name, d in DENOISERS.items() if d.setting.kind != "svd"}
    assert len(set(budgets.values())) == 1, budgets
    assert DENOISERS["rdae"].setting == DENOISERS["autoencoder"].setting


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--one_class_idx", "11"], "--one_class_idx"),
        (["--outliers", "5000"], "--outliers 5000"),
        (["--first_images", "100000"], "--first_images"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(argv, said, tmp_path, capsys):
    assert main([*outliers(tmp_path), *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.fixture
def commands(tmp_path):
    """What a script would start: lists of arguments, as a stub in place of Python receives them."""
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\nprintf '\\n'\n")
    stub.chmod(0o755)

    def run(name: str, *args: str, **env: str) -> list[list[str]]:
        kept = {key: value for key, value in os.environ.items() if key not in ("DATA_PATH", "LOG_ROOT")}
        line = ["bash", str(ROOT / f"scripts/{name}.sh"), *args]
        done = subprocess.run(line, env=kept | {"PYTHON": str(stub)} | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line.split("\0")[:-1] for line in done.stdout.splitlines()]

    return run


@pytest.mark.parametrize("name, env, count", [
    ("RDAE_Outliers", {"THRESHOLDS": "4.5:4.7:0.075 2", "SEEDS": "0 3"}, 8),
    ("RDAE_Denoise", {}, 9),
    ("RDAE_Features", {"POINTS": "10 20"}, 2),
])  # fmt: skip
def test_each_evaluation_names_the_folder_that_training_makes(name, env, count, commands, tmp_path, capsys):
    found = commands(name, "--device", "cpu", LOG_ROOT=str(tmp_path / "my logs"), **env)
    assert len(found) == 2 * count
    made = set()
    for training, evaluation in zip(found[::2], found[1::2], strict=True):
        plans = []
        for run, line in ((train.main, training), (evaluate.main, evaluation)):
            assert run([*line[1:], "--dry_run"]) == 0
            plans.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        assert plans[0]["run_dir"] == plans[1]["load_path"]
        assert training[-2:] == ["--device", "cpu"] and "--device" not in evaluation
        made.add(plans[0]["run_dir"])
    assert len(made) == count and not (tmp_path / "my logs").exists()


def test_the_published_sweep_has_its_thresholds(commands):
    found = [line for line in commands("RDAE_Outliers") if line[0] == "train.py"]
    thresholds = [float(line[line.index("--threshold") + 1]) for line in found]
    assert thresholds == sorted({*numbers("2:7:0.075"), *numbers("4.5:5:0.075")})
    assert len(thresholds) == 67 + 7 and 4.725 in thresholds


def test_the_published_commands_have_the_settings_of_the_studies():
    recipe = Recipe("rdae")

    def flags_of(name: str) -> dict:
        parser = build_parser("train.py", STAGE1, "rdae", SPECS)
        return parse(recipe.words(name)[1:], parser).as_dict()

    for name, setting in (
        ("outliers", SPLITTERS["rdae_slides"]),
        ("robust", DENOISERS["rdae"].setting),
        ("plain", DENOISERS["autoencoder"].setting),
        ("variational", DENOISERS["vae"].setting),
    ):
        flags = flags_of(name)
        length = (flags["rounds"], flags["inner_epochs"])
        if setting.rounds * setting.epochs == flags["epochs"]:  # modes without rounds
            length = (setting.rounds, setting.epochs)
        assert length == (setting.rounds, setting.epochs), name
        assert (flags["lr_init"], flags["batch_size"]) == (setting.lr, setting.batch_size), name
        for field in ("layers", "activation", "output", "tied", "likelihood", "sigma"):
            expected = getattr(setting.net, field)
            assert flags[field] == (list(expected) if isinstance(expected, tuple) else expected), (name, field)
    for points in (10, 100, 250):
        (threshold,) = recipe.words(f"threshold_{points}")
        assert float(threshold) == DENOISERS["rdae"].thresholds[points]
