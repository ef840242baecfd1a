"""Evaluation of a data matrix and its parts, by way of runs on digits and against scikit-learn."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import accuracy_score, average_precision_score, precision_recall_fscore_support, roc_auc_score

import eval as evaluate
import train
from datasets import DataSource, split_one_class
from datasets.corrupt import CorruptSpec
from evals.extract import luma
from evals.robust import _thinned, curve, flag_metrics, ranking_metrics

NOISY = "--corrupt normal --corrupt_pixels 5 --data_seed 2".split()
KINDS = {
    "denoise": [*NOISY, "--penalty", "l1", "--threshold", "0.5"],
    "outliers": "--one_class_idx 4 --outliers 9 --threshold 0.9 --data_seed 3 --seed 7".split(),
    "features": "--corrupt uniform --corrupt_fixed --corrupt_pixels 4 --penalty l21_cols --threshold 9".split(),
    "plain": ["--mode", "dae", "--epochs", "20", *NOISY],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of each kind."""
    logs, known = tmp_path_factory.mktemp("logs"), {}

    def run(kind):
        if kind not in known:
            own = [] if kind == "plain" else "--mode rdae --rounds 4 --inner_epochs 20".split()
            args = "--dataset digits --layers 32 16 --batch_size 32 --lr_init 3e-3 --device cpu".split()
            folder = logs / kind
            assert train.main([*args, *own, *KINDS[kind], "--log_root", str(folder)]) == 0
            (known[kind],) = folder.iterdir()
        return known[kind]

    return run


@pytest.fixture
def of(trained, tmp_path):
    """Evaluate a run of a kind: its result, its table of a line an image, and its folder."""

    def evaluated(kind, mode, *more):
        folder = shutil.copytree(trained(kind), tmp_path / kind, dirs_exist_ok=True)
        assert evaluate.main(["--load_path", str(folder), "--mode", f"rdae_{mode}", *more]) == 0
        result = json.loads((folder / f"result_rdae_{mode}.json").read_text())
        (table,) = result["scores"].values()
        with (folder / table).open() as file:
            return result, list(csv.DictReader(file)), folder

    return evaluated


def noisy_table(one_class=None, **noise):
    from dataclasses import replace

    split = split_one_class("digits", DataSource(), one_class, None)
    return replace(split, corrupt=CorruptSpec(**noise))


def test_noise_is_measured_where_it_is(of):
    result, rows, folder = of("denoise", "denoise")
    state = torch.load(folder / "last.model", weights_only=True)
    split = noisy_table(corrupt="normal", corrupt_pixels=5, data_seed=2)
    table = split.train_table()
    L, S, mask, clean = (np.float64(x) for x in (state["L"], state["S"], table.mask, table.clean))
    error, before = (L - clean) ** 2, (np.float64(table.rows) - clean) ** 2
    for name, place in {"all": mask >= 0, "corrupted": mask > 0, "intact": mask == 0}.items():
        assert result["mse"][name] == pytest.approx(error[place].mean(), rel=1e-6)
        assert result["psnr"][name] == pytest.approx(-10 * np.log10(error[place].mean()), rel=1e-6)
        assert result["noisy_mse"][name] == pytest.approx(before[place].mean(), rel=1e-6)
    assert mask.sum(1).tolist() == [5] * len(mask) and result["noisy_mse"]["intact"] == 0
    precision, recall, _, _ = precision_recall_fscore_support(mask.ravel() > 0, S.ravel() != 0, average="binary")
    assert result["support"] == pytest.approx({"precision": precision, "recall": recall})
    assert 0.5 < precision and 0.4 < recall and result["mse"]["all"] < 0.4 * result["noisy_mse"]["all"]
    assert [float(row["mse"]) for row in rows] == pytest.approx(error.mean(1).tolist(), rel=1e-5)
    assert result["nonzero"] == pytest.approx((S != 0).mean())


def test_of_noise_everywhere_nothing_is_intact(of):
    result, *_ = of("plain", "denoise", "--corrupt_pixels", "64")
    assert set(result["mse"]) == set(result["psnr"]) == set(result["noisy_mse"]) == {"all", "corrupted"}


def test_codes_are_judged_by_a_forest_on_other_images(of):
    result, _, folder = of("plain", "denoise")
    state = torch.load(folder / "last.model", weights_only=True)
    split = noisy_table(corrupt="normal", corrupt_pixels=5, data_seed=2)

    def codes(table):
        weights = [state[f"autoencoder.encoder.{n}.{kind}"] for n in (0, 1) for kind in ("weight", "bias")]
        hidden = torch.sigmoid(table.rows @ weights[0].T + weights[1])
        return (hidden @ weights[2].T + weights[3]).numpy()

    known, test = split.train_table(), split.test_table(1)
    forest = RandomForestClassifier(100, random_state=0).fit(codes(known), known.labels)
    assert result["code_accuracy"] == pytest.approx((forest.predict(codes(test)) == test.labels.numpy()).mean())
    assert result["code_accuracy"] > 0.5 and "support" not in result


