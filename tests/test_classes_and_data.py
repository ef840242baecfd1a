"""What a run depends on is recorded and compared: its images, the names of classes, what a mode fills in itself."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluate
import train
import train_cocsr
import tsne
from common.files import load_tensors, read_facts
from common.run import Run, epoch_of
from tests.conftest import SHIFT, TINY
from tests.test_commands import refused

SMALL = "--dataset folder --image_size 8 --model resnet8 --num_worker 1".split()
SPARSE = "--sr_dict_size 6 --invert_sr_feature_norm".split()


def fill(root: Path, counts: dict[str, int], seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name / f"{n:02}.png")


@pytest.fixture(scope="module")
def ships(tmp_path_factory):
    """A run of both stages on class `ship`, the second of two: (folder of the data, logs, stage 1, stage 2)."""
    root = tmp_path_factory.mktemp("ships")
    fill(root / "data", {"train/dog": 6, "train/ship": 8, "test/dog": 4, "test/ship": 4, "test/wreck": 3})
    common = [*SMALL, *SHIFT, "--data_path", str(root / "data"), "--log_root", str(root / "logs")]
    common += ["--one_class_idx", "1", "--batch_size", "4"]
    assert train.main([*common, "--mode", "simclr_CSI", "--epochs", "1"]) == 0
    (stage1,) = (root / "logs").iterdir()
    assert train_cocsr.main([*common, *SPARSE, "--resume_path", str(stage1), "--epochs", "2"]) == 0
    (stage2,) = (folder for folder in (root / "logs").iterdir() if folder != stage1)
    return root / "data", stage1, stage2


@pytest.fixture
def grown(ships, tmp_path) -> Path:
    """The same data, and a class more, which moves the others."""
    shutil.copytree(ships[0], tmp_path / "grown")
    fill(tmp_path / "grown", {"train/cat": 8, "test/cat": 4}, seed=1)
    return tmp_path / "grown"


def of(data: Path, *more: object) -> list[str]:
    return [*SMALL, *SHIFT, "--data_path", str(data), *map(str, more)]


# ------------------------------------------------------------------------------------------------ names of classes


def test_the_name_of_the_class_is_in_weights_results_scores_and_log(ships, tmp_path, capsys):
    data, stage1, stage2 = ships
    for path in (
        stage1 / "last.model",
        stage1 / "last.resume",
        stage2 / "last.cocsr_model",
        stage2 / "start.cocsr_model",
    ):
        facts = read_facts(path)
        assert facts["data"]["class_name"] == "ship" and facts["data"]["classes"] == ["dog", "ship"]
        assert facts["data"]["images"] == 8 and len(facts["data"]["fingerprint"]) == 16
    assert "8 images of class 1 (ship)" in (stage1 / "log.txt").read_text()
    args = of(data, "--load_path", stage1, "--one_class_idx", 1, "--save_score", "--out", tmp_path)
    assert evaluate.main(args) == 0
    assert "class 1 (ship) normal" in capsys.readouterr().out
    result = json.loads((tmp_path / "result_ood_pre_CSI.json").read_text())
    assert result["class_name"] == "ship" and result["one_class_idx"] == 1
    assert result["data"]["folder"]["images"] == 11 and len(result["data"]["folder"]["fingerprint"]) == 16
    assert result["scores"] == {"folder": "scores_ood_pre_CSI_folder.csv"}
    rows = list(csv.DictReader((tmp_path / "scores_ood_pre_CSI_folder.csv").open()))
    assert [row["class"] for row in rows] == ["dog"] * 4 + ["ship"] * 4 + ["wreck"] * 3


def test_a_class_that_was_added_does_not_make_a_ship_a_cat(ships, grown, tmp_path, capsys):
    _, stage1, stage2 = ships
    own = ["--load_path", stage1, "--out", tmp_path / "o"]
    told = refused(capsys, evaluate.main(of(grown, *own, "--one_class_idx", 1)), "--one_class_idx ship", "'ship'")
    assert "'dog'" in told and not (tmp_path / "o").exists()
    assert evaluate.main(of(grown, *own, "--one_class_idx", "ship")) == 0
    assert evaluate.main(of(grown, *own, "--one_class_idx", 2, "--ood_score", "knn")) == 0
    stage = of(grown, *SPARSE, "--resume_path", stage1, "--epochs", 3, "--log_root", tmp_path / "l")
    refused(capsys, train_cocsr.main([*stage, "--one_class_idx", "1"]), "--one_class_idx ship")
    drawn = of(grown, "--mode", "ood_pre_tsne_dict", "--load_path", stage2, "--one_class_idx", 1, "--sr_dict_size", 6)
    refused(capsys, tsne.main(drawn), "--one_class_idx ship")
    longer = of(grown, "--mode", "simclr_CSI", "--resume_path", stage1, "--epochs", 3, "--log_root", tmp_path / "l")
    refused(capsys, train.main([*longer, "--one_class_idx", "1"]), "2 classes, the data set has 3")
    assert not (tmp_path / "l").exists()


def test_weights_of_all_classes_are_for_the_same_ones(ships, grown, tmp_path, capsys):
    data = ships[0]
    args = ["--mode", "simclr", "--epochs", 1, "--error_step", 0, "--log_root", tmp_path / "l"]
    assert train.main(of(data, *args)) == 0
    (run,) = (tmp_path / "l").iterdir()
    assert evaluate.main([*SMALL, "--data_path", str(data), "--load_path", str(run)]) == 0
    assert evaluate.main([*SMALL, "--data_path", str(data), "--load_path", str(run), "--one_class_idx", "1"]) == 0
    assert "was trained on all classes; normal here: class 1 (ship)" in capsys.readouterr().out
    code = evaluate.main([*SMALL, "--data_path", str(grown), "--load_path", str(run)])
    assert "(dog, ship)" in refused(capsys, code, "--data_path", "(cat, dog, ship)")


def test_training_goes_on_with_the_same_classes_only(ships, tmp_path, capsys):
    """Whose number is the same, so that no head is of the wrong size."""
    data, stage1, _ = ships
    shutil.copytree(data, tmp_path / "data")
    for split in ("train", "test"):
        (tmp_path / "data" / split / "dog").rename(tmp_path / "data" / split / "tug")
    logs = ["--log_root", tmp_path / "l"]
    longer = of(tmp_path / "data", "--mode", "simclr_CSI", "--resume_path", stage1, "--epochs", 3, *logs)
    refused(capsys, train.main([*longer, "--one_class_idx", "1"]), "--one_class_idx ship", "1 is 'tug'")
    common = [*SMALL, "--epochs", "1", "--error_step", "0", "--log_root", str(tmp_path / "l")]
    assert train.main([*common, "--mode", "sup_simclr", "--data_path", str(data)]) == 0
    (start,) = (tmp_path / "l").iterdir()
    heads = [*common, "--mode", "sup_linear", "--load_path", str(start)]
    code = train.main([*heads, "--data_path", str(tmp_path / "data")])
    assert "(ship, tug)" in refused(capsys, code, "--data_path", "(dog, ship)")
    assert train.main([*heads, "--data_path", str(data)]) == 0


def test_a_class_may_be_given_by_name_and_an_unknown_one_is_refused(ships, tmp_path, capsys):
    args = of(ships[0], "--mode", "simclr", "--epochs", 1, "--log_root", tmp_path)
    assert train.main([*args, "--one_class_idx", "ship"]) == 0
    assert (tmp_path / "folder_resnet8_unsup_simclr_one_class_ship").is_dir()
    assert "of class 1 (ship)" in capsys.readouterr().out
    refused(capsys, train.main([*args, "--one_class_idx", "plane"]), "--one_class_idx plane", "dog, ship")
    # A class that only the test split has is never normal.
    refused(capsys, train.main([*args, "--one_class_idx", "wreck"]), "--one_class_idx wreck")


def test_weights_of_another_data_set_are_reported_and_those_without_facts_evaluated(ships, stage1, tmp_path, capsys):
    data = ships[0]
    args = of(data, "--one_class_idx", 1, "--no_strict", "--out", tmp_path, "--load_path")
    assert evaluate.main([*args, str(stage1)]) == 0
    assert "was trained on digits, class '3'; here it is folder" in capsys.readouterr().out
    torch.save(torch.load(ships[1] / "last.model", weights_only=True), tmp_path / "bare.model")
    assert evaluate.main([*of(data, "--one_class_idx", 0), "--load_path", str(tmp_path / "bare.model")]) == 0


# ------------------------------------------------------------------------------------------------------ the images


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run that stands at the second step of its second epoch: (folder of the data, its flags, logs)."""
    import training.loop as loop

    fill(tmp_path / "data", {"train/good": 8})
    args = [*SMALL, "--mode", "simclr", "--one_class_idx", "good", "--epochs", "3", "--batch_size", "2"]
    args += ["--log_root", str(tmp_path / "logs")]
    real, steps = loop.descend, []

    def descend(recipe, batch, world):
        steps.append(batch)
        return real(recipe, batch, world)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "descend", descend)
        patch.setattr("training.launch.stop_signals", lambda: _asked(lambda: 15 if len(steps) == 6 else 0))
        assert train.main([*args, "--data_path", str(tmp_path / "data")]) == 143
    return tmp_path / "data", args, tmp_path / "logs"


