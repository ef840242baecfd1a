import numpy as np
import pytest
import torch

from models.sparse.admm import admm_lasso
from models.sparse.prox import lasso_gap, soft
from training.losses.dictionary import dictionary_terms


def unit_columns(*shape: int, seed: int = 0) -> torch.Tensor:
    D = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return D / D.norm(dim=-2, keepdim=True)


def textbook_admm(D, s, lam, rho, steps):
    """The three lines of the specification for one dictionary and one sample, with a solve in each step."""
    system = D.T @ D + rho * torch.eye(D.shape[1], dtype=D.dtype)
    y = u = torch.zeros(D.shape[1], dtype=D.dtype)
    for _ in range(steps):
        x = torch.linalg.solve(system, D.T @ s + rho * (y - u))
        y = (x + u).sign() * ((x + u).abs() - lam / rho).clamp(min=0)
        u = u + x - y
    return y


@pytest.mark.parametrize("atoms", [6, 10, 23])
@pytest.mark.parametrize("rho", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_equals_the_textbook_steps(atoms, rho, steps):
    D, S = unit_columns(3, 10, atoms), torch.randn(3, 10, 4, dtype=torch.float64)
    codes = admm_lasso(D, S, lam=0.05, rho=rho, steps=steps).codes
    for k in range(3):
        for n in range(4):
            expected = textbook_admm(D[k], S[k, :, n], 0.05, rho, steps)
            torch.testing.assert_close(codes[k, :, n], expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", ["admm_square", "admm_wide"])
def test_known_codes_losses_and_gradient(golden, name):
    g = golden(name)
    D, S = g["dictionary"].requires_grad_(), g["features"].T
    settings = {"lam": g["lambda_"], "rho": g["rho"], "steps": g["stages"]}
    everything = admm_lasso(D, S, **settings).codes
    torch.testing.assert_close(everything, g["codes"], atol=1e-9, rtol=0)

    terms = {"fit": 0.0, "l1": 0.0}
    for k in range(len(D)):
        own = S[None, :, g["labels"] == k]
        codes = admm_lasso(D[k : k + 1], own, **settings).codes
        part = dictionary_terms(D[k : k + 1], codes, own, constraint_mode=g["constraint_mode"])
        terms = {key: terms[key] + part[key] for key in terms}
    norm = dictionary_terms(D, everything, S, constraint_mode=g["constraint_mode"])["atom_norm"]
    loss = terms["fit"] + g["lambda_l1"] * terms["l1"] + g["lambda_constraint"] * norm
    loss.backward()
    found = [terms["fit"].item(), terms["l1"].item(), norm.item(), loss.item()]
    expected = [g["loss_reconstruction"], g["loss_l1"], g["loss_constraint"], g["loss"]]
    assert found == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(D.grad, g["grad_dictionary"], atol=1e-9, rtol=0)


def test_own_blocks_equal_the_diagonal_of_all_blocks():
    D, S = unit_columns(3, 8, 12), torch.randn(3, 8, 5, dtype=torch.float64)
    own = admm_lasso(D, S, lam=0.1).codes
    for k in range(3):
        torch.testing.assert_close(own[k], admm_lasso(D, S[k], lam=0.1).codes[k], atol=1e-12, rtol=0)


@pytest.mark.parametrize("features, atoms", [(20, 12), (12, 30)])
def test_converges_to_scikit_learns_lasso(features, atoms):
    from sklearn.linear_model import Lasso

    lam = 0.08
    D, S = unit_columns(2, features, atoms), torch.randn(2, features, 3, dtype=torch.float64)
    codes, gap, _ = admm_lasso(D, S, lam=lam, rho=0.5, steps=20_000)
    assert gap.max() < 1e-9
    for k in range(2):
        lasso = Lasso(alpha=lam / features, fit_intercept=False, tol=1e-14, max_iter=1_000_000)
        expected = lasso.fit(D[k].numpy(), S[k].numpy()).coef_.T
        np.testing.assert_allclose(codes[k].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("atoms", [5, 9])
def test_gradients_match_finite_differences(atoms):
    D, S = unit_columns(2, 7, atoms).requires_grad_(), torch.randn(2, 7, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda D, S: admm_lasso(D, S, lam=0.05, rho=0.7, steps=12).codes, (D, S))


def test_orthonormal_dictionary_gives_the_soft_threshold():
    D = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0][None]
    S = torch.randn(9, 6, dtype=torch.float64)
    codes, gap, _ = admm_lasso(D, S, lam=0.4, steps=200)
    torch.testing.assert_close(codes, soft(D.mT @ S, 0.4), atol=1e-12, rtol=0)
    assert gap.max() < 1e-12


def test_lambda_above_every_correlation_gives_zeros():
    D, S = unit_columns(1, 6, 8), torch.randn(6, 4, dtype=torch.float64)
    codes, gap, _ = admm_lasso(D, S, lam=float((D.mT @ S).abs().max()) * 1.001, steps=300)
    assert (codes == 0).all() and gap.max() == 0


def test_gap_is_the_largest_breach_of_the_optimality_conditions():
    D, S = unit_columns(1, 6, 4), torch.randn(1, 6, 1, dtype=torch.float64)
    a = torch.tensor([0.0, 0.5, -0.2, 0.0], dtype=torch.float64)
    c = [float(D[0, :, j] @ (S[0, :, 0] - D[0] @ a)) for j in range(4)]
    breaches = [max(abs(c[0]) - 0.3, 0), abs(c[1] - 0.3), abs(c[2] + 0.3), max(abs(c[3]) - 0.3, 0)]
    assert lasso_gap(D, S, a.view(1, 4, 1), 0.3).item() == pytest.approx(max(breaches), abs=1e-14)


def test_half_precision_features_are_coded_in_float32():
    D, S = unit_columns(1, 6, 8).float(), torch.randn(1, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        codes = admm_lasso(D, S, lam=0.1).codes
    torch.testing.assert_close(codes, admm_lasso(D, S, lam=0.1).codes, atol=0, rtol=0)
    assert admm_lasso(D, S.bfloat16(), lam=0.1).codes.dtype == torch.float32


@pytest.mark.parametrize("change", [{"rho": 0.0}, {"rho": -1.0}, {"lam": -0.1}, {"steps": 0}])
def test_refuses_parameters_out_of_range(change):
    with pytest.raises(ValueError, match="rho"):
        admm_lasso(torch.ones(1, 3, 2), torch.ones(3, 4), **{"lam": 0.1, **change})


def test_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="must be"):
        admm_lasso(torch.ones(2, 3, 2), torch.ones(3, 3, 4), lam=0.1)
    with pytest.raises(ValueError, match="must be"):
        admm_lasso(torch.ones(2, 3, 2), torch.ones(4, 4), lam=0.1)


def test_a_failed_factorisation_is_nan_and_not_a_wrong_answer():
    D = torch.full((1, 4, 3), torch.inf)
    assert not admm_lasso(D, torch.ones(4, 2), lam=0.1).codes.isfinite().any()


def test_earlier_codes_are_those_of_a_solver_that_stops_there():
    g = torch.Generator().manual_seed(0)
    D, S = (torch.randn(2, 6, n, generator=g, dtype=torch.float64) for n in (9, 4))
    found = admm_lasso(D, S, lam=0.1, steps=12, also=(11, 0, 4))
    for step, codes in zip((0, 4, 11), found.also, strict=True):
        assert torch.equal(codes, admm_lasso(D, S, lam=0.1, steps=step + 1).codes)
    with pytest.raises(ValueError, match="further steps"):
        admm_lasso(D, S, lam=0.1, steps=12, also=(12,))


def test_a_tolerance_stops_as_soon_as_the_gap_allows():
    g = torch.Generator().manual_seed(0)
    D, S = (torch.randn(2, 6, n, generator=g, dtype=torch.float64) for n in (5, 4))
    loose, tight = (admm_lasso(D, S, lam=0.1, steps=5000, tol=tol) for tol in (1e-1, 1e-8))
    assert loose.gap.max() <= 1e-1 * 0.1 and tight.gap.max() <= 1e-8 * 0.1 < loose.gap.max()
