"""Noise x lambda, against loops that set lambda and look at one image at a time."""

import copy
import itertools
import json
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common.dist import World
from common.errors import UserError
from common.flags import Flags
from common.seed import generator
from datasets import ShiftSpec
from datasets.augment import AlignedSpec
from datasets.noise import LEVELS, noisy
from datasets.sets import image_set
from datasets.views import DrawSpec, draw_set, set_views
from evals.classify import linear_logits
from evals.noise_lambda import CLASSES, COLUMNS, PREDICTED, ROTATIONS, SHIFTS, best_lambda, noise_lambda
from evals.noise_lambda_report import line_notes, table_lines
from evals.trained import Trained
from models.csc import CSC2d
from models.feature_net import Classifier, RotTransNet
from models.lambda_line import LambdaLine, adaptive
from models.resnet import BasicBlock, ResNet

N, HELD, C, SIDE = 31, 40, 4, 6
SEED = 19
GRID = (0.05, 0.1, 0.4, 0.9)
FLAGS = {
    "mode": "noise_lambda",
    "dataset": "toy",
    "seed": 3,
    "amp": "off",
    "ood_batch_size": 7,
    "noises": ["gaussian", "impulse"],
    "noise_protocol": "imagenetc",
    "noise_levels": [5, 2],
    "lambdas": [0.4, 0.05, 0.9, 0.1],
    "calibration_images": 25,
    "measures": ["energy", "highpass"],
    "line_of": "same",
    "cifar10c": None,
    "control_path": None,
    "shift_trans_type": "rot_bmix",
    "mix_alpha": 0.5,
    "color_jitter_strength": 0.5,
    "resize_factor": 0.3,
    "resize_fix": False,
}


CLASSIFIER, STEM = partial(Classifier, n_classes=C), partial(CSC2d, kernel_size=3, padding=1)


def network(kind=CLASSIFIER, stem=STEM):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = kind(ResNet(BasicBlock, (1,), (8,), stem=stem, stem_act=nn.Identity, input_std=(0.25,) * 3))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias, std=0.5)
                nn.init.normal_(module.weight, 2.0)
    return net


@pytest.fixture
def trained():
    """A random network on random pictures, smooth ones, of which it tells most as they are labelled."""
    net = network().train()

    def pictures(count, seed):
        gen = torch.Generator().manual_seed(seed)
        small = torch.randint(0, 256, (count, 3, 2, 2), generator=gen, dtype=torch.uint8)
        images = torch.nn.functional.interpolate(small.float(), (SIDE, SIDE), mode="bilinear").byte()
        with torch.no_grad():
            labels = linear_logits(copy.deepcopy(net).eval(), images.float() / 255).argmax(1)
        labels[::6] = (labels[::6] + 1) % C
        return image_set(images, labels)

    test, held_out = pictures(N, 1), pictures(HELD, 2)
    split = SimpleNamespace(
        test=lambda: test,
        training_parts=lambda crop: (held_out, held_out),
        train=lambda: held_out,
        facts=lambda images: {"dataset": "toy"},
        normal=lambda labels: labels >= 0,
        n_classes=C,
        dataset="toy",
        class_names=["a", "b", "c", "d"],
        source=None,
        one_class_idx=None,
    )
    return Trained.of(net, Flags(FLAGS, {"lambdas"}), split)


def with_flags(trained, **flags):
    return replace(trained, flags=Flags(trained.flags.as_dict() | flags, {"lambdas"}))


def measured(trained, task=CLASSES, **flags):
    (found,) = noise_lambda(with_flags(trained, **flags), task=task)
    return found


def naive(net, images, lambdas):
    """Accuracy under one lambda for each image, one image at a time, and both measures of the residual at 0.1."""
    net.eval()
    stem, right, residuals = net.backbone.conv1, [], {"energy": [], "highpass": []}
    mask = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]).expand(3, 1, 3, 3)
    with torch.no_grad():
        for image, label, lam in zip(images.images, images.labels, lambdas, strict=True):
            x = image[None].float() / 255
            inputs = (x - net.input_mean) / net.input_std
            stem.set_lambda(0.1)
            residual = inputs - stem.synthesise(stem(inputs), inputs.shape[2:])
            residuals["energy"].append(float(residual.square().sum()))
            residuals["highpass"].append(float(torch.nn.functional.conv2d(residual, mask, groups=3).abs().mean()))
            stem.set_lambda(lam)
            right.append(int(net.linear(net.features(x)).argmax()) == int(label))
    stem.set_lambda(0.1)
    net.train()
    return np.mean(right), {measure: np.array(values) for measure, values in residuals.items()}


