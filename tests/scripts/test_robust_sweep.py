"""The scripts of adversarial training: which commands they start, and that these fit each other."""

import os

import pytest

from tests.scripts.conftest import script
from tests.scripts.test_sdnet_sweep import plan
from tests.scripts.test_sweeps import options

SCRIPTS = {
    "ANCRA_CIFAR10": ("cifar10", "resnet18", 6),
    "ANCRA_CIFAR100": ("cifar100", "resnet18", 6),
    "ANCRA_WRN28": ("cifar10", "wrn28_10", 2),
    "ANCRA_WRN34": ("cifar10", "wrn34_10", 2),
    "ANCRA_TinyImageNet": ("folder", "preact18_64", 6),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_published_recipes_train_every_row_and_attack_it(name, commands, capsys):
    dataset, model, count = SCRIPTS[name]
    found = commands(name, DATA_PATH="data")
    trained = [line for line in found if line[0] == "train.py"]
    assert len(trained) == count and len(found) == 2 * count
    for line in trained:
        flags = options(line)
        assert flags["--model"] == [model] and flags["--dataset"] == [dataset] and flags["--epochs"] == ["120"]
        assert ("--ra" in flags) == ("--anc" in flags)
        assert ("--pad" in flags) == (name == "ANCRA_TinyImageNet") and ("--zeta" in flags) == (
            name == "ANCRA_WRN28" and "--anc" in flags
        )


def test_every_attack_is_on_a_run_that_was_trained_before(commands, tmp_path, capsys):
    found = commands("robust_short", DATA_PATH=str(tmp_path))
    made = [plan(line, capsys)["run_dir"] for line in found if line[0] == "train.py"]
    attacked = [options(line)["--load_path"][0] for line in found if line[0] == "eval.py"]
    assert len(set(made)) == 22 and attacked == [f"{run}/last.model" for run in made]
    epochs = {tuple(options(line)["--mode"]): options(line)["--epochs"][0] for line in found if line[0] == "train.py"}
    assert epochs["supervised",] == "115" and epochs["adv_pgd",] == "8"  # the last of its rows, with contrast


def test_the_best_epoch_is_attacked_where_there_is_one_and_images_of_the_plain_network_are_shown(
    commands,
    tmp_path,
):
    runs = {name: tmp_path / f"my logs/folder_resnet8_{name}_s0" for name in ("supervised", "adv_trades_ra_anc")}
    for run in runs.values():
        run.mkdir(parents=True)
        for weights in ("last", "best"):
            (run / f"{weights}.model").touch()
    found = commands(
        "robust_short", DATA_PATH=str(tmp_path), ROWS="plain trades_ancra", SEEDS="0", ATTACK_FLAGS="--x 1"
    )
    attacks = [options(line) for line in found if line[0] == "eval.py"]
    assert [flags["--load_path"][0] for flags in attacks] == [
        str(run / f"{weights}.model") for run in runs.values() for weights in ("last", "best")
    ]
    plain = str(runs["supervised"] / "last.model")
    assert [flags.get("--transfer_path") for flags in attacks] == [None, None, [plain], [plain]]
    assert all(flags["--x"] == ["1"] for flags in attacks)


def test_an_unknown_family_is_refused(tmp_path):
    done = script("robust_sweep", tmp_path, "ancra_vgg", "cifar10")
    assert done.returncode == 2 and "FAMILY is ancra" in done.stderr


def runs_in(folder, *names):
    made = [folder / "my logs" / name for name in names]
    for run in made:
        run.mkdir(parents=True)
        (run / "last.model").touch()
        os.utime(run / "last.model", (1, 1))  # older than what is measured of it
    return [str(run) for run in made]


def test_figures_of_features_are_of_every_run_and_then_of_all(commands, tmp_path):
    runs = runs_in(tmp_path, "a", "b")
    found = commands("ANCRA_Figures", *runs, OUT="out", TARGET_LABEL="3")
    *measured, drawn = found
    assert [line[0] for line in measured] == ["eval.py", "tsne.py"] * 2
    for line, run in zip(measured, [run for run in runs for _ in range(2)], strict=True):
        flags = options(line)
        assert flags["--load_path"] == [f"{run}/last.model"]
        assert flags["--mode"] == [{"eval.py": "feature_distance", "tsne.py": "feature_umap"}[line[0]]]
        assert ("--save_score" in flags) == (line[0] == "eval.py")
    assert drawn == ["-m", "scripts.robust_figures", *runs, "--out", "out", "--target_label", "3"]


def test_what_was_measured_is_not_measured_again(commands, tmp_path):
    runs = runs_in(tmp_path, "a", "b")
    for name in ("result_feature_distance.json", "feature_umap_penultimate_shift0.png"):
        (tmp_path / "my logs/a" / name).touch()
    found = commands("ANCRA_Figures", *runs)
    assert [line[0] for line in found] == ["eval.py", "tsne.py", "-m"] and found[0][4] == f"{runs[1]}/last.model"
    assert found[-1] == ["-m", "scripts.robust_figures", *runs, "--out", "."]


def test_figures_of_what_is_no_run_are_refused(tmp_path):
    for args, told in (((), "usage: ANCRA_Figures.sh RUN"), ((str(tmp_path),), "RUN: no last.model in")):
        done = script("ANCRA_Figures", tmp_path, *args)
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1
