"""`supervised`: its schedule, its groups of parameters, and the epoch that held-out images select."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import eval as evaluate
import train
from common.device import pick_device
from common.files import load_tensors, read_facts
from common.flags import build_parser, parse
from datasets.one_class import read_split
from datasets.sets import image_set
from models.checkpoint import build_net
from models.csc import csc_layers, follow_weights, input_sizes
from program import SPECS
from training import STAGE1
from training.modes.supervised import SupervisedSpec, parameter_groups
from training.recipe import EpochEnd

DIGITS = "--dataset digits --image_size 8 --mode supervised --model sdnet8 --batch_size 64 --device cpu --pad 1".split()


def run(logs, *args, code=0):
    """Train in `logs`; the run's folder and what it recorded."""
    assert train.main([*DIGITS, *args, "--log_root", str(logs)]) == code
    (folder,) = logs.iterdir()
    return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "epoch, expected",
    [(0, 0.1), (5, 0.5 * (0.1 + 1e-6)), (10, 1e-6), (2.5, 1e-6 + (0.1 - 1e-6) * (1 + 2**-0.5) / 2)],
)
def test_the_rate_falls_by_a_cosine(epoch, expected):
    assert SupervisedSpec().lr(0.1, epoch, 10) == pytest.approx(expected, rel=1e-12)


def test_or_to_a_tenth_after_given_epochs():
    spec = SupervisedSpec(lr_drops=(3, 6))
    assert [spec.lr(0.1, e, 10) for e in (0, 2.9, 3, 5.9, 6, 9)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])


def test_atoms_have_no_weight_decay_and_everything_else_has():
    net = build_net("classifier", "sdnet8_all", n_classes=10, seed=0)
    others, atoms = parameter_groups(net, 5e-4)
    assert (others["weight_decay"], atoms["weight_decay"]) == (5e-4, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {names[id(p)] for p in atoms["params"]}
    assert found == {f"backbone.{name}.weight" for name in csc_layers(net.backbone)} and len(found) == 7
    assert {names[id(p)] for p in others["params"]} == set(names.values()) - found
    (one,) = parameter_groups(build_net("classifier", "resnet8", n_classes=10, seed=0), 5e-4)
    assert one["weight_decay"] == 5e-4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("logs"), "--epochs", "4", "--held_out", "300", "--first_images", "800")


def test_the_weights_of_the_best_epoch_and_of_the_last_are_kept(trained):
    folder, rows = trained
    accuracies = [row["held_out/accuracy"] for row in rows]
    best = int(np.argmax(accuracies)) + 1
    assert read_facts(folder / "best.model")["epoch"] == best and read_facts(folder / "last.model")["epoch"] == 4
    said = (folder / "log.txt").read_text()
    assert f"held_out/accuracy: last {accuracies[-1]:.4f} (epoch 4), best {max(accuracies):.4f} (epoch {best}" in said
    assert rows[-1]["train/images_per_second"] > 0 and rows[-1]["train/peak_memory_gib"] > 0.1
    # The held-out images are the same whenever they are asked for, and the accuracy is that of the weights on them.
    modes = build_parser("x", STAGE1, "supervised", SPECS)
    flags = parse([*DIGITS, "--held_out", "300", "--first_images", "800"], modes)
    split = read_split(flags, training=True, model_size=32)
    held = split.held_out_images()
    assert len(held) == 300 and len(split.train()) == 500
    assert not set(held.indices.tolist()) & set(split.train().indices.tolist())
    net = build_net("classifier", "sdnet8", n_classes=10, seed=0).eval()
    net.load_state_dict(torch.load(folder / "last.model", weights_only=True))
    with torch.no_grad():
        right = net(held.to(pick_device("cpu")).batch(torch.arange(300))).argmax(1) == held.labels
    assert float(right.float().mean()) == pytest.approx(accuracies[-1])