class _asked:
    def __init__(self, answer):
        self.answer = answer

    def __enter__(self):
        return self.answer

    def __exit__(self, *_):
        pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_images_that_were_removed_replaced_or_renamed_are_refused_and_moved_ones_are_not(interrupted, capsys):
    data, args, logs = interrupted
    run = [*args, "--data_path", str(data)]
    before = contents(logs)
    good = data / "train/good"
    whole = (good / "03.png").read_bytes()
    (good / "03.png").unlink()
    refused(capsys, train.main(run), "--data_path", "images 8, now 7", "--suffix")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(good / "03.png")
    refused(capsys, train.main(run), "--data_path", "their content")
    (good / "03.png").write_bytes(whole)
    (good / "03.png").rename(good / "99.png")
    refused(capsys, train.main(run), "--data_path", "their content")
    (good / "99.png").rename(good / "03.png")
    assert contents(logs) == before
    data.rename(data.with_name("moved"))
    assert train.main([*args, "--data_path", str(data.with_name("moved"))]) == 0
    assert "continuing after epoch 1, step 2 of 4" in capsys.readouterr().out


def test_a_run_from_before_images_were_recorded_ends_in_no_traceback(interrupted, capsys):
    data, args, logs = interrupted
    config = next(logs.glob("*/args.json"))
    written = json.loads(config.read_text())
    del written["data"]
    config.write_text(json.dumps(written))
    for n in range(2, 8):
        (data / f"train/good/{n:02}.png").unlink()
    refused(capsys, train.main([*args, "--data_path", str(data)]), "--data_path", "step 2 of an epoch, which now has 1")


