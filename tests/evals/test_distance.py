"""Distances of features in pairs, against loops over images."""

import copy
import csv
import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval as evaluate
from common.dist import World
from common.errors import RunStopped, UserError
from common.files import save_tensors
from common.flags import Flags
from common.negatives import NONE, pick_negatives
from common.seed import generator
from datasets.sets import image_set
from evals import distance as module
from evals.distance import QUANTITIES, STATISTICS, feature_distance
from evals.distance_report import distance_lines, title_of
from evals.trained import Trained
from models.checkpoint import build_net
from tests.test_commands import refused

N, C, POOL = 33, 4, 9
NAMES = ["ant", "bee", "cat", "dog", "a fifth, which training has not"]
FLAGS = {
    "mode": "feature_distance",
    "dataset": "toy",
    "seed": 3,
    "amp": "off",
    "ood_batch_size": 4,
    "epsilon": 0.1,
    "num_steps": 3,
    "step_size": 0.05,
    "strategy": "random",
    "target_label": None,
    "test_noise": "none",
    "test_noise_level": None,
}


def network(kind: str):
    """Fresh weights, and statistics of batch normalisation from images."""
    net = build_net(kind, "resnet8", n_classes=C, seed=0)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = None
    with torch.no_grad():
        images = toy().test().batch(torch.arange(N))
        net.train().heads(images, torch.arange(N) % C)
        for layer in layers:
            nn.init.normal_(layer.weight, 1.0, 0.3, generator=generator(0, "weights"))
    return net.eval()


def toy(labels=None):
    gen = generator(5, "toy")
    images = torch.randint(256, (N + 3, 3, 8, 8), generator=gen, dtype=torch.uint8)
    labels = torch.cat([torch.arange(N) % C, torch.full((3,), C)]) if labels is None else labels
    return SimpleNamespace(
        dataset="toy",
        one_class_idx=None,
        n_classes=C,
        class_names=NAMES,
        normal=lambda labels: labels < C,
        test=lambda: image_set(images[: len(labels)], labels),
    )


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    monkeypatch.setattr(module, "_POOL", POOL)


def trained(kind="ra_classifier", split=None, **changes) -> Trained:
    return Trained(network(kind), Flags(FLAGS | changes), split or toy(), torch.device("cpu"))


def measured(of: Trained):
    (result,) = feature_distance(of)
    return result


def moved(net, images, labels, noise, sign):
    """PGD as a plain loop."""
    x = images + 0.001 * noise
    for _ in range(3):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(x), labels, reduction="sum"), x)
        x = x.detach() + sign * 0.05 * grad.sign()
        x = torch.min(torch.max(x, images - 0.1), images + 0.1).clamp(0, 1)
    return x.detach()


@pytest.mark.parametrize("kind", ["ra_classifier", "classifier"])
@pytest.mark.parametrize("strategy", ["random", "random_adv", "hard_adv"])
def test_pairs_are_those_of_a_loop_over_images(kind, strategy):
    result = measured(trained(kind, strategy=strategy))
    columns = result.per_image["toy"]
    assert columns["index"].tolist() == list(range(N)) and columns["label"].tolist() == [n % C for n in range(N)]
    net, test = network(kind), toy().test()
    order = torch.randperm(N, generator=generator(3, "feature distance"))
    seen = 0
    for number, pool in enumerate(order.tensor_split(4)):
        images, labels, shape = test.batch(pool), test.labels[pool], (len(pool), 3, 8, 8)
        with torch.no_grad():
            features, logits = net.features(images), net(images)
        chosen = pick_negatives(
            logits, labels, strategy=strategy.removesuffix("_adv"), generator=generator(3, "negatives", number)
        )[:, 0]
        noise = [torch.randn(shape, generator=generator(3, f"attack{of}", number)) for of in ("", " on negatives")]
        attacked, others = moved(net, images, labels, noise[0], 1), images[chosen]
        if strategy.endswith("_adv"):
            others = moved(net, others, labels, noise[1], -1)
        with torch.no_grad():
            pairs = {"positive": net.features(attacked), "negative": net.features(others)}
        for n, place in enumerate(pool.tolist()):
            assert columns["negative"][place] == int(pool[chosen[n]])
            assert labels[n] != test.labels[columns["negative"][place]]
            for name, other in pairs.items():
                f, g = features[n].double().numpy(), other[n].double().numpy()
                cosine = f @ g / np.linalg.norm(f) / np.linalg.norm(g)
                assert columns[f"{name}_cosine"][place] == pytest.approx(cosine, abs=1e-4)
                assert columns[f"{name}_l2"][place] == pytest.approx(np.linalg.norm(f - g), rel=1e-3, abs=1e-5)
                seen += 1
    assert seen == 2 * N
    assert (columns["positive_l2"] > 0.01).all() and len(np.unique(columns["negative"])) > 10


