"""Classifiers under attack: linear networks whose robust accuracy is known, masked gradients, reverse attention."""

import copy
import re
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evals.attack as module
from common.attacks import pgd
from common.attacks.auto import AutoResult
from common.attacks.masked import HEADLINE
from common.attacks.specs import radius_text
from common.dist import World
from common.errors import UserError
from common.flags import Flags, flags_of
from common.seed import generator
from datasets.sets import image_set
from evals.attack import ATTACKS, Column, attack, find_signs
from evals.result import Result, family
from evals.specs import AttackSpec
from evals.trained import Trained
from models.feature_net import Heads
from models.mode import evaluation_mode, frozen
from models.resnet import BasicBlock, ResNet
from models.reverse_attention import RaClassifier
from tests.common.attacks.nets import digits
from tests.common.attacks.nets import trained as trained_on_digits
from tests.conftest import ROOT

N = 60
FLAGS = {
    "mode": "attack",
    "dataset": "toy",
    "seed": 3,
    "amp": "off",
    "ood_batch_size": 60,
    "test_noise": "none",
    "test_noise_level": None,
    "epsilon": 0.1,
    **{name: info.default for name, info in flags_of(AttackSpec).items()},
    "attack_steps": 12,
    "attack_targets": 3,
}


def trained_of(net, images, labels, classes, given=("epsilon",), **flags):
    """A network in training mode with test images in [0, 1], rounded to 8 bits."""
    test = image_set((images * 255).round().byte(), labels)
    split = SimpleNamespace(
        test=lambda: test,
        normal=lambda labels: labels >= 0,
        n_classes=classes,
        dataset="toy",
        one_class_idx=None,
    )
    return Trained.of(net.train(), Flags({**FLAGS, **flags}, {*given, *flags}), split)


def attacked(trained, **flags):
    (found,) = attack(replace(trained, flags=Flags({**trained.flags.as_dict(), **flags}, {"epsilon", *flags})))
    return found


def left(result):
    return {"clean": result.metrics["accuracy"], **family(result.metrics, "attacked")}


class Net(nn.Module):
    """Something that makes logits of images, as a network with heads."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("somewhere", torch.zeros(()))
        # Not as a module of it, whose mode would change.
        self.logits = lambda images: logits(images)

    def heads(self, images, labels=None):
        return Heads(self.logits(images), ())


# ------------------------------------------------------------------------------------------------- linear networks


class Linear(nn.Module):
    """Logits (w x - b, b - w x)."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = nn.Parameter(w), b

    def forward(self, x):
        score = (x * self.w).flatten(1).sum(1) - self.b
        return torch.stack([score, -score], 1)


@pytest.fixture
def linear():
    """Random images and a linear network that is right on nine in ten."""
    gen = torch.Generator().manual_seed(0)
    images, w = torch.rand(N, 3, 4, 4, generator=gen), torch.randn(3, 4, 4, generator=gen)
    images = (images * 255).round() / 255
    score = (images * w).flatten(1).sum(1)
    net = Linear(w, float(score.median()))
    labels = net(images).argmax(1)
    labels[::10] = 1 - labels[::10]
    return net, images, labels


def exactly(net, images, labels, eps):
    """Which images are right whatever happens to them, in float64: the worst image is a corner of the box."""
    w = net.w.detach().double()
    sign = torch.where(labels == 0, 1.0, -1.0).view(-1, 1, 1, 1).double()
    x = images.double()
    worst = (x - eps * sign * w.sign()).clamp(0, 1)
    score = (worst * w).flatten(1).sum(1) - net.b
    # The own logit has to be larger; of equals the first is named.
    return torch.where(labels == 0, score >= 0, score < 0).numpy()


EPSILONS = (0.0, 0.01, 0.03, 0.1, 0.2, 1.0)
REACHES_THE_CORNER = "fgsm pgd20 cw pgd40 pgd100 apgd_ce temperature margins apgd_t curve".split()


