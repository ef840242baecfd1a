import numpy as np
import pytest
import torch

from benchmarks import conditioning
from models.sparse.admm import admm_lasso
from models.sparse.dictionary import CodingSpec, DictionaryBank
from models.sparse.prox import lasso_gap, soft
from training.losses.dictionary import atom_norm, code_terms


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

    parts = []
    for k in range(len(D)):
        own = S[None, :, g["labels"] == k]
        parts.append(code_terms(D[k : k + 1], admm_lasso(D[k : k + 1], own, **settings).codes, own))
    fit, l1 = (torch.stack(x).sum() for x in zip(*parts, strict=True))
    norm = atom_norm(D, g["constraint_mode"])
    loss = fit + g["lambda_l1"] * l1 + g["lambda_constraint"] * norm
    loss.backward()
    found = [fit.item(), l1.item(), norm.item(), loss.item()]
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


def plain(D, S, lam, rho, steps, also=()):
    """The steps with an explicit inverse, left to autograd: codes, then those of the steps in `also`."""
    inverse = torch.linalg.inv(D.mT @ D + rho * torch.eye(D.shape[2], dtype=D.dtype))
    y = u = torch.zeros(len(D), D.shape[2], S.shape[-1], dtype=D.dtype)
    found = []
    for step in range(steps):
        x = inverse @ (D.mT @ S + rho * (y - u))
        y = torch.where((x + u).abs() > lam / rho, x + u - lam / rho * (x + u).sign(), 0.0)
        u = u + x - y
        if step in also:
            found.append(y)
    return y, *found


# As tall as wide, taller, a little wider, and so wide that the map is kept as thin factors.
@pytest.mark.parametrize("atoms", [4, 7, 9, 14, 23])
@pytest.mark.parametrize("wanted", ["D", "S", "DS"])
def test_gradients_equal_plain_autograd(atoms, wanted):
    g = torch.Generator().manual_seed(1)
    values = {"D": unit_columns(2, 7, atoms), "S": torch.randn(2, 7, 3, dtype=torch.float64, generator=g)}
    steps, also = 25, (3, 11, 24)
    weights = [torch.randn(2, atoms, 3, dtype=torch.float64, generator=g) for _ in range(4)]
    gradients = []
    for solver in (admm_lasso, plain):
        D, S = (values[name].clone().requires_grad_(name in wanted) for name in "DS")
        found = solver(D, S, lam=0.05, rho=0.7, steps=steps, also=also)
        codes = (found.codes, *found.also) if solver is admm_lasso else found
        sum((w * c.square()).sum() for w, c in zip(weights, codes, strict=True)).backward()
        gradients.append([x.grad for x in (D, S)])
    for ours, expected in zip(*gradients, strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-11)


def test_gradients_of_earlier_codes_alone_for_shared_samples():
    S = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    D = unit_columns(2, 7, 9).requires_grad_()
    codes = admm_lasso(D, S, lam=0.05, steps=12, also=(5,)).also[0]
    (ours,) = torch.autograd.grad(codes.square().sum(), D)
    (expected,) = torch.autograd.grad(plain(D, S, 0.05, 1.0, 6)[0].square().sum(), D)
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-11)


def test_gradients_after_an_early_stop():
    S = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    D = unit_columns(2, 7, 9).requires_grad_()
    codes = admm_lasso(D, S, lam=0.05, steps=400, tol=1e-3).codes
    (ours,) = torch.autograd.grad(codes.square().sum(), D)
    # It looks at every twentieth step, and each sample ends where its own gap allows.
    looks = [*range(20, 400, 20), 400]
    reached = plain(D, S, 0.05, 1.0, 400, [n - 1 for n in looks])[1:]
    done = torch.stack([lasso_gap(D, S, c, 0.05) for c in reached]) <= 1e-3 * 0.05
    done[-1] = True
    ended = done.int().argmax(0)
    assert len(ended.unique()) > 3
    own = torch.stack(reached).gather(0, ended[None, :, None].expand(1, *codes.shape))[0]
    torch.testing.assert_close(codes, own, atol=1e-12, rtol=0)
    (expected,) = torch.autograd.grad(own.square().sum(), D)
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("steps", [1, 2, 40, 5000])
def test_codes_under_a_tolerance_do_not_depend_on_the_batch(steps):
    g = torch.Generator().manual_seed(0)
    D, S = (torch.randn(2, 6, n, generator=g, dtype=torch.float64) for n in (9, 40))
    whole = admm_lasso(D, S, lam=0.1, steps=steps, tol=1e-2).codes
    parts = [admm_lasso(D, x, lam=0.1, steps=steps, tol=1e-2).codes for x in S.split(3, 2)]
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-12, rtol=0)


