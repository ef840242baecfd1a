import math

import pytest
import torch

from training.losses.contrastive import nt_xent, sup_nt_xent, uniclr


def double_loop(z, tau, labels=None):
    """SimCLR's equation 1 (or its supervised form), row by row."""
    n = len(z)
    z = [row / row.norm() for row in z]
    total = 0.0
    for i in range(n):
        denominator = sum(math.exp(float(z[i] @ z[k]) / tau) for k in range(n) if k != i)
        log_p = {k: float(z[i] @ z[k]) / tau - math.log(denominator) for k in range(n) if k != i}
        if labels is None:
            total -= log_p[(i + n // 2) % n]
        else:
            same = [k for k in range(n) if labels[k % (n // 2)] == labels[i % (n // 2)]]
            total += sum(-log_p[k] if k != i else -math.log(1e-8) for k in same) / len(same)
    return total / n


@pytest.mark.parametrize("tau", [0.07, 0.5, 2.0])
def test_equals_a_double_loop(tau):
    z = torch.randn(14, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    assert nt_xent(*z.chunk(2), tau).item() == pytest.approx(double_loop(z, tau), abs=1e-12)
    assert sup_nt_xent(*z.chunk(2), labels, tau).item() == pytest.approx(double_loop(z, tau, labels), abs=1e-12)


def uniclr_loop(z, normal, tau, soft=None):
    """Row by row; `z` has both copies, `normal` says which rows of one copy are unshifted."""
    n = len(z)
    u = [row / row.norm() for row in z]
    total = 0.0
    for i in range(n):
        log_sum = torch.stack([u[i] @ u[k] / tau for k in range(n) if k != i]).logsumexp(0)
        if normal[i % (n // 2)]:
            positives = [k for k in range(n) if k != i and normal[k % (n // 2)]]
        else:
            positives = [(i + n // 2) % n]
        weights = [1 / len(positives)] * len(positives)
        if soft is not None:
            weights = torch.stack([u[i] @ u[k] / soft for k in positives]).softmax(0).tolist()
        total = total - sum(w * (u[i] @ u[k] / tau - log_sum) for w, k in zip(weights, positives, strict=True))
    return total / n


@pytest.mark.parametrize("normal", [[True, False, True, False, True], [True, False, False, False, False], [True] * 5])
@pytest.mark.parametrize("soft", [None, 0.5])
def test_uniclr_and_its_gradient_equal_a_double_loop(normal, soft):
    z = torch.randn(10, 4, dtype=torch.float64)
    ours, naive = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = uniclr(*ours.chunk(2), torch.tensor(normal), 0.3, soft)
    expected = uniclr_loop(naive, normal, 0.3, soft)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.grad, naive.grad, atol=1e-12, rtol=0)


def test_uniclr_without_unshifted_views_is_nt_xent():
    z = torch.randn(12, 4, dtype=torch.float64)
    none = torch.zeros(6, dtype=torch.bool)
    torch.testing.assert_close(uniclr(*z.chunk(2), none, 0.5), nt_xent(*z.chunk(2), 0.5))


def test_known_values_and_gradients(golden):
    g = golden("nt_xent")
    for name, arguments in (("", ()), ("sup_", (g["labels"],))):
        z = g["z"].clone().requires_grad_()
        loss = (sup_nt_xent if name else nt_xent)(*z.chunk(2), *arguments, g["temperature"])
        loss.backward()
        assert loss.item() == pytest.approx(g[f"{name}loss"], abs=1e-5)
        torch.testing.assert_close(z.grad, g[f"{name}grad_z"], atol=1e-5, rtol=0)


def test_equal_projections_give_the_logarithm_of_all_others():
    z = torch.ones(6, 3, dtype=torch.float64)
    assert nt_xent(z, z, 0.5).item() == pytest.approx(math.log(11), abs=1e-12)


def test_another_shift_of_the_same_image_is_a_negative():
    """Rows 0 and 1 show one image under two shifts: pulling them together must not lower the loss."""
    apart = torch.eye(4, dtype=torch.float64)
    together = apart.clone()
    together[1] = apart[0]
    assert nt_xent(together, together, 0.5) > nt_xent(apart, apart, 0.5)


def test_large_similarities_stay_finite_and_scale_does_not_matter():
    z = torch.randn(8, 4)
    loss = nt_xent(z, z, 0.001)
    assert loss.isfinite()
    torch.testing.assert_close(nt_xent(1e4 * z, z, 0.5), nt_xent(z, z, 0.5))


def test_autocast_does_not_lower_the_precision():
    z0, z1 = torch.randn(2, 32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = nt_xent(z0.bfloat16().float(), z1.bfloat16().float(), 0.5)
    assert low.item() == nt_xent(z0.bfloat16().float(), z1.bfloat16().float(), 0.5).item()


def test_refuses_copies_of_different_length():
    with pytest.raises(ValueError, match="copies"):
        nt_xent(torch.ones(3, 2), torch.ones(4, 2))
