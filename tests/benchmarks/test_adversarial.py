"""What the benchmark of adversarial training compares is compared here at small sizes; nothing is timed."""

import re

import pytest
import torch

from benchmarks import adversarial, released_ancra
from benchmarks.adversarial import OURS, OurStep, ReleasedStep, check, training_flags
from benchmarks.released_ancra import ReleasedNet, contrast_loop, pick_loop, released_copy
from common.negatives import STRATEGIES, pick_negatives
from models.checkpoint import build_net
from models.reverse_attention import reverse_attention
from tests.fake_gpu import FakeGpu
from training.losses.adversarial import anc

CPU = torch.device("cpu")
FLAGS = "--model resnet8 --batch_size 6 --num_steps 1 --repeats 1".split()
SMALL = ["--num_steps", "1", "--amp", "off"]


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    monkeypatch.setattr(adversarial, "_SIDE", 8)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def steps(batch_size=6, *more: str, device=CPU) -> tuple[OurStep, ReleasedStep]:
    flags = training_flags("resnet8", batch_size, *SMALL, *more, "--device", str(device))
    ours = OurStep(flags, device)
    return ours, ReleasedStep(ours, flags)


@pytest.mark.parametrize("strategy", ["random_adv", "hard_adv", "random"])
def test_loss_and_gradients_of_both_formulations_agree(strategy):
    found = check("resnet8", 6, "--num_steps", "2", "--strategy", strategy, "--alpha", "0.7")
    assert re.search(r"by (0e\+00|\de-1\d), gradients by \de-1\d$", found), found


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("contrast_loop", lambda real: lambda p, q, alpha: 1.01 * real(p, q, alpha)),
        ("targeted_attack", lambda real: lambda net, images, *rest, **how: images),
        ("untargeted_attack", lambda real: lambda net, images, *rest, **how: images),
    ],
)
def test_a_formulation_that_is_wrong_is_not_timed(name, wrong, monkeypatch):
    where = released_ancra if name == "contrast_loop" else adversarial
    monkeypatch.setattr(where, name, wrong(getattr(released_ancra, name)))
    with pytest.raises(AssertionError, match="resnet8: loss or gradients differ by"):
        check("resnet8", 16, "--num_steps", "1")


@pytest.mark.parametrize("rule", STRATEGIES)
def test_the_loop_chooses_whom_tensors_choose(rule):
    logits, labels = torch.randn(30, 4, generator=gen(1)), torch.randint(4, (30,), generator=gen(2))
    found = torch.tensor(pick_loop(labels, logits, rule))
    assert (labels[found] != labels).all()
    drawn = torch.stack(
        [pick_negatives(logits, labels, strategy=rule, generator=gen(seed))[:, 0] for seed in range(20)]
    )
    certain = (drawn == drawn[0]).all(0)
    assert torch.equal(found[certain], drawn[0][certain])
    assert not certain.any() if rule == "random" else certain.sum() > 10


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loop_over_pairs_is_the_contrast(alpha):
    p, q = (torch.randn(9, 3, generator=gen(seed), dtype=torch.float64).requires_grad_() for seed in (1, 2))
    losses = [contrast_loop(p, q, alpha), anc(p, q, alpha=alpha)]
    torch.testing.assert_close(*losses)
    first, second = (torch.autograd.grad(loss, (p, q), materialize_grads=True) for loss in losses)
    torch.testing.assert_close(first, second)
    assert sum(float(gradient.abs().sum()) for gradient in first) > 0


def test_the_released_network_weighs_and_switches_itself():
    net = build_net("ra_classifier", "resnet8", n_classes=5, seed=0).double()
    released, images, labels = released_copy(net, contiguous=True), torch.rand(4, 3, 8, 8).double(), torch.arange(4)
    assert isinstance(released, ReleasedNet) and released.net is not net
    assert all(p.is_contiguous() for p in released.parameters())
    for given in (labels, None):
        final, *auxiliary = released(images, given)
        assert released.net.training == (given is not None)
        heads = net.train(given is not None).heads(images, given)
        torch.testing.assert_close([final, *auxiliary], [heads.final, *heads.auxiliary])
    z = torch.rand(4, net.backbone.feature_dim, 2, 2).double()
    expected = reverse_attention(z, net.linear.weight, net.linear.bias, pool=2, labels=labels)
    weighted = z * net.linear.weight[labels][:, :, None, None]
    torch.testing.assert_close(expected.final, net.linear(weighted.mean((2, 3))))


def test_both_train():
    for step in steps(12, "--lr_init", "0.01"):
        first = step.loss().item()
        for _ in range(6):
            step()
        assert step.loss().item() < first


def test_a_step_of_ours_waits_for_no_device_and_a_released_one_does():
    with FakeGpu() as gpu:
        ours, theirs = steps(6, device=gpu.device)
        gpu.waits.clear()
        ours()
        assert not gpu.waits
        theirs()
        # A pair of each head, the labels, three terms and three accuracies.
        assert len(gpu.waits) >= 2 * 6 + 1 + 3 + 3


def test_the_log_has_the_terms_and_the_accuracies():
    _, theirs = steps()
    theirs()
    assert len(theirs.logged) == 6 and all(0 <= share <= 1 for share in theirs.logged[3:])
    images, labels = theirs.seen
    assert (labels[2] != labels[0]).all() and (images[1] - images[0]).abs().max() <= 8 / 255 + 1e-6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table(device, capsys):
    with FakeGpu():
        assert adversarial.main([*FLAGS, "--device", device]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\S.*?) +\|", printed, re.M)
    assert rows == [
        *["a step", "-" * 23, OURS, "released", "released, channels last"],
        *["of a step", "-" * 20, "choice of negatives", "contrast of one head", "passes for the log"],
    ]
    assert "loss differs from the released formulation's by" in printed


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--repeats", "0"], "must be > 0"),
        (["--batch_size", "1"], "--batch_size > 1"),
        (["--device", "cuda", "--process_time"], "--process_time"),
        (["--strategy", "hardest"], "--strategy"),
        (["--num_steps", "0"], "--num_steps"),
    ],
)
def test_flags_that_measure_nothing_are_refused(flags, message, capsys):
    with FakeGpu():
        assert adversarial.main([*FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err