def test_a_class_that_was_added_does_not_end_a_resumed_run_in_a_traceback(interrupted, capsys):
    data, args, _ = interrupted
    fill(data, {"train/another": 3})
    refused(capsys, train.main([*args, "--data_path", str(data)]), "--data_path", "their classes")


def test_scores_fitted_to_other_images_are_reported(ships, tmp_path, capsys):
    data, stage1, _ = ships
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/train/ship/00.png").unlink()
    args = of(tmp_path / "data", "--load_path", stage1, "--one_class_idx", 1, "--out", tmp_path / "o")
    assert evaluate.main(args) == 0
    assert "scores are fitted to other images" in capsys.readouterr().out
    assert evaluate.main(of(data, "--load_path", stage1, "--one_class_idx", 1, "--out", tmp_path / "p")) == 0
    assert "other images" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- what else counts


def test_what_a_mode_fills_in_itself_is_compared(ships, tmp_path, capsys):
    args = of(ships[0], "--mode", "sup_simclr", "--epochs", 2, "--error_step", 0, "--log_root", tmp_path)
    assert train.main([*args, "--batch_size", "7"]) == 0
    (run,) = tmp_path.iterdir()
    assert json.loads((run / "args.json").read_text())["flags"]["temperature"] == 0.07
    code = train.main([*args, "--batch_size", "7", "--temperature", "0.5"])
    refused(capsys, code, "--temperature was 0.07, is 0.5")
    assert train.main([*args, "--batch_size", "7", "--temperature", "0.07"]) == 0  # the same said aloud


