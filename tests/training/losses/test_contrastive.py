import math

import pytest
import torch

from training.losses.contrastive import nt_xent, sup_nt_xent, uniclr


def double_loop(z, tau, labels=None, copies=2):
    """SimCLR's equation 1 (or its supervised form), row by row; of several other copies, their mean."""
    n, views = len(z), len(z) // copies
    z = [row / row.norm() for row in z]
    total = 0.0
    for i in range(n):
        denominator = sum(math.exp(float(z[i] @ z[k]) / tau) for k in range(n) if k != i)
        log_p = {k: float(z[i] @ z[k]) / tau - math.log(denominator) for k in range(n) if k != i}
        if labels is None:
            total -= sum(log_p[(i + k * views) % n] for k in range(1, copies)) / (copies - 1)
        else:
            same = [k for k in range(n) if labels[k % views] == labels[i % views]]
            total += sum(-log_p[k] if k != i else -math.log(1e-8) for k in same) / len(same)
    return total / n


@pytest.mark.parametrize("tau", [0.07, 0.5, 2.0])
@pytest.mark.parametrize("copies", [2, 3, 5])
def test_equals_a_double_loop(tau, copies):
    z = torch.randn(7 * copies, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    assert nt_xent(z, tau, copies).item() == pytest.approx(double_loop(z, tau, copies=copies), abs=1e-12)
    expected = double_loop(z, tau, labels, copies)
    assert sup_nt_xent(z, labels, tau, copies).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("copies", [2, 4])
def test_the_gradient_of_nt_xent_is_the_numerical_one(copies):
    z = torch.randn(3 * copies, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, 0.3, copies), z)


def uniclr_loop(z, normal, tau, soft=None):
    """Row by row; `z` has all copies, `normal` says which rows of one copy are unshifted."""
    n, views = len(z), len(normal)
    u = [row / row.norm() for row in z]
    total = 0.0
    for i in range(n):
        log_sum = torch.stack([u[i] @ u[k] / tau for k in range(n) if k != i]).logsumexp(0)
        if normal[i % views]:
            positives = [k for k in range(n) if k != i and normal[k % views]]
        else:
            positives = [k for k in range(n) if k != i and k % views == i % views]
        weights = [1 / len(positives)] * len(positives)
        if soft is not None:
            weights = torch.stack([u[i] @ u[k] / soft for k in positives]).softmax(0).tolist()
        total = total - sum(w * (u[i] @ u[k] / tau - log_sum) for w, k in zip(weights, positives, strict=True))
    return total / n


@pytest.mark.parametrize("normal", [[True, False, True, False, True], [True, False, False, False, False], [True] * 5])
@pytest.mark.parametrize("soft", [None, 0.5])
@pytest.mark.parametrize("copies", [2, 3])
def test_uniclr_and_its_gradient_equal_a_double_loop(normal, soft, copies):
    z = torch.randn(5 * copies, 4, dtype=torch.float64)
    ours, naive = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = uniclr(ours, torch.tensor(normal), 0.3, soft, copies)
    expected = uniclr_loop(naive, normal, 0.3, soft)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.grad, naive.grad, atol=1e-12, rtol=0)


def test_uniclr_without_unshifted_views_is_nt_xent():
    z = torch.randn(12, 4, dtype=torch.float64)
    none = torch.zeros(6, dtype=torch.bool)
    torch.testing.assert_close(uniclr(z, none, 0.5), nt_xent(z, 0.5))
    torch.testing.assert_close(uniclr(z, none[:4], 0.5, copies=3), nt_xent(z, 0.5, copies=3))


def test_known_values_and_gradients(golden):
    g = golden("nt_xent")
    for name, arguments in (("", ()), ("sup_", (g["labels"],))):
        z = g["z"].clone().requires_grad_()
        loss = (sup_nt_xent if name else nt_xent)(z, *arguments, g["temperature"])
        loss.backward()
        assert loss.item() == pytest.approx(g[f"{name}loss"], abs=1e-5)
        torch.testing.assert_close(z.grad, g[f"{name}grad_z"], atol=1e-5, rtol=0)


def test_equal_projections_give_the_logarithm_of_all_others():
    z = torch.ones(6, 3, dtype=torch.float64)
    assert nt_xent(z.repeat(2, 1), 0.5).item() == pytest.approx(math.log(11), abs=1e-12)


def test_another_shift_of_the_same_image_is_a_negative():
    """Rows 0 and 1 show one image under two shifts: pulling them together must not lower the loss."""
    apart = torch.eye(4, dtype=torch.float64)
    together = apart.clone()
    together[1] = apart[0]
    assert nt_xent(together.repeat(2, 1), 0.5) > nt_xent(apart.repeat(2, 1), 0.5)


def test_large_similarities_stay_finite_and_scale_does_not_matter():
    z = torch.randn(8, 4)
    loss = nt_xent(z.repeat(2, 1), 0.001)
    assert loss.isfinite()
    torch.testing.assert_close(nt_xent(torch.cat([1e4 * z, z]), 0.5), nt_xent(z.repeat(2, 1), 0.5))


def test_autocast_does_not_lower_the_precision():
    z = torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = nt_xent(z.bfloat16().float(), 0.5)
    assert low.item() == nt_xent(z.bfloat16().float(), 0.5).item()


def test_refuses_copies_of_different_length():
    with pytest.raises(ValueError, match="copies"):
        nt_xent(torch.ones(7, 2))
    with pytest.raises(ValueError, match="copies"):
        nt_xent(torch.ones(7, 2), copies=1)