def mixed(n, seed):
    """The order in which images form batches."""
    return torch.randperm(n, generator=generator(seed, "order of noise x lambda"))


def chosen(held_out, count, seed):
    keep = torch.randperm(len(held_out), generator=generator(seed, "calibration images"))[:count].sort().values
    return held_out.where(torch.isin(torch.arange(len(held_out)), keep))


def test_every_number_against_a_loop_over_images_and_lambdas(trained):
    found = measured(trained)
    net, split = trained.net, trained.split
    held_out = chosen(split.training_parts(None)[1], 25, 3)
    facts, rows = found.facts, found.per_image["table"]
    assert (facts["n"], facts["n_calibration"], facts["lambda"], facts["lambdas"]) == (N, 25, 0.1, list(GRID))
    for kind in ("gaussian", "impulse"):
        levels = {number: LEVELS["imagenetc"][kind][number - 1] for number in (2, 5)}
        residuals, best = {"energy": [], "highpass": []}, []
        calibration = facts["calibration"][kind]
        for place, level in enumerate([None, *levels.values()]):
            images = held_out
            if level is not None:
                images = noisy(held_out, kind, level, 3, name="calibration images")
            accuracies = [naive(net, images, [lam] * 25)[0] for lam in GRID]
            np.testing.assert_allclose(calibration["accuracy"][place], accuracies, rtol=1e-12)
            for measure, values in naive(net, images, [0.1] * 25)[1].items():
                residuals[measure].append(values.mean())
            best.append(GRID[best_lambda(np.array(accuracies), GRID, 0.1)])
        assert calibration["best"] == best
        for measure, line in facts["lines"][kind].items():
            np.testing.assert_allclose(calibration["residual"][measure], residuals[measure], rtol=1e-5)
            a, b = np.polyfit(residuals[measure], best, 1) if len(set(best)) > 1 else (0.0, best[0])
            np.testing.assert_allclose((line["a"], line["b"]), (a, b), rtol=1e-3, atol=1e-9)
            assert (line["low"], line["high"], line["reference"]) == (0.05, 0.9, 0.1)

        for number, level in {0: None, **levels}.items():
            images = split.test() if level is None else noisy(split.test(), kind, level, 3)
            own, residual = [naive(net, images, [lam] * N)[0] for lam in GRID], naive(net, images, [0.1] * N)[1]
            expected = {"fixed": own[1], "oracle": max(own), "control": np.nan}
            expected["level"] = np.nan if level is None else level
            for measure, of_image in residual.items():
                line = facts["lines"][kind][measure]
                of_batch = np.empty(N)
                for part in mixed(N, 3).split(7):
                    of_batch[part] = of_image[part].mean()
                of_set = np.full(N, of_image.mean())
                expected[f"residual_{measure}"] = of_image.mean()
                for per, values in {"set": of_set, "batch": of_batch, "image": of_image}.items():
                    lambdas = np.clip(line["a"] * values + line["b"], 0.05, 0.9)
                    expected[f"{measure}_{per}"] = naive(net, images, lambdas)[0]
                    expected[f"lambda_{measure}_{per}"] = lambdas.mean()
            (row,) = np.flatnonzero((rows["noise"] == kind) & (rows["number"] == number))
            for name, value in expected.items():
                assert rows[name][row] == pytest.approx(value, rel=1e-4, nan_ok=True), (kind, number, name)
            np.testing.assert_allclose(facts["test"][kind][str(number)]["accuracy"], own, rtol=1e-12)
    # The test is worth something only where these differ.
    some = ("fixed", "energy_set", "energy_image", "highpass_image", "oracle")
    assert max(len({rows[name][row] for name in some}) for row in range(6)) >= 4
    assert len({lam for kind in facts["calibration"].values() for lam in kind["best"]}) > 1


def test_predictions_are_those_of_a_network_that_follows_the_line(trained):
    """What is measured here is what `adaptive`, and with it --stem_lambda auto, does."""
    found = measured(trained, noises=["gaussian"], noise_levels=[5])
    images = noisy(trained.split.test(), "gaussian", LEVELS["imagenetc"]["gaussian"][4], 3)
    net = trained.net.eval()
    predicted = found.facts["test"]["gaussian"]["5"]["predicted"]
    for measure, per in itertools.product(("energy", "highpass"), ("image", "batch")):
        line = LambdaLine(**found.facts["lines"]["gaussian"][measure])
        with torch.no_grad(), adaptive(net, line, per):
            order = mixed(N, 3)
            parts = [linear_logits(net, part.float() / 255) for part in images.images[order].split(7)]
        accuracy = (torch.cat(parts).argmax(1) == images.labels[order]).double().mean()
        assert predicted[f"gaussian {measure}"][per] == pytest.approx(float(accuracy))