@pytest.mark.parametrize("eps", [0.02, 0.1])
def test_every_attack_finds_the_worst_image_of_a_linear_network(linear, eps):
    net, images, labels = linear
    trained = trained_of(Net(net), images, labels, 2)
    names = [*REACHES_THE_CORNER, "fgsm_random"]
    found = attacked(trained, epsilon=eps, attacks=names, epsilons=[*EPSILONS, eps], attack_steps=16)
    expected = exactly(net, images, labels, eps)
    table = found.per_image["toy"]
    for name in REACHES_THE_CORNER:
        assert np.array_equal(table[name] == table["label"], expected), name
    assert left(found)["fgsm_random"] >= expected.mean() == found.metrics["worst_case"]
    assert np.array_equal(table["robust"], expected) and 0 < expected.mean() < found.metrics["accuracy"]
    for radius, value in family(found.metrics, "curve").items():
        at = next(e for e in [*EPSILONS, eps] if radius_text(e) == radius)
        assert value == exactly(net, images, labels, at).mean(), radius
    assert found.metrics["robust_of_correct"] == pytest.approx(expected.mean() / found.metrics["accuracy"])
    assert found.facts["attacks"]["apgd_t"]["warnings"] == ["2 classes: by the targeted margin"]
    assert not found.facts["health"].startswith(HEADLINE)


def test_in_l2_the_worst_image_lies_along_the_weights(linear):
    net, images, labels = linear
    middle = ((0.4 + 0.2 * images) * 255).round() / 255  # Nothing is clipped.
    net.b = float((middle * net.w.detach()).flatten(1).sum(1).median())
    labels = net(middle).argmax(1)
    eps = 0.05
    found = attacked(
        trained_of(Net(net), middle, labels, 2), norm="l2", epsilon=eps, attacks=["apgd_ce", "fgsm", "pgd40", "curve"]
    )
    score = ((middle * net.w).flatten(1).sum(1) - net.b).abs()
    expected = (score > eps * net.w.norm()).numpy()
    table = found.per_image["toy"]
    for name in ("apgd_ce", "fgsm", "pgd40"):
        assert np.array_equal(table[name] == table["label"], expected), name
    assert 0 < expected.mean() < 1
    # The last radius covers all images, whatever the norm.
    *_, last = found.facts["radii"]
    assert last == pytest.approx(48**0.5) and list(family(found.metrics, "curve").values())[-1] == 0


def test_the_last_image_counts_in_pgd_and_the_best_one_in_apgd(linear):
    """An attack that goes the wrong way ends with more than there was; that is a sign, and must not be hidden."""
    net, images, labels = linear

    class Backwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return -grad

    trained = trained_of(Net(lambda x: net(Backwards.apply(x))), images, labels, 2)
    found = attacked(trained, attacks=["pgd20", "pgd40", "fgsm", "apgd_ce"])
    assert left(found)["pgd20"] > found.metrics["accuracy"] >= left(found)["apgd_ce"]
    (sign,) = [sign for sign in found.facts["signs"] if sign["name"] == "left under attack above natural"]
    assert sign["shows"] and sign["number"] == pytest.approx(max(left(found).values()) - found.metrics["accuracy"])
    assert found.metrics["worst_case"] <= min(left(found).values())


# ------------------------------------------------------------------------------------------------ masked gradients


def on_digits(logits, count=N, **flags):
    _, _, x, y = digits()
    return trained_of(Net(logits), x[:count], y[:count], 10, epsilon=0.15, **flags)


def signs(result):
    return {sign["name"] for sign in result.facts["signs"] if sign["shows"]}


class Rounded(nn.Module):
    """What has no gradient in its way."""

    def forward(self, x):
        return trained_on_digits("conv")((x * 8).round() / 8)


WITHOUT_SQUARE = "fgsm fgsm_random pgd20 cw pgd40 apgd_ce apgd_t temperature margins curve".split()


@pytest.mark.parametrize("kind", ["conv", "robust"])
def test_a_plain_network_shows_no_sign(kind):
    found = attacked(on_digits(trained_on_digits(kind)), attacks=WITHOUT_SQUARE)
    assert found.facts["health"].startswith("no sign: ") and len(found.facts["signs"]) == 6
    assert found.metrics["worst_case"] < found.metrics["accuracy"] - 0.1
    assert found.facts["not_measured_without"] == ["square", "transfer"]