def test_weights_of_an_earlier_epoch_are_of_that_epoch(tmp_path, capsys):
    args = [*TINY, "--mode", "simclr", "--save_step", "1", "--log_root", str(tmp_path)]
    assert train.main([*args, "--epochs", "3"]) == 0
    (run,) = tmp_path.iterdir()
    assert load_tensors(run / "previous.resume", flag="x")["epoch"] == 2
    for name in ("previous.model", "previous.resume"):
        more = ["--epochs", "3", "--suffix", name[9:], "--resume_path", str(run / name)]
        assert train.main([*args, *more]) == 0
        assert "epoch 3/3" in capsys.readouterr().out
    for name, epoch in (("last", 3), ("previous", 2)):
        code = evaluate.main([*TINY, "--load_path", str(run / f"{name}.model"), "--out", str(tmp_path / name)])
        (result,) = (tmp_path / name).glob("result_*.json")
        assert code == 0 and json.loads(result.read_text())["epochs"] == epoch


def test_the_epoch_of_weights_without_facts_is_that_of_the_state_saved_with_them(tmp_path):
    """As version 0.1 wrote them."""
    for name, epoch in (("last", 9), ("previous", 7)):
        torch.save({"w": torch.ones(1)}, tmp_path / f"{name}.model")
        torch.save({"epoch": epoch}, tmp_path / f"{name}.resume")
        torch.save({"w": torch.ones(1)}, tmp_path / f"{name}.cocsr_model")
        torch.save({"epoch": epoch + 10}, tmp_path / f"{name}.cocsr_resume")
    torch.save({"w": torch.ones(1)}, tmp_path / "other.model")
    found = {path.name: epoch_of(path, flag="load_path") for path in tmp_path.glob("*model")}
    assert found == {
        "last.model": 9,
        "previous.model": 7,
        "last.cocsr_model": 19,
        "previous.cocsr_model": 17,
        "other.model": None,
    }


def test_a_finished_run_names_the_way_to_train_for_longer(tmp_path, capsys):
    args = [*TINY, "--mode", "simclr", "--log_root", str(tmp_path)]
    assert train.main([*args, "--epochs", "1"]) == 0
    (run,) = tmp_path.iterdir()
    assert train.main([*args, "--epochs", "1"]) == 0
    remedy = f"--resume_path {run} and another --suffix"
    assert remedy in capsys.readouterr().out
    refused(capsys, train.main([*args, "--epochs", "2"]), "--epochs was 1, is 2", remedy)
    assert train.main([*args, "--epochs", "2", "--resume_path", str(run), "--suffix", "longer"]) == 0
    for mode in (["--mode", "rot_trans"],):
        assert train.main([*args[:-4], *mode, "--log_root", str(tmp_path), "--epochs", "1"]) == 0
        capsys.readouterr()
        told = refused(
            capsys, train.main([*args[:-4], *mode, "--log_root", str(tmp_path), "--epochs", "2"]), "--epochs"
        )
        assert "--resume_path" not in told