def test_statistics_are_over_the_images_and_over_those_of_each_class():
    result = measured(trained())
    columns = result.per_image["toy"]
    of = {"max": np.max, "min": np.min, "mean": np.mean, "variance": np.var}
    assert set(result.metrics) == {f"{name}/{kind}" for name in QUANTITIES for kind in STATISTICS}
    for name in QUANTITIES:
        for kind, function in of.items():
            assert result.metrics[f"{name}/{kind}"] == pytest.approx(function(columns[name]))
            for label, title in enumerate(NAMES[:C]):
                values = columns[name][columns["label"] == label]
                assert result.facts["by_class"][title][name][kind] == pytest.approx(function(values))
    assert result.facts["n"] == N and result.facts["without_negative"] == 0 and result.name == "all"
    assert result.facts["data"] == {"toy": {"images": N, "fingerprint": toy().test().where(torch.arange(N + 3) < N)
                                            .fingerprint}}  # fmt: skip


def test_no_number_depends_on_the_batch_size_or_on_the_classes_that_are_shown():
    every = measured(trained(strategy="random_adv")).per_image["toy"]
    for changes in ({"ood_batch_size": 100}, {"target_label": 2}, {"target_label": "cat"}):
        result = measured(trained(strategy="random_adv", **changes))
        found = result.per_image["toy"]
        rows = every["label"] == 2 if "target_label" in changes else slice(None)
        for name, values in found.items():
            np.testing.assert_allclose(values, every[name][rows], atol=1e-4, rtol=1e-4)
        if "target_label" in changes:
            assert result.name == "class_2" and list(result.facts["by_class"]) == ["cat"]
            assert result.facts["target"] == "cat" and result.facts["classes"] == {"cat": 2}


def test_the_network_is_left_as_it_was():
    of = trained()
    before = {key: value.clone() for key, value in of.net.state_dict().items()}
    of.net.train()
    measured(of)
    assert of.net.training and all(torch.equal(before[key], value) for key, value in of.net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in of.net.parameters())


def test_an_image_without_a_negative_has_no_pair_and_is_counted(monkeypatch):
    real = module.pick_negatives

    def some(logits, labels, **settings):
        found = real(logits, labels, **settings)
        found[labels == 1] = NONE
        return found

    monkeypatch.setattr(module, "pick_negatives", some)
    result = measured(trained(strategy="random_adv"))
    columns = result.per_image["toy"]
    lacking = columns["label"] == 1
    assert result.facts["without_negative"] == lacking.sum() == 8
    assert (columns["negative"] == -1).tolist() == np.isnan(columns["negative_l2"]).tolist() == lacking.tolist()
    assert np.isfinite(columns["positive_cosine"]).all()
    assert result.metrics["negative_l2/mean"] == pytest.approx(columns["negative_l2"][~lacking].mean())
    assert list(result.facts["by_class"]["bee"]) == ["positive_cosine", "positive_l2"]
    assert "8 images have no negative" in "".join(distance_lines(result))


def test_the_table():
    result = measured(trained())
    result.metrics.update({"positive_cosine/mean": 0.5, "negative_l2/variance": 12345.678})
    lines = list(distance_lines(result))
    assert title_of(result) == (
        f"features of {N} test images, all classes; positive pairs by PGD-3 at 25.5/255, negative ones random"
    )
    assert lines[0].split() == list(STATISTICS)
    assert lines[1].startswith("positive cosine ") and lines[1].split()[4] == "0.5"
    assert lines[4].startswith("negative L2 ") and lines[4].split()[5] == "1.235e+04"
    assert [line.split()[0] for line in lines[5:]] == ["means", "ant", "bee", "cat", "dog"]
    assert float(lines[6].split()[1]) == pytest.approx(
        result.facts["by_class"]["ant"]["positive_cosine"]["mean"], rel=1e-3
    )


