"""The sweeps and the published commands: every command names the folder that the one before it makes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluate
import train
import train_cocsr
import tsne
from tests.conftest import ROOT, SHARED

MAIN = {"train.py": train.main, "train_cocsr.py": train_cocsr.main, "eval.py": evaluate.main, "tsne.py": tsne.main}

# What stage 1 and stage 2 of each published family make, for class 2.
RUNS = {
    "CIFAR10": (
        "cifar10_resnet18_unsup_simclr_CSI_shift_rot_bmix_one_class_2_f512_mix82",
        "cifar10_resnet18_unsup_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_one_class_2_f512_mix82_dm1_init",
    ),
    "CIFAR10_Multiclass": (
        "cifar10_resnet18_unsup_simclr_CSI_shift_rot_bmix_f512_mix82",
        "cifar10_resnet18_unsup_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_f512_mix82_dm1_init",
    ),
    "CIFAR100": (
        "cifar100_resnet18_unsup_simclr_CSI_shift_rot_bmix_one_class_2_f512_mix82",
        "cifar100_resnet18_unsup_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_one_class_2_f512_mix82_dm1_init",
    ),
    "Imagenet": (
        "imagenet_resnet18_imagenet_unsup_simclr_CSI_shift_rot_bmix_one_class_2_f512_j2_mix82",
        "imagenet_resnet18_imagenet_unsup_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_one_class_2"
        "_f512_j2_mix82_dm1_init",
    ),
    "Imagenet_Multiclass": (
        "imagenet_resnet18_imagenet_unsup_simclr_CSI_shift_rot_bmix_f512_j2_mix82",
        "imagenet_resnet18_imagenet_unsup_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_f512_j2_mix82_dm1_init",
    ),
}
LAST = {"CIFAR10": 9, "CIFAR100": 19, "Imagenet": 29}


def sweep(wrapper: str, python: Path | str, *args: str, **env: str) -> subprocess.CompletedProcess:
    """Run scripts/<wrapper>.sh with `python` in place of the interpreter."""
    clean = {name: value for name, value in os.environ.items() if name not in ("START", "END", "DATA_PATH", "LOG_ROOT")}
    command = ["bash", str(ROOT / f"scripts/{wrapper}.sh"), *args]
    return subprocess.run(command, env={**clean, "PYTHON": str(python), **env}, capture_output=True, text=True)


@pytest.fixture
def commands(tmp_path):
    """The commands that a sweep would start: lists of arguments, as a shell stub in place of Python receives them."""
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\nprintf '\\n'\n")
    stub.chmod(0o755)

    def run(wrapper: str, *args: str, **env: str) -> list[list[str]]:
        done = sweep(wrapper, stub, *args, **env)
        assert done.returncode == 0, done.stderr
        return [line.split("\0")[:-1] for line in done.stdout.splitlines()]

    return run


def dry_run(command: list[str], capsys, *more: object) -> dict:
    """What the script would do, without a process of its own."""
    capsys.readouterr()
    code = MAIN[command[0]]([*command[1:], "--dry_run", *map(str, more)])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out)


def options(command: list[str]) -> dict[str, list[str]]:
    """Flags with their values, whatever their order; no flag stands twice."""
    found: dict[str, list[str]] = {}
    for word in command[1:]:
        if word.startswith("--"):
            assert word not in found, word
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


# ---------------------------------------------------------------------------------------------------- the sweeps


@pytest.mark.parametrize("family", RUNS)
def test_each_stage_names_the_published_folder_that_the_one_before_makes(family, commands, tmp_path, capsys):
    env = {"LOG_ROOT": str(tmp_path / "my logs")}
    if "Multiclass" not in family:
        env |= {"START": "2", "END": "2"}
    stages = ["Stage1", "Stage2", "Eval"] + (["TSNE"] if family == "CIFAR10" else [])
    one, two, *later = (
        dry_run(command, capsys) for stage in stages for command in commands(f"{family}_{stage}", **env)
    )
    assert (one["script"], two["script"], *(c["script"] for c in later)) == tuple(MAIN)[: len(stages)]
    first, second = (str(tmp_path / "my logs" / name) for name in RUNS[family])
    assert one["run_dir"] == first and two["resume_path"] == first and two["run_dir"] == second
    for looked in later:
        assert looked["load_path"] == f"{second}/last.cocsr_model" and looked["run_dir"] == second
    assert (one["mode"], one["K"], one["views_per_step"], one["epochs"]) == ("simclr_CSI", 5, 1280, 1000)
    assert (two["mode"], two["K"], two["views_per_step"], two["epochs"]) == ("cocsr_dict", 5, 640, 1300)
    assert not (tmp_path / "my logs").exists()


def test_a_sweep_starts_the_interpreter_once_a_class_from_the_root_of_the_project(tmp_path):
    env = {"START": "2", "END": "3", "LOG_ROOT": str(tmp_path / "logs")}
    done = sweep("CIFAR10_Stage1", sys.executable, "--dry_run", **env)
    names = [Path(json.loads(line)["run_dir"]).name for line in done.stdout.splitlines()]
    assert names == [RUNS["CIFAR10"][0].replace("class_2", f"class_{i}") for i in (2, 3)], done.stderr


def test_all_classes_are_the_default_and_further_arguments_reach_every_command(commands):
    for family, last in LAST.items():
        found = [options(command) for command in commands(f"{family}_Eval", "--seed", "7", "--suffix", "a b")]
        assert [flags["--one_class_idx"] for flags in found] == [[str(i)] for i in range(last + 1)]
        assert all(flags["--seed"] == ["7"] and flags["--suffix"] == ["a b"] for flags in found)
    (multi,) = commands("Imagenet_Multiclass_Stage2", DATA_PATH="/my data")
    assert options(multi)["--data_path"] == ["/my data"] and "--one_class_idx" not in multi


def test_what_a_sweep_cannot_do_is_reported(commands):
    for env in ({"START": "3", "END": "2"}, {"START": "x"}):
        done = sweep("CIFAR10_Eval", "true", **env)
        assert done.returncode != 0 and done.stderr, env
    told = {("cifar11", "Eval"): "cifar11", ("cifar10", "Stage3"): "Stage3", ("cifar10",): "usage"}
    for args, word in told.items():
        done = sweep("sweep", "true", *args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and word in done.stderr
    assert "START and END have no effect" in sweep("CIFAR10_Multiclass_Eval", "true", START="1").stderr
    assert sweep("CIFAR10_Stage1", "false").returncode == 1  # a class that fails stops the sweep


# ---------------------------------------------------------------------------------------- the published commands


@pytest.fixture(scope="module")
def published() -> dict[tuple[str, str], list[str]]:
    """The 16 commands of the published README for class 2, by family and script."""
    found = sorted((SHARED / "seeds").glob("000_*.txt"))
    if not found:
        pytest.skip(f"the published README {SHARED}/seeds/000_*.txt is not on this machine")
    text = found[0].read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [
        line
        for block in blocks
        for line in re.findall(r"^ *python ((?:train|train_cocsr|eval|tsne)\.py .*)", block, re.M)
    ]
    commands = [shlex.split(line.replace("${i}", "2").replace("$i", "2")) for line in lines]
    assert len(commands) == 16
    names = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "imagenet": "Imagenet"}
    table = {}
    for command in commands:
        family = names[options(command)["--dataset"][0]] + ("" if "--one_class_idx" in command else "_Multiclass")
        table[family, command[0]] = command
    assert len(table) == 16
    return table


@pytest.mark.parametrize("family", RUNS)
def test_published_commands_make_the_folders_that_later_ones_name(family, published, tmp_path, capsys):
    done = {
        script: dry_run(command, capsys, "--log_root", tmp_path)
        for (name, script), command in published.items()
        if name == family
    }
    first, second = (Path(done[script]["run_dir"]) for script in ("train.py", "train_cocsr.py"))
    assert (first, second) == tuple(tmp_path / name for name in RUNS[family])
    assert Path(done["train_cocsr.py"]["resume_path"]).name == first.name
    for script in {"eval.py", "tsne.py"} & done.keys():
        load_path = Path(done[script]["load_path"])
        assert (load_path.parent.name, load_path.name) == (second.name, "last.cocsr_model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", RUNS)
def test_sweeps_are_the_published_commands_but_for_folders(family, published, commands):
    stages = {"train.py": "Stage1", "train_cocsr.py": "Stage2", "eval.py": "Eval", "tsne.py": "TSNE"}
    compared = 0
    for (name, script), expected in published.items():
        if name != family:
            continue
        (ours,) = commands(f"{family}_{stages[script]}", **({"START": "2", "END": "2"} if name in LAST else {}))
        flags, theirs = options(ours), options(expected)
        assert ours[0] == script and flags.pop("--data_path") == ["../Data/"]
        assert flags.pop("--log_root", None) == (["./logs"] if "train" in script else None)  # no effect elsewhere
        for path in ("--resume_path", "--load_path"):
            if path in theirs:
                flags[path] = [flags[path][0].replace("./logs/", "../Data/Model/")]
        assert flags == theirs
        compared += 1
    assert compared == (4 if family == "CIFAR10" else 3)