def test_finite_differences_of_thin_factors_and_earlier_codes():
    D, S = unit_columns(2, 4, 11).requires_grad_(), torch.randn(2, 4, 3, dtype=torch.float64).requires_grad_()

    def outputs(D, S):
        found = admm_lasso(D, S, lam=0.05, rho=0.7, steps=12, also=(2, 11))
        return found.codes, *found.also

    assert torch.autograd.gradcheck(outputs, (D, S))


def test_backward_works_twice_and_second_derivatives_are_refused():
    D, S = unit_columns(1, 5, 4).requires_grad_(), torch.randn(5, 3, dtype=torch.float64)
    loss = admm_lasso(D, S, lam=0.05).codes.square().sum()
    first, again = (torch.autograd.grad(loss, D, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (gradient,) = torch.autograd.grad(loss, D, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_training_keeps_one_tensor_for_each_step():
    """w of every step and the codes, not the half dozen of plain autograd."""
    D, S = unit_columns(2, 16, 16).float().requires_grad_(), torch.randn(2, 16, 32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        admm_lasso(D, S, lam=0.01, steps=20)
    assert sizes.count((2, 16, 32)) <= 20 + 1


@pytest.mark.parametrize("atoms", [64, 96, 160])
def test_oneDNN_and_BLAS_give_the_same_codes_and_gradients(monkeypatch, atoms):
    found = []
    for convolves in (False, True):
        monkeypatch.setattr("models.sparse.admm._convolves", lambda A, answer=convolves: answer)
        D = unit_columns(3, 64, atoms).float().requires_grad_()
        S = torch.randn(3, 64, 20, generator=torch.Generator().manual_seed(0))
        codes = admm_lasso(D, S, lam=0.01).codes
        found.append((codes, *torch.autograd.grad(codes.square().sum(), D)))
    for a, b in zip(*found, strict=True):  # gradients here are of the order of hundreds; both are as far from float64
        assert (a - b).abs().max() <= 5e-6 * a.abs().max()


@pytest.mark.parametrize("atoms", [128, 160, 300])
@pytest.mark.parametrize("rho", conditioning.RHOS)
def test_an_inverse_is_more_exact_in_float32_than_a_solve_in_each_step(rho, atoms):
    ours, solving = conditioning.errors(*conditioning.inputs(atoms, torch.device("cpu"), 128, 50), rho)
    assert ours <= max(solving / 3, 2e-6)


SAMPLES = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3))


def bank(seed: int = 0, atoms: int = 9) -> DictionaryBank:
    return DictionaryBank(2, 6, atoms, CodingSpec(0.1, 1.0, 10), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("atoms", [5, 9, 14])  # M <= F, between, M >= 2 F
def test_a_system_formed_once_codes_as_one_formed_each_time(atoms):
    b, found = bank(atoms=atoms), []
    for system in (None, b.system()):
        samples = SAMPLES.clone().requires_grad_()
        codes = b.code(samples, system=system).codes
        found.append((codes, *torch.autograd.grad(codes.square().sum(), (samples, b.dictionary))))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_half_precision_and_inference_mode():
    b = bank().requires_grad_(False)
    with torch.inference_mode():
        codes = b.code(SAMPLES).codes
        inside = bank()
        torch.testing.assert_close(inside.code(SAMPLES).codes, codes, atol=0, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(bank().requires_grad_(False).code(SAMPLES).codes, codes, atol=0, rtol=0)
    assert b.bfloat16().code(SAMPLES).codes.dtype == torch.float32
