from dataclasses import replace

import pytest
import torch

from evals.coding import (
    CROSS,
    Coder,
    FittedDictionaries,
    Outputs,
    TrainedDictionaries,
    code_in_all,
    reconstruction_error,
    sparse_features,
)
from models.feature_net import FeatureTransform
from models.sparse.admm import admm_lasso
from models.sparse.dictionary import CodingSpec, DictionaryBank, SparseSpec
from models.sparse.learn import objective

INVERTED = FeatureTransform(invert_sr_feature_norm=True)
SPEC = SparseSpec(sr_dict_size=20, sr_lambda=1e-3, sr_rho=1.0)


def outputs(n: int, seed: int) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(9))
    h = torch.einsum("nkc,kcf->nkf", torch.rand(n, 2, 6, generator=g), basis).abs()
    return {"h": h, "z": torch.randn(n, 2, 8, generator=g), "shift": torch.randn(n, 2, 2, generator=g)}


def test_fitted_dictionaries_code_averaged_features_to_the_stated_gap():
    """Averaged features are inverted, then coded; the codes are those of the lasso to a gap of 1e-3 lambda."""
    train, test = outputs(50, 0), outputs(9, 1)
    coder = FittedDictionaries.fit(train, INVERTED, SPEC, rounds=60, seed=0)
    out, h = coder(test), test["h"]
    torch.testing.assert_close(out["s"], h / h.square().sum(2, keepdim=True))
    assert out["codes"].shape == (9, 2, 20) and torch.equal(out["shift"], test["shift"])
    assert out["gap"].max() <= 1e-3 and coder.lam == 1e-3
    D = coder.bank.dictionary
    assert D.shape == (2, 64, 20) and D.norm(dim=1).max() <= 1 + 1e-5
    s, codes = out["s"].permute(1, 2, 0), out["codes"].permute(1, 2, 0)
    nothing = objective(D, s, torch.zeros_like(codes), 1e-3)
    assert (objective(D, s, codes, 1e-3) < 0.5 * nothing).all()
    torch.testing.assert_close(out["error"], (s - D @ codes).square().sum(1).T)


def test_fitted_dictionaries_follow_the_seed():
    found = [
        FittedDictionaries.fit(outputs(50, 0), INVERTED, SPEC, rounds=2, seed=s).bank.dictionary for s in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_a_fitted_coder_is_the_same_after_its_state_is_loaded():
    coder = FittedDictionaries.fit(outputs(50, 0), INVERTED, SPEC, rounds=60, seed=0)
    again = FittedDictionaries.load(coder.state(), INVERTED)
    before, after = coder(outputs(9, 1)), again(outputs(9, 1))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_trained_dictionaries_add_the_error_of_averaged_codes():
    bank = DictionaryBank(2, 6, 9, CodingSpec(0.01, 1.0, 40), torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    given = {"s": torch.randn(5, 2, 6, generator=g), "codes": torch.randn(5, 2, 9, generator=g)}
    coder = TrainedDictionaries(bank)
    found = coder(given)
    assert set(found) == {"s", "codes", "error", "objective"} and not found["error"].requires_grad and coder.lam == 0.01
    for n in range(5):
        for k in range(2):
            rest = given["s"][n, k] - bank.dictionary[k] @ given["codes"][n, k]
            torch.testing.assert_close(found["error"][n, k], rest.square().sum().detach())
            objective = 0.5 * rest.square().sum() + 0.01 * given["codes"][n, k].abs().sum()
            torch.testing.assert_close(found["objective"][n, k], objective.detach())
    assert set(coder.state()) == {"dictionary", "rho", "lambdaV"}
    assert Coder()(given) is given and Coder().lam is None and Coder().state() == {}


def test_reconstructions_are_cut_into_blocks_that_do_not_matter(monkeypatch):
    g = torch.Generator().manual_seed(0)
    D, s, codes = (torch.randn(*shape, generator=g) for shape in ((3, 5, 7), (30, 3, 5), (30, 3, 7)))
    whole = reconstruction_error(D, s, codes)
    monkeypatch.setattr("evals.coding._BLOCK", 100)
    torch.testing.assert_close(reconstruction_error(D, s, codes), whole)


def test_every_view_is_coded_in_every_dictionary(monkeypatch):
    """By a loop over views and dictionaries; blocks do not matter."""
    bank = DictionaryBank(3, 6, 9, CodingSpec(0.05, 1.0, 300), torch.Generator().manual_seed(0)).double()
    s = torch.randn(5, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, gaps = code_in_all(bank, s, bank.system())
    for n in range(5):
        for k in range(3):
            for j in range(3):
                code = admm_lasso(bank.dictionary[j : j + 1], s[n, k][None, :, None], lam=0.05, steps=300)
                a = code.codes[0, :, 0]
                torch.testing.assert_close(gaps[n, k, j], code.gap[0, 0] / 0.05, atol=1e-10, rtol=0)
                cost = 0.5 * (s[n, k] - bank.dictionary[j] @ a).square().sum() + 0.05 * a.abs().sum()
                torch.testing.assert_close(found[n, k, j], cost.detach(), atol=1e-10, rtol=0)
    monkeypatch.setattr("evals.coding._TOGETHER", 6)
    torch.testing.assert_close(code_in_all(bank, s, bank.system()).objective, found, atol=1e-12, rtol=0)
    of_coder = TrainedDictionaries(bank).cross({"s": s})
    torch.testing.assert_close(of_coder[CROSS], found)
    torch.testing.assert_close(of_coder["gap"], gaps.mean(2)[..., None])


def test_fitted_dictionaries_take_lambda_as_a_share():
    spec = replace(SPEC, sr_lambda_rel=0.25)
    coder = FittedDictionaries.fit(outputs(50, 0), INVERTED, spec, rounds=5, seed=0)
    s = sparse_features(outputs(50, 0), INVERTED).permute(1, 2, 0)
    D = coder.bank.dictionary
    assert coder.lam == pytest.approx(0.25 * (D.mT @ s).abs().amax(1).median().item(), rel=1e-6)
