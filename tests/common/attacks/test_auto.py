"""The wrapper of pyautoattack, on small networks: what it returns, and what it leaves as it was."""

import logging
import re
import sys

import pytest
import torch
from torch import nn

from common.attacks import apgd
from common.attacks import auto as module
from common.attacks.auto import STANDARD, autoattack
from common.attacks.ball import NORMS
from common.attacks.objectives import judged
from common.errors import UserError
from tests.common.attacks.nets import digits, trained

N = 12


@pytest.fixture
def package():
    return pytest.importorskip("pyautoattack")


def few_classes(k):
    net = trained("dense")
    return nn.Sequential(net, FirstLogits(k)).eval()


class FirstLogits(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, logits):
        return logits[:, : self.k]


@pytest.fixture
def net():
    """Of five classes, since FAB takes its time for each."""
    return few_classes(5)


@pytest.fixture
def batch(net):
    x = digits()[2][:N]
    y = net(x).argmax(1)
    y[:2] = (y[:2] + 1) % 5  # Two are wrong without any attack.
    return x, y


def run(net, x, y, **changes):
    settings = {"eps": 0.1, "seed": 0, "batch_size": N, "queries": 50, **changes}
    return autoattack(net, x, y, **settings)


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
def test_the_standard_attacks_each_on_what_is_left(package, net, batch, norm, eps):
    x, y = batch
    found = run(net, x, y, norm=norm, eps=eps)
    assert list(found.accuracy) == ["natural", *STANDARD]
    left = list(found.accuracy.values())
    assert left == sorted(left, reverse=True) and 1 > left[0] > left[1] and left[-1] > 0
    named = net(found.images).argmax(1)
    assert torch.equal(found.fooled, named != y) and float((named == y).float().mean()) == pytest.approx(left[-1])
    distance = NORMS[norm].distance(found.images, x)
    assert distance.max() <= eps + 1e-6 and found.images.min() >= 0 and found.images.max() <= 1
    assert torch.equal(found.images[~found.fooled], x[~found.fooled])
    # It is at least as strong as APGD alone, within an image.
    alone = apgd(judged(net), x, y, eps=eps, norm=norm, steps=100)
    assert left[-1] <= float((net(alone).argmax(1) == y).float().mean()) + 1 / N


def test_the_same_seed_finds_the_same(package, net, batch):
    one, two = (run(net, *batch, batch_size=5, attacks=["apgd-ce", "square"]) for _ in range(2))
    assert torch.equal(one.images, two.images) and one.accuracy == two.accuracy


def test_square_alone_asks_for_no_gradient_and_for_no_more_than_its_queries(package, net, batch):
    x, y = batch
    calls = []

    def logits_of_x(x):
        calls.append((len(x), torch.is_grad_enabled() and x.requires_grad))
        return net(x)

    found = run(logits_of_x, x, y, attacks=["square"], eps=0.2, queries=200, batch_size=5)
    assert list(found.accuracy) == ["natural", "square"] and found.accuracy["square"] < found.accuracy["natural"] - 0.2
    assert not any(grad for _, grad in calls)
    # Two batches of what is left, 200 queries each, and some calls of checks.
    assert 200 < len(calls) < 2 * 200 + 40


def test_attacks_run_in_the_order_in_which_they_are_named(package, net, batch):
    found = run(net, *batch, attacks=["square", "apgd-dlr", "apgd-ce"], batch_size=5)
    assert list(found.accuracy) == ["natural", "square", "apgd-dlr", "apgd-ce"]


@pytest.mark.parametrize("classes, left_out", [(2, True), (3, True), (4, False), (5, False)])
def test_with_few_classes_there_are_as_many_targets_as_can_be(package, batch, classes, left_out):
    x = batch[0]
    net = few_classes(classes)
    found = run(net, x, net(x).argmax(1), eps=0.3)
    assert ("apgd-t" in found.accuracy) != left_out and "fab-t" in found.accuracy
    assert ("apgd-t was left out: it needs 4 classes" in found.warnings) == left_out
    assert found.accuracy["natural"] == 1 and found.accuracy["square"] < 0.8


def test_one_image_and_images_that_are_all_wrong(package, net, batch):
    x, y = batch
    assert list(run(net, x[2:3], y[2:3], eps=0.3).accuracy) == ["natural", *STANDARD]
    wrong = run(net, x[:2], y[:2])
    assert wrong.accuracy == dict.fromkeys(["natural", *STANDARD], 0.0) and torch.equal(wrong.images, x[:2])


def test_warnings_are_in_the_report_and_nowhere_else(package, net, batch, capsys, caplog):
    x, y = batch
    said = run(lambda x: 1e9 * net(x).round(), x, y, attacks=["apgd-dlr"]).warnings
    assert any("points with zero gradient" in text for text in said) and len(said) == len(set(said))
    probabilities = run(lambda x: net(x).softmax(1), x, y, attacks=["apgd-dlr"]).warnings
    assert any("probability distribution" in text for text in probabilities)
    drawn = run(lambda x: net(x + 0.1 * torch.rand(x.shape)), x, y, attacks=["apgd-ce"]).warnings
    assert any("randomized defense" in text for text in drawn)
    assert capsys.readouterr() == ("", "") and not caplog.records