def test_two_runs_are_equal_and_the_network_is_left_as_it_was(trained):
    before = {name: value.clone() for name, value in trained.net.state_dict().items()}
    first, second = measured(trained), measured(trained)
    assert json.dumps(first.facts) == json.dumps(second.facts) and first.metrics == second.metrics
    assert all(torch.equal(before[name], value) for name, value in trained.net.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in trained.net.modules())


def test_no_test_label_moves_a_line_or_a_prediction_and_labels_of_held_out_images_do(trained):
    first = measured(trained).facts
    test = trained.split.test()
    trained.split.test = lambda: replace(test, labels=(test.labels + 1) % C)
    second = measured(trained).facts
    assert first["lines"] == second["lines"] and first["calibration"] == second["calibration"]
    seen = [[one["lambdas"] for kind in facts["test"].values() for one in kind.values()] for facts in (first, second)]
    assert seen[0] == seen[1] and first["test"] != second["test"]
    train, held_out = trained.split.training_parts(None)
    trained.split.training_parts = lambda crop: (train, replace(held_out, labels=(held_out.labels + 1) % C))
    assert measured(trained).facts["calibration"] != first["calibration"]


def test_the_oracle_is_a_bound_of_what_lies_on_the_grid(trained):
    """With a flat line every prediction is the lambda of training, which lies on it."""
    rows = measured(trained).per_image["table"]
    assert (rows["oracle"] >= rows["fixed"]).all() and (rows["oracle"] > rows["fixed"]).any()
    rows = measured(trained, noises=["shot"], noise_levels=[1], noise_protocol="cifar10c").per_image["table"]
    for per in PREDICTED:
        assert rows[f"lambda_{per}"] == pytest.approx(0.1) and (rows[per] == rows["fixed"]).all()


@pytest.mark.parametrize(
    "accuracy, expected",
    [((0.5, 0.5, 0.6, 0.5), 2), ((0.5, 0.5, 0.5, 0.5), 1), ((0.5, 0.4, 0.5, 0.1), 0), ((0.3, 0.1, 0.9, 0.9), 2)],
)
def test_of_equally_good_lambdas_the_one_closest_to_that_of_training_is_taken(accuracy, expected):
    assert best_lambda(np.array(accuracy), GRID, 0.1) == expected
    assert best_lambda(np.array((0.7, 0.1, 0.7)), (0.1, 0.2, 0.3), 0.2) == 0


def test_all_kinds_by_the_line_of_one(trained):
    own = measured(trained, noises=["gaussian", "impulse"])
    other = measured(trained, noises=["impulse"], line_of="gaussian")
    assert other.facts["line_of"] == {"impulse": "gaussian"} and set(other.facts["lines"]) == {"gaussian", "impulse"}
    assert other.facts["lines"] == own.facts["lines"] and set(other.facts["test"]) == {"impulse"}
    clean = own.facts["test"]["gaussian"]["0"]
    assert other.facts["test"]["impulse"]["0"]["predicted"] == {
        name: clean["predicted"][name] for name in ("gaussian energy", "gaussian highpass")
    }
    there = other.facts["test"]["impulse"]["5"]
    for measure, value in there["residual"].items():
        line = LambdaLine(**own.facts["lines"]["gaussian"][measure])
        lam = float(line.predict(torch.tensor(value)))
        assert there["lambdas"][f"gaussian {measure}"]["set"] == pytest.approx(lam)
    assert there["accuracy"] == own.facts["test"]["impulse"]["5"]["accuracy"]


def test_only_predictions_per_batch_depend_on_the_batch_size(trained):
    tables = [measured(trained, ood_batch_size=size).per_image["table"] for size in (1, 4, 100)]
    for name in COLUMNS:
        if not name.endswith("batch") and name != "control":
            assert all(np.array_equal(table[name], tables[0][name]) for table in tables)
    for measure in ("energy", "highpass"):
        (one, _, whole), columns = tables, [f"{measure}_{per}" for per in ("batch", "image", "set")]
        assert np.array_equal(one[columns[0]], one[columns[1]]) and np.array_equal(whole[columns[0]], whole[columns[2]])


