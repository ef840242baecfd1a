"""--recipe: what it sets, what comes before it, and what it refuses."""

import json

import pytest

import train
import train_cocsr
from common.flags import build_parser, parse
from program import SPECS
from scripts.recipes import RECIPES
from training import STAGE1, STAGE2
from training.launch import Script, read_job
from training.named import NAMED, told
from training.optim import OptimSpec

ONE = Script("train.py", STAGE1, "simclr", "last.model", "last.resume")
TWO = Script("train_cocsr.py", STAGE2, "cocsr_dict", "last.cocsr_model", "last.cocsr_resume")


def flags_of(*words: str) -> dict:
    return read_job(["--dry_run", *words], TWO if "level_dict" in words else ONE, SPECS).flags.as_dict()


def test_a_recipe_sets_mode_and_flags_and_what_is_given_comes_before_it():
    found = flags_of("--recipe", "short")
    assert (
        found["mode"] == "rot_trans"
        and {n: found[n] for n in NAMED["short"]["rot_trans"]} == NAMED["short"]["rot_trans"]
    )
    found = flags_of("--recipe", "short", "--mode", "simclr_CSI", "--optimizer", "lars", "--epochs", "3")
    assert (found["optimizer"], found["epochs"], found["batch_size"]) == ("lars", 3, 32)
    assert flags_of("--mode", "rot_trans")["optimizer"] == "lars"


def test_the_first_mode_of_a_script_is_the_default():
    modes = {
        name: [next(mode for mode in rows if mode in table) for table in (STAGE1, STAGE2)]
        for name, rows in NAMED.items()
    }
    assert modes == {
        "published": ["simclr_CSI", "cocsr_dict"],
        "short": ["rot_trans", "level_dict"],
        "best": ["simclr_CSI", "level_dict"],
    }
    job = read_job(["--dry_run", "--recipe", "short", "--resume_path", "x"], TWO, SPECS)
    assert job.flags.mode == "level_dict" and job.flags.as_dict()["sr_dict_size"] == 256


def test_a_recipe_comes_before_the_defaults_of_a_mode(monkeypatch):
    monkeypatch.setitem(NAMED["short"], "level_dict", {"sr_dict_size": 7})
    assert flags_of("--recipe", "short", "--mode", "level_dict", "--resume_path", "x")["sr_dict_size"] == 7
    given = ["--sr_dict_size", "9", "--resume_path", "x"]
    assert flags_of("--recipe", "short", "--mode", "level_dict", *given)["sr_dict_size"] == 9


def test_a_mode_that_the_recipe_does_not_have_is_refused(capsys):
    assert train.main(["--recipe", "short", "--mode", "sup_simclr"]) == 2
    assert "--recipe short: it has --mode rot_trans, simclr_CSI" in capsys.readouterr().err
    assert train_cocsr.main(["--recipe", "nosuch"]) == 2


def line_of(*words: str) -> str | None:
    job = read_job(["--dry_run", *words], TWO if "level_dict" in words else ONE, SPECS)
    return told(job.flags, job.mode.defaults)


def test_what_a_recipe_stands_for_is_told():
    assert line_of("--mode", "simclr") is None
    assert line_of("--recipe", "published", "--mode", "simclr") == "recipe published: --mode simclr --simclr_dim 512"
    line = line_of("--recipe", "published", "--mode", "rot_trans")
    assert line == "recipe published: --mode rot_trans --shift_trans_type rotation"
    line = line_of("--recipe", "short", "--epochs", "3", "--lr_init", "0.1")
    assert line == (
        "recipe short: --mode rot_trans --shift_trans_type rotation --model resnet8 --optimizer adam --batch_size 32"
        " --lr_scheduler cosine_to_zero --warmup_share 0.05 --held_out auto;"
        " in place of its own: --lr_init 0.1 --epochs 3"
    )
    line = line_of("--recipe", "short", "--mode", "level_dict", "--resume_path", "x")
    assert line == "recipe short: --mode level_dict --sr_layer pixels stages --sr_dict_size 256 --sr_lambda_rel 0.1"


@pytest.mark.parametrize("mode", NAMED["published"])
def test_what_is_told_of_a_recipe_is_a_command_line(mode):
    script = TWO if mode in STAGE2 else ONE
    found = read_job(["--dry_run", "--recipe", "published", "--mode", mode, "--resume_path", "x"], script, SPECS)
    line = told(found.flags, found.mode.defaults)
    words = line.removeprefix("recipe published: ").split()
    again = parse(words, build_parser("train", script.modes, "simclr", SPECS)).as_dict()
    assert {n: again[n] for n in NAMED["published"][mode]} == NAMED["published"][mode] and again["mode"] == mode


def test_a_switch_is_told_without_a_value_and_only_where_it_is_on(monkeypatch):
    own = {"sr_rho_auto": True, "freeze_sr_dict": False, "sr_dict_size": 7}
    monkeypatch.setitem(NAMED["published"], "cocsr_dict", own)
    job = read_job(["--dry_run", "--recipe", "published", "--resume_path", "x"], TWO, SPECS)
    assert told(job.flags, {}) == "recipe published: --mode cocsr_dict --sr_rho_auto --sr_dict_size 7"


def test_a_warm_up_in_epochs_replaces_the_recipes_share():
    words = ["--recipe", "short", "--warmup", "3"]
    assert flags_of(*words)["warmup_share"] is None
    assert read_job(["--dry_run", *words], ONE, SPECS).flags.of(OptimSpec).warmup_epochs == 3
    assert line_of(*words).endswith("in place of its own: --warmup 3")
    assert flags_of("--recipe", "short", "--warmup_share", "0.2")["warmup_share"] == 0.2


@pytest.mark.parametrize("mode", NAMED["published"])
def test_the_published_recipe_is_that_of_the_published_scripts(mode):
    """The rows of recipes.env, which the shell scripts run."""
    row = {"simclr_CSI": "csi", "cocsr_dict": "cocsr"}.get(mode, mode)
    script, *words = RECIPES["cifar10"].words(row)
    table = STAGE2 if script == "train_cocsr.py" else STAGE1
    given = parse(words, build_parser(script, table, "simclr", SPECS)).as_dict()
    own = parse(["--mode", mode], build_parser(script, table, "simclr", SPECS)).as_dict() | NAMED["published"][mode]
    read = {name for spec in table[mode].specs for name in spec.__dataclass_fields__}
    assert {n: given[n] for n in read if n in given} == {n: own[n] for n in read if n in own}


def test_recipes_are_plain_values():
    assert json.loads(json.dumps(NAMED)) == NAMED