@pytest.mark.parametrize("suffix", ["a/../../x", "/x", "a/b", "../../../x"])
def test_a_suffix_is_one_component_of_a_path(suffix, tmp_path, capsys):
    outside = tmp_path / "x"
    outside.mkdir()
    (outside / "thesis.tex").write_text("years of work")
    args = [*TINY, "--epochs", "1", "--log_root", str(tmp_path / "logs"), "--overwrite", "--suffix", suffix]
    refused(capsys, train.main(args), "--suffix")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "thesis.tex"]


def test_names_of_models_and_classes_are_one_component_too(ships, tmp_path, capsys):
    refused(capsys, train.main([*TINY, "--model", "timm_../../x", "--log_root", str(tmp_path)]), "--model")
    shutil.copytree(ships[0], tmp_path / "data")
    (tmp_path / "data/train/ship").rename(tmp_path / "data/train/a big ship")
    args = of(tmp_path / "data", "--mode", "simclr", "--epochs", 1, "--log_root", tmp_path / "l")
    assert train.main([*args, "--one_class_idx", "a big ship"]) == 0
    assert [path.name for path in (tmp_path / "l").iterdir()] == ["folder_resnet8_unsup_simclr_one_class_a_big_ship"]
    refused(capsys, train.main([*args, "--suffix", "s" * 300]), "--suffix")


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train.main([*TINY, "--mode", "simclr", "--epochs", "1", "--log_root=~/x"]) == 0
    (run,) = (tmp_path / "x").iterdir()
    assert evaluate.main([*TINY, f"--load_path=~/x/{run.name}", "--out", "~/o"]) == 0
    assert list((tmp_path / "o").glob("result_*.json"))
    refused(
        capsys, evaluate.main([*TINY, "--load_path", f"~/x/{run.name}", "--ood_dataset", "folder:~/no"]), str(tmp_path)
    )


# ------------------------------------------------------------------------------------------- kills in bad moments


def test_a_kill_while_the_first_file_is_written_leaves_a_folder_that_can_be_used(tmp_path):
    args = [*TINY, "--mode", "simclr", "--epochs", "1", "--log_root", str(tmp_path)]
    folder = tmp_path / "digits_resnet8_unsup_simclr_one_class_3"
    for overwrite in ([], ["--overwrite"]):
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / ".args.json.0123456789ab.tmp").write_text('{"fla')
        assert train.main([*args, *overwrite]) == 0
        assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
        shutil.rmtree(folder)


def test_the_frozen_network_is_checked_before_the_last_save(stage1, tmp_path, monkeypatch, capsys):
    """A network that changed is no finished run, and neither is one that was killed before it was checked."""
    args = [*TINY, *SHIFT, *SPARSE, "--resume_path", str(stage1), "--epochs", "4", "--log_root", str(tmp_path)]
    saved: list[int] = []
    real = Run.save

    def save(self, weights, state):
        saved.append(state["epoch"])
        if len(saved) == 1:
            weights["feature_net.conv1.weight"][0, 0, 0, 0] += 1  # in the live network
        real(self, weights, state)

    monkeypatch.setattr(Run, "save", save)
    with pytest.raises(RuntimeError, match="the frozen network changed"):
        train_cocsr.main(args)
    assert saved == [2]
    (run,) = tmp_path.iterdir()
    assert load_tensors(run / "last.cocsr_resume", flag="x")["epoch"] == 2


def test_a_start_that_is_gone_costs_no_training(stage1, tmp_path, monkeypatch):
    real = Run.keep
    monkeypatch.setattr(
        Run, "keep", lambda self, name, *rest: None if name.startswith("start") else real(self, name, *rest)
    )
    args = [*TINY, *SHIFT, *SPARSE, "--resume_path", str(stage1), "--epochs", "3", "--log_root", str(tmp_path)]
    assert train_cocsr.main(args) == 0
    (run,) = tmp_path.iterdir()
    assert "is not known" in (run / "log.txt").read_text() and read_facts(run / "last.cocsr_model")["epoch"] == 3