def test_both_are_evaluated_each_under_its_own_name(trained, tmp_path):
    folder, _ = trained
    for name in ("last", "best"):
        assert evaluate.main(["--load_path", str(folder / f"{name}.model"), "--out", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["accuracy_test_acc.json", "accuracy_test_acc_best.json"]
    found = [json.loads((tmp_path / name).read_text()) for name in names]
    assert all(result["accuracy"] > 0.2 and result["predictions"] == {} for result in found)


def test_the_predicted_class_of_every_image_is_written_on_request(trained, tmp_path, capsys):
    folder, _ = trained
    assert evaluate.main(["--load_path", str(folder), "--out", str(tmp_path), "--save_score"]) == 0
    assert "--save_score has no effect" not in capsys.readouterr().out
    result = json.loads((tmp_path / "accuracy_test_acc.json").read_text())
    assert result["predictions"] == {"digits": "predictions_test_acc_digits.csv"}
    with (tmp_path / result["predictions"]["digits"]).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["n"] and all(0.1 <= float(row["confidence"]) <= 1 for row in rows)
    right = [row["label"] == row["predicted"] for row in rows]
    assert np.mean(right) == pytest.approx(result["accuracy"]) and [row["correct"] == "True" for row in rows] == right


def test_a_run_that_was_interrupted_ends_bit_for_bit_as_one_that_was_not(trained, tmp_path, monkeypatch):
    """With the solver's steps, which a warm power iteration follows, and the best epoch so far."""
    import training.loop as loop

    real, seen = loop.descend, []

    def once(*args):
        if len(seen) == 17:
            raise KeyboardInterrupt
        seen.append(0)
        return real(*args)

    more = ["--epochs", "4", "--held_out", "300", "--first_images", "800", "--save_step", "1"]
    monkeypatch.setattr(loop, "descend", once)
    train.main([*DIGITS, *more, "--log_root", str(tmp_path)])
    monkeypatch.setattr(loop, "descend", real)
    folder, rows = run(tmp_path, *more)
    for name in ("last.model", "best.model"):
        a, b = (torch.load(place / name, weights_only=True) for place in (folder, trained[0]))
        assert all(torch.equal(value, b[key]) for key, value in a.items())
        assert read_facts(folder / name)["epoch"] == read_facts(trained[0] / name)["epoch"]
    assert (
        load_tensors(folder / "last.resume", flag="x")["best"]
        == load_tensors(trained[0] / "last.resume", flag="x")["best"]
    )
    assert [row["train/loss_cls"] for row in rows] == [row["train/loss_cls"] for row in trained[1]]


def test_the_first_of_equal_epochs_is_kept(tmp_path, monkeypatch):
    build = STAGE1["supervised"].build
    values = {1: 0.5, 2: 0.7, 3: 0.7, 4: 0.6}

    def fixed(*args):
        return replace(build(*args), end_epoch=lambda epoch: EpochEnd({"a": values[epoch]}, select="a"))

    monkeypatch.setitem(STAGE1, "supervised", replace(STAGE1["supervised"], build=fixed))
    folder, _ = run(tmp_path, "--epochs", "4", "--first_images", "200")
    assert read_facts(folder / "best.model")["epoch"] == 2
    assert "a: last 0.6000 (epoch 4), best 0.7000 (epoch 2, best.model)" in (folder / "log.txt").read_text()


def test_too_many_held_out_images_are_refused(tmp_path, capsys):
    assert train.main([*DIGITS, "--held_out", "1198", "--log_root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --held_out 1198: there are 1198 training images; give fewer")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, text", [
    (["--csc_lambda", "-0.1"], "--csc_lambda must be >= 0"), (["--csc_steps", "0"], "--csc_steps must be >= 1"),
    (["--csc_lambda", "nan"], "--csc_lambda must be >= 0"), (["--held_out", "some"], "neither a number nor auto"),
    (["--one_class_idx", "3"], "--one_class_idx: --mode supervised learns to classify")])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(flags, text, tmp_path, capsys):
    assert train.main([*DIGITS, *flags, "--log_root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["sdnet8", "sdnet8_all"])
def test_64_random_images_are_learnt_by_heart(model):
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=gen)
    data = image_set(images, torch.randint(10, (64,), generator=gen))
    net = build_net("classifier", model, n_classes=10, seed=0).train()
    sizes = input_sizes(net.backbone, 3, (32, 32))
    follow_weights(sizes, fresh=True)
    optimizer = torch.optim.SGD(parameter_groups(net, 0.0), 0.1, momentum=0.9, nesterov=True)
    x, y = data.batch(torch.arange(64)), data.labels
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        follow_weights(sizes)
    assert loss.item() < 0.1 and bool((net(x).argmax(1) == y).all())
