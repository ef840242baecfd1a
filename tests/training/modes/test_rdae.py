"""`rdae`, `dae` and `vae`: the loop and its hooks make what the algorithm makes."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch

import eval as evaluate
import train
from common.files import load_tensors
from datasets import DataSource, split_one_class
from models.autoencoder.networks import AutoencoderSpec, TruncatedSVD
from models.autoencoder.robust import PENALTIES, Gradients, Threshold, separate

DIGITS = "--dataset digits --one_class_idx 4 --outliers 9 --batch_size 32 --lr_init 3e-3 --device cpu".split()
SMALL = [*DIGITS, "--layers", "16", "8"]


def run(logs, *args, code=0):
    """Train in `logs`; the run's folder, its checkpoint, and what it recorded."""
    before = set(logs.iterdir()) if logs.exists() else set()
    assert train.main([*args, "--log_root", str(logs)]) == code
    (folder,) = set(logs.iterdir()) - before or before
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder, torch.load(folder / "last.model", weights_only=True), rows


def of_rounds(rows, tag):
    return [row[f"rdae/{tag}"] for row in rows if f"rdae/{tag}" in row]


def data():
    split = split_one_class("digits", DataSource(), 4, None)
    return torch.cat([split.train_table().rows]), split


@pytest.fixture(scope="module")
def mixture():
    from dataclasses import replace

    split = replace(data()[1], outliers=9)
    return split.train_table()


@pytest.mark.parametrize("reinit", [False, True])
@pytest.mark.parametrize("penalty, threshold", [("l1", 0.3), ("l21_rows", 0.9), ("l21_cols", 2.0)])
def test_a_training_run_is_the_algorithm_bit_for_bit(penalty, threshold, reinit, mixture, tmp_path):
    more = ["--reinit"] if reinit else []
    args = ["--mode", "rdae", "--penalty", penalty, "--threshold", str(threshold), "--rounds", "3", "--eps", "0", *more]
    _, state, rows = run(tmp_path, *SMALL, *args, "--inner_epochs", "4")
    spec = AutoencoderSpec(layers=(16, 8))
    step = Gradients(lambda: spec.build("dense", 64, None), epochs=4, lr=3e-3, batch_size=32, seed=0, reinit=reinit)
    found = separate(mixture.rows, step, penalty=penalty, threshold=Threshold(threshold), rounds=3, eps=0)
    assert torch.equal(state["S"], found.S) and torch.equal(state["L"], found.L) and bool((found.S != 0).any())
    for name, value in step.net.state_dict().items():
        assert torch.equal(state[f"autoencoder.{name}"], value), name
    for name in ("c1", "c2", "threshold"):
        assert of_rounds(rows, name) == pytest.approx(found.history[name], abs=1e-12)
    clipped = PENALTIES[penalty].sizes(mixture.rows - state["L"] - state["S"])
    assert clipped.max() <= threshold * (1 + 1e-5)


def test_a_variational_network_takes_the_autoencoders_place(mixture, tmp_path):
    args = ["--mode", "rdae", "--autoencoder", "vae", "--likelihood", "gaussian", "--sigma", "0.3", "--rounds", "3"]
    args += ["--contamination", "0.1", "--inner_epochs", "2", "--eps", "0"]
    folder, state, _ = run(tmp_path, *SMALL, *args)
    spec = AutoencoderSpec(layers=(16, 8), likelihood="gaussian", sigma=0.3)
    step = Gradients(lambda: spec.build("vae", 64, None), epochs=2, lr=3e-3, batch_size=32, seed=0)
    found = separate(mixture.rows, step, threshold=Threshold(None, 0.1), rounds=3, eps=0)
    assert torch.equal(state["S"], found.S) and "_vae_rdae_l21_rows_q0.1" in folder.name
    assert evaluate.main(["--load_path", str(folder)]) == 0


def test_the_exact_linear_step_is_a_truncated_svd(mixture, tmp_path):
    args = ["--mode", "rdae", "--autoencoder", "svd", "--layers", "3", "--threshold", "1.5", "--rounds", "30"]
    folder, state, rows = run(tmp_path, *DIGITS, *args)
    net = TruncatedSVD(64, 3)

    class Exact:
        fit, reconstruct = net.fit, net.forward

    found = separate(mixture.rows, Exact(), threshold=Threshold(1.5), rounds=30)
    assert found.stopped_by == "c2" and found.rounds == len(rows) < 30
    assert torch.equal(state["S"], found.S) and torch.equal(state["autoencoder.components"], net.components)
    assert load_tensors(folder / "last.resume", flag="x")["converged"] is True


