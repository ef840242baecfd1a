"""Pixels against pixels: the scores of the baseline, from the definitions."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.svm import OneClassSVM

from datasets import DataSource, split_one_class
from scripts.pixel_baseline import main


def test_both_baselines_score_test_images_by_the_training_images_of_the_class(tmp_path, capsys):
    args = ["--dataset", "digits", "--one_class_idx", "3", "--image_size", "8", "--log_root", str(tmp_path)]
    assert main(args) == 0
    split = split_one_class("digits", DataSource(image_size=8), 3, 8)
    train, test = (data.images.flatten(1).numpy() / 255 for data in (split.train(), split.test()))
    labels = split.test().labels.numpy()
    distance = np.sqrt(((test[:, None] - train[None]) ** 2).sum(2)).min(1)
    svm = OneClassSVM(kernel="rbf", gamma="scale", nu=0.1).fit(train)
    for name, scores in (("nearest", -distance), ("ocsvm", svm.decision_function(test))):
        (path,) = tmp_path.glob(f"*/result_pixels_{name}.json")
        result = json.loads(path.read_text())
        for c in (c for c in range(10) if c != 3):
            pair = (labels == 3) | (labels == c)
            expected = roc_auc_score(labels[pair] == 3, scores[pair])
            assert result["auroc"][f"one_class_{c}"] == pytest.approx(expected, abs=2e-3)
        assert result["mean"] == pytest.approx(np.mean(list(result["auroc"].values())))
        assert (result["n_in"], result["n_out"]) == (61, 538)


def test_a_dry_run_and_a_test_split_without_anomalies_write_nothing(tmp_path, capsys):
    args = ["--dataset", "digits", "--one_class_idx", "3", "--log_root", str(tmp_path / "logs")]
    assert main([*args, "--dry_run"]) == 0
    assert json.loads(capsys.readouterr().out)["run_dir"].endswith("digits_pixels_one_class_3")
    for split in ("train", "test"):
        (tmp_path / "data" / split / "good").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / split / "good" / "0.png")
    args = ["--dataset", "folder", "--data_path", str(tmp_path / "data"), "--one_class_idx", "good"]
    assert main([*args, "--log_root", str(tmp_path / "logs")]) == 2
    assert "all test images are of class good" in capsys.readouterr().err and not (tmp_path / "logs").exists()
