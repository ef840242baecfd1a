"""The scripts of SDNets: which commands they start, that these fit each other, and what they leave out."""

import json
import os
import time
from pathlib import Path

import pytest

import eval as evaluate
import train
from scripts.recipes import Recipe
from tests.scripts.conftest import script
from tests.scripts.test_sweeps import options

MAIN = {"train.py": train.main, "eval.py": evaluate.main}


def plan(line: list[str], capsys) -> dict:
    """What a command would do."""
    capsys.readouterr()
    assert MAIN[line[0]]([*line[1:], "--dry_run"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def check(found: list[list[str]], capsys) -> list[Path]:
    """Every evaluation is of a run that a command before it makes; the run folders."""
    made: list[Path] = []
    for line in found:
        planned = plan(line, capsys)
        if line[0] == "train.py":
            made.append(Path(planned["run_dir"]))
        else:
            assert Path(planned["load_path"]).parent in made
            other = options(line).get("--control_path")
            assert other is None or Path(other[0]).parent in made
    return made


NETWORKS = ["resnet18", "sdnet18", "sdnet18_all", "sdnet18_all_noshortcut"]
LARGE = [f"{name}_imagenet" for name in NETWORKS]
COSINE = {"--lr_init": ["0.1"], "--lr_final": ["1e-6"], "--weight_decay": ["5e-4"], "--batch_size": ["128"]}
STEPS = {"--lr_init": ["0.1"], "--lr_drops": ["30", "60", "90"], "--weight_decay": ["1e-4"], "--no_nesterov": []}


@pytest.mark.parametrize(
    "name, dataset, networks, epochs, schedule",
    [
        ("SDNET_CIFAR10", "cifar10", NETWORKS, "220", COSINE),
        ("SDNET_CIFAR100", "cifar100", NETWORKS, "220", COSINE),
        ("SDNET_ImageNet", "imagenet1k", LARGE, "100", STEPS),
    ],
)
def test_the_published_recipes(name, dataset, networks, epochs, schedule, commands, tmp_path, capsys):
    found = commands(name, "--device", "cpu", SEEDS="3")
    made = check(found, capsys)
    assert made == [tmp_path / f"my logs/{dataset}_{network}_supervised_s3" for network in networks]
    training = [options(line) for line in found if line[0] == "train.py"]
    for flags, network in zip(training, networks, strict=True):
        expected = {**schedule, "--epochs": [epochs], "--model": [network], "--seed": ["3"], "--device": ["cpu"]}
        if "ImageNet" in name:
            expected["--batch_size"] = ["256" if "_all" in network else "512"]
        assert expected.items() <= flags.items()
        assert flags.keys() - expected.keys() <= {"--mode", "--dataset", "--data_path", "--log_root", "--suffix"}
    tests = [options(line) for line in found if line[0] == "eval.py"]
    assert [flags["--mode"] for flags in tests] == [["test_acc"]] * 8 + [["noise_lambda"]] * 3
    weights = [Path(flags["--load_path"][0]).name for flags in tests[:8]]
    assert weights == ["last.model", "best.model"] * 4
    noise = tests[8:]
    assert [Path(flags["--load_path"][0]).parent for flags in noise] == made[1:]
    assert {flags["--control_path"][0] for flags in noise} == {str(made[0] / "last.model")}
    protocols = {flags.get("--noise_protocol", ["none"])[0] for flags in noise}
    assert protocols == {"imagenetc" if "ImageNet" in name else "none"}


def test_the_short_run_is_the_command_that_was_measured(commands, capsys):
    found = commands("sdnet_short", DATA_PATH="/photographs")
    runs = [options(line) for line in found if line[0] == "train.py"]
    measured = "--dataset folder --data_path /photographs --mode supervised --epochs 20 --amp bf16".split()
    by_default = [*measured, "--model", "sdnet8", "--seed", "1", "--suffix", "s1"]
    (ours,) = (plan(line, capsys) for line in found if line[0] == "train.py" and {"sdnet8", "s1"} <= set(line))
    theirs = plan(["train.py", *by_default, "--log_root", str(Path(ours["run_dir"]).parent)], capsys)
    assert ours == theirs
    assert [(flags["--model"], flags["--seed"]) for flags in runs] == [
        ([model], [seed]) for seed in "01" for model in ("resnet8", "sdnet8", "sdnet8_all")
    ]
    noise = [options(line) for line in found if "noise_lambda" in line]
    assert len(noise) == 4 and all(flags["--noise_levels"] == ["1", "3", "5"] for flags in noise)
    assert script("sdnet_short", "true").returncode != 0  # no photographs


def test_networks_epochs_and_flags_of_noise_are_the_callers(commands):
    own = {"MODELS": "sdnet34", "EPOCHS": "7", "NOISE_FLAGS": "--cifar10c /c --noises shot"}
    found = [options(line) for line in commands("SDNET_CIFAR10", **own)]
    assert len(found) == 4 and found[0]["--epochs"] == ["7"] and found[0]["--model"] == ["sdnet34"]
    # There is no resnet18 to compare with.
    assert "--control_path" not in found[3] and found[3]["--noises"] == ["shot"] and found[3]["--cifar10c"] == ["/c"]


def touch(path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() + seconds,) * 2)


def test_what_is_there_is_not_evaluated_again_until_its_weights_change(commands, tmp_path):
    run, control = (tmp_path / f"my logs/cifar10_{name}_supervised_s0" for name in ("sdnet18", "resnet18"))
    for folder in (run, control):
        for weights in ("last", "best"):
            touch(folder / f"{weights}.model", 0)
        for name in ("clean/accuracy_test_acc", "clean/accuracy_test_acc_best", "result_noise_lambda"):
            touch(folder / f"{name}.json", 10)

    def again() -> list[str]:
        """The evaluations, by mode and weights."""
        found = [options(line) for line in commands("SDNET_CIFAR10", MODELS="resnet18 sdnet18") if line[0] == "eval.py"]
        return ["/".join([*flags["--mode"], *Path(flags["--load_path"][0]).parts[-2:]]) for flags in found]

    name = "cifar10_sdnet18_supervised_s0"
    assert again() == []
    touch(run / "best.model", 20)
    assert again() == [f"test_acc/{name}/best.model"]
    touch(control / "last.model", 20)
    assert again() == [
        "test_acc/cifar10_resnet18_supervised_s0/last.model",
        f"test_acc/{name}/best.model",
        f"noise_lambda/{name}/last.model",
    ]
    touch(control / "last.model", 0)
    (run / "result_noise_lambda.json").unlink()
    assert again()[1:] == [f"noise_lambda/{name}/last.model"]
    (run / "best.model").unlink()  # of a run without held-out images, by which lambda would be calibrated
    assert again() == []


def test_a_command_that_fails_ends_the_script(tmp_path):
    done = script("SDNET_CIFAR10", "false", LOG_ROOT=str(tmp_path))
    assert done.returncode == 1
    told = {("x", "cifar10"): "'x'", ("sdnet",): "usage"}
    for args, word in told.items():
        done = script("sdnet_sweep", "true", *args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and word in done.stderr


def test_the_detector_is_tested_clean_and_under_noise_by_both_lambdas(commands, tmp_path, capsys):
    found = commands("SDNET_Detector", SEEDS="2", CLASS="5", EPOCHS="9", LEVELS="0.1 0.2", DATASET="digits")
    runs = check(found, capsys)
    assert runs == [
        tmp_path / f"my logs/digits_{model}_unsup_simclr_CSI_shift_rotation_one_class_5_s2"
        for model in ("resnet8", "sdnet8")
    ]
    tests = [options(line) for line in found if "ood_pre" in line]
    asked = [
        (flags.get("--test_noise_level", ["clean"])[0], flags.get("--stem_lambda", ["trained"])[0]) for flags in tests
    ]
    levels = ["clean", "0.1", "0.2"]
    assert asked == [(level, lam) for lam in ("trained", "trained", "auto") for level in levels]
    assert len({flags["--out"][0] for flags in tests}) == len(tests)
    assert all(Path(flags["--out"][0]).is_relative_to(Path(flags["--load_path"][0]).parent) for flags in tests)
    calibration = [n for n, line in enumerate(found) if "noise_lambda_shift" in line]
    (first_auto, *_) = (n for n, line in enumerate(found) if "auto" in line)
    assert (
        len(calibration) == 1 and calibration[0] < first_auto and str(runs[1] / "last.model") in found[calibration[0]]
    )


def test_the_run_on_a_gpu_measures_its_speed_and_ends_its_cosine_in_time(commands, tmp_path, capsys):
    found = commands("gpu_sdnet", "--compile", MODELS="resnet18 sdnet18", MINUTES="7")
    lines = [line for line in found if line[0] in MAIN]
    check(lines, capsys)
    training = [options(line) for line in lines if line[0] == "train.py"]
    assert [flags["--epochs"] for flags in training] == [["2"], ["2"], ["33"], ["33"]]
    assert all(flags["--amp"] == ["bf16"] and "--compile" in flags for flags in training)
    probes = [str(tmp_path / f"my logs_speed/cifar10_{model}_supervised") for model in ("resnet18", "sdnet18")]
    assert [plan(line, capsys)["run_dir"] for line in lines[:2]] == probes
    (length,) = (line for line in found if "scripts.length" in line)
    assert length == ["-m", "scripts.length", *probes, "--minutes", "7", "--most", "220"]
    assert found[-1] == ["-m", "scripts.sdnet", str(tmp_path / "my logs")]
    assert [line for line in lines if "noise_lambda" in line and "--control_path" in line]


def test_levels_of_the_detector_are_those_of_the_short_run():
    from datasets.noise import LEVELS

    numbers = [float(word) for word in Recipe("sdnet_detector").words("levels")]
    short = options(["eval.py", *Recipe("sdnet_short").words("test_noise")])
    assert numbers == [LEVELS["cifar10c"]["gaussian"][int(n) - 1] for n in short["--noise_levels"]]