def test_two_ranks_find_what_one_does():
    """Two threads, each with a network of its own, that exchange what ranks would."""
    of = trained(strategy="random_adv")
    expected = measured(of)
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
        results[rank] = measured(replace(of, net=copy.deepcopy(of.net), world=Pair(rank, 2, rank)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        assert found.facts == expected.facts and found.metrics == expected.metrics


def test_features_that_are_not_finite_end_in_one_line():
    of = trained()
    with torch.no_grad():
        of.net.backbone.bn1.weight.fill_(float("nan"))
    with pytest.raises(RunStopped, match="features are not finite"):
        measured(of)


@pytest.mark.parametrize(
    "changes, split, told",
    [
        ({"target_label": 4}, toy(), "--target_label 4: give a number from 0 to 3, or one of ant, bee, cat, dog"),
        ({"target_label": -1}, toy(), "--target_label -1"),
        ({"target_label": "eel"}, toy(), "--target_label eel"),
        ({"target_label": 3}, toy(torch.arange(N + 3) % 3), "--target_label: there are no test images of this class"),
        ({}, toy(torch.zeros(9, dtype=torch.long)), "or none of any other"),
        ({}, SimpleNamespace(**{**vars(toy()), "one_class_idx": 1}), "--one_class_idx: --mode feature_distance"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, split, told):
    with pytest.raises(UserError, match=told):
        feature_distance(trained(split=split, **changes))


# ---------------------------------------------------------------------------------------------- from the command line


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with a network of ten classes."""
    net = build_net("ra_classifier", "resnet8", n_classes=10, seed=0)
    flags = {"mode": "adv_trades", "dataset": "digits", "image_size": 8, "model": "resnet8", "ra": True, "anc": False}
    (tmp_path / "run").mkdir()
    facts = {"flags": {**flags, "epsilon": 0.05, "strategy": "hard_adv"}, "epoch": 1}
    save_tensors(tmp_path / "run" / "last.model", net.state_dict(), facts=facts)
    return tmp_path / "run"


def compare(run: Path, *more: str) -> int:
    args = ["--mode", "feature_distance", "--load_path", str(run), "--device", "cpu", "--num_steps", "1"]
    return evaluate.main([*args, *more])


def test_what_is_written_and_printed(run, capsys):
    assert compare(run, "--target_label", "7", "--save_score") == 0
    result = json.loads((run / "result_feature_distance_class_7.json").read_text())
    assert result["trained_by"] == {"mode": "adv_trades", "ra": True, "anc": False}
    # The radius is that of training; negatives are natural ones where nothing else is said.
    settings = result["settings"]
    assert (settings["epsilon"], settings["strategy"], settings["target_label"]) == (0.05, "random", 7)
    with (run / result["pairs"]["digits"]).open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "negative", *QUANTITIES] and len(rows) == result["n"] == 60
    assert result["positive_l2"]["max"] == max(float(row["positive_l2"]) for row in rows)
    out = capsys.readouterr().out
    assert "class 7; positive pairs by PGD-1 at 12.8/255, negative ones random" in out and "positive cosine" in out
    assert out.count("wrote ") == 2 and "no effect" not in out
    assert sorted(path.name for path in run.iterdir() if path.suffix != ".model") == [
        "pairs_feature_distance_class_7_digits.csv",
        "result_feature_distance_class_7.json",
    ]


def test_a_class_that_is_not_there_is_refused_before_anything_is_written(run, capsys):
    before = sorted(run.iterdir())
    refused(capsys, compare(run, "--target_label", "10"), "--target_label 10")
    refused(capsys, compare(run, "--one_class_idx", "3"), "--one_class_idx")
    refused(capsys, compare(run, "--epsilon", "-1"), "--epsilon")
    assert sorted(run.iterdir()) == before