def test_the_gain_of_square_is_reported(package, net, batch):
    """Gradients that point the wrong way: APGD finds nothing, Square does."""

    class Backwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return -grad

    found = run(lambda x: net(Backwards.apply(x)), *batch, eps=0.2, attacks=["apgd-ce", "square"], queries=200)
    assert any("Square Attack has decreased the robust accuracy" in text for text in found.warnings)


def test_a_network_that_attacks_itself_is_reported_and_the_next_one_is_not(package, net, batch):
    def dynamic(x):
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            torch.autograd.grad(net(inner).sum(), inner)
        return net(x)

    def dynamic_warnings(logits_of_x):
        return [text for text in run(logits_of_x, *batch, attacks=["apgd-ce"]).warnings if "dynamic" in text]

    assert dynamic_warnings(dynamic) and not dynamic_warnings(net)


def test_the_process_is_left_as_it_was(package, net, batch):
    state, logger = torch.get_rng_state(), logging.getLogger("auto-attack")
    before = logger.level, logger.propagate, list(logger.handlers)

    def trace(frame, event, arg):
        return None

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        run(net, *batch, attacks=["apgd-ce", "square"])
        kept = sys.gettrace()
    finally:
        sys.settrace(outer)
    assert kept is trace and torch.equal(torch.get_rng_state(), state)
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_an_error_of_the_network_leaves_the_process_as_it_was(package, net, batch):
    calls = []

    def broken(x):
        calls.append(len(x))
        if len(calls) == 30:
            raise RuntimeError("broken")
        return net(x)

    state, handlers = torch.get_rng_state(), list(logging.getLogger("auto-attack").handlers)
    with pytest.raises(RuntimeError, match="broken"):
        run(broken, *batch)
    assert torch.equal(torch.get_rng_state(), state) and logging.getLogger("auto-attack").handlers == handlers


@pytest.mark.parametrize("attacks", [["fab-t", "apgd-t", "square"], ["fab", "apgd-dlr"]])
def test_no_parameter_gets_a_gradient_and_nothing_of_the_network_changes(package, net, batch, attacks):
    x, y = batch[0][:4], batch[1][:4]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    given = x.clone()
    run(net, x, y, attacks=attacks)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(x, given) and not net.training


def test_square_does_not_write_into_what_the_network_keeps(package, batch):
    class Keeps(nn.Module):
        """Hands out logits that it goes on using."""

        def __init__(self):
            super().__init__()
            self.logits = torch.zeros(N, 10)
            self.logits[:, 3] = 1

        def forward(self, x):
            return self.logits[: len(x)]

    net = Keeps()
    run(net, batch[0], torch.full((N,), 3), attacks=["square"], queries=3)
    assert net.logits.sum() == N


def test_logits_of_halves_are_attacked_in_float32(package, net, batch):
    x, y = batch
    found = run(lambda x: net(x).bfloat16(), x, y, attacks=["apgd-ce", "square"])
    assert found.images.dtype == torch.float32 and found.accuracy["apgd-ce"] < found.accuracy["natural"]


def test_images_in_another_memory_format_are_attacked_alike(package, net, batch):
    x, y = batch
    x = x.expand(-1, 3, -1, -1).contiguous()
    of_colours = lambda x: net(x.mean(1, keepdim=True))  # noqa: E731
    strided = x.contiguous(memory_format=torch.channels_last)
    found = [run(of_colours, images, y, attacks=["apgd-dlr", "square"]).accuracy for images in (x, strided)]
    assert found[0] == found[1]


def test_a_missing_package_is_reported(monkeypatch, net, batch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    message = r"--attacks: AutoAttack and Square need the package pyautoattack; pip install pyautoattack"
    with pytest.raises(UserError, match=message):
        run(net, *batch)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eps": -1.0}, "eps must be a number >= 0, got -1.0"),
        ({"eps": 0.0}, "AutoAttack needs eps > 0 and images, got 0.0 and 12"),
        ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
        ({"batch_size": 0}, "batch_size must be > 0, got 0"),
        ({"attacks": []}, "attacks: none was named"),
        ({"attacks": ["apgd"]}, "attacks must be of apgd-ce, apgd-t, fab-t, square, apgd-dlr, fab, got 'apgd'"),
        ({"images": torch.full((N, 1, 8, 8), 2.0)}, "images must lie in [0, 1], got 2 to 2"),
    ],
)
def test_what_autoattack_cannot_use_is_refused(package, net, batch, changes, message):
    x = changes.pop("images", batch[0])
    with pytest.raises(ValueError, match=re.escape(message)):
        run(net, x, batch[1], **changes)


def test_an_attack_that_needs_more_classes_is_refused_by_name(package, batch):
    net = few_classes(3)
    with pytest.raises(ValueError, match="attacks: apgd-t needs 4 classes, and there are 3"):
        run(net, batch[0], net(batch[0]).argmax(1), attacks=["apgd-t"])


def test_a_package_that_reports_otherwise_is_not_believed(package, net, batch, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", re.compile("another text"))
    with pytest.raises(RuntimeError, match="install version 0.2.0"):
        run(net, *batch, attacks=["apgd-ce"])
