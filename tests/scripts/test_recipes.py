"""The flags of the published commands: one file, which Bash and Python read alike."""

import argparse
import subprocess

import pytest

from scripts.recipes import KINDS, METHODS, RECIPES, Recipe, planned_minutes, steps_of
from scripts.sweep import uneven
from tests.conftest import ROOT

FAMILIES = ["cifar10", "cifar100", "imagenet", "digits", "short", "short_multi"]
FAMILIES += ["rdae", "sdnet", "sdnet_imagenet", "sdnet_short", "sdnet_detector"]
ROWS = [
    line.removeprefix("all_").partition("=")[0]
    for line in (ROOT / "scripts/recipes.env").read_text().splitlines()
    if line.startswith("all_")
]
OWN = ["dataset", "model", "classes"]  # these have no row for all


def in_bash(text: str) -> subprocess.CompletedProcess:
    """Run lines after those that a script begins with."""
    lines = f"set -euo pipefail\nsource scripts/recipes.sh\n{text}"
    return subprocess.run(["bash", "-c", lines], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_bash_and_python_read_the_same_words(family):
    names = ROWS + (OWN if family in RECIPES else [])
    done = in_bash(f'recipe {family} {" ".join(names)}\nfor name in {" ".join(names)}; do echo "${{!name}}"; done')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [" ".join(Recipe(family).words(name)) for name in names]


def test_families_replace_rows_within_rows():
    words = Recipe("digits").words("cocsr")
    assert words[:5] == ["train_cocsr.py", "--mode", "cocsr_dict", "--image_size", "16"]
    assert "--simclr_dim" not in words and words[words.index("--sr_dict_size") + 1] == "64"
    assert "--color_jitter_strength" in Recipe("imagenet").words("csi")
    assert "--color_jitter_strength" not in Recipe("imagenet").words("of_cocsr")


def test_a_row_that_does_not_exist_ends_the_script():
    done = in_bash("recipe cifar10 net no_such\necho begun")
    assert done.returncode != 0 and not done.stdout and "all_no_such" in done.stderr
    done = in_bash('all_net="@no_such --simclr_dim 512"\nrecipe cifar10 csi\necho begun')
    assert done.returncode != 0 and not done.stdout and "all_no_such" in done.stderr
    with pytest.raises(KeyError, match="all_no_such"):
        Recipe("cifar10").words("no_such")


def test_no_script_repeats_a_flag_of_the_recipes():
    commands = [word for family in RECIPES for kind in KINDS.values() for word in Recipe(family).words(kind.row)]
    flags = {word for word in commands if word.startswith("--")} - {"--mode"}
    assert {"--simclr_dim", "--sr_lambda", "--ood_samples", "--warmup"} <= flags
    for name in ("sweep.sh", "short_run.sh", "short_multiclass.sh", "quickstart.sh", "recipes.py"):
        words = (ROOT / "scripts" / name).read_text().split()
        assert not flags.intersection(words), name


# `minutes` has stages of its own.
@pytest.mark.parametrize("family", [family for family in RECIPES if family != "minutes"])
def test_rows_of_run_names_follow_from_the_flags(family, tmp_path):
    options = argparse.Namespace(data_path="x", epochs=1, more=1, times=1.0, flags=[])
    recipe = RECIPES[family]
    steps = {step.kind: step for step in steps_of(recipe, ["ADMM-SRNet"], 2, 0, tmp_path, options)}
    for row, suffix in (("csi", "suffix"), ("cocsr", "stage2_suffix")):
        parts = [*recipe.words("dataset"), *recipe.words("model"), "unsup", *recipe.words(f"{row}_run"), "one_class_2"]
        assert steps[row].folder.name == "_".join([*parts, *recipe.words(suffix)])


def test_every_method_of_minutes_has_epochs_of_its_own(tmp_path):
    options = argparse.Namespace(data_path="x", epochs=1000, more=300, times=1.0, flags=[])
    steps = {step.kind: step for step in steps_of(RECIPES["minutes"], list(METHODS), 2, 0, tmp_path, options)}
    trained = {kind: step for kind, step in steps.items() if step.arguments[0] != "eval.py"}
    epochs = {kind: step.flags.as_dict()["epochs"] for kind, step in trained.items() if kind != "levels"}
    assert epochs == {
        "simclr": 25,
        "rot_trans": 13,
        "csi": 6,
        "mixed_csi": 4,
        "cocsr": 5,
        "short_rot_trans": 11,
        "short_csi": 6,
        "uniclr": 6,
    }
    assert not trained["levels"].flags.given("epochs")
    assert len({step.folder for step in trained.values()}) == len(trained)
    assert [step.kind for step in steps["of cocsr"].needs] == ["mixed_csi", "cocsr"]
    assert steps["of csi"].flags.as_dict()["shift_trans_type"] == "rotation"
    options.times = 2.0
    longer = {step.kind: step for step in steps_of(RECIPES["minutes"], list(METHODS), 2, 0, tmp_path, options)}
    twice = {kind: longer[kind].flags.as_dict()["epochs"] for kind in epochs}
    assert planned_minutes(RECIPES["minutes"], "ADMM-SRNet", 0.5) == 5 * 3 / 5
    assert planned_minutes(RECIPES["minutes"], "ADMM-SRNet-levels", 2) == pytest.approx(5 * 26.3 / 13.3)
    assert [planned_minutes(RECIPES["minutes"], method, 1) for method in METHODS] == [5.0] * len(METHODS)
    assert uneven(RECIPES["minutes"], list(METHODS), 0.5) == ["ADMM-SRNet 3"]
    assert uneven(RECIPES["minutes"], list(METHODS), 1) == uneven(RECIPES["digits"], list(METHODS), 1) == []
    # Dictionaries at several depths take as long as before, so that their stage 1 has more than twice the time.
    assert twice == {k: 2 * n for k, n in epochs.items()} | {"short_rot_trans": 24}


@pytest.mark.parametrize("times", [0.1, 0.5, 1.4, 3.0])
def test_stage_2_has_an_epoch_of_its_own_however_short_all_is(times, tmp_path):
    options = argparse.Namespace(data_path="x", epochs=1, more=1, times=times, flags=[])
    steps = {step.kind: step for step in steps_of(RECIPES["minutes"], list(METHODS), 2, 0, tmp_path, options)}
    epochs = {kind: steps[kind].flags.as_dict()["epochs"] for kind in ("mixed_csi", "cocsr", "short_rot_trans")}
    assert epochs["mixed_csi"] == max(1, round(4 * times))
    assert epochs["cocsr"] == epochs["mixed_csi"] + max(1, round(times))
    assert epochs["short_rot_trans"] == max(1, round(13.3 * times - 2.3))