def test_metrics_are_means_over_levels(trained):
    found = measured(trained)
    rows = found.per_image["table"]
    for column in ("fixed", *PREDICTED, "oracle"):
        for kind in ("gaussian", "impulse"):
            values = rows[column][rows["noise"] == kind]
            assert found.metrics[f"{column}/{kind}"] == pytest.approx(values[1:].mean())
            assert found.metrics[f"{column}/clean_{kind}"] == values[0]
    assert not any(name.startswith("control") for name in found.metrics)
    lines = list(table_lines(rows))
    assert lines[0].split() == ["energy"] * 3 + ["highpass"] * 3
    assert lines[1].split() == ["noise", "level", "fixed", *["set", "batch", "image"] * 2, "oracle*"]
    assert lines[5].split()[:3] == ["gaussian", "mean", "1.."] and len(lines) == 10
    assert float(lines[5].split()[3]) == pytest.approx(100 * found.metrics["fixed/gaussian"], abs=0.051)


def test_a_measure_that_is_not_asked_for_has_no_lines_and_no_columns(trained):
    whole, found = measured(trained, noises=["gaussian"]), measured(trained, noises=["gaussian"], measures=["highpass"])
    assert list(found.facts["lines"]["gaussian"]) == ["highpass"]
    rows, other = found.per_image["table"], whole.per_image["table"]
    assert np.isnan(rows["energy_set"]).all() and not any(name.startswith("energy") for name in found.metrics)
    assert np.array_equal(rows["highpass_image"], other["highpass_image"])
    assert "energy" not in "".join(table_lines(rows))


def test_ranks_together_find_what_one_finds(trained):
    """Two threads, each with a network of its own, that exchange what ranks would."""
    expected = measured(trained)
    boxes: list = [None, None]
    barrier = threading.Barrier(2, timeout=120)

    class Pair(World):
        def all_gather_object(self, value):
            boxes[self.rank] = value
            barrier.wait()
            found = list(boxes)
            barrier.wait()
            return found

    results: list = [None, None]

    def work(rank):
        other = replace(trained, net=copy.deepcopy(trained.net), world=Pair(rank, 2, rank))
        results[rank] = measured(other)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        assert found.facts == expected.facts and found.metrics == expected.metrics


class ShiftNet(Classifier):
    """Its linear head tells shifts."""

    def forward(self, images):
        return SimpleNamespace(shift=self.linear(self.features(images)))


@pytest.mark.parametrize("task, shifts", [(SHIFTS, 5), (ROTATIONS, 4)])
def test_shifts_of_normal_training_images_calibrate_where_there_are_no_classes(task, shifts, trained):
    """Views are of the noisy image, and labels are their shifts. rot_bmix mixes with the next image."""
    made = network(partial(ShiftNet, n_classes=5) if task is SHIFTS else RotTransNet)
    split = SimpleNamespace(**{**vars(trained.split), "one_class_idx": 1, "normal": lambda labels: labels == 1})
    other = replace(trained, net=made, split=split)
    found = measured(other, task, noises=["gaussian"], noise_levels=[3])
    normal = split.test().where(split.test().labels == 1)
    assert (found.facts["n"], found.facts["views"], found.facts["n_calibration"]) == (len(normal), shifts, 25)
    images = chosen(split.train(), 25, 3)
    images = noisy(images, "gaussian", LEVELS["imagenetc"]["gaussian"][2], 3, name="calibration images")
    made.eval()
    for place, lam in enumerate(GRID):
        made.backbone.conv1.set_lambda(lam)
        right = []
        with torch.no_grad():
            for n in range(25):
                outputs = made(views_of(images, n, task))
                right.append((outputs.shift if task is SHIFTS else outputs.rotation).argmax(1) == torch.arange(shifts))
        accuracy = float(torch.cat(right).double().mean())
        assert found.facts["calibration"]["gaussian"]["accuracy"][1][place] == pytest.approx(accuracy)


def views_of(images, n, task):
    """The four rotations of image n, as they are; or those of a draw and the mix with the next, augmented."""
    if task is ROTATIONS:
        image = images.images[n : n + 1] / 255
        return torch.cat([torch.rot90(image, quarters, (2, 3)) for quarters in range(4)])
    spec = DrawSpec(ShiftSpec("rot_bmix").functions(), AlignedSpec(0.5, 0.3, False), seed=3)
    return set_views(images, spec, draw_set(images, spec, 0), torch.tensor([n]))