def test_outliers_are_the_rows_with_an_entry_in_S(of):
    result, rows, folder = of("outliers", "outliers")
    state = torch.load(folder / "last.model", weights_only=True)
    flagged = (state["S"] != 0).any(1).numpy()
    outlying = np.array([row["label"] != "4" for row in rows])
    assert outlying.sum() == 9 == result["n_out"] and [row["flagged"] == "True" for row in rows] == flagged.tolist()
    precision, recall, f1, _ = precision_recall_fscore_support(outlying, flagged, average="binary", zero_division=0)
    assert [result[k] for k in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])
    scores = [float(row["score"]) for row in rows]
    assert result["roc_auc"] == pytest.approx(roc_auc_score(outlying, scores)) and result["roc_auc"] > 0.9
    assert result["oracle_f1"] >= result["f1"] and result["seed"] == 0  # evaluation's own; the data is that of training
    assert result["trained_on"] is True


def test_other_images_are_scored_by_their_reconstruction(of, capsys):
    result, rows, folder = of("outliers", "outliers")
    # Twice in one folder: a result of other data has a name of its own.
    args = ["--load_path", str(folder), "--outliers", "30", "--data_seed", "5"]
    assert evaluate.main(args) == 0 and "trained on other data" in capsys.readouterr().out
    (other,) = [p for p in folder.glob("result_rdae_outliers_*.json")]
    found = json.loads(other.read_text())
    assert (found["n_out"], found["trained_on"]) == (30, False) and found["roc_auc"] > 0.9
    assert json.loads((folder / "result_rdae_outliers.json").read_text())["n_out"] == 9


def test_weights_of_pictures_score_a_table_by_naming_its_file(of, tmp_path, capsys):
    """As long as its rows are as long; --dataset table need not be given."""
    np.savez(tmp_path / "a.npz", X=np.random.default_rng(0).random((20, 64)))
    result, rows, _ = of("outliers", "outliers", "--npz", str(tmp_path / "a.npz"), "--out", str(tmp_path / "outliers"))
    assert result["dataset"] == "table" and len(rows) == 20 and result["trained_on"] is False
    assert "was trained on digits" in capsys.readouterr().out