def test_a_network_that_rounds_its_input_shows_that_it_has_no_gradient():
    found = attacked(on_digits(Rounded()), attacks=WITHOUT_SQUARE)
    assert {"images without gradient", "left at an unlimited radius"} <= signs(found) and found.facts[
        "health"
    ].startswith(HEADLINE)
    assert found.per_image["toy"]["without_gradient"].all()
    # Noise that PGD starts from changes little.
    assert left(found)["apgd_ce"] > found.metrics["accuracy"] - 0.15


def test_a_saturated_network_shows_it_and_attacks_that_know_fool_it():
    """Logits times 10,000: the cross-entropy has no gradient, ratios and margins of logits and a temperature have."""
    net = trained_on_digits("conv")
    found = attacked(on_digits(lambda x: 1e4 * net(x)), attacks=WITHOUT_SQUARE)
    plain = attacked(on_digits(net), attacks=WITHOUT_SQUARE)
    assert "images without gradient" in signs(found)
    assert left(found)["pgd40"] > left(plain)["pgd40"] + 0.3
    for name in ("margins", "temperature", "apgd_t", "cw"):
        assert left(found)[name] <= left(plain)[name] + 0.05, name
    assert found.metrics["worst_case"] <= plain.metrics["worst_case"] + 0.05


def test_square_and_images_of_another_network_show_what_gradients_do_not(monkeypatch):
    pytest.importorskip("pyautoattack")
    net = trained_on_digits("conv")
    monkeypatch.setattr(module, "_source", lambda trained, place: Net(net))
    trained = on_digits(Rounded(), transfer_path="there")
    found = attacked(trained, attacks=["pgd20", "square"], square_queries=200, transfer_path="there")
    assert {"a gradient-free attack leaves less by", "transfer leaves less than the white box by"} <= signs(found)
    assert left(found)["transfer"] < left(found)["pgd20"] and found.facts["attacks"]["transfer"]["group"] == "black box"
    # The same images as for the network they were made on.
    both = attacked(on_digits(net, transfer_path="there"), attacks=["apgd_ce"], transfer_path="there")
    assert left(both)["transfer"] <= left(both)["apgd_ce"] + 0.05 and not signs(both)


# ------------------------------------------------------------------------------------------------- reverse attention


