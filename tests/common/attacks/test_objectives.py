"""Losses of attackers against loops over images, by hand, and against the authors' own code."""

import math

import pytest
import torch

from common.attacks import objectives as o
from common.seed import generator

N, C = 12, 6


def draws(n=N, c=C, dtype=torch.float64):
    gen = generator(0, "objectives")
    logits = torch.randn(n, c, generator=gen, dtype=dtype) * 3
    labels = torch.randint(c, (n,), generator=gen)
    labels[: n // 2] = logits[: n // 2].argmax(1)
    targets = (labels + 1 + torch.randint(c - 1, (n,), generator=gen)) % c
    return logits, labels, targets


def by_loop(logits, labels, of_row):
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    return torch.tensor([of_row(row, own) for row, own in rows], dtype=torch.float64)


def test_cross_entropy():
    logits, labels, _ = draws()
    found = by_loop(logits, labels, lambda z, y: math.log(sum(map(math.exp, z))) - z[y])
    torch.testing.assert_close(o.cross_entropy(logits, labels), found)


def test_the_margin_is_positive_where_the_image_is_classified_wrongly():
    logits, labels, _ = draws()
    found = o.margin(logits, labels)
    expected = by_loop(logits, labels, lambda z, y: max(v for k, v in enumerate(z) if k != y) - z[y])
    torch.testing.assert_close(found, expected)
    assert torch.equal(found > 0, logits.argmax(1) != labels) and (found > 0).any() and (found < 0).any()


def test_dlr():
    logits, labels, _ = draws()

    def row(z, y):
        ordered = sorted(z, reverse=True)
        return -(z[y] - max(v for k, v in enumerate(z) if k != y)) / (ordered[0] - ordered[2])

    torch.testing.assert_close(o.dlr(logits, labels), by_loop(logits, labels, row))


def test_dlr_is_the_same_for_larger_logits_where_the_cross_entropy_is_blind():
    logits, labels, _ = draws(dtype=torch.float32)
    torch.testing.assert_close(o.dlr(100 * logits, labels), o.dlr(logits, labels))
    right = logits.argmax(1) == labels
    assert (o.cross_entropy(1000 * logits, labels)[right] == 0).all()


def test_targeted_losses():
    logits, labels, targets = draws()
    rows = list(zip(logits.tolist(), labels.tolist(), targets.tolist(), strict=True))
    margins = torch.tensor([z[t] - z[y] for z, y, t in rows], dtype=torch.float64)
    torch.testing.assert_close(o.targeted_margin(logits, labels, targets), margins)
    ordered = logits.sort(1, descending=True).values
    gaps = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    torch.testing.assert_close(o.targeted_dlr(logits, labels, targets), margins / gaps)
    torch.testing.assert_close(
        o.targeted_cross_entropy(logits, labels, targets), logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    )


def test_kl_is_the_divergence_from_the_given_distribution():
    logits, _, _ = draws()
    given = logits.flip(0)
    p, q = given.softmax(1), logits.softmax(1)
    torch.testing.assert_close(o.kl(logits, given), (p * (p / q).log()).sum(1))
    torch.testing.assert_close(o.kl(logits, logits), torch.zeros(N, dtype=torch.float64))
    assert (o.kl(logits, given) > 0).all()


def test_losses_equal_those_of_the_authors_of_autoattack():
    base = pytest.importorskip("pyautoattack.autopgd_base")
    logits, labels, targets = draws(dtype=torch.float32)
    theirs = base.APGDAttack_targeted(None, eps=0.1, device="cpu")
    theirs.y_target = targets
    torch.testing.assert_close(o.dlr(logits, labels), theirs.dlr_loss(logits, labels))
    torch.testing.assert_close(o.targeted_dlr(logits, labels, targets), theirs.dlr_loss_targeted(logits, labels))


@pytest.mark.parametrize("name", ["cross_entropy", "margin", "dlr"])
def test_gradients(name):
    logits, labels, _ = draws()
    loss = getattr(o, name)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@pytest.mark.parametrize("name", ["targeted_cross_entropy", "targeted_margin", "targeted_dlr"])
def test_gradients_of_targeted_losses(name):
    logits, labels, targets = draws()
    loss = getattr(o, name)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, targets), logits.requires_grad_())


def test_with_too_few_classes_there_is_the_margin_and_the_name_says_so():
    two, three, four = draws(c=2), draws(c=3), draws(c=4)
    with pytest.raises(ValueError, match="DLR needs 3 classes or more, got 2; use the margin"):
        o.dlr(*two[:2])
    with pytest.raises(ValueError, match="targeted DLR needs 4 classes or more, got 3"):
        o.targeted_dlr(*three)
    assert [o.dlr_or_margin(c).name for c in (2, 3, 4)] == ["margin", "DLR", "DLR"]
    assert [o.targeted_dlr_or_margin(c).name for c in (2, 3, 4)] == ["targeted margin"] * 2 + ["targeted DLR"]
    assert torch.equal(o.dlr_or_margin(2).loss(*two[:2]), o.margin(*two[:2]))
    assert torch.equal(o.targeted_dlr_or_margin(3).loss(*three), o.targeted_margin(*three))
    assert torch.isfinite(o.targeted_dlr_or_margin(4).loss(*four)).all()


def test_equal_logits_give_finite_losses():
    logits, labels = torch.zeros(1, 4), torch.tensor([1])
    found = [o.dlr(logits, labels), o.targeted_dlr(logits, labels, torch.tensor([2])), o.margin(logits, labels)]
    assert torch.equal(torch.cat(found), torch.zeros(3))


def test_losses_are_float32_where_logits_are_halves():
    logits, labels, targets = draws(dtype=torch.float32)
    half = logits.bfloat16()
    assert torch.equal(o.dlr(half, labels), o.dlr(half.float(), labels))
    assert torch.equal(o.targeted_dlr(half, labels, targets), o.targeted_dlr(half.float(), labels, targets))
    assert o.kl(half, half).dtype == o.cross_entropy(half, labels).dtype == torch.float32


def test_a_judged_loss_says_which_images_are_classified_wrongly():
    logits, labels, targets = draws()
    loss, fooled = o.judged(lambda x: x, o.targeted_margin)(logits, labels, targets)
    assert torch.equal(loss, o.targeted_margin(logits, labels, targets))
    assert torch.equal(fooled, logits.argmax(1) != labels)


def test_other_classes_are_the_likeliest_besides_the_own():
    logits, labels, _ = draws()
    found = o.other_classes(logits, labels, 3)
    for z, y, row in zip(logits.tolist(), labels.tolist(), found.tolist(), strict=True):
        assert row == [k for k in sorted(range(C), key=lambda k: -z[k]) if k != y][:3]