@pytest.fixture
def pictures(tmp_path):
    """A folder of 16-bit pictures of two classes without a test split, and the weights trained on it."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
        for n in range(6):
            values = rng.integers(100, 4000, (8, 8), dtype=np.uint16)
            Image.fromarray(values).save(tmp_path / "pictures" / "train" / name / f"{n}.png")
    args = "--mode rdae --dataset folder --image_size 8 --layers 4 --rounds 1 --inner_epochs 1 --device cpu".split()
    assert train.main([*args, "--data_path", str(tmp_path / "pictures"), "--log_root", str(tmp_path / "logs")]) == 0
    (folder,) = (tmp_path / "logs").iterdir()
    return folder


def test_noise_is_measured_without_test_images(pictures, capsys):
    assert evaluate.main(["--load_path", str(pictures), "--mode", "rdae_denoise"]) == 0
    told = capsys.readouterr().out
    assert "note: codes are not judged without test images (--data_path: no pictures" in told
    result = json.loads((pictures / "result_rdae_denoise.json").read_text())
    assert result["mse"]["all"] > 0 and "code_accuracy" not in result


def test_pictures_that_are_read_otherwise_are_other_data(pictures, capsys):
    """L and S are of the values that they had in training."""
    assert evaluate.main(["--load_path", str(pictures)]) == 0
    assert json.loads((pictures / "result_rdae_outliers.json").read_text())["trained_on"] is True
    assert evaluate.main(["--load_path", str(pictures), "--value_range", "0", "65535"]) == 0
    assert "trained on other data" in capsys.readouterr().out
    (other,) = pictures.glob("result_rdae_outliers_*.json")
    assert json.loads(other.read_text())["trained_on"] is False


@pytest.mark.parametrize("more, told", [("--image_size 16", "--image_size: "), ("--npz", "--npz: ")])
def test_rows_of_another_length_are_refused_with_a_remedy(more, told, trained, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", X=np.random.default_rng(0).random((20, 63)))
    more = [*more.split(), *([str(tmp_path / "a.npz")] if more == "--npz" else [])]
    args = ["--load_path", str(trained("outliers")), "--mode", "rdae_outliers", *more]
    assert evaluate.main([*args, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error and "takes rows of 64 entries" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_sparse_part_a_quantile_flags(of):
    result, rows, _ = of("plain", "outliers", "--contamination", "0.03")
    scores = np.array([float(row["score"]) for row in rows])
    assert result["threshold"] == pytest.approx(np.quantile(scores, 0.97), rel=1e-6)
    assert result["flagged"] == (scores > result["threshold"]).sum() and "precision" not in result


def test_corrupted_features_are_found_exactly(of):
    result, rows, folder = of("features", "features")
    assert (result["flagged"], result["precision"], result["recall"], result["accuracy"]) == (4, 1, 1, 1)
    assert [row["flagged"] for row in rows] == [row["corrupted"] for row in rows]
    with Image.open(folder / "rdae_features.png") as picture:
        assert picture.width > 3 * picture.height


def test_features_need_a_sparse_part(trained, capsys):
    assert evaluate.main(["--load_path", str(trained("plain")), "--mode", "rdae_features"]) == 2
    assert "was trained by --mode dae" in capsys.readouterr().err


def test_a_detector_scores_test_images_by_their_reconstruction(trained, tmp_path):
    folder = shutil.copytree(trained("outliers"), tmp_path / "run")
    assert evaluate.main(["--load_path", str(folder), "--mode", "ood_reconstruction", "--save_score"]) == 0
    result = json.loads((folder / "result_ood_reconstruction_reconstruction.json").read_text())
    state = torch.load(folder / "last.model", weights_only=True)
    test = split_one_class("digits", DataSource(), 4, None).test_table(1)
    w = {k.removeprefix("autoencoder."): v for k, v in state.items()}
    h = torch.sigmoid(test.rows @ w["encoder.0.weight"].T + w["encoder.0.bias"])
    h = torch.sigmoid(
        (h @ w["encoder.1.weight"].T + w["encoder.1.bias"]) @ w["decoder.0.weight"].T + w["decoder.0.bias"]
    )
    scores = -(test.rows - torch.sigmoid(h @ w["decoder.1.weight"].T + w["decoder.1.bias"])).norm(dim=1)
    with (folder / "scores_ood_reconstruction_reconstruction_digits.csv").open() as file:
        found = [float(row["score"]) for row in csv.DictReader(file)]
    assert found == pytest.approx(scores.tolist(), rel=1e-4)
    assert result["pooled"] == pytest.approx(roc_auc_score(test.labels == 4, scores), abs=1e-3) and result["mean"] > 0.9


def test_known_flags(golden):
    """Any non-zero entry flags a row; four of them, the nominal label, as well."""
    g = {name: np.asarray(value) for name, value in golden("rdae_a").items()}
    outlying = g["out_y"] != g["nominal_label"]
    flagged = (g["out_S"] != 0).any(1)
    assert np.array_equal(flagged, g["out_pred"] == 1)
    found = flag_metrics(flagged, outlying)
    assert list(found.values()) == pytest.approx(g["out_prf1acc"].tolist(), abs=1e-12)
    assert list(found) == ["precision", "recall", "f1", "accuracy"]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_flags_are_counted_as_scikit_learn_does(share):
    rng = np.random.default_rng(0)
    flagged, outlying = rng.random(200) < share, rng.random(200) < 0.2
    found = flag_metrics(flagged, outlying)
    expected = precision_recall_fscore_support(outlying, flagged, average="binary", zero_division=0)[:3]
    assert list(found.values()) == pytest.approx([*expected, accuracy_score(outlying, flagged)])
    assert flag_metrics(flagged, np.zeros(200, bool))["f1"] == 0


def test_a_curve_has_the_counts_of_every_threshold():
    rng = np.random.default_rng(1)
    scores, outlying = rng.integers(0, 12, 80).astype(float), rng.random(80) < 0.3  # many ties
    found = curve(scores, outlying)
    assert np.all(np.diff(found["threshold"]) > 0) and len(found["threshold"]) == len(np.unique(scores))
    for t, precision, recall, f1 in zip(*found.values(), strict=True):
        naive = flag_metrics(scores > t, outlying)
        assert [precision, recall, f1] == pytest.approx([naive["precision"], naive["recall"], naive["f1"]])
    assert found["recall"][0] == 1 and (scores > found["threshold"][0]).all()
    ranked = ranking_metrics(scores, outlying)
    assert ranked["roc_auc"] == pytest.approx(roc_auc_score(outlying, scores))
    assert ranked["pr_auc"] == pytest.approx(average_precision_score(outlying, scores))


def test_a_drawn_curve_has_the_best_point():
    """Of ten thousand scores, most of which lie close together: few points are kept of them."""
    rng = np.random.default_rng(2)
    scores = np.concatenate([rng.normal(size=10_000) * 1e-3, [50.0]])
    whole = curve(scores, np.append(scores[:-1] > 1e-3, True))
    drawn = _thinned(whole)
    assert len(drawn["f1"]) <= 401 < len(whole["f1"]) and np.all(np.diff(drawn["threshold"]) > 0)
    best = whole["f1"].argmax()
    assert drawn["f1"].max() == whole["f1"][best] and whole["threshold"][best] in drawn["threshold"]


def test_grey_pictures_stay_what_they_are_and_green_weighs_most():
    grey = torch.rand(2, 1, 4, 4).expand(-1, 3, -1, -1)
    assert torch.equal(luma(grey), grey[:, :1])
    colours = torch.eye(3)[:, :, None, None]
    assert luma(colours).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])


def test_sheets_and_curves_are_drawn(of):
    sizes = {}
    for kind, mode in (("denoise", "denoise"), ("outliers", "outliers")):
        _, _, folder = of(kind, mode)
        with Image.open(folder / f"rdae_{mode}.png") as picture:
            sizes[mode] = picture.size
            assert np.asarray(picture.convert("L")).std() > 20
    assert sizes["denoise"][0] > 2 * sizes["denoise"][1]  # ten images beside each other, four rows