@pytest.fixture(scope="module")
def attentive():
    """A network with reverse attention in its last two blocks, trained for seconds on attacked digits; and digits."""
    x, y, *tests = digits()
    x, tests[0] = (images.expand(-1, 3, -1, -1).contiguous() for images in (x, tests[0]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = RaClassifier(ResNet(BasicBlock, (1, 2), (8, 16)), n_classes=10)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)

        def total(heads, labels):
            losses = [F.cross_entropy(logits, labels, reduction="none") for logits in (heads.final, *heads.auxiliary)]
            return losses[0] + losses[1] + losses[2]

        for epoch in range(4):
            for index in torch.randperm(len(x), generator=generator(epoch, "order")).split(100):
                images, labels = x[index], y[index]
                with evaluation_mode(net), frozen(net):
                    climb = {"eps": 0.1, "steps": 2, "step": 0.05, "keep": "last"}
                    images = pgd(lambda x, labels=labels: total(net.heads(x), labels), images, **climb)
                loss = total(net.heads(images, labels), labels).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    optimizer.zero_grad()
    return net, tests[0][:N], tests[1][:N]


def test_attacks_that_know_reverse_attention_beat_those_on_the_final_head(attentive):
    names = "pgd40 apgd_ce apgd_t aux aux_t margins mask_straight mask_soft mask_held".split()
    found = attacked(trained_of(*attentive, 10), attacks=names, attack_targets=3)
    values = left(found)
    assert {"aux_0", "aux_1", "aux_t_0", "aux_t_1"} < set(values)
    for name in ("aux_0", "margins", "mask_straight", "mask_soft", "mask_held"):
        assert values[name] < min(values["pgd40"], values["apgd_ce"]) - 0.05, name
    assert min(values["mask_held"], values["aux_t_0"]) < values["apgd_t"] - 0.1
    assert found.metrics["worst/adaptive"] < found.metrics["worst/standard"] - 0.1
    assert signs(found) == {"attacks that know the network leave less by"}
    worst = np.logical_and.reduce([found.per_image["toy"][name] == found.per_image["toy"]["label"] for name in values])
    assert np.array_equal(found.per_image["toy"]["robust"], worst) and found.metrics["worst_case"] == worst.mean()
    assert found.metrics["worst_case"] < min(values.values())


def test_what_is_reported_is_what_the_network_predicts_on_the_images_found(attentive, monkeypatch):
    """Whatever mask an attack held, and whichever head it fooled."""
    net, x, y = attentive
    kept = {}

    def keeping(name, run):
        return lambda *args, **more: kept.setdefault(name, []).append(run(*args, **more)) or kept[name][-1]

    names = ["aux_t", "mask_held", "mask_soft", "curve"]
    rows = {name: replace(ATTACKS[name], run=keeping(name, ATTACKS[name].run)) for name in names}
    monkeypatch.setattr(module, "ATTACKS", {"clean": ATTACKS["clean"], **rows})
    found = attacked(trained_of(net, x, y, 10), attacks=names, attack_targets=2, epsilons=[0.05, 0.1, 0.2])
    net.eval()
    for name in ("mask_held", "mask_soft", "curve"):
        images = torch.cat([part.images if name == "curve" else part for part in kept[name]])
        assert found.per_image["toy"][name].tolist() == net(images).argmax(1).tolist(), name
        x8 = (x * 255).round() / 255
        assert (images - x8).abs().max() <= 0.1 + 1e-6 and images.min() >= 0 and images.max() <= 1
    radius = found.per_image["toy"]["radius"]
    assert np.array_equal(found.per_image["toy"]["curve"] == y.numpy(), radius > 0.1)
    assert set(radius.tolist()) <= {0.05, 0.1, 0.2, float("inf")} and len(set(radius.tolist())) > 2


def test_the_mask_is_held_at_the_likeliest_other_classes_in_turn(attentive, monkeypatch):
    net, x, y = attentive
    held, inner = [], net.heads

    def watching(images, labels=None, **more):
        if "rows" in more:
            held.append(more["rows"](torch.zeros(len(images), 10), torch.eye(10)).argmax(1))
        return inner(images, labels, **more)

    monkeypatch.setattr(net, "heads", watching)
    settings = {"attacks": ["mask_held"], "attack_steps": 1, "attack_targets": 2, "epsilon": 1e-4}
    table = attacked(trained_of(net, x, y, 10), **settings).per_image["toy"]
    right = torch.from_numpy(table["clean"] == table["label"])
    net.eval()
    with torch.no_grad():
        logits = inner((x * 255).round() / 255).final.scatter(1, y[:, None], -torch.inf)
    # At this radius all are right to the end: so many passes for the first class, then as many for the second.
    assert np.array_equal(table["clean"], table["mask_held"]) and len(held) % 2 == 0
    for place, aims in enumerate(logits.topk(2, 1).indices[right].unbind(1)):
        half = held[place * len(held) // 2 :][: len(held) // 2]
        assert all(torch.equal(one, aims) for one in half)


def test_the_example_of_an_attack_becomes_a_column(monkeypatch):
    (text,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/robustness.md").read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.setattr(module, "ATTACKS", dict(ATTACKS))
    exec(text, vars(module) | {"ATTACKS": module.ATTACKS})
    found = attacked(on_digits(trained_on_digits("conv")), attacks=["entropy", "fgsm"])
    assert left(found)["entropy"] < found.metrics["accuracy"] - 0.1
    assert found.facts["attacks"]["entropy"]["group"] == "adaptive"
    assert found.metrics["worst/adaptive"] == left(found)["entropy"]


def test_a_network_is_left_as_it_was(attentive):
    net, x, y = attentive
    trained = trained_of(net, x, y, 10)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    attacked(trained, attacks=["pgd20", "aux", "mask_held", "curve"], attack_steps=3, attack_images=20)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


# ------------------------------------------------------------------------------------------ columns, images and ranks


def test_a_column_does_not_depend_on_which_other_attacks_run():
    trained = on_digits(trained_on_digits("robust"))
    every = attacked(trained, attacks=["fgsm_random", "pgd20", "apgd_ce", "apgd_t", "curve"], attack_steps=5)
    for name in ("fgsm_random", "apgd_t", "curve"):
        (alone,) = [attacked(trained, attacks=[name], attack_steps=5)]
        assert np.array_equal(alone.per_image["toy"][name], every.per_image["toy"][name])
    again = attacked(trained, attacks=["apgd_t", "fgsm_random"], attack_steps=5)
    assert list(left(again)) == ["clean", "fgsm_random", "apgd_t"]  # In order of cost.
    other = attacked(trained, attacks=["fgsm_random"], attack_steps=5, seed=4)
    assert not np.array_equal(other.per_image["toy"]["fgsm_random"], again.per_image["toy"]["fgsm_random"])


def test_default_stands_for_what_runs_where_nothing_is_named(linear):
    trained, settings = trained_of(Net(linear[0]), *linear[1:], 2), {"attack_images": 4, "attack_steps": 1}
    alone = attacked(trained, square_queries=2, **settings)
    assert "square" in left(alone) and not {"pgd100", "aux", "transfer", "autoattack"} & left(alone).keys()
    more = attacked(trained, square_queries=2, attacks=["pgd100", "default"], **settings)
    assert set(left(more)) == {*left(alone), "pgd100"}


def test_restarts_leave_no_more():
    trained = on_digits(trained_on_digits("conv"))
    one, three = (attacked(trained, attacks=["fgsm_random"], attack_restarts=restarts) for restarts in (1, 3))
    right = [found.per_image["toy"]["fgsm_random"] == found.per_image["toy"]["label"] for found in (one, three)]
    assert right[1].sum() < right[0].sum() and not (right[1] & ~right[0]).any()


def test_a_step_size_is_that_of_pgd_alone():
    trained = on_digits(trained_on_digits("robust"))
    names = ["pgd20", "cw", "fgsm_random"]
    wide, narrow = (attacked(trained, attacks=names, attack_step_size=step) for step in (None, 0.001))
    assert left(narrow)["pgd20"] > left(wide)["pgd20"] + 0.05 and left(narrow)["cw"] > left(wide)["cw"] + 0.05
    assert left(narrow)["fgsm_random"] == left(wide)["fgsm_random"]


def test_some_images_are_of_each_class_as_many_and_smaller_numbers_are_among_larger():
    labels = torch.tensor([0] * 50 + [1] * 9 + [2] * 30)
    images = image_set(torch.zeros(89, 3, 2, 2, dtype=torch.uint8), labels)
    taken = {count: module.some_images(images, count, seed=1) for count in (9, 24, 40, 89, 500)}
    assert [torch.bincount(taken[count].labels).tolist() for count in (9, 24, 40)] == [[3] * 3, [8] * 3, [16, 9, 15]]
    sets = [set(chosen.indices.tolist()) for chosen in taken.values()]
    assert [len(chosen) for chosen in sets] == [9, 24, 40, 89, 89] and sets == sorted(sets, key=len)
    assert all(small <= large for small, large in zip(sets, sets[1:], strict=False))
    assert taken[24].indices.tolist() == sorted(taken[24].indices.tolist())
    assert module.some_images(images, 24, seed=2).indices.tolist() != taken[24].indices.tolist()


class Pair(World):
    """Two threads that exchange what ranks would."""

    boxes: list = [None, None]
    barrier = threading.Barrier(2, timeout=120)

    def all_gather_object(self, value):
        self.boxes[self.rank] = value
        self.barrier.wait()
        found = list(self.boxes)
        self.barrier.wait()
        return found


def test_several_ranks_find_what_one_does(attentive):
    net, x, y = attentive
    flags = {"attacks": ["fgsm_random", "aux", "curve", "apgd_t"], "attack_steps": 2, "ood_batch_size": 13}
    expected = attacked(trained_of(net, x, y, 10), **flags)
    found: list = [None, None]

    def work(rank):
        own = replace(trained_of(copy.deepcopy(net), x, y, 10), world=Pair(rank, 2, rank))
        found[rank] = attacked(own, **flags)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        assert one.metrics == expected.metrics and one.facts["signs"] == expected.facts["signs"]
        for name, column in expected.per_image["toy"].items():
            assert np.array_equal(one.per_image["toy"][name], column), name


def test_attacks_and_the_judge_see_the_network_in_one_precision(attentive):
    net, x, y = attentive
    seen = []

    def watching(images):
        seen.append(torch.is_autocast_enabled("cpu"))
        return net.eval()(images)

    for amp, precision in (("bf16", "bf16"), ("off", "float32")):
        seen.clear()
        names = ["fgsm", "apgd_ce", "temperature", "curve"]
        settings = {"attacks": names, "attack_steps": 2, "attack_images": 10}
        found = attacked(trained_of(Net(watching), x, y, 10), amp=amp, **settings)
        assert set(seen) == {amp == "bf16"} and found.facts["precision"] == precision


def test_autoattack_sees_all_images_in_one_call_and_what_it_says_is_reported(monkeypatch):
    calls = []

    def fake(logits_of_x, images, labels, **settings):
        calls.append((len(images), settings))
        moved = images.clone()
        moved[3] = 1 - moved[3]
        return AutoResult(moved, torch.arange(len(images)) == 3, {"natural": 0.9, "square": 0.8}, ("a", "b"))

    monkeypatch.setattr(module, "autoattack", fake)
    monkeypatch.setitem(module._NEEDS, "pyautoattack", (lambda victim: True, ""))
    net = trained_on_digits("conv")
    found = attacked(on_digits(net), attacks=["autoattack", "square"], square_queries=7, ood_batch_size=25)
    (whole,) = [settings for count, settings in calls if count == N]
    assert [count for count, _ in calls] == [25, 25, 10, N]
    assert whole["eps"] == 0.15 and whole["norm"] == "linf" and whole["batch_size"] == 25 and "attacks" not in whole
    assert calls[0][1]["attacks"] == ["square"] and calls[0][1]["queries"] == 7
    assert len({settings["seed"] for _, settings in calls}) == 4
    of_attack = found.facts["attacks"]
    assert of_attack["autoattack"]["parts"] == {"natural": 0.9, "square": 0.8} and "parts" not in of_attack["square"]
    assert of_attack["autoattack"]["warnings"] == of_attack["square"]["warnings"] == ["a", "b"]


# ------------------------------------------------------------------------------------------------------------ signs


def column(name, *right, n=1000):
    """So many of n images are right: the first ones, or those of a range."""
    start, stop = right if len(right) == 2 else (0, right[0])
    places = np.arange(n)
    table = {"correct": (places >= start) & (places < stop), "without_gradient": np.zeros(n, dtype=bool)}
    return Column(ATTACKS[name], Result(name, {"accuracy": table["correct"].mean()}, {"toy": table}, {}), 0.0)


def signs_of(**columns):
    made = {name: column(name, *(right if isinstance(right, tuple) else (right,))) for name, right in columns.items()}
    worst = {}
    for group in ("standard", "adaptive"):
        if own := [one.correct for one in made.values() if one.row.group == group]:
            worst[f"worst/{group}"] = np.logical_and.reduce(own)
    found, missing = find_signs(made, worst, columns.get("curve") and 0.0)
    return {sign.name: (round(sign.number, 6), sign.shows) for sign in found}, missing


def test_signs_compare_the_strongest_of_each_kind():
    found, missing = signs_of(
        clean=900,
        fgsm=700,
        fgsm_random=720,
        pgd20=600,
        pgd40=590,
        pgd100=640,
        cw=580,
        square=560,
        margins=500,
        transfer=880,
    )
    assert found == {
        "attacks that know the network leave less by": (0.08, True),
        "left under attack above natural": (-0.18, False),
        "more steps leave more by": (0.05, True),
        "one step leaves less than many by": (-0.11, False),
        "a gradient-free attack leaves less by": (0.02, True),
        "transfer leaves less than the white box by": (-0.3, False),
        "images without gradient": (0.0, False),
    }
    assert missing == ["curve"]


def test_differences_that_chance_makes_are_no_sign():
    """Of 1,000 images 8 are right under one attack alone, 4 under the other: 0.4 points, and chance makes up to 0.7."""
    found, _ = signs_of(clean=900, pgd20=(4, 604), pgd40=(0, 608), fgsm=(8, 604), square=(6, 600))
    assert found["more steps leave more by"] == (0.008, True)  # All 8 on one side.
    chance, _ = signs_of(clean=900, pgd20=(4, 604), pgd40=(0, 602))
    assert chance["more steps leave more by"] == (0.002, False)
    mixed, _ = signs_of(clean=900, pgd20=(4, 604), pgd40=(12, 616))
    assert mixed["more steps leave more by"] == (0.004, False)
    assert found["one step leaves less than many by"] == (0.004, False)


def test_without_attacks_that_a_sign_compares_it_is_not_looked_for():
    found, missing = signs_of(clean=900, pgd20=600)
    assert set(found) == {"left under attack above natural", "images without gradient"}
    assert missing == ["square", "transfer", "curve"]


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"attacks": ["aux"]}, "--attacks aux: it is for networks with reverse attention; leave it out"),
        ({"attacks": ["transfer"]}, "--attacks transfer: give --transfer_path"),
        ({"epsilon": 0.0}, "--epsilon 0: nothing can be attacked"),
        ({"one_class_idx": 3}, "--one_class_idx: --mode attack names all classes; leave it out"),
    ],
)
def test_what_cannot_be_attacked_is_refused_before_anything_runs(linear, flags, message):
    trained = trained_of(Net(linear[0]), *linear[1:], 2)
    trained.split.one_class_idx = flags.pop("one_class_idx", None)
    trained = replace(trained, flags=Flags({**trained.flags.as_dict(), **flags}, {"epsilon", *flags}))
    with pytest.raises(UserError, match=re.escape(message)):
        attack(trained)


