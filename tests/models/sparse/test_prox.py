"""Proximal operators: known answers, and the properties that define them.

`soft` and `soft_group` of rows and of columns go through the same tests. P: the operator. t: threshold.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from models.sparse.prox import soft, soft_group


class Operator(NamedTuple):
    """sizes(v): what t is compared with. penalty(p): what t weighs. golden: its result in `rdae_a`."""

    prox: Callable[[Tensor, float], Tensor]
    sizes: Callable[[Tensor], Tensor]
    golden: str

    def penalty(self, p: Tensor) -> float:
        return float(self.sizes(p).sum())


OPERATORS = {
    "soft": Operator(soft, torch.abs, "soft"),
    "rows": Operator(partial(soft_group, dim=1), lambda v: v.square().sum(1).sqrt(), "l21_rows"),
    "columns": Operator(partial(soft_group, dim=0), lambda v: v.square().sum(0).sqrt(), "l21_cols"),
}
every = pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every
def test_known_answers(golden, operator):
    g = golden("rdae_a")
    found = operator.prox(g["M"], g["t"])
    torch.testing.assert_close(found, g[operator.golden], atol=1e-9, rtol=0)
    assert torch.equal(found == 0, g[operator.golden] == 0)  # Ties and the zero row included: zero exactly.


@every
@pytest.mark.parametrize("t", [0.01, 0.3, 1.0, 2.5])
def test_the_residual_is_a_subgradient_of_the_penalty(operator, t):
    v = normal(60, 7)
    p = operator.prox(v, t)
    assert operator.sizes(v - p).max() <= t + 1e-12  # Inside the dual ball ...
    assert ((v - p) * p).sum().item() == pytest.approx(t * operator.penalty(p), rel=1e-12)  # ... and aligned with p.


@every
def test_the_residual_is_the_projection_on_the_dual_ball(operator):
    """Moreau: v - P(v) is v with entries clipped to [-t, t], or groups scaled to a norm of at most t."""
    v, t = normal(60, 7), 1.3
    if operator.prox is soft:
        projected = v.clamp(-t, t)
    else:
        sizes = operator.sizes(v).unsqueeze(operator.prox.keywords["dim"])
        projected = v * (t / sizes).clamp(max=1)
    torch.testing.assert_close(v - operator.prox(v, t), projected, atol=1e-14, rtol=0)


@every
def test_no_perturbation_does_better(operator):
    """Of small steps and large ones, and towards 0 and v: 0.5 |v - s|^2 + t penalty(s) is least at P(v)."""
    v, t = normal(6, 5), 0.7
    p = operator.prox(v, t)

    def objective(s: Tensor) -> float:
        return 0.5 * float((v - s).square().sum()) + t * operator.penalty(s)

    least = objective(p)
    steps = [scale * normal(6, 5, seed=n) for n in range(1, 40) for scale in (1e-4, 1e-2, 1.0)]
    steps += [scale * (end - p) for end in (v, torch.zeros_like(v)) for scale in (-1e-2, 1e-2, 1.0)]
    assert min(objective(p + step) for step in steps) >= least


@every
def test_is_non_expansive(operator):
    for seed in range(20):
        a, b = normal(6, 5, seed=seed), normal(6, 5, seed=100 + seed)
        assert (operator.prox(a, 0.6) - operator.prox(b, 0.6)).norm() <= (a - b).norm()


@every
def test_threshold_0_is_the_identity_and_a_copy(operator):
    v = normal(6, 5)
    v[2] = 0
    found = operator.prox(v, 0.0)
    assert torch.equal(found, v)
    found += 1
    assert torch.equal(v[0], normal(6, 5)[0])


@every
def test_threshold_0_keeps_entries_whose_squares_vanish(operator):
    v = torch.full((3, 2), 1e-30)
    assert torch.equal(operator.prox(v, 0.0), v)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_above_the_largest_size_gives_0(operator, dtype):
    v = normal(6, 5).to(dtype)
    t = 1.00001 * float(operator.sizes(v).max())
    for threshold in (t, 2 * t, float("inf")):
        assert (operator.prox(v, threshold) == 0).all()
    assert (operator.prox(v, 0.99 * t) != 0).any()


@every
def test_an_infinite_threshold_gives_0_for_zeros_too(operator):
    assert torch.equal(operator.prox(torch.zeros(3, 4), float("inf")), torch.zeros(3, 4))


@every
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("t", [0.0, 0.5, float("inf")])
def test_empty_input_gives_empty_output(operator, shape, t):
    assert operator.prox(torch.zeros(shape), t).shape == shape


def test_a_norm_equal_to_the_threshold_gives_0():
    v = torch.tensor([[3.0, 4.0], [3.0, 4.001], [0.0, 0.0]])
    found = soft_group(v, 5.0, dim=1)
    assert (found[0] == 0).all() and (found[1] > 0).all() and (found[2] == 0).all()


def test_soft_gives_exact_zeros_inside_the_threshold():
    v = torch.tensor([-0.3, -0.1, 0.0, 0.2999, 0.3])
    assert (soft(v, 0.3) == 0).all()


def test_columns_are_rows_of_the_transpose():
    v = normal(9, 4)
    assert torch.equal(soft_group(v, 1.1, dim=0), soft_group(v.T, 1.1, dim=1).T)


def test_rows_do_not_depend_on_the_basis():
    v, turn = normal(9, 4), torch.linalg.qr(normal(4, 4, seed=1)).Q
    torch.testing.assert_close(soft_group(v @ turn, 1.1, dim=1), soft_group(v, 1.1, dim=1) @ turn, atol=1e-13, rtol=0)


def test_a_negative_dim_counts_from_the_end():
    v = normal(3, 4, 5)
    for dim in range(3):
        assert torch.equal(soft_group(v, 1.1, dim), soft_group(v, 1.1, dim - 3))


def test_groups_of_images_lie_along_one_dimension():
    """(2, 3, 4, 4): the channels of each pixel of each image are a group."""
    v = normal(2, 3, 4, 4)
    found = soft_group(v, 1.1, dim=1)
    for n in range(2):
        for y in range(4):
            for x in range(4):
                group = v[n, :, y, x]
                expected = group * max(0.0, 1 - 1.1 / float(group.norm()))
                torch.testing.assert_close(found[n, :, y, x], expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dim", [0, 1])
def test_gradients_are_those_of_finite_differences(dim):
    v = normal(5, 4).requires_grad_()
    sizes = v.detach().norm(dim=dim)
    t = float(sizes.median()) + 0.01  # Some groups stay, some do not.
    assert torch.autograd.gradcheck(lambda x: soft_group(x, t, dim), (v,))


@pytest.mark.parametrize("t", [0.0, 0.5, float("inf")])
@pytest.mark.parametrize("dim", [0, 1])
def test_gradients_are_finite_where_groups_are_zero(t, dim):
    v = torch.zeros(4, 4)
    v[1] = torch.tensor([3.0, 0.0, 4.0, 0.0])
    v.requires_grad_()
    soft_group(v, t, dim).sum().backward()
    assert v.grad.isfinite().all()


def test_equals_the_operators_of_pyproximal():
    pyproximal = pytest.importorskip("pyproximal")
    v, t = normal(7, 5), 0.8
    v[3] = 0
    found = pyproximal.L1(sigma=1.0).prox(v.numpy().ravel(), t)
    torch.testing.assert_close(soft(v, t).flatten(), torch.from_numpy(found), atol=1e-14, rtol=0)
    # Its groups are the columns of a matrix that it is given as a vector.
    for dim, matrix in ((0, v), (1, v.T)):
        flat = matrix.contiguous().numpy().ravel()
        found = pyproximal.L21(ndim=len(matrix), sigma=1.0).prox(flat, t)
        expected = torch.from_numpy(found).reshape(matrix.shape)
        torch.testing.assert_close(soft_group(v, t, dim), expected if dim == 0 else expected.T, atol=1e-14, rtol=0)
