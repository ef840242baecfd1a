import pytest
import torch
import torch.nn.functional as F

from common.seed import generator
from models.sparse.admm import admm_lasso
from models.sparse.learn import learn_dictionary, objective, update_atoms

LAM = 0.1


def sparse_samples(n: int = 200, features: int = 12, atoms: int = 16, k: int = 2) -> torch.Tensor:
    """Samples that are sums of three of the atoms of a hidden dictionary, and a little noise; (K, F, N)."""
    g = torch.Generator().manual_seed(0)
    D = F.normalize(torch.randn(k, features, atoms, generator=g, dtype=torch.float64), dim=1)
    codes = torch.zeros(k, atoms, n, dtype=torch.float64)
    for column in range(n):
        codes[:, torch.randperm(atoms, generator=g)[:3], column] = torch.randn(k, 3, generator=g, dtype=torch.float64)
    return D @ codes + 0.02 * torch.randn(k, features, n, generator=g, dtype=torch.float64)


def final(D: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    code = admm_lasso(D, S, lam=LAM, steps=2000, tol=1e-6)
    assert code.gap.max() < 1e-4 * LAM
    return objective(D, S, code.codes, LAM)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_objective_is_no_worse_than_scikit_learns():
    from sklearn.decomposition import DictionaryLearning

    S = sparse_samples()
    D = learn_dictionary(S, 16, lam=LAM, rho=1.0, steps=300, generator=generator(0, "test"))
    assert D.norm(dim=1).max() <= 1 + 1e-9
    for k in range(2):
        other = DictionaryLearning(16, alpha=LAM, max_iter=300, tol=1e-8, fit_algorithm="cd", random_state=0)
        components = torch.from_numpy(other.fit(S[k].T.numpy()).components_.T)
        theirs = final(components[None], S[k : k + 1])
        assert final(D[k : k + 1], S[k : k + 1]) <= 1.02 * theirs


def test_every_dictionary_is_fitted_to_its_own_samples_and_far_better_than_its_start():
    S = sparse_samples()
    D, start = (learn_dictionary(S, 16, lam=LAM, rho=1.0, steps=n, generator=generator(0, "a")) for n in (200, 0))
    both, swapped = final(D, S), final(D.flip(0), S)
    assert (both < 0.8 * final(start, S)).all() and (both < 0.8 * swapped).all()


def test_one_round_over_the_atoms_lowers_the_error_and_solves_for_each_atom():
    """After its step no atom can be bettered alone: the gradient is zero, or points out of the unit ball."""
    g = torch.Generator().manual_seed(1)
    S, codes = (torch.randn(1, n, 30, generator=g, dtype=torch.float64) for n in (6, 4))
    D = F.normalize(torch.randn(1, 6, 4, generator=g, dtype=torch.float64), dim=1)
    before = (S - D @ codes).square().sum()
    D = update_atoms(D, S, codes)
    assert (S - D @ codes).square().sum() < before
    last = D[0, :, -1]
    gradient = (D[0] @ codes[0] - S[0]) @ codes[0, -1]
    tangent = gradient - (gradient @ last) * last if last.norm() > 1 - 1e-9 else gradient
    assert tangent.norm() < 1e-9 * gradient.norm().clamp_min(1)


def test_an_atom_that_no_sample_uses_becomes_the_worst_coded_sample():
    S = torch.tensor([[[1.0, 0.0, 3.0], [0.0, 1.0, 4.0]]])
    D = torch.eye(2)[None].clone()
    codes = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(update_atoms(D, S, codes)[0, :, 1], torch.tensor([0.6, 0.8]))


def test_fewer_samples_than_atoms():
    S = sparse_samples(n=5)
    D = learn_dictionary(S, 9, lam=LAM, rho=1.0, steps=20, generator=generator(0, "a"))
    assert D.shape == (2, 12, 9) and D.isfinite().all() and torch.linalg.matrix_rank(D[0]) == 9


def test_the_seed_decides():
    S = sparse_samples(n=40)
    a, b, c = (learn_dictionary(S, 8, lam=LAM, rho=1.0, steps=5, generator=generator(s, "a")) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.allclose(a, c)
