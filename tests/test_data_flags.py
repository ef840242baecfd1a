"""Noise, outliers and tables from the command line: what trains and is evaluated on them, and the names of runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval as evaluate
import train
import train_cocsr
import tsne
from common.dist import SINGLE
from common.errors import UserError
from common.files import read_facts, save_tensors
from common.flags import build_parser, parse
from datasets import Loading
from datasets.one_class import read_split
from program import SPECS
from tests.conftest import SHIFT, TINY
from tests.test_commands import refused
from training import COMMON, STAGE1, Mode, run_name
from training.launch import Script
from training.recipe import Recipe, Step

NEW = ("corrupt", "corrupt_pixels", "corrupt_fixed", "data_seed", "outliers", "first_images", "npz")
CHANGED = "--corrupt salt_pepper --corrupt_pixels 5 --data_seed 3 --outliers 20 --first_images 900".split()
NAME = "digits_resnet8_unsup_simclr_CSI_shift_rot_bmix_one_class_3_outliers_20_corrupt_salt_pepper5"


def flags_of(*args: str, mode: str = "simclr"):
    return parse(["--mode", mode, *args], build_parser("test", STAGE1, "simclr", SPECS))


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """A run of one epoch on noisy digits with outliers among them."""
    logs = tmp_path_factory.mktemp("logs")
    args = [*TINY, *SHIFT, *CHANGED, "--mode", "simclr_CSI", "--epochs", "1", "--log_root", str(logs)]
    assert train.main(args) == 0
    return logs / NAME


def test_a_run_names_what_was_changed_and_records_it(changed):
    assert changed.is_dir()
    assert "of class 3 (3), 20 outliers among them, salt_pepper noise at 5 pixels" in (changed / "log.txt").read_text()
    facts = read_facts(changed / "last.model")
    split = read_split(flags_of(*TINY, *CHANGED), training=True, model_size=32)
    data = split.train()
    assert facts["data"]["images"] == len(data) and facts["data"]["fingerprint"] == data.fingerprint
    recorded = {name: facts["flags"][name] for name in NEW if name in facts["flags"]}
    assert recorded == {"corrupt": "salt_pepper", "corrupt_pixels": 5, "corrupt_fixed": False, "data_seed": 3,
                        "outliers": 20, "first_images": 900}  # fmt: skip


def test_evaluation_sees_the_same_data_whatever_its_seed(changed, tmp_path, monkeypatch, capsys):
    import evals.detect as module

    seen, real = [], module._test_sets
    monkeypatch.setattr(
        module,
        "_test_sets",
        lambda trained, loaded: (seen.append((trained, real(trained, loaded))), seen[-1][1])[1],
    )
    for n, more in enumerate(([], ["--seed", "7"], ["--corrupt", "none"], ["--corrupt_pixels", "6"])):
        args = ["--load_path", str(changed), "--out", str(tmp_path / str(n)), "--ood_dataset", "interp", *more]
        assert evaluate.main([*args, "--test_batch_size", "5"]) == 0
        told = capsys.readouterr().out
        assert ("scores are fitted to other images" in told) is (n > 1)
        assert (f"was trained with {more[0] if more else ''} " in told) is (n > 1)
    (trained, first), (_, second), (_, clean), (_, other) = seen
    digits = first["digits"]
    assert torch.equal(digits.images, second["digits"].images) and digits.mask is not None
    assert (digits.mask.sum((1, 2, 3)) == 5).all() and (other["digits"].mask.sum((1, 2, 3)) == 6).all()
    plain = read_split(flags_of(*TINY), training=False, model_size=32).test()
    assert clean["digits"].mask is None and torch.equal(clean["digits"].images, plain.images)
    # Outliers are mixed of clean images, and then get noise of their own.
    mixed, bare = first["interp"], clean["interp"]
    assert (mixed.mask.sum((1, 2, 3)) == 5).all() and not torch.equal(mixed.mask, digits.mask[: len(mixed)])
    intact = ~mixed.mask.expand_as(mixed.images)
    assert torch.equal(mixed.images[intact], bare.images[intact])
    results = [json.loads((tmp_path / str(n) / "result_ood_pre_CSI.json").read_text()) for n in range(4)]
    assert [r["settings"].get("corrupt") for r in results] == ["salt_pepper", "salt_pepper", None, "salt_pepper"]
    assert results[0]["data"] == results[1]["data"] != results[2]["data"]


def test_stage_2_and_t_sne_go_on_with_the_same_data(changed, tmp_path, capsys):
    args = ["--resume_path", str(changed), "--epochs", "2", "--sr_dict_size", "6", "--log_root", str(tmp_path)]
    assert train_cocsr.main([*args, "--batch_size", "61"]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("one_class_3_outliers_20_corrupt_salt_pepper5")
    one, two = (read_facts(path)["data"] for path in (changed / "last.model", folder / "last.cocsr_model"))
    assert one == two
    assert evaluate.main(["--load_path", str(folder), "--out", str(tmp_path / "e")]) == 0
    assert tsne.main(["--load_path", str(changed), "--out", str(tmp_path / "t"), "--tsne_points", "5"]) == 0
    assert "other images" not in capsys.readouterr().out


def test_noise_of_an_evaluation_of_weights_trained_without(stage1, tmp_path, capsys):
    args = ["--load_path", str(stage1), "--out", str(tmp_path), "--corrupt", "normal", "--corrupt_pixels", "64"]
    assert evaluate.main(args) == 0 and "trained with --corrupt none, evaluated with normal" in capsys.readouterr().out
    result = json.loads((tmp_path / "result_ood_pre_CSI.json").read_text())
    assert abs(result["mean"] - 0.5) < 0.15  # nothing of the digits is left
    assert evaluate.main([*args[:-1], "65"]) == 2
    assert "--corrupt_pixels 65: there are 64" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- errors and names


@pytest.mark.parametrize(
    "args, told",
    [
        (["--outliers", "5"], ["--outliers", "--one_class_idx"]),
        (["--one_class_idx", "3", "--outliers", "2000"], ["--outliers 2000", "there are 1076"]),
        (["--one_class_idx", "3", "--outliers", "-1"], ["--outliers must be >= 0"]),
        (["--one_class_idx", "3", "--first_images", "0"], ["--first_images must be > 0"]),
        (["--first_images", "5000"], ["--first_images 5000", "1198"]),
        (["--corrupt", "normal", "--corrupt_pixels", "65"], ["--corrupt_pixels 65", "64"]),
        (["--corrupt", "normal", "--corrupt_pixels", "0"], ["--corrupt_pixels must be >= 1"]),
        (["--corrupt", "speckle"], ["--corrupt", "salt_pepper"]),
        (["--npz", "table.npz"], ["--npz: --dataset digits is no table"]),
        (["--one_class_idx", "3", "--outliers", "5", "--mode", "sup_simclr"], ["--one_class_idx", "sup_simclr"]),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(args, told, tmp_path, capsys):
    common = "--dataset digits --image_size 8 --model resnet8 --epochs 1".split()
    mode = [] if "--mode" in args else ["--mode", "simclr"]
    code = train.main([*common, *mode, *args, "--log_root", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    refused(capsys, code, *told)


def test_modes_for_pictures_refuse_tables(tmp_path, capsys):
    np.savez(tmp_path / "table.npz", X=np.random.default_rng(0).normal(size=(20, 4)))
    for given in ([], ["--dataset", "table"]):
        args = ["--npz", str(tmp_path / "table.npz"), *given, "--epochs", "1", "--log_root", str(tmp_path / "l")]
        refused(capsys, train.main([*args, "--mode", "simclr", "--model", "resnet8"]), "--npz", "rdae, dae and vae")
    refused(capsys, train.main(["--dataset", "table", "--epochs", "1", "--log_root", str(tmp_path / "l")]), "--npz")
    assert not (tmp_path / "l").exists()


def test_flags_that_change_nothing_are_reported(tmp_path, capsys):
    idle = "--corrupt_pixels 5 --corrupt_fixed --data_seed 3".split()
    assert train.main([*TINY, *idle, "--mode", "simclr", "--epochs", "1", "--log_root", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert all(f"note: --{name} has no effect" in told for name in ("corrupt_pixels", "corrupt_fixed", "data_seed"))
    assert [folder.name for folder in tmp_path.iterdir()] == ["digits_resnet8_unsup_simclr_one_class_3"]


def test_names_of_runs():
    def name(*args: str, backbone: bool = True) -> str:
        row = Mode(lambda *_: None, COMMON, lambda flags: ["x"], backbone=backbone)  # type: ignore[arg-type, return-value]
        return run_name(flags_of("--dataset", "mnist", "--suffix", "s", *args), row)

    assert name() == "mnist_resnet18_x_s"
    assert name("--data_seed", "3", "--corrupt_pixels", "5", "--first_images", "9") == "mnist_resnet18_x_s"
    four = ["--one_class_idx", "4", "--outliers", "265"]
    assert name(*four) == "mnist_resnet18_x_one_class_4_outliers_265_s"
    noisy = ["--corrupt", "normal", "--corrupt_pixels", "100"]
    assert name(*noisy, backbone=False) == "mnist_x_corrupt_normal100_s"
    assert name(*four, *noisy, backbone=False) == "mnist_x_one_class_4_outliers_265_corrupt_normal100_s"


# ------------------------------------------------------------------------------------------------------ earlier runs


def as_of_an_earlier_version(folder: Path) -> None:
    """Take the new flags out of all that a run has recorded."""
    config = json.loads((folder / "args.json").read_text())
    config["flags"] = {name: value for name, value in config["flags"].items() if name not in NEW}
    config["used"] = [name for name in config["used"] if name not in NEW]
    (folder / "args.json").write_text(json.dumps(config))
    weights = folder / "last.model"
    facts = read_facts(weights)
    facts["flags"] = {name: value for name, value in facts["flags"].items() if name not in NEW}
    save_tensors(weights, torch.load(weights, weights_only=True), facts=facts)


def test_a_run_of_an_earlier_version_goes_on_and_its_results_are_replaced(tmp_path, capsys):
    args = [*TINY, "--mode", "simclr", "--epochs", "1", "--log_root", str(tmp_path)]
    assert train.main(args) == 0
    (folder,) = tmp_path.iterdir()
    as_of_an_earlier_version(folder)
    assert train.main(args) == 0 and "is finished" in capsys.readouterr().out
    assert evaluate.main(["--load_path", str(folder)]) == 0
    (path,) = folder.glob("result_*")
    result = json.loads(path.read_text())
    assert not set(NEW) & result["settings"].keys()
    refused(capsys, train.main([*args, "--first_images", "900", "--epochs", "2"]), "--epochs was 1")
    assert evaluate.main(["--load_path", str(folder), "--first_images", "900"]) == 0
    assert len(list(folder.glob("result_*"))) == 2


def test_a_run_does_not_go_on_with_other_noise(changed, tmp_path, capsys):
    shutil.copytree(changed, tmp_path / NAME)
    args = [*TINY, *SHIFT, *CHANGED, "--mode", "simclr_CSI", "--epochs", "1", "--log_root", str(tmp_path)]
    for more in (["--data_seed", "4"], ["--corrupt_fixed"], ["--first_images", "901"]):
        refused(capsys, train.main([*args, *more]), more[0])
    assert train.main(args) == 0


# ---------------------------------------------------------------------------------------------------- rows as data


def rows_mode() -> Mode:
    """A linear autoencoder of rows, without a backbone."""

    def build(flags, split, world=SINGLE) -> Recipe:
        data = split.train_table()
        n = data.rows.shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(flags.seed)
            model = nn.Sequential(nn.Linear(n, 3), nn.Linear(3, n))

        def losses(batch) -> Step:
            rows = batch.local_images[0]
            assert rows.dtype == torch.float32 and torch.equal(rows, data.rows[batch.index])
            return Step({"fit": F.mse_loss(model(rows), rows)}, {})

        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        return Recipe(model, data, losses, (optimizer,), loading=Loading(flip=False))  # type: ignore[arg-type]

    return Mode(build, COMMON, lambda flags: ["toy"], backbone=False)


SCRIPT = Script("toy.py", {"toy": rows_mode()}, "toy", "last.model", "last.resume")


def run_rows(logs: Path, *args: str) -> Path:
    before = set(logs.iterdir())
    train.train(["--log_root", str(logs), "--device", "cpu", "--epochs", "3", *args], SCRIPT)
    (folder,) = set(logs.iterdir()) - before
    return folder


def test_a_mode_without_a_backbone_trains_on_rows_of_images_in_their_own_size(tmp_path):
    folder = run_rows(tmp_path, *"--dataset digits --one_class_idx 3 --outliers 5 --corrupt normal".split())
    assert folder.name == "digits_toy_one_class_3_outliers_5_corrupt_normal10"
    losses = [json.loads(line)["train/loss_fit"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert torch.load(folder / "last.model", weights_only=True)["0.weight"].shape == (3, 64)


def test_a_table_is_trained_on_by_naming_its_file(tmp_path, capsys):
    rng = np.random.default_rng(0)
    file = tmp_path / "table.npz"
    np.savez(file, X=rng.normal(size=(40, 6)), y=np.arange(40) % 2)
    (tmp_path / "logs").mkdir()
    args = ["--npz", str(file), "--one_class_idx", "1", "--outliers", "4"]
    folder = run_rows(tmp_path / "logs", *args)
    assert folder.name == "table_toy_one_class_1_outliers_4"
    assert "24 rows of class 1 (1), 4 outliers among them" in (folder / "log.txt").read_text()
    facts = read_facts(folder / "last.model")
    assert facts["flags"]["npz"] == str(file) and facts["flags"]["dataset"] == "table"
    assert (facts["data"]["class_name"], facts["data"]["images"]) == ("1", 24)
    assert "no effect" not in capsys.readouterr().out
    # The same table elsewhere is the same; another one is not.
    file.rename(tmp_path / "moved.npz")
    command = ["--log_root", str(tmp_path / "logs"), "--device", "cpu", "--epochs", "3", *args[2:], "--npz"]
    train.train([*command, str(tmp_path / "moved.npz")], SCRIPT)
    told = capsys.readouterr().out
    assert "is finished" in told and f"note: --npz was {file}, is {tmp_path / 'moved.npz'}: not read" in told
    train.train([*command, str(file)], SCRIPT)
    assert "note: --npz" not in capsys.readouterr().out
    np.savez(file, X=rng.normal(size=(40, 6)), y=np.arange(40) % 2)
    (folder / "last.resume").rename(folder / "saved.resume")
    state = torch.load(folder / "saved.resume", weights_only=True)
    torch.save({**state, "epoch": 2}, folder / "last.resume")
    with pytest.raises(UserError, match="^--npz: the training images changed .*their content"):
        train.train([*command, str(file)], SCRIPT)
