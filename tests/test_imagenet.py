"""The ImageNet-30 path through the real commands, on small pictures: workers, cache, both stages, outlier sets."""

import json

import pytest
import torch

import eval as evaluate
import train
import train_cocsr
import tsne
from datasets.pictures import centre
from tests.conftest import SHIFT
from tests.datasets.test_pictures import photographs

SMALL = ["--dataset", "imagenet", "--model", "resnet8", "--image_size", "16", *SHIFT]
SPARSE = ["--sr_dict_size", "8", "--invert_sr_feature_norm"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    photographs(root, {"one_class_train/acorn": 9, "one_class_train/tank": 8, "one_class_test/acorn": 5})
    photographs(root, {"one_class_test/tank": 4})
    return root


def test_both_stages_and_evaluation_of_one_class(data, tmp_path, capsys):
    common = [*SMALL, "--data_path", str(data), "--one_class_idx", "1"]
    log = ["--log_root", str(tmp_path), "--batch_size", "4"]
    weights = []
    for workers, cache in (("0", []), ("2", ["--image_cache", str(tmp_path / "cache")])):
        args = [*common, *log, "--mode", "simclr_CSI", "--epochs", "2", "--num_worker", workers, *cache]
        assert train.main([*args, "--suffix", workers]) == 0, capsys.readouterr().err
        stage1 = tmp_path / f"imagenet_resnet8_unsup_simclr_CSI_shift_rot_bmix_one_class_1_{workers}"
        weights.append(torch.load(stage1 / "last.model", weights_only=True))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])  # workers and cache: same pixels
    assert len(weights[0]["linear.weight"]) == 2
    args = [*common, *log, *SPARSE, "--resume_path", str(stage1), "--epochs", "3", "--ini_sr_dict_train"]
    assert train_cocsr.main([*args, "--num_worker", "0"]) == 0, capsys.readouterr().err
    (stage2,) = tmp_path.glob("*cocsr_dict*")
    assert evaluate.main([*common, *SPARSE, "--mode", "ood_pre_cocsr_refmix", "--load_path", str(stage2)]) == 0
    result = json.loads((stage2 / "result_ood_pre_cocsr_refmix_CSI_sr.json").read_text())
    assert set(result["auroc"]) == {"one_class_0"} and (result["n_in"], result["n_out"]) == (4, 5)


def test_all_classes_need_the_published_outlier_sets_or_others_only_in_evaluation(data, tmp_path, capsys):
    common = [*SMALL, "--data_path", str(data)]
    args = [*common, "--mode", "simclr_CSI", "--epochs", "1", "--batch_size", "8", "--num_worker", "0"]
    assert train.main([*args, "--log_root", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    before = sorted(run.iterdir())
    assert evaluate.main([*common, "--load_path", str(run)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: --ood_dataset: not found:")
    for name in ("cub", "stanford_dogs", "flowers102", "places365", "food_101", "caltech_256", "dtd", "pets"):
        assert f"{name} (" in told
    assert sorted(run.iterdir()) == before
    photographs(tmp_path / "others", {"../dtd/images/a": 3})
    args = [*common, "--load_path", str(run), "--ood_dataset", "dtd", "interp", "--test_batch_size", "4"]
    assert evaluate.main([*args, "--ood_data_path", str(tmp_path / "others"), "--save_score"]) == 0
    result = json.loads((run / "result_ood_pre_CSI.json").read_text())
    assert set(result["auroc"]) == {"dtd", "interp"} and (result["n_in"], result["n_out"]) == (9, 3 + 9)
    assert (run / "scores_ood_pre_CSI_interp.csv").is_file()


def test_imagenet_1k_is_trained_with_labels_and_tested_on_centre_crops(tmp_path, capsys, monkeypatch):
    photographs(tmp_path, {"train/n01": 12, "train/n02": 12, "val/n01": 3, "val/n02": 4})
    args = ["--dataset", "imagenet1k", "--data_path", str(tmp_path), "--image_size", "16", "--model", "sdnet8"]
    own = ["--mode", "supervised", "--epochs", "1", "--batch_size", "8", "--held_out", "4", "--num_worker", "0"]
    assert train.main([*args, *own, "--log_root", str(tmp_path / "logs")]) == 0, capsys.readouterr().err
    run = tmp_path / "logs/imagenet1k_sdnet8_supervised"
    assert "20 images of all classes" in (run / "log.txt").read_text()
    for weights in ("last", "best"):
        assert evaluate.main(["--load_path", str(run / f"{weights}.model")]) == 0, capsys.readouterr().err
    result = json.loads((run / "accuracy_test_acc.json").read_text())
    assert (result["n"], result["classes"]) == (7, 2) and result["dataset"] == "imagenet1k"
    assert (run / "accuracy_test_acc_best.json").is_file()
    # Of training pictures only those are decoded that are looked at.
    read = []
    monkeypatch.setattr("datasets.pictures.centre", lambda pixels, side: (read.append(1), centre(pixels, side))[1])
    few = "--noises gaussian --noise_levels 1 --lambdas 0.1 0.5".split()
    assert evaluate.main(["--load_path", str(run), "--mode", "noise_lambda", *few]) == 0, capsys.readouterr().err
    found = json.loads((run / "result_noise_lambda.json").read_text())
    assert (found["n"], found["n_calibration"]) == (7, 4)
    args = ["--load_path", str(run), "--mode", "sdnet_inside", "--inside_images", "2"]
    before = len(read)
    assert tsne.main(args) == 0, capsys.readouterr().err
    shown = json.loads((run / "result_sdnet_inside.json").read_text())["shown"]
    assert sorted(image["class"] for image in shown) == ["n01", "n02"] and 20 <= len(read) - before <= 26


def test_mean_sparse_looks_at_pictures_as_they_are_decoded(tmp_path, capsys):
    photographs(tmp_path, {"train/n01": 12, "train/n02": 12, "val/n01": 3, "val/n02": 4})
    data = ["--dataset", "imagenet1k", "--data_path", str(tmp_path), "--image_size", "16", "--model", "resnet8"]
    own = ["--mode", "supervised", "--epochs", "1", "--batch_size", "8", "--held_out", "6", "--num_worker", "0"]
    logs = ["--log_root", str(tmp_path / "logs")]
    assert train.main([*data, *own, *logs]) == 0, capsys.readouterr().err
    base = tmp_path / "logs/imagenet1k_resnet8_supervised"
    assert train.main(["--mode", "meansparse", "--load_path", str(base), *logs]) == 0, capsys.readouterr().err
    run = tmp_path / "logs/imagenet1k_resnet8_meansparse_activations"
    assert "statistics of 18 images" in (run / "log.txt").read_text()
    scan = ["--mode", "alpha_scan", "--load_path", str(run), "--attack_steps", "1", "--alphas", "0.2"]
    capsys.readouterr()
    assert evaluate.main(scan) == 2 and "--scan_images: pictures of this data set" in capsys.readouterr().err
    assert evaluate.main([*scan, "--scan_images", "4"]) == 0, capsys.readouterr().err
    found = json.loads((run / "result_alpha_scan.json").read_text())
    assert found["n"] == 4 and [row["alpha"] for row in found["table"]] == [0, 0.2]
