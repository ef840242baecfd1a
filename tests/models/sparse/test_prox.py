import torch

from models.sparse.prox import soft


def test_soft_residual_is_a_subgradient_of_the_l1_norm():
    v, t = torch.randn(60, 4, dtype=torch.float64), 0.3
    p = soft(v, t)
    assert (v - p).abs().max() <= t + 1e-12  # inside the dual ball ...
    assert torch.isclose(((v - p) * p).sum(), t * p.abs().sum())  # ... and aligned with p: the minimiser, exactly


def test_soft_gives_exact_zeros_inside_the_threshold():
    v = torch.tensor([-0.3, -0.1, 0.0, 0.2999, 0.3])
    assert (soft(v, 0.3) == 0).all()
