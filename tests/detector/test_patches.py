"""Models of patches against explicit formulas."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import multivariate_normal
from sklearn.linear_model import Lasso

from detector import patches
from detector.net import pooled
from detector.patches import METHODS, Places, _Places, choose_places, coreset, fit_padim, fit_places, fit_sparse


def aligned(n=60, places=6, features=5, seed=0):
    """Patches whose mean and spread differ from place to place."""
    gen = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(1, places, features, generator=torch.Generator().manual_seed(7))
    spread = 0.3 + torch.rand(1, places, 1, generator=torch.Generator().manual_seed(8))
    return centre + spread * torch.randn(n, places, features, generator=gen)


def test_one_gaussian_is_the_mahalanobis_distance():
    x, other = aligned(), aligned(4, seed=1)
    model = METHODS["mahalanobis"].fits[16].fit(x, None, torch.Generator())
    flat = (x / x.flatten(0, 1).std(0)).flatten(0, 1).double().numpy()
    mean = flat.mean(0)
    cov = (flat - mean).T @ (flat - mean) / len(flat)
    cov += 0.01 * np.diag(cov).mean() * np.eye(5)
    y = (other / x.flatten(0, 1).std(0)).flatten(0, 1).double().numpy()
    expected = cdist(y, mean[None], "mahalanobis", VI=np.linalg.inv(cov))[:, 0] / 5**0.5
    assert model(other).flatten().numpy() == pytest.approx(expected, rel=2e-3)  # The mean is kept in half precision.


def _dense(fitted, k):
    """The covariance of each place that `k` directions say, in whitened features, (P, F, F), float64."""
    largest, rest = (x.double() for x in fitted._split(k))
    vectors = fitted.vectors[:, :k].double()
    features = fitted.white.shape[0]
    eye = torch.eye(features, dtype=torch.float64)
    own = torch.einsum("pkf,pk,pkg->pfg", vectors, largest - rest[:, None], vectors)
    return rest[:, None, None] * eye + own


@pytest.mark.parametrize("k", [0, 1, 3])
def test_gaussians_of_places_by_dense_covariances(k):
    x, other = aligned(), aligned(7, seed=1)
    fitted = _Places.of(x, apart=True)
    cov = _dense(fitted, k)
    y = ((other * fitted.scale - fitted.mean) @ fitted.white).double()
    d = torch.stack([torch.einsum("nf,fg,ng->n", y[:, p], torch.linalg.inv(cov[p]), y[:, p]) for p in range(6)], 1)
    assert fitted.model(k)(other).double().numpy() == pytest.approx((d / 5).sqrt().numpy(), rel=2e-3)
    white = fitted.white.double().numpy()
    volume = np.linalg.slogdet(white)[1] + float(fitted.scale.log().sum())
    logs = [
        multivariate_normal(np.zeros(5), cov[p].numpy()).logpdf(y[:, p].numpy()) + volume + 2.5 * np.log(2 * np.pi)
        for p in range(6)
    ]
    assert fitted.likelihood(other, k) == pytest.approx(np.mean(logs) / 5, rel=2e-3, abs=2e-3)


def test_all_directions_but_one_are_the_shrunk_covariance():
    x = aligned(200)
    fitted = _Places.of(x, apart=True)
    y = ((x * fitted.scale - fitted.mean) @ fitted.white).double()
    for p in range(6):
        sample = y[:, p].T @ y[:, p] / 200
        shrunk = 0.7 * sample + 0.3 * sample.diagonal().mean() * torch.eye(5)
        assert torch.allclose(_dense(fitted, 4)[p], shrunk, atol=1e-4)


def test_places_are_told_apart_where_they_differ_and_not_else():
    assert choose_places(aligned(), aligned(20, seed=1)).apart
    gen = torch.Generator().manual_seed(0)
    alike, others = torch.randn(20, 6, 5, generator=gen), torch.randn(20, 6, 5, generator=gen)
    assert not choose_places(alike, others).apart


def test_padim_by_explicit_inverses():
    x, other = aligned(), aligned(3, seed=1)
    model = fit_padim(x, None, torch.Generator())
    scale = x.flatten(0, 1).std(0)
    for p in range(6):
        own = (x[:, p] / scale).double().numpy()
        mean = own.mean(0)
        cov = (own - mean).T @ (own - mean) / len(own)
        cov += 0.01 * np.diag(cov).mean() * np.eye(5)
        y = (other[:, p] / scale).double().numpy()
        expected = cdist(y, mean[None], "mahalanobis", VI=np.linalg.inv(cov))[:, 0] / 5**0.5
        assert model(other)[:, p].numpy() == pytest.approx(expected, rel=5e-3)


def test_nearest_neighbours_by_brute_force():
    x, other = aligned(20), aligned(3, seed=1)
    model = METHODS["patch_knn"].fits[16].fit(x, None, torch.Generator().manual_seed(0))
    far = cdist((other * model.scale).flatten(0, 1).numpy(), model.bank.float().numpy()).min(1) / 5**0.5
    assert len(model.bank) == 12 and model(other).flatten().numpy() == pytest.approx(far, rel=1e-3, abs=1e-3)
    pooled = METHODS["pooled_knn"].fits[16].fit(x, None, torch.Generator())
    assert pooled(other).shape == (3, 1) and pooled(x).max() < 2e-2


def test_prototypes_by_brute_force_in_whitened_features():
    x, other = aligned(20), aligned(3, seed=1)
    model = METHODS["prototypes"].fits[16].fit(x, None, torch.Generator().manual_seed(0))
    assert len(model.bank) == 120  # All, where there are no more than are kept.
    flat = x.flatten(0, 1)
    scaled = (flat / flat.std(0)).double().numpy()
    cov = np.cov(scaled.T, bias=True)
    cov += 0.01 * np.diag(cov).mean() * np.eye(5)
    y = (other.flatten(0, 1) / flat.std(0)).double().numpy()
    far = cdist(y, scaled, "mahalanobis", VI=np.linalg.inv(cov)).min(1) / 5**0.5
    assert model(other).flatten().numpy() == pytest.approx(far, rel=5e-3, abs=2e-3)
    few = METHODS["prototypes"].fits[16].fit(aligned(200), None, torch.Generator())
    coarse = METHODS["prototypes"].fits[32].fit(aligned(200), None, torch.Generator())
    assert (len(few.bank), len(coarse.bank)) == (1024, 256)


def test_the_farthest_patches_of_a_grid_decide():
    far = torch.arange(100.0)[torch.randperm(100)][None]
    assert pooled(far, 16).item() == 98.5  # of 2 of 100
    assert pooled(far, 32).item() == 89.5  # of 20
    assert pooled(far[:, :10], 16).item() == far[:, :10].max()


def test_a_coreset_takes_the_farthest_patch_each_time():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=gen)
    chosen = coreset(x, 10, torch.Generator().manual_seed(3))
    again = torch.Generator().manual_seed(3)
    y = (x @ torch.randn(4, 4, generator=again)).numpy()
    own = [int(torch.randint(60, (), generator=again))]
    while len(own) < 10:
        own.append(int(cdist(y, y[own]).min(1).argmax()))
    assert chosen.tolist() == own


def test_sparse_codes_reach_the_lassos_objective(monkeypatch):
    monkeypatch.setattr(patches, "_ATOMS", 12)
    monkeypatch.setattr(patches, "_STEPS", 200)
    x, other = aligned(30), aligned(2, seed=1)
    model = fit_sparse(x, None, torch.Generator().manual_seed(0))
    y = (((other * model.scale - model.mean) @ model.project).flatten(0, 1)).double().numpy()
    D, lam = model.atoms.double().numpy(), float(model.lam)
    expected = []
    for s in y:
        a = Lasso(alpha=lam / len(s), fit_intercept=False, tol=1e-10, max_iter=100000).fit(D, s).coef_
        expected.append(((0.5 * ((s - D @ a) ** 2).sum() + lam * np.abs(a).sum()) / len(s)) ** 0.5)
    assert model(other).flatten().numpy() == pytest.approx(expected, rel=1e-3)
    loud = model(other + 10 * (other - other.mean()))
    assert (loud > model(other)).all()  # The norm of a patch counts.


def test_tensors_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="Gaussians has"):
        patches.Gaussians(scale=torch.ones(2))


def test_few_pictures_have_few_directions_of_their_own():
    x = aligned(25)
    assert choose_places(x, aligned(9, seed=1)).directions <= 2
    assert fit_places(x, Places(True, 2, 0.0), torch.Generator()).directions.shape == (6, 2, 5)
