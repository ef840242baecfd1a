"""Tables of SDNets from small run folders, against numbers by hand."""

import csv
import json
import math

import pytest

from evals import noise_lambda
from models.lambda_line import MEASURES
from scripts.length import epochs_that_fit
from scripts.length import main as length
from scripts.sdnet import PER, control_of, main, measures_of, signed, tables

FLAGS = {"mode": "supervised", "dataset": "folder", "epochs": 20, "one_class_idx": None, "suffix": None, "lr_init": 0.1}
COLUMNS = ("control", "fixed", "energy_set", "energy_batch", "energy_image", "oracle")


def run(logs, model, seed, *, speeds=(100.0,), **flags):
    """A run folder of a network and seed without results."""
    name = "_".join(map(str, [model, f"s{seed}", *flags.values()]))
    folder = logs / name
    folder.mkdir(parents=True)
    own = {**FLAGS, "model": model, "seed": seed, "log_root": str(logs), **flags}
    config = {"flags": own, "used": sorted(own), "data": {"fingerprint": "f" * 16, "images": 45000}}
    (folder / "args.json").write_text(json.dumps(config))
    rows = [{"train/images_per_second": speed, "train/peak_memory_gib": 1.5 + n} for n, speed in enumerate(speeds)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def accuracy(folder, value, *, weights="last", name="", **settings):
    tag = name or ("" if weights == "last" else f"_{weights}")
    found = {"condition": "clean", "weights": weights, "settings": settings, "accuracy": value}
    (folder / f"accuracy_test_acc{tag}.json").write_text(json.dumps(found))


def noise(folder, levels, *, name="", highpass=None, **settings):
    """levels: kind -> [(level, accuracies of COLUMNS in percent)], the first without noise. highpass: by that measure
    at every level."""
    settings = {"noise_protocol": "cifar10c", "noise_levels": [1, 3], **settings}
    found = {"mode": "noise_lambda", "weights": "last", "settings": settings, "table": f"table{name}.csv"}
    (folder / f"result_noise_lambda{name}.json").write_text(json.dumps(found))
    with (folder / f"table{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        own = [f"highpass_{per}" for per in ("set", "batch", "image")]
        lambdas = ["lambda_energy_set", "lambda_energy_image", "lambda_oracle"]
        writer.writerow(["noise", "number", "level", "residual_energy", *COLUMNS, *own, *lambdas])
        for kind, rows in levels.items():
            for number, (level, values) in enumerate(rows):
                more = ["nan"] * 3 if highpass is None else [highpass / 100] * 3
                lam = [0.3, 0.4, 0.1 * (number + 1)]
                writer.writerow([kind, number, level, 1.0, *(value / 100 for value in values), *more, *lam])


def table(text, title):
    """Cells of the table below a title, by its first cells."""
    part = text[text.index(f"**{title}") :].split("**")[2]
    lines = [line for line in part.strip().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture
def logs(tmp_path):
    for seed, (control, sdnet, best) in enumerate([(0.80, 0.79, 0.81), (0.84, 0.85, 0.83)]):
        accuracy(run(tmp_path, "resnet8", seed, speeds=(90, 110, 400)), control)
        folder = run(tmp_path, "sdnet8", seed, speeds=(80,))
        accuracy(folder, sdnet)
        accuracy(folder, best, weights="best")
        clean = ("nan", [80, 79, 78, 78, 77, 79])
        steps = [(0.04, [60, 65, 70, 69, 68, 72]), (0.08, [40, 45, 58 + 2 * seed, 55, 54, 60])]
        noise(folder, {"gaussian": [clean, *steps], "impulse": [clean, (0.01, [70, 71, 70, 70, 70, 73])]})
    return tmp_path


def test_accuracies_are_means_and_spreads_over_seeds_and_differences_are_by_seed(logs):
    resnet8, sdnet8 = table(tables([logs]), "Clean accuracy in percent: folder, 20 epochs, seeds 0, 1")
    assert resnet8 == {
        "network": "resnet8", "seeds": "2", "last epoch": "82.00 ± 2.83", "best epoch": "", "last - control": "",
        "images/s": "110", "peak memory, GiB": "3.50",
    }  # fmt: skip
    assert sdnet8["last epoch"] == "82.00 ± 4.24" and sdnet8["best epoch"] == "82.00 ± 1.41"
    # -1 and +1 point, not the spread of two independent networks.
    assert sdnet8["last - control"] == "+0.00 ± 1.41"


def test_noise_is_averaged_over_levels_and_then_over_seeds(logs):
    text = tables([logs])
    gaussian, impulse = table(text, "Accuracy under noise in percent, mean over levels: folder, 20 epochs")
    assert (gaussian["network"], gaussian["noise"]) == ("sdnet8", "gaussian")
    assert gaussian["control"] == "50.0 ± 0.0" and gaussian["lambda of training"] == "55.0 ± 0.0"
    assert gaussian["predicted, set"] == "64.5 ± 0.7" and gaussian["oracle"] == "66.0 ± 0.0"
    assert gaussian["set - training"] == "+9.5 ± 0.7" and gaussian["set - control"] == "+14.5 ± 0.7"
    assert impulse["set - training"] == "-1.0 ± 0.0" and gaussian["image - training"] == "+6.0 ± 0.0"
    rows = table(text, "At every level: folder, 20 epochs")
    assert [(row["noise"], row["level"]) for row in rows] == [
        ("gaussian", "clean"), ("gaussian", "0.04"), ("gaussian", "0.08"), ("impulse", "clean"), ("impulse", "0.01")
    ]  # fmt: skip
    assert rows[2]["predicted, set"] == "59.0 ± 1.4" and rows[2]["lambda, set"] == "0.30 ± 0.00"
    assert rows[2]["lambda, image"] == "0.40 ± 0.00" and {row["measure"] for row in rows} == {"energy"}
    assert rows[2]["lambda, oracle"] == "0.30 ± 0.00" and rows[0]["predicted, image"] == "77.0 ± 0.0"
    where = "points (sdnet8, gaussian 0.08, energy, set)"
    assert f"largest gain over lambda of training: +14.0 ± 1.4 {where}; " in text
    assert f"largest gain over control: +19.0 ± 1.4 {where}\n" in text


def test_a_study_without_a_control_has_no_gain_over_it(logs):
    for folder in logs.glob("sdnet8*"):
        noise(folder, {"shot": [("nan", [math.nan, 79, 95, 78, 77, 79]), (60, [math.nan, 60, 61, 61, 61, 62])]})
    (shot,) = table(tables([logs]), "Accuracy under noise in percent")
    assert shot["control"] == shot["set - control"] == "" and shot["set - training"] == "+1.0 ± 0.0"
    assert "largest gain over lambda of training: +1.0 ± 0.0 points (sdnet8, shot 60, energy, set)\n" in tables([logs])


def test_each_measure_of_the_residual_has_rows_of_its_own(logs):
    for folder in logs.glob("sdnet8*"):
        noise(folder, {"shot": [("nan", [80, 79, 78, 78, 77, 79]), (60, [1, 60, 61, 61, 61, 62])]}, highpass=75)
    energy, highpass = table(tables([logs]), "Accuracy under noise in percent")
    assert (energy["measure"], energy["predicted, image"]) == ("energy", "61.0 ± 0.0")
    assert (highpass["measure"], highpass["predicted, image"]) == ("highpass", "75.0 ± 0.0")
    assert highpass["set - training"] == "+15.0 ± 0.0" and highpass["lambda of training"] == "60.0 ± 0.0"


def test_tables_without_the_name_of_a_measure_are_of_energy(logs):
    text = tables([logs])
    for path in logs.glob("sdnet8*/table.csv"):
        header, *rows = path.read_text().splitlines()
        path.write_text("\n".join([header.replace("energy_", ""), *rows]))
    assert "lambda_set" in path.read_text() and tables([logs]) == text


def test_the_columns_are_those_that_the_evaluation_writes():
    assert measures_of(dict.fromkeys(noise_lambda.COLUMNS, 0.5)) == list(MEASURES)
    assert PER == noise_lambda.PER and {"control", "fixed", "oracle"} <= set(noise_lambda.COLUMNS)


def test_accuracy_under_noise_or_another_lambda_is_not_clean_accuracy(logs):
    accuracy(logs / "sdnet8_s0", 0.1, name="_aaaa", test_noise="gaussian")
    accuracy(logs / "sdnet8_s0", 0.1, name="_bbbb", stem_lambda="auto")
    _, sdnet8 = table(tables([logs]), "Clean accuracy")
    assert sdnet8["last epoch"] == "82.00 ± 4.24"


def test_each_set_of_flags_of_noise_lambda_has_a_table_of_its_own(logs):
    noise(logs / "sdnet8_s1", {"shot": [("nan", [80, 79, 78, 78, 77, 79]), (500, [1, 2, 3, 4, 5, 6])]},
          name="_more", noise_protocol="sdnet")  # fmt: skip
    text = tables([logs])
    assert "last.model, own noise, levels of cifar10c**" in text
    assert "\nnoise_lambda: noise_protocol sdnet, noise_levels 1 3\n" in text
    (shot,) = table(text, "At every level: folder, 20 epochs, seeds 0, 1; last.model, own noise, levels of sdnet")[1:]
    assert shot["level"] == "500" and shot["control"] == "1.0"


def test_runs_of_another_length_or_data_set_are_not_mixed_with_these(logs):
    accuracy(run(logs, "sdnet8", 0, epochs=1), 0.5)
    accuracy(run(logs, "sdnet8", 0, dataset="cifar10"), 0.6)
    text = tables([logs])
    assert text.count("**Clean accuracy") == 3
    (one,) = table(text, "Clean accuracy in percent: folder, 1 epochs, seed 0")
    assert one["last epoch"] == "50.00" and one["last - control"] == ""
    run(logs, "sdnet8", 0, epochs=2)  # not evaluated, as those that measure speed
    assert tables([logs]) == text


def test_the_detector_has_a_column_for_each_level_of_noise(tmp_path):
    for seed in (0, 1):
        for model in ("resnet8", "sdnet8"):
            folder = run(tmp_path, model, seed, mode="simclr_CSI", one_class_idx=8)
            for place, settings, mean in (
                ("clean", {}, 0.9),
                ("10", {"test_noise": "gaussian", "test_noise_level": 0.1}, 0.6 + seed / 10),
                ("4", {"test_noise": "gaussian", "test_noise_level": 0.04}, 0.8),
                ("auto", {"test_noise": "gaussian", "test_noise_level": 0.1, "stem_lambda": "auto"}, 0.75),
            ):
                if model == "sdnet8" or place != "auto":
                    found = {"mode": "ood_pre", "score": "CSI", "weights": "last", "settings": settings, "mean": mean}
                    (folder / "detector" / place).mkdir(parents=True)
                    (folder / "detector" / place / "result_ood_pre_CSI.json").write_text(json.dumps(found))
    resnet8, sdnet8, auto = table(tables([tmp_path]), "AUROC in percent: folder, class 8, 20 epochs, seeds 0, 1")
    assert list(resnet8) == ["network", "score", "lambda", "clean", "gaussian 0.04", "gaussian 0.1"]
    assert resnet8["lambda"] == "" and resnet8["gaussian 0.1"] == "65.0 ± 7.1"
    assert sdnet8["lambda"] == "as trained" and sdnet8["clean"] == "90.0 ± 0.0"
    assert auto["lambda"] == "predicted, image" and auto["gaussian 0.1"] == "75.0 ± 0.0" and auto["clean"] == ""


def test_the_control_of_a_network_has_its_blocks():
    names = ("resnet8", "sdnet8", "sdnet18_all", "sdnet34_all_noshortcut_imagenet", "sdnet18_imagenet")
    found = [control_of(name) for name in names]
    assert found == ["resnet8", "resnet8", "resnet18", "resnet34_imagenet", "resnet18_imagenet"]


def test_the_sign_of_a_mean_is_shown():
    assert [signed([1.0, 2.0]), signed([-1.0]), signed([])] == ["+1.5 ± 0.7", "-1.0", ""]


def refused(capsys, *argv):
    assert main(list(map(str, argv))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_runs_that_cannot_share_a_row_are_named(logs, capsys):
    folder = run(logs, "sdnet8", 2, lr_init=0.2)
    assert "differ in --lr_init" in refused(capsys, logs)
    (folder / "args.json").unlink()
    run(logs, "resnet8", 1, suffix="again")
    assert "resnet8 with seed 1" in refused(capsys, logs)


def test_damaged_files_and_empty_folders_are_named(logs, tmp_path, capsys):
    assert "nothing to show below" in refused(capsys, tmp_path / "none")
    (logs / "sdnet8_s0/table.csv").write_text("noise,number\ngaussian,1\n")
    assert "sdnet8_s0/table.csv is no table of noise_lambda" in refused(capsys, logs)
    (logs / "sdnet8_s0/accuracy_test_acc.json").write_text("{")
    assert "accuracy_test_acc.json is not a result" in refused(capsys, logs)
    (logs / "sdnet8_s0/args.json").write_text("[]")
    assert "args.json is not that of a run folder" in refused(capsys, logs)


def test_tables_can_go_to_a_file(logs, tmp_path, capsys):
    assert main([str(logs), "--out", str(tmp_path / "tables.md")]) == 0
    assert (tmp_path / "tables.md").read_text() == capsys.readouterr().out == tables([logs])


def test_epochs_follow_from_the_speed_of_the_last_epoch_and_the_slowest_run(tmp_path, capsys):
    assert epochs_that_fit(45_000, 3000.0, 20, 220) == 72  # 0.9 of 20 minutes, 15 s each
    assert epochs_that_fit(45_000, 1e6, 20, 220) == 220 and epochs_that_fit(45_000, 1.0, 1, 220) == 1
    folders = [str(run(tmp_path, "sdnet18", seed, speeds=(1, speed))) for seed, speed in ((0, 3000.0), (1, 1500.0))]
    assert length([*folders, "--minutes", "20", "--most", "220"]) == 0 and capsys.readouterr().out == "36\n"
    assert length([str(tmp_path), "--minutes", "20", "--most", "220"]) == 2
    assert capsys.readouterr().err.endswith("is no run that has trained an epoch\n")
    assert length([*folders, "--minutes", "0", "--most", "220"]) == 2 and "--minutes" in capsys.readouterr().err
