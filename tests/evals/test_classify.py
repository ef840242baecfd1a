"""Classification under conditions: perturbations, settings, their summaries, and how the network is left."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import RunStopped, UserError
from common.flags import Flags
from datasets.sets import image_set
from evals.classify import (
    Condition,
    Perturbed,
    best,
    classified_images,
    classify,
    correct_of,
    each,
    error_rate,
    linear_logits,
    marginalized_logits,
    worst_case,
)
from evals.trained import Trained

N, C = 23, 3


class Net(nn.Module):
    """Features are normalised pixels times `scale`, so that an attribute changes what the linear head says."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(48, C)
        self.joint_distribution_layer = nn.Linear(48, 4 * C)

    def features(self, images):
        return (self.norm(images) * self.scale).flatten(1)


@pytest.fixture
def trained():
    """A random network on random images, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net().train()
        images = torch.randint(0, 256, (N, 3, 4, 4), dtype=torch.uint8)
    with torch.no_grad():
        guess = net.eval()
        labels = linear_logits(guess, images.float() / 255).argmax(1)
    net.train()
    labels[::5] = (labels[::5] + 1) % C  # a fifth is wrong without any attack
    split = SimpleNamespace(
        test=lambda: image_set(images, labels), normal=lambda y: y >= 0, n_classes=C, dataset="toy", one_class_idx=None
    )
    values = {"one_class_idx": None, "ood_batch_size": 4, "amp": "off", "seed": 0, "dataset": "toy", "mode": "m"}
    flags = Flags(values | {"test_noise": "none", "test_noise_level": None})
    return Trained.of(net, flags, split)


def fgsm(net, images, labels, generator, eps=0.2):
    """One signed step; its gradient is taken by `backward`, which would reach parameters, too."""
    x = images.clone().requires_grad_()
    F.cross_entropy(linear_logits(net, x), labels).backward()
    return (x + eps * x.grad.sign()).clamp(0, 1)


def noise(net, images, labels, generator):
    return (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def scaled(value):
    @contextlib.contextmanager
    def setting(net):
        before, net.scale = net.scale, value
        try:
            yield
        finally:
            net.scale = before

    return setting


def by_image(trained, condition):
    """Whether each image is right, one image at a time."""
    net, test = trained.net, trained.split.test()
    found = []
    net.eval()
    for n in range(N):
        image, label = test.batch(torch.tensor([n])), test.labels[n : n + 1]
        with condition.setting(net):
            moved = condition.perturb(net, image, label, None)
            found.append(bool(linear_logits(net, moved.detach()).argmax(1) == label))
    net.zero_grad()
    net.train()
    return np.array(found)


def test_clean_accuracy_and_what_every_image_was_taken_for(trained):
    (found,) = classify(trained)
    columns = found.per_image["toy"]
    probabilities = correct_of_loop(trained)
    assert (found.name, found.facts["n"], found.facts["condition"]) == ("clean", N, "clean")
    assert found.metrics["accuracy"] == pytest.approx(columns["correct"].mean()) == pytest.approx(18 / 23)
    assert columns["predicted"].tolist() == probabilities.argmax(1).tolist()
    np.testing.assert_allclose(columns["confidence"], probabilities.max(1).values, atol=1e-6)
    assert (
        columns["index"].tolist() == list(range(N))
        and columns["label"].tolist() == trained.split.test().labels.tolist()
    )


def correct_of_loop(trained):
    trained.net.eval()
    with torch.no_grad():
        images = trained.split.test().images.float() / 255
        found = torch.cat([linear_logits(trained.net, image[None]).softmax(1) for image in images])
    trained.net.train()
    return found


def test_an_attack_and_a_setting_and_their_worst_case_against_a_loop(trained):
    conditions = [Condition(), Condition("fgsm", fgsm), Condition("scale", setting=scaled(-1.0))]
    *found, worst = classify(trained, conditions=conditions, summarise=worst_case)
    expected = [by_image(trained, condition) for condition in conditions]
    for result, right in zip(found, expected, strict=True):
        assert np.array_equal(result.per_image["toy"]["correct"], right)
        assert result.metrics["accuracy"] == pytest.approx(right.mean())
    assert len({result.metrics["accuracy"] for result in found}) == 3
    everywhere = [all(column) for column in zip(*expected, strict=True)]
    assert worst.name == "worst_case" and worst.per_image["toy"]["correct"].tolist() == everywhere
    assert worst.metrics["accuracy"] == pytest.approx(np.mean(everywhere))
    assert worst.facts["over"] == ["clean", "fgsm", "scale"]
    assert worst.metrics["accuracy"] <= min(result.metrics["accuracy"] for result in found)


def test_the_network_is_left_as_it_was(trained):
    net = trained.net
    net.linear.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.linear.weight.grad = torch.ones(C, 48)
    seen = []

    def watching(net, images, labels, generator):
        seen.append((torch.is_grad_enabled(), net.training, net.scale))
        return fgsm(net, images, labels, generator)

    list(classify(trained, conditions=[Condition("a", watching, scaled(3.0))]))
    assert set(seen) == {(True, False, 3.0)} and len(seen) == 6
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.scale == 1.0 and all(module.training for module in net.modules())
    assert torch.equal(net.linear.weight.grad, torch.ones(C, 48)) and net.norm.weight.grad is None
    assert [p.requires_grad for p in net.linear.parameters()] == [True, False] and net.norm.weight.requires_grad


def test_the_network_is_left_as_it_was_even_after_an_error(trained):
    def failing(net, images, labels, generator):
        raise KeyError

    with pytest.raises(KeyError):
        list(classify(trained, conditions=[Condition("a", failing, scaled(3.0))]))
    net = trained.net
    assert net.scale == 1.0 and all(module.training for module in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_draws_of_a_perturbation_follow_the_seed_and_its_name(trained):
    def confidences(name, **flags):
        other = Trained.of(trained.net, Flags({**trained.flags.as_dict(), **flags}), trained.split)
        (found,) = classify(other, conditions=[Condition(name, noise)])
        return found.per_image["toy"]["confidence"].tolist()

    state = torch.get_rng_state()
    first = confidences("noise")
    assert confidences("noise") == first and torch.equal(state, torch.get_rng_state())
    assert confidences("noise", seed=1) != first and confidences("noise 2") != first


def test_a_perturbation_that_knows_more_adds_columns_and_facts(trained):
    def knowing(net, images, labels, generator):
        moved = noise(net, images, labels, generator)
        return Perturbed(moved, {"change": (moved - images).abs().amax((1, 2, 3))}, {"sizes": [len(images)]})

    known, plain = classify(
        trained, conditions=[Condition("noise", knowing, at="b"), Condition("noise", noise, at="b2")]
    )
    change = known.per_image["toy"]["change"]
    assert change.shape == (N,) and len(set(change.tolist())) > 3 and known.facts["sizes"] == [4, 3]
    assert "sizes" not in plain.facts and "change" not in plain.per_image["toy"]
    # It gets the same images as one that knows nothing.
    (again,) = classify(trained, conditions=[Condition("noise", noise, at="b")])
    assert np.array_equal(again.per_image["toy"]["confidence"], known.per_image["toy"]["confidence"])


def test_a_condition_on_all_images_at_once_sees_them_in_one_call(trained):
    seen, asked = [], []

    def watching(net, images, labels, generator):
        seen.append((len(images), labels.tolist()))
        return fgsm(net, images, labels, generator)

    def predict(net, images):
        asked.append(len(images))
        return linear_logits(net, images)

    whole, parts = Condition("a", watching, whole=True), Condition("b", fgsm)
    one, two = classify(trained, predict=predict, conditions=[whole, parts])
    assert seen == [(N, trained.split.test().labels.tolist())] and max(asked) == 4
    assert np.array_equal(one.per_image["toy"]["correct"], two.per_image["toy"]["correct"])


def test_other_images_than_those_of_the_split(trained):
    some = classified_images(trained).where(torch.arange(N) % 3 == 1)
    (found,) = classify(trained, test=some)
    (every,) = classify(trained)
    assert found.facts["n"] == len(some) == 8 and found.per_image["toy"]["index"].tolist() == list(range(1, N, 3))
    assert np.array_equal(found.per_image["toy"]["correct"], every.per_image["toy"]["correct"][1::3])


def grid(trained):
    """Two conditions under each of three settings; at 0 the network is blind, and nothing can attack it."""
    values = {"0": 0.0, "1": 1.0, "0.5": 0.5}
    return [
        Condition(name, perturb, scaled(value), at)
        for at, value in values.items()
        for name, perturb in (("clean", Condition().perturb), ("fgsm", fgsm))
    ]


def test_the_worst_case_is_taken_within_each_setting(trained):
    results = list(classify(trained, conditions=grid(trained), summarise=worst_case))
    assert [r.name for r in results[6:]] == ["worst_case at 0", "worst_case at 1", "worst_case at 0.5"]
    for worst, at in zip(results[6:], ("0", "1", "0.5"), strict=True):
        pair = [r.per_image["toy"]["correct"] for r in results[:6] if r.facts["at"] == at]
        assert np.array_equal(worst.per_image["toy"]["correct"], pair[0] & pair[1])


def test_the_best_setting_is_among_those_that_keep_the_clean_accuracy(trained):
    *results, _ = classify(trained, conditions=grid(trained), summarise=best())
    clean = {r.facts["at"]: r.metrics["accuracy"] for r in results if r.facts["condition"] == "clean"}
    worst = {r.facts["at"]: r.metrics["accuracy"] for r in worst_case(results)}
    assert worst["0"] > worst["1"] and clean["0"] < clean["1"]  # what is blind cannot be attacked
    for floor, kept in ((0.0, clean), (clean["1"], {at for at, value in clean.items() if value >= clean["1"]})):
        (found,) = best(floor=floor)(results)
        at = max(kept, key=lambda at: worst[at])
        assert (found.name, found.facts["at"]) == ("best", at) and (floor == 0) == (at == "0")
        assert (found.metrics["accuracy"], found.metrics["clean_accuracy"]) == (worst[at], clean[at])
    # No lower than by so much below the first setting, here the one with scale 1.
    turned = [r for at in ("1", "0.5", "0") for r in results if r.facts["at"] == at]
    (found,) = best(max_drop=0.001)(turned)
    assert found.facts["at"] != "0"
    (found,) = best(max_drop=0.001)(results)  # the first setting is the blind one, and no other lies below it
    assert found.facts["at"] == "0"
    with pytest.raises(RunStopped, match="keeps a clean accuracy of 99.0 %"):
        list(best(floor=0.99)(results))
    assert list(each(results)) == []


def test_the_marginalised_logits_are_those_of_the_four_rotations(trained):
    net = trained.net.eval()
    images = torch.rand(5, 3, 4, 4)
    expected = torch.zeros(5, C)
    for quarters in range(4):
        joint = net.joint_distribution_layer(net.features(torch.rot90(images, quarters, (2, 3))))
        expected += joint[:, quarters * C : (quarters + 1) * C] / 4
    torch.testing.assert_close(marginalized_logits(net, images), expected)


def test_what_cannot_be_classified_is_refused(trained):
    one = Trained.of(trained.net, trained.flags, SimpleNamespace(**{**vars(trained.split), "one_class_idx": 3}))
    with pytest.raises(UserError, match="--one_class_idx"):
        classify(one)
    trained.split.n_classes = 7
    with pytest.raises(UserError, match="--dataset: it has 7 classes, but the network knows 3"):
        list(classify(trained))
    with pytest.raises(ValueError, match="two conditions of one name"):
        classify(trained, conditions=[Condition(), Condition()])


def test_the_error_rate_of_a_function_against_a_loop(trained):
    test, net = trained.split.test(), trained.net.eval()

    def predict(images):
        return linear_logits(net, images)

    right = [bool(predict(test.batch(torch.tensor([n]))).argmax() == test.labels[n]) for n in range(N)]
    assert correct_of(predict, test, 4).tolist() == right
    assert error_rate(predict, test, 4) == error_rate(predict, test, 100) == right.count(False) / N