def test_a_radius_of_another_norm_is_refused(linear):
    trained = trained_of(Net(linear[0]), *linear[1:], 2)
    with pytest.raises(UserError, match="--norm l2: the radius of training is of linf; give --epsilon 0.5, say"):
        attack(replace(trained, flags=Flags({**trained.flags.as_dict(), "norm": "l2"}, {"norm"})))


def test_without_the_package_its_attacks_are_refused_and_left_out_of_the_default(linear, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    trained = trained_of(Net(linear[0]), *linear[1:], 2)
    message = r"--attacks autoattack: AutoAttack and Square need the package pyautoattack; pip install pyautoattack"
    with pytest.raises(UserError, match=message):
        attacked(trained, attacks=["fgsm", "autoattack"])
    found = attacked(trained, attack_images=4, attack_steps=1)
    assert "square" not in left(found) and "square" in found.facts["not_measured_without"]


def test_autoattack_is_refused_to_several_ranks(linear, monkeypatch):
    monkeypatch.setitem(module._NEEDS, "pyautoattack", (lambda victim: True, ""))
    monkeypatch.setattr(World, "all_gather_object", lambda self, value: [value])
    trained = replace(trained_of(Net(linear[0]), *linear[1:], 2), world=World(0, 2))
    with pytest.raises(UserError, match="--attacks autoattack: it sees all images in one call; start one process"):
        attacked(trained, attacks=["autoattack"])


@pytest.mark.parametrize(
    "eps, text", [(8 / 255, "8/255"), (0, "0"), (1, "1"), (0.2, "0.2"), (1 / 255, "1/255"), (0.0123456, "0.0123456")]
)
def test_a_radius_is_written_as_it_is_given(eps, text):
    assert radius_text(eps) == text
