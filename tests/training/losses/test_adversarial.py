"""Losses of adversarial training: known answers, values by hand, bounds."""

import math

import pytest
import torch
import torch.nn.functional as F

from training.losses.adversarial import anc, anc_of_pairs, boosted_cross_entropy, kl, weighted_kl


def draws(n=6, classes=5, seed=0):
    return 2 * torch.randn(n, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


@pytest.mark.parametrize("alpha, name", [(1.0, "alpha1"), (0.3, "alpha03"), (0.0, "alpha0")])
def test_known_contrasts_and_gradients(golden, alpha, name):
    g = golden("ancra_ops")
    a, b = (g[f"anc_{part}_logits"].float().requires_grad_() for part in ("anchor", "negative"))
    total = len(a) * anc(a, b, alpha=alpha)
    assert float(total.detach()) == pytest.approx(float(g[f"anc_sum_{name}"]), rel=2e-5)
    found = torch.autograd.grad(total, (a, b), allow_unused=True)
    for gradient, part in zip(found, ("anchor", "negative"), strict=True):
        gradient = torch.zeros_like(a) if gradient is None else gradient
        torch.testing.assert_close(gradient, g[f"anc_grad_{part}_{name}"].float(), atol=2e-5, rtol=0)


def test_contrasts_by_hand():
    p, same, other = [0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.3, 0.6, 0.1]
    found = anc_of_pairs(logits_of(p, p), logits_of(same, other), alpha=1)
    torch.testing.assert_close(found, torch.tensor([math.sqrt(0.42), 0.0], dtype=torch.float64))
    assert float(anc(logits_of(p, p), logits_of(same, other), alpha=0.5)) == pytest.approx(0.324037, abs=1e-6)


def test_bounds_and_symmetries_of_contrasts():
    a, b = draws(200), draws(200, seed=1)
    pairs = anc_of_pairs(a, b, alpha=0.3)
    assert ((pairs == 0) | ((pairs >= 0.2) & (pairs <= 1))).all() and (pairs > 0).any()
    assert torch.equal(pairs == 0, a.argmax(1) != b.argmax(1))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(anc(a[order], b[order], alpha=0.3), anc(a, b, alpha=0.3))
    x, y = a.requires_grad_(), b.requires_grad_()
    one = torch.autograd.grad(anc(x, y, alpha=0.3), (x, y))
    two = torch.autograd.grad(anc(y, x, alpha=0.7), (x, y))
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right)


def test_divergences_against_torch_and_by_hand():
    a, b, labels = draws(), draws(seed=1), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = F.kl_div(b.log_softmax(1), a.softmax(1), reduction="batchmean")
    torch.testing.assert_close(kl(a, b), expected)
    each = F.kl_div(b.log_softmax(1), a.softmax(1), reduction="none").sum(1)
    weight = 1 - a.softmax(1)[torch.arange(6), labels]
    torch.testing.assert_close(weighted_kl(a, b, labels), (weight * each).mean())
    assert float(kl(a, a)) == pytest.approx(0, abs=1e-12)
    assert torch.autograd.gradcheck(lambda u, v: kl(u, v), (a.requires_grad_(), b.requires_grad_()))
    assert torch.autograd.gradcheck(lambda u, v: weighted_kl(u, v, labels), (a, b))


def test_boosted_cross_entropy_by_hand():
    logits, labels = logits_of([0.7, 0.2, 0.1], [0.1, 0.3, 0.6]), torch.tensor([0, 1])
    expected = -(math.log(0.7) + math.log(1 - 0.2) + math.log(0.3) + math.log(1 - 0.6)) / 2
    assert float(boosted_cross_entropy(logits, labels)) == pytest.approx(expected)
    sure = torch.tensor([[0.0, 50.0]])
    assert math.isfinite(float(boosted_cross_entropy(sure, torch.tensor([0]))))
    assert torch.autograd.gradcheck(lambda u: boosted_cross_entropy(u, labels), logits.requires_grad_())