def test_an_infinite_threshold_leaves_a_plain_autoencoder(tmp_path):
    _, plain, _ = run(tmp_path, *SMALL, "--mode", "dae", "--epochs", "6")
    _, robust, rows = run(
        tmp_path, *SMALL, "--mode", "rdae", "--threshold", "1e9", "--rounds", "3", "--inner_epochs", "2", "--eps", "0"
    )
    assert not robust["S"].any() and len(rows) == 6 and plain["S"].shape == (0, 64)
    assert all(torch.equal(robust[k], v) for k, v in plain.items() if k.startswith("autoencoder."))


@pytest.mark.parametrize(
    "mode, more",
    [("rdae", "--threshold 0.9 --rounds 4 --inner_epochs 2 --reinit --eps 0"), ("vae", "--epochs 8")],
)
def test_a_run_that_is_stopped_goes_on_bit_for_bit(mode, more, tmp_path, monkeypatch):
    import training.loop as loop

    args = [*SMALL, "--mode", mode, *more.split()]
    _, whole, _ = run(tmp_path / "whole", *args)
    real, steps = loop.descend, []
    monkeypatch.setattr(loop, "descend", lambda *a: (steps.append(1), real(*a))[1])
    # In the middle of an epoch, at the end of one within a round, and at the end of a round.
    for stop in (3, 10, 20):
        seen = len(steps)
        with monkeypatch.context() as patch:
            asked = lambda: contextlib.nullcontext(lambda: 15 if len(steps) - seen == stop else 0)  # noqa: B023, E731
            patch.setattr("training.launch.stop_signals", asked)
            run(tmp_path / "cut", *args, code=143)
    _, cut, _ = run(tmp_path / "cut", *args)
    assert all(torch.equal(cut[name], value) for name, value in whole.items())


def test_the_threshold_of_each_round_follows_from_the_contamination(tmp_path, mixture):
    """A quantile of the first round would flag fewer and fewer, since residuals shrink."""
    args = ["--mode", "rdae", "--contamination", "0.2", "--rounds", "3", "--inner_epochs", "5", "--eps", "0"]
    _, state, rows = run(tmp_path, *SMALL, *args)
    norms = (mixture.rows - state["L"]).norm(dim=1).double().numpy()
    assert float(state["threshold"]) == pytest.approx(np.quantile(norms, 0.8), rel=1e-6)
    assert of_rounds(rows, "nonzero") == pytest.approx([0.2] * 3, abs=1 / len(norms))
    assert of_rounds(rows, "threshold") == sorted(of_rounds(rows, "threshold"), reverse=True)
    spec = AutoencoderSpec(layers=(16, 8))
    step = Gradients(lambda: spec.build("dense", 64, None), epochs=5, lr=3e-3, batch_size=32, seed=0)
    found = separate(mixture.rows, step, threshold=Threshold(None, 0.2), rounds=3, eps=0)
    assert torch.equal(found.S, state["S"]) and found.threshold == float(state["threshold"])


@pytest.mark.parametrize("convention", ["lambda_mu", "lambda_n"])
def test_published_lambdas_become_thresholds(convention, tmp_path, mixture, capsys):
    args = ["--mode", "rdae", "--threshold_from", convention, "--threshold", "0.01", "--rounds", "1"]
    _, state, _ = run(tmp_path, *SMALL, *args, "--inner_epochs", "1")
    X = mixture.rows.double().numpy()
    expected = {"lambda_mu": 0.01 * 4 * np.abs(X).sum() / X.size, "lambda_n": 0.01 * len(X)}[convention]
    assert float(state["threshold"]) == pytest.approx(expected, rel=1e-6)
    assert f"lambda 0.01 is a threshold of {expected:.6g}" in capsys.readouterr().out


@pytest.mark.parametrize("eps", [0.25, 0.02, 0.002])
@pytest.mark.parametrize("stop", ["c2", "any", "all"])
def test_a_run_ends_with_the_first_round_that_meets_the_criteria(stop, eps, tmp_path, capsys):
    args = ["--mode", "rdae", "--autoencoder", "svd", "--layers", "4", "--threshold", "1.2", "--rounds", "12"]
    _, _, rows = run(tmp_path, *DIGITS, *args, "--eps", "0", "--suffix", "whole")
    c1, c2 = np.array(of_rounds(rows, "c1")) < eps, np.array(of_rounds(rows, "c2")) < eps
    met = np.flatnonzero({"c2": c2, "any": c1 | c2, "all": c1 & c2}[stop])
    capsys.readouterr()
    _, _, rows = run(tmp_path, *DIGITS, *args, "--eps", str(eps), "--stop", stop, "--suffix", f"{stop}_{eps}")
    assert len(rows) == (met[0] + 1 if len(met) else 12)
    assert ("converged" in capsys.readouterr().out) == bool(len(met))


