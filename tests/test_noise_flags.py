"""--test_noise from the command line: which images have it, which never do, where it is told, and what is refused."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluate
import train
import tsne
from datasets.noise import CORRUPTIONS, noisy
from evals import EVALS, TSNES
from evals.trained import Trained
from scripts import results
from tests.conftest import SHIFT, TINY
from tests.evals.test_trained import flags_of, trained_of
from tests.test_commands import refused

LEVELS = {"gaussian": "0.1", "shot": "12", "speckle": "0.4", "impulse": "0.2", "contrast": "0.3"}
GAUSSIAN = ["--test_noise", "gaussian", "--test_noise_level", "0.1"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """A labelled run on digits, whose linear probe knows some of them."""
    logs = tmp_path_factory.mktemp("logs")
    args = "--dataset digits --image_size 8 --model resnet8 --epochs 3 --error_step 0 --lr_init 0.5".split()
    assert train.main([*args, "--mode", "sup_simclr", "--log_root", str(logs)]) == 0
    (folder,) = logs.iterdir()
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    """A small autoencoder of digits of class 3."""
    logs = tmp_path_factory.mktemp("logs")
    args = "--dataset digits --mode dae --layers 8 --one_class_idx 3 --epochs 2".split()
    assert train.main([*args, "--log_root", str(logs)]) == 0
    (folder,) = logs.iterdir()
    return folder


@pytest.fixture
def seen(monkeypatch):
    """What `noisy` made: the set before, its name, the set after."""
    import datasets.noise as module

    made = []

    def spy(images, kind, level, seed, *, name):
        made.append((images, name, noisy(images, kind, level, seed, name=name)))
        return made[-1][2]

    monkeypatch.setattr(module, "noisy", spy)
    return made


# ------------------------------------------------------------------------------------------------------ who has noise


@pytest.mark.parametrize("kind", LEVELS)
def test_all_test_sets_of_a_detection_have_it_and_training_images_never(kind, stage1, tmp_path, seen, monkeypatch):
    import evals.detect as module

    sets, real = [], module._test_sets
    monkeypatch.setattr(module, "_test_sets", lambda *args: (sets.append(real(*args)), sets[-1])[1])
    flags = ["--load_path", str(stage1), "--ood_dataset", "interp", "--test_batch_size", "9"]
    assert evaluate.main([*flags, "--out", str(tmp_path / "clean")]) == 0 and not seen
    more = ["--test_noise", kind, "--test_noise_level", LEVELS[kind], "--out", str(tmp_path / "noisy")]
    assert evaluate.main([*flags, *more]) == 0
    clean, noise = sets
    assert len(seen) == 2 and list(clean) == ["digits", "interp"]
    for (before, _, after), name in zip(seen, ("digits", "interp"), strict=True):
        assert torch.equal(before.images, clean[name].images)  # both the normal and the anomalous ones
        assert torch.equal(after.images, noise[name].images)
    level = float(LEVELS[kind])
    assert torch.equal(noise["digits"].images, noisy(clean["digits"], kind, level, 0).images)
    # Mixtures are of clean images, and their noise is not that of the images with the same numbers.
    same = noisy(clean["interp"], kind, level, 0)
    assert torch.equal(noise["interp"].images, same.images) == (CORRUPTIONS[kind].draw is None)
    one, two = (json.loads((tmp_path / n / "result_ood_pre_CSI.json").read_text()) for n in ("clean", "noisy"))
    assert one["data"] == two["data"] and one["data"].keys() == {"training", "digits", "interp"}
    assert one["auroc"].keys() == two["auroc"].keys() and one["mean"] != two["mean"]
    assert {"test_noise", "test_noise_level"} & one["settings"].keys() == set()
    assert (two["settings"]["test_noise"], two["settings"]["test_noise_level"]) == (kind, level)


def test_nothing_is_left_to_detect_where_all_is_noise(stage1, tmp_path):
    args = ["--load_path", str(stage1), "--out", str(tmp_path), "--test_noise", "impulse", "--test_noise_level", "1"]
    assert evaluate.main(args) == 0
    assert abs(json.loads((tmp_path / "result_ood_pre_CSI.json").read_text())["mean"] - 0.5) < 0.12


def test_accuracy_falls_with_the_level_and_files_stay_apart(labelled, tmp_path, seen):
    run = shutil.copytree(labelled, tmp_path / "run")
    args, found = ["--load_path", str(run), "--mode", "test_acc"], []
    for more in ([], GAUSSIAN, [*GAUSSIAN[:3], "0.6"], GAUSSIAN, []):
        assert evaluate.main([*args, *more]) == 0
    for path in run.glob("accuracy_*.json"):
        result = json.loads(path.read_text())
        found.append((result["settings"].get("test_noise_level", 0), result["accuracy"], path.name))
    found.sort()
    assert [level for level, _, _ in found] == [0, 0.1, 0.6] and found[0][2] == "accuracy_test_acc.json"
    assert found[0][1] > found[2][1] + 0.03
    assert {name for _, name, _ in seen} == {"test images"} and len(seen) == 3
    # The same numbers from the images themselves.
    trained = EVALS["test_acc"].load(flags_of(*args, *GAUSSIAN, "--dataset", "digits", "--image_size", "8",
                                              "--model", "resnet8"))  # fmt: skip
    data = noisy(trained.split.test(), "gaussian", 0.1, 0)
    with torch.no_grad():
        logits = trained.net.linear(trained.net.features(data.images.float() / 255))
    assert float((logits.argmax(1) == data.labels).double().mean()) == pytest.approx(found[1][1])


def test_pictures_of_t_sne_show_test_images_with_it(stage1, autoencoder, tmp_path, seen):
    for n, folder in enumerate((stage1, autoencoder)):
        for name, more in (("a", []), ("b", GAUSSIAN)):
            out = tmp_path / str(n)
            assert tsne.main(["--load_path", str(folder), "--out", str(out), "--tsne_points", "5", *more]) == 0
            pictures = list(out.glob("*.png"))
            assert len(pictures) == (5 if n == 0 else 1) * (1 if name == "a" else 2)
        noted = [json.loads(Image.open(path).info["Comment"])["settings"] for path in pictures]
        assert sum(settings.get("test_noise") == "gaussian" for settings in noted) == len(noted) / 2
    assert [name for _, name, _ in seen] == ["test images"] * 2


# They look at training images.
INSIDE = ("sdnet_inside", "meansparse_inside", "alpha_scan")


def test_every_row_that_looks_at_test_pictures_has_the_flag():
    having = {name for name, row in (EVALS | TSNES).items() if any("test_noise" in vars(s) for s in row.specs)}
    own = {name for name in EVALS if name.startswith("noise_lambda")}  # they put noise on images themselves
    assert {*EVALS, *TSNES} - having == {"rdae_outliers", "rdae_denoise", "rdae_features", *INSIDE, *own}


def test_the_noise_comes_on_top_of_that_of_the_split(stage1, seen):
    trained = trained_of(stage1, *GAUSSIAN, "--corrupt", "salt_pepper", "--corrupt_pixels", "9")
    found = trained.test_images()
    ((before, _, after),) = seen
    assert (
        found.images is after.images
        and before.mask is not None
        and torch.equal(before.images, trained.split.test().images)
    )
    assert found.mask is before.mask


def test_a_network_in_memory_is_evaluated_under_it_and_its_training_images_are_not(stage1, seen):
    """As while a curve is made: the split is that of training."""
    loaded = trained_of(stage1)
    trained = Trained.of(loaded.net, flags_of(*TINY, *SHIFT, "--device", "cpu", *GAUSSIAN), loaded.split)
    assert torch.equal(trained.train_images().images, loaded.train_images().images)
    (clean,), (noise,) = (EVALS["ood_pre"].measure(of) for of in (loaded, trained))
    assert len(seen) == 1 and clean.metrics["mean"] != noise.metrics["mean"]


def test_another_seed_draws_other_noise_and_two_folders_of_the_same_pictures_the_same(stage1, tmp_path):
    rng = np.random.default_rng(0)
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    for n in range(4):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        for place in ("a", "b"):
            picture.save(tmp_path / place / f"{n}.png")
    from evals.detect import _test_sets

    names = [f"folder:{tmp_path / place}" for place in ("a", "b")]
    first, second = (
        _test_sets(trained_of(stage1, *GAUSSIAN, "--seed", seed, "--ood_dataset", *names)) for seed in "01"
    )
    assert torch.equal(first[names[0]].images, first[names[1]].images)
    assert not torch.equal(first["digits"].images, second["digits"].images)
    assert not torch.equal(first[names[0]].images, second[names[0]].images)
    # What is recorded of the training's noise and outliers does not count.
    third = _test_sets(trained_of(stage1, *GAUSSIAN, "--data_seed", "5"))
    assert torch.equal(first["digits"].images, third["digits"].images)


# --------------------------------------------------------------------------------------------- what has no effect


def no_effect(capsys) -> set[str]:
    return set(re.findall(r"note: --(\w+) has no effect", capsys.readouterr().out))


def test_where_it_changes_nothing_it_is_reported(stage1, autoencoder, tmp_path, capsys):
    both = {"test_noise", "test_noise_level"}
    args = [*TINY, *GAUSSIAN, "--mode", "simclr", "--epochs", "1", "--log_root", str(tmp_path / "l")]
    capsys.readouterr()
    assert train.main(args) == 0 and no_effect(capsys) == both
    weights = next((tmp_path / "l").iterdir())
    assert "test_noise" not in json.loads((weights / "args.json").read_text())["used"]
    for mode in ("rdae_denoise", "rdae_outliers"):
        args = ["--mode", mode, "--load_path", str(autoencoder), "--out", str(tmp_path), *GAUSSIAN]
        assert evaluate.main(args) == 0 and no_effect(capsys) == both, mode
        assert "test_noise" not in json.loads((tmp_path / f"result_{mode}.json").read_text())["settings"]
    args = ["--load_path", str(stage1), "--out", str(tmp_path), "--test_noise_level", "7", "--severity", "2"]
    assert evaluate.main(args) == 0 and no_effect(capsys) == {"test_noise_level", "severity"}
    assert evaluate.main([*args[:4], *GAUSSIAN]) == 0 and not no_effect(capsys)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "more, told",
    [
        (["--test_noise", "shot"], ["--test_noise shot", "--test_noise_level", "a Poisson rate in [0.001, 10000]"]),
        ([*GAUSSIAN[:3], "-0.1"], ["--test_noise_level -0.1", "a standard deviation in [0, 10]"]),
        ([*GAUSSIAN[:3], "nan"], ["--test_noise_level nan"]),
        ([*GAUSSIAN[:3], "inf"], ["--test_noise_level inf"]),
        (["--test_noise", "shot", "--test_noise_level", "0"], ["--test_noise_level 0", "a Poisson rate"]),
        (["--test_noise", "impulse", "--test_noise_level", "1.01"], ["--test_noise_level 1.01", "entries in [0, 1]"]),
        (["--test_noise", "speckle", "--test_noise_level", "11"], ["--test_noise_level 11"]),
        (["--test_noise", "salt_pepper", "--test_noise_level", "1"], ["--test_noise", "impulse"]),
        ([*GAUSSIAN[:3], "much"], ["--test_noise_level", "much"]),
        ([*GAUSSIAN, "--severity", "3"], ["--severity 3", "--test_noise_level"]),
        (["--test_noise", "jpeg", "--severity", "6"], ["--severity", "6"]),
        (["--test_noise", "jpeg", "--test_noise_level", "0"], ["--test_noise_level 0", "a JPEG quality in [1, 100]"]),
    ],
)  # fmt: skip
def test_a_level_that_cannot_be_is_one_line_and_nothing_is_written(more, told, stage1, tmp_path, capsys):
    run = shutil.copytree(stage1, tmp_path / "run", ignore=shutil.ignore_patterns("result_*", "*.png"))
    before = sorted(run.iterdir())
    for script in (evaluate, tsne):
        refused(capsys, script.main(["--load_path", str(run), *more]), *told)
    assert sorted(run.iterdir()) == before


def test_corruptions_are_of_clean_images(stage1, tmp_path, capsys):
    args = ["--load_path", str(stage1), "--out", str(tmp_path / "out"), "--corruptions", "jpeg"]
    refused(capsys, evaluate.main([*args, *GAUSSIAN]), "--corruptions: they are of clean images", "--test_noise")
    refused(capsys, evaluate.main([*args, "fog"]), "--corruptions", "'fog'", "pixelate")
    assert not (tmp_path / "out").exists()


def test_tables_are_refused(autoencoder, tmp_path, capsys):
    np.savez(tmp_path / "table.npz", X=np.random.default_rng(0).normal(size=(20, 64)))
    args = ["--load_path", str(autoencoder), "--npz", str(tmp_path / "table.npz"), "--one_class_idx", "0", *GAUSSIAN]
    for script, mode in ((evaluate, "ood_reconstruction"), (tsne, "ood_tsne_codes")):
        refused(capsys, script.main([*args, "--mode", mode]), "--npz: rows of a table are no pictures")


# ------------------------------------------------------------------------------------------------------------ results


def test_a_severity_is_a_level_of_the_protocol(stage1, tmp_path):
    args, found = ["--load_path", str(stage1)], []
    for name, more in (("a", ["--test_noise_level", "0.09"]), ("b", ["--severity", "4"])):
        assert evaluate.main([*args, "--out", str(tmp_path / name), "--test_noise", "gaussian", *more]) == 0
        found.append(json.loads((tmp_path / name / "result_ood_pre_CSI.json").read_text()))
    assert found[0]["auroc"] == found[1]["auroc"]
    assert found[1]["settings"]["severity"] == 4 and "severity" not in found[0]["settings"]


def test_one_command_makes_the_table_of_all_severities(stage1, tmp_path, capsys):
    args = ["--load_path", str(stage1), "--out", str(tmp_path)]
    capsys.readouterr()
    assert evaluate.main([*args, "--corruptions", "contrast", "impulse"]) == 0
    told = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    table = found["corruptions"]
    assert list(table) == ["contrast", "impulse"] and {len(row) for row in table.values()} == {5}
    assert found["settings"]["corruptions"] == ["contrast", "impulse"]
    means = {kind: np.mean(row) for kind, row in table.items()}
    assert found["corrupted"] == pytest.approx({**means, "mean": np.mean(list(means.values()))})
    for kind, row in table.items():
        numbers = " ".join(f"{100 * value:6.1f}" for value in (*row, found["corrupted"][kind]))
        assert f"  {kind:<16} {numbers}" in told
    # As if each were asked for by itself; and what is clean stays so.
    for kind, severity in (("contrast", 5), ("impulse", 2)):
        more = ["--test_noise", kind, "--severity", str(severity), "--out", str(tmp_path / kind)]
        assert evaluate.main([*args[:2], *more]) == 0
        assert json.loads((tmp_path / kind / path.name).read_text())["mean"] == table[kind][severity - 1]
    assert evaluate.main([*args[:2], "--out", str(tmp_path / "clean")]) == 0
    assert json.loads((tmp_path / "clean" / path.name).read_text())["mean"] == found["mean"]


def test_a_table_of_results_has_a_column_for_each_noise_and_the_mean_over_seeds(stage1, tmp_path, capsys):
    run = shutil.copytree(stage1, tmp_path / stage1.name, ignore=shutil.ignore_patterns("result_*"))
    for more in ([], GAUSSIAN, [*GAUSSIAN, "--seed", "1"], [*GAUSSIAN[:3], "0.2"]):
        assert evaluate.main(["--load_path", str(run), *more]) == 0
    assert len(list(run.glob("result_*"))) == 4
    capsys.readouterr()
    assert results.main([str(run), "--format", "csv"]) == 0
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    noise = ("gaussian, test_noise_level 0.1", "gaussian, test_noise_level 0.2", "none, no test_noise_level")
    assert header[2:] == [f"CSI (ood_pre, test_noise {what})" for what in noise]
    ((data, normal, low, high, clean),) = rows
    assert (data, normal) == ("digits", "class 3") and low.endswith(" (2 runs)")
    assert float(high) > 0 and float(clean) > 0


def test_a_result_of_the_first_version_is_not_replaced_by_one_under_noise(stage1, tmp_path):
    run = shutil.copytree(stage1, tmp_path / "run", ignore=shutil.ignore_patterns("result_*"))
    assert evaluate.main(["--load_path", str(run)]) == 0
    (path,) = run.glob("result_*")
    old = json.loads(path.read_text())
    new = ("test_noise", "test_noise_level", "corrupt")
    old = {name: value for name, value in old.items() if name not in ("settings", "data", "class_name", "weights")}
    old["flags"] = {name: value for name, value in old["flags"].items() if name not in new}
    for more in (GAUSSIAN, ["--corrupt", "normal"]):
        path.write_text(json.dumps(old))
        assert evaluate.main(["--load_path", str(run), *more]) == 0
        assert json.loads(path.read_text()) == old
    assert len(list(run.glob("result_*"))) == 3
    assert evaluate.main(["--load_path", str(run)]) == 0 and json.loads(path.read_text()) != old
    assert len(list(run.glob("result_*"))) == 3