def test_a_control_sees_the_same_images(trained, tmp_path):
    from common.files import save_tensors
    from models.checkpoint import build_net

    control = build_net("classifier", "resnet8", seed=4, n_classes=C)
    save_tensors(
        tmp_path / "last.model", control.state_dict(), facts={"flags": {"model": "resnet8", "mode": "supervised"}}
    )
    trained.split.check_trained = lambda facts, path, flag: None
    found = measured(trained, control_path=str(tmp_path), noises=["gaussian"], noise_levels=[4])
    control.eval()
    for number, images in ((0, trained.split.test()), (4, noisy(trained.split.test(), "gaussian", 0.26, 3))):
        with torch.no_grad():
            named = torch.cat([linear_logits(control, image[None] / 255).argmax(1) for image in images.images])
        assert found.facts["test"]["gaussian"][str(number)]["control"] == float(
            (named == images.labels).double().mean()
        )
    assert {name for name in found.metrics if name.startswith("control")} == {
        "control/gaussian",
        "control/clean_gaussian",
    }


def test_arrays_of_cifar_10_c_take_the_place_of_our_noise_in_the_test_alone(trained, monkeypatch):
    import evals.noise_lambda as module

    expected = measured(trained, noise_protocol="cifar10c")
    asked = []

    def arrays(folder, kind, severity):
        asked.append((folder, kind, severity))
        return noisy(trained.split.test(), kind, LEVELS["cifar10c"][kind][severity - 1], 99)

    monkeypatch.setattr(module, "cifar10c", arrays)
    monkeypatch.setattr(module, "_check_cifar10c", lambda *args: None)
    found = measured(trained, noise_protocol="cifar10c", cifar10c="there")
    assert found.facts["calibration"] == expected.facts["calibration"] and found.facts["test"] != expected.facts["test"]
    assert asked == [("there", kind, severity) for kind in ("gaussian", "impulse") for severity in (2, 5)]
    assert {"CIFAR-10-C gaussian 2", "CIFAR-10-C impulse 5"} < set(found.facts["data"])


def test_what_cannot_be_measured_is_refused_before_the_work(trained, tmp_path):
    def refused(flags, match, task=CLASSES, **parts):
        other = replace(trained, **parts)
        with pytest.raises(UserError, match=match):
            noise_lambda(with_flags(other, **flags), task=task)

    refused({"lambdas": [0.2, 0.4]}, "--lambdas: the network was trained with lambda 0.1; it must be among them")
    refused({"noise_levels": [6]}, "--noise_levels 6: gaussian noise of imagenetc has levels 1 to 5")
    refused(
        {},
        "--load_path: the network has no layer of sparse coding",
        net=network(stem=partial(nn.Conv2d, kernel_size=3)),
    )
    for name, value, match in [
        ("training_parts", lambda crop: ([], None), "--held_out: .* train with --held_out auto"),
        ("one_class_idx", 2, "--one_class_idx: --mode noise_lambda names all classes"),
        ("n_classes", 7, "--dataset: it has 7 classes, but the network knows 4"),
    ]:
        refused({}, match, split=SimpleNamespace(**{**vars(trained.split), name: value}))
    refused({}, "--data_path: the training images are not those that the network was", facts={"dataset": "others"})
    refused({"cifar10c": str(tmp_path)}, "--noise_protocol imagenetc: --cifar10c has the levels of cifar10c")
    refused({"cifar10c": str(tmp_path), "noise_protocol": "cifar10c"}, "--cifar10c: it has the classes of CIFAR-10")
    refused({"control_path": str(tmp_path)}, "--control_path: no last.model")
    refused(
        {"shift_trans_type": "none"},
        "--shift_trans_type: one shift",
        SHIFTS,
        net=network(partial(ShiftNet, n_classes=5)),
    )


def test_the_lambda_of_training_joins_the_lambdas_that_were_not_given(trained):
    trained.net.backbone.conv1.set_lambda(0.3)
    flags = Flags({**trained.flags.as_dict(), "noises": ["shot"], "noise_levels": [1]})
    (found,) = noise_lambda(replace(trained, flags=flags), task=CLASSES)
    assert found.facts["lambdas"] == pytest.approx([0.05, 0.1, 0.3, 0.4, 0.9]) and found.facts[
        "lambda"
    ] == pytest.approx(0.3)


def test_a_line_that_does_not_rise_is_named():
    lines = {"gaussian": {"energy": {"a": -0.1}, "highpass": {"a": 0.2}}, "shot": {"energy": {"a": 0.0}}}
    notes = list(line_notes({"lines": lines, "n_calibration": 60}))
    assert [note.split(" does not rise")[0] for note in notes] == [
        "note: the line of gaussian noise by energy", "note: the line of shot noise by energy"
    ] and "60 images" in notes[0]  # fmt: skip