@pytest.mark.parametrize(
    "wrong, told",
    [
        ("--threshold 0", "--threshold must lie in (0, 1e+30]"),
        ("--threshold -1", "--threshold must lie in (0, 1e+30]"),
        ("--threshold inf", "--threshold must lie in (0, 1e+30]"),
        ("--threshold nan", "--threshold"),
        ("--contamination 1", "--contamination must lie in (0, 1)"),
        ("--threshold 1 --contamination 0.1", "--contamination"),
        ("--threshold_from lambda_n", "--threshold_from lambda_n"),
        ("--epochs 3", "--epochs"),
        ("--outliers 99999", "--outliers 99999"),
        ("--autoencoder svd --layers 999", "--layers 999"),
        ("--mode dae --autoencoder svd", "--autoencoder svd"),
        ("--mode vae --corrupt normal", "--likelihood bernoulli"),
        ("--autoencoder vae", "--likelihood bernoulli"),
        ("--mode vae --autoencoder conv", "give --mode dae"),
        ("--mode dae --autoencoder vae", "give --mode vae"),
        ("--layers 0", "--layers"),
        ("--npz nowhere.npz", "--npz"),
        ("--corrupt normal --corrupt_pixels 65", "--corrupt_pixels 65"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(wrong, told, tmp_path, capsys):
    args = ["--mode", "rdae", *SMALL, "--log_root", str(tmp_path), *wrong.split()]
    assert train.main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and told in error, error
    assert not list(tmp_path.iterdir())


OF_NETWORKS = "--widths 4 --activation tanh --output linear --tied --likelihood gaussian --beta 2 --sigma 0.2".split()
OF_ROUNDS = "--stop any --eps 1e-4 --inner_epochs 1 --reinit".split()


@pytest.mark.parametrize(
    "mode, kind, idle",
    [
        ("rdae", "dense", {"widths", "likelihood", "beta", "sigma"}),
        ("dae", "conv", {"tied", "likelihood", "beta", "sigma", "stop", "eps", "inner_epochs", "reinit"}),
        ("rdae", "vae", {"widths", "output", "tied"}),
        ("rdae", "svd", {flag[2:] for flag in OF_NETWORKS if flag[:2] == "--"} | {"inner_epochs", "reinit"}),
    ],
)
def test_flags_that_change_nothing_are_reported(mode, kind, idle, tmp_path, capsys):
    args = ["--mode", mode, "--autoencoder", kind, "--rounds" if mode == "rdae" else "--epochs", "1"]
    folder, *_ = run(tmp_path, *SMALL, *OF_NETWORKS, *OF_ROUNDS, *args)
    notes = [line for line in capsys.readouterr().out.splitlines() if "has no effect" in line]
    assert {line.split()[1][2:] for line in notes} - {"lr_init"} == idle
    # Weights record those that have one, and evaluation reports the others, too.
    assert evaluate.main(["--load_path", str(folder), *OF_NETWORKS]) == 0
    told = capsys.readouterr().out
    assert {line.split()[1][2:] for line in told.splitlines() if "has no effect" in line} == idle & {
        flag[2:] for flag in OF_NETWORKS
    }


@pytest.mark.parametrize(
    "arrays, told",
    [
        ({"Y": np.zeros((4, 3))}, "no array X"),
        ({"X": np.full((4, 3), 2.0)}, "equal"),
        ({"X": np.array([[0.0, math.nan], [1.0, 2.0]])}, "value nan"),
        ({"X": np.array([[0.0, math.inf], [1.0, 2.0]])}, "value inf"),
        ({"X": np.random.default_rng(0).normal(size=(9, 4))}, "--output linear"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_in_a_line(arrays, told, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", **arrays)
    args = ["--mode", "rdae", "--npz", str(tmp_path / "a.npz"), "--log_root", str(tmp_path / "logs")]
    assert train.main([*args, "--layers", "2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error, error
    assert not (tmp_path / "logs").exists()


def test_a_table_is_split_and_rows_of_another_table_are_scored(tmp_path, capsys):
    """Planted rows are flagged; a new file of other length is scored by the reconstruction error."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(2, 12))
    X, new = (rng.normal(size=(n, 2)) @ basis for n in (60, 25))
    planted = np.zeros((2, 60), dtype=int)
    planted[0, [3, 17, 41]] = 1
    X[planted[0] > 0] += rng.normal(size=(3, 12)) * 2
    new[:4] += rng.normal(size=(4, 12)) * 4
    np.savez(tmp_path / "a.npz", X=X, y=planted[0])
    np.savez(tmp_path / "b.npz", X=new, y=np.arange(25) < 4)
    args = ["--mode", "rdae", "--npz", str(tmp_path / "a.npz"), "--one_class_idx", "0", "--outliers", "3"]
    folder, state, _ = run(tmp_path / "logs", *args, "--autoencoder", "svd", "--layers", "2", "--threshold", "2")
    assert evaluate.main(["--load_path", str(folder)]) == 0
    result = json.loads((folder / "result_rdae_outliers.json").read_text())
    assert (result["flagged"], result["precision"], result["recall"], result["roc_auc"]) == (3, 1, 1, 1)
    assert result["dataset"] == "table" and result["trained_on"] is True
    out = ["--out", str(tmp_path / "new"), "--outliers", "4"]
    assert evaluate.main(["--load_path", str(folder), "--npz", str(tmp_path / "b.npz"), *out]) == 0
    (found,) = (tmp_path / "new").glob("result_*.json")
    result = json.loads(found.read_text())
    assert (result["trained_on"], result["n_in"], result["n_out"], result["roc_auc"]) == (False, 21, 4, 1)
    assert "scored by its reconstruction error" in capsys.readouterr().out


def test_rows_without_labels_are_scored_by_weights_of_labelled_ones(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", X=rng.random((30, 4)), y=np.arange(30) % 3)
    np.savez(tmp_path / "new.npz", X=rng.random((7, 4)))
    args = ["--mode", "rdae", "--npz", str(tmp_path / "a.npz"), "--layers", "2", "--rounds", "1", "--inner_epochs", "1"]
    folder, *_ = run(tmp_path / "logs", *args)
    assert evaluate.main(["--load_path", str(folder), "--npz", str(tmp_path / "new.npz")]) == 0
    assert "was trained on rows of other labels (0, 1, 2)" in capsys.readouterr().out
    assert json.loads((folder / "result_rdae_outliers.json").read_text())["data"]["training"]["images"] == 7


def test_test_rows_of_a_table_are_scored(tmp_path, capsys):
    """By their reconstruction error; labels that training rows do not have are anomalies."""
    rng = np.random.default_rng(0)
    basis, y = rng.normal(size=(2, 12)), np.arange(40) < 6
    X, new = (rng.normal(size=(n, 2)) @ basis for n in (60, 40))
    new[y] += rng.normal(size=(6, 12))
    np.savez(tmp_path / "a.npz", X_train=X, X_test=new, y_test=y)
    args = ["--mode", "rdae", "--npz", str(tmp_path / "a.npz"), "--autoencoder", "svd", "--layers", "2"]
    folder, state, _ = run(tmp_path / "logs", *args, "--threshold", "1")
    assert evaluate.main(["--load_path", str(folder)]) == 0
    result = json.loads((folder / "result_rdae_outliers.json").read_text())
    assert result["test"] == {"roc_auc": 1, "pr_auc": pytest.approx(1)} and "roc_auc" not in result
    lines = (folder / result["scores"]["test"]).read_text().splitlines()
    V = state["autoencoder.components"].double().numpy()
    expected = np.linalg.norm(new - new @ V @ V.T, axis=1)
    assert [float(line.split(",")[-1]) for line in lines[1:]] == pytest.approx(expected.tolist(), abs=1e-4)
    assert evaluate.main(["--load_path", str(folder), "--mode", "ood_reconstruction"]) == 2
    assert "evaluated by rdae_outliers" in capsys.readouterr().err


def test_rows_that_were_trained_on_are_no_test_rows(tmp_path):
    """A file with one matrix, of which some rows are used, with noise of another draw."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", X=rng.random((40, 6)), y=np.arange(40) % 2)
    args = ["--mode", "rdae", "--npz", str(tmp_path / "a.npz"), "--autoencoder", "svd", "--layers", "2"]
    folder, *_ = run(tmp_path / "logs", *args, "--one_class_idx", "0", "--outliers", "5", "--corrupt", "uniform",
                     "--corrupt_pixels", "2")  # fmt: skip
    for mode in ("rdae_outliers", "rdae_denoise"):
        assert evaluate.main(["--load_path", str(folder), "--mode", mode]) == 0
        result = json.loads((folder / f"result_{mode}.json").read_text())
        assert not {"test", "code_accuracy"} & result.keys() and list(result["scores"]) == ["training"]
