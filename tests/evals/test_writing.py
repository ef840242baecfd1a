"""Results keep apart what differs, and go where they are wanted."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluate
import evals.report as report
import train
import tsne
from evals.writing import place_for, read_json
from tests.conftest import SHIFT, TINY
from tests.test_commands import refused


@pytest.fixture
def run(stage1, tmp_path):
    """A run without the results that other tests have left beside its weights."""
    left = shutil.ignore_patterns("result_*", "scores_*", "accuracy_*", "*.png")
    return shutil.copytree(stage1, tmp_path / "run", ignore=left)


def names(folder, kind="result"):
    return sorted(path.name for path in folder.glob(f"{kind}_*"))


def test_results_of_other_settings_keep_names_of_their_own(run):
    def evaluated(*more):
        assert evaluate.main([*TINY, *SHIFT, "--load_path", str(run), "--save_score", *map(str, more)]) == 0
        return names(run)

    first = evaluated()
    assert first == ["result_ood_pre_CSI.json"]
    was = (run / first[0]).read_text()
    assert evaluated() == first  # the same again takes its place
    assert evaluated("--device", "cpu", "--ood_batch_size", 7) == first
    for count, more in enumerate((["--seed", 1], ["--ood_samples", 2], ["--mix_alpha", 0.3], ["--amp", "bf16"]), 2):
        assert len(evaluated(*more)) == count, more
        assert len(evaluated(*more)) == count, more
    assert json.loads((run / first[0]).read_text())["auroc"] == json.loads(was)["auroc"]
    for name in names(run):
        result = json.loads((run / name).read_text())
        assert (run / result["scores"]["digits"]).is_file()
    assert len(names(run, "scores")) == len(names(run))
    # What another score asks for is no setting of this one.
    assert len(evaluated("--ood_score", "CSI", "knn", "--knn_k", 3)) == 5 + 1


def test_results_of_another_class_keep_names_of_their_own(run):
    """Of weights that do not know theirs."""
    torch.save(torch.load(run / "last.model", weights_only=True), run / "last.model")
    for idx, count in (("3", 1), ("4", 2), ("3", 2)):
        assert (
            evaluate.main([*TINY, *SHIFT, "--load_path", str(run), "--one_class_idx", idx, "--ood_score", "knn"]) == 0
        )
        assert len(names(run)) == count


def test_only_the_name_may_tell_two_classes_apart(tmp_path):
    """The same images and number, another name."""
    facts = {"checkpoint": str(tmp_path / "last.model"), "dataset": "folder", "class_name": "ship", "seed": 0}
    facts |= {"settings": {}, "data": {}}
    path = place_for(tmp_path, "result_a", ".json", facts, read_json)
    path.write_text(json.dumps(facts))
    assert place_for(tmp_path, "result_a", ".json", facts, read_json) == path
    assert place_for(tmp_path, "result_a", ".json", facts | {"class_name": "boat"}, read_json) != path


def test_what_a_killed_evaluation_was_writing_goes(run):
    left = run / ".result_ood_pre_CSI.json.0123456789ab.tmp"
    left.touch()
    assert evaluate.main([*TINY, *SHIFT, "--load_path", str(run)]) == 0
    assert not left.exists()


def test_results_of_other_images_keep_names_of_their_own(run, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a/bad", "b/bad", "a_bad"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name / "0.png")
    sets = [f"folder:{tmp_path}/{name}" for name in ("a/bad", "b/bad", "a_bad")]
    args = [*TINY, *SHIFT, "--load_path", str(run), "--save_score"]
    assert evaluate.main([*args, "--ood_dataset", *sets]) == 0
    (result,) = (json.loads((run / name).read_text()) for name in names(run))
    assert len(names(run, "scores")) == 4 and set(result["scores"]) == {"digits", *sets}
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "a/bad/1.png")
    assert evaluate.main([*args, "--ood_dataset", *sets]) == 0
    assert len(names(run)) == 2 and len(names(run, "scores")) == 8


def test_a_result_of_the_version_before_is_replaced_by_the_same_only(run):
    path = run / "result_ood_pre_CSI.json"
    assert evaluate.main([*TINY, *SHIFT, "--load_path", str(run)]) == 0
    old = json.loads(path.read_text())
    for name in ("settings", "data", "class_name", "weights", "scores"):
        del old[name]
    path.write_text(json.dumps(old))
    assert evaluate.main([*TINY, *SHIFT, "--load_path", str(run), "--ood_samples", "2"]) == 0
    assert len(names(run)) == 2 and json.loads(path.read_text()) == old
    assert evaluate.main([*TINY, *SHIFT, "--load_path", str(run)]) == 0
    assert len(names(run)) == 2 and "settings" in json.loads(path.read_text())


def test_accuracies_and_pictures_keep_names_of_their_own(run, tmp_path):
    args = [*TINY, *SHIFT, "--mode", "ood_pre_tsne", "--load_path", str(run), "--tsne_points", "5"]
    for seed, count in ((0, 5), (0, 5), (1, 10), (0, 10)):
        assert tsne.main([*args, "--seed", str(seed)]) == 0
        assert len(list(run.glob("*.png"))) == count
    common = "--dataset digits --image_size 8 --model resnet8 --epochs 1".split()
    assert train.main([*common, "--mode", "sup_simclr", "--error_step", "0", "--log_root", str(tmp_path / "l")]) == 0
    (start,) = (tmp_path / "l").iterdir()
    more = ["--mode", "sup_linear", "--load_path", str(start), "--log_root", str(tmp_path / "l")]
    assert train.main([*common, *more]) == 0
    (heads,) = (folder for folder in (tmp_path / "l").iterdir() if folder != start)
    for size, count in ((8, 1), (9, 2), (8, 2)):
        args = ["--dataset", "digits", "--image_size", str(size), "--model", "resnet8", "--mode", "test_acc"]
        assert evaluate.main([*args, "--load_path", str(heads)]) == 0
        assert len(list(heads.glob("accuracy_*.json"))) == count


def test_results_go_elsewhere_and_two_checkpoints_stay_apart_there(run, tmp_path, capsys):
    before = sorted(run.iterdir())
    out = tmp_path / "deep" / "out"
    for name in ("last", "previous", "last"):
        args = [*TINY, *SHIFT, "--load_path", str(run / f"{name}.model"), "--out", str(out)]
        assert evaluate.main(args) == 0
    assert sorted(run.iterdir()) == before
    assert names(out) == ["result_ood_pre_CSI.json", "result_ood_pre_CSI_previous.json"]
    again = shutil.copytree(run, tmp_path / "another")
    assert evaluate.main([*TINY, *SHIFT, "--load_path", str(again), "--out", str(out)]) == 0
    assert len(names(out)) == 3
    # A run of the same name elsewhere is another one, too.
    twin = shutil.copytree(run, tmp_path / "seed_1" / "run")
    assert evaluate.main([*TINY, *SHIFT, "--load_path", str(twin), "--out", str(out)]) == 0
    assert len(names(out)) == 4
    (tmp_path / "file").touch()
    code = evaluate.main([*TINY, *SHIFT, "--load_path", str(run), "--out", str(tmp_path / "file" / "o")])
    refused(capsys, code, "--out")


def test_a_full_disk_is_reported_as_in_training(run, monkeypatch, capsys):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write_json", full)
    assert evaluate.main([*TINY, *SHIFT, "--load_path", str(run)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("stopped: no space left on the disk") and told.count("\n") == 1


def test_files_are_written_before_anything_is_shown(run, monkeypatch):
    def shown(*_):
        assert names(run) == ["result_ood_pre_CSI.json"] and names(run, "scores") == ["scores_ood_pre_CSI_digits.csv"]

    monkeypatch.setattr(report, "_show", shown)
    assert evaluate.main([*TINY, *SHIFT, "--load_path", str(run), "--save_score"]) == 0


def test_one_shift_has_no_logits_to_draw(tmp_path, capsys):
    assert train.main([*TINY, "--epochs", "1", "--log_root", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    code = tsne.main([*TINY, "--mode", "ood_pre_tsne_shi", "--load_path", str(run)])
    refused(capsys, code, "--shift_trans_type", "ood_pre_tsne_shi")
