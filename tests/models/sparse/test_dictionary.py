import pytest
import torch

from models.sparse import dictionary
from models.sparse.admm import admm_lasso
from models.sparse.dictionary import CodingSpec, DictionaryBank


def bank(seed: int = 0) -> DictionaryBank:
    return DictionaryBank(2, 6, 9, CodingSpec(0.1, 1.0, 10), torch.Generator().manual_seed(seed))


def test_starts_from_nonnegative_atoms_of_unit_norm_that_the_seed_fixes():
    d = bank().dictionary
    torch.testing.assert_close(d.norm(dim=1), torch.ones(2, 9))
    assert d.min() >= 0 and torch.equal(d, bank().dictionary) and not torch.equal(d, bank(1).dictionary)


def test_state_dict_has_the_published_names():
    state = bank().state_dict()
    assert set(state) == {"dictionary", "rho", "lambdaV"}
    assert state["rho"].shape == state["lambdaV"].shape == ()


def test_k_means_atoms_land_in_the_parameter_that_the_optimiser_trains():
    """Trap 1: the published program put the atoms into a new parameter, which its optimiser never saw."""
    b = bank()
    adam = torch.optim.Adam(b.parameters(), 0.01)
    atoms = torch.randn(2, 6, 9)
    b.set_atoms(atoms, norm=2.0)
    torch.testing.assert_close(b.dictionary.detach(), 2 * atoms / atoms.norm(dim=1, keepdim=True))
    before = b.dictionary.detach().clone()
    b.code(torch.randn(2, 6, 5)).codes.square().sum().backward()
    adam.step()
    assert (b.dictionary - before).abs().max() > 1e-3


def test_a_zero_atom_stays_zero():
    b = bank()
    b.set_atoms(torch.zeros(2, 6, 9), norm=1.0)
    assert (b.dictionary == 0).all()


def test_a_bank_codes_by_all_of_its_settings():
    s = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    for spec in (CodingSpec(0.1, 1.0, 10), CodingSpec(0.3, 2.0, 7), CodingSpec(0.1, 1.0, 2000, 0.1)):
        b = DictionaryBank(2, 6, 9, spec, torch.Generator().manual_seed(0))
        code = admm_lasso(b.dictionary, s, lam=spec.lam, rho=spec.rho, steps=spec.steps, tol=spec.tol)
        for system in (None, b.system()):
            torch.testing.assert_close(b.code(s, system=system).codes, code.codes, atol=1e-6, rtol=0)
    assert (b.code(s).codes - admm_lasso(b.dictionary, s, lam=0.1, steps=2000).codes).abs().max() > 1e-4


def test_facts_of_codes_are_those_of_a_loop():
    b, s = bank(), torch.rand(2, 6, 5)
    code = b.code(s)
    facts = b.facts(s, code)
    for k in range(2):
        for n in range(5):
            d, a = b.dictionary[k].detach(), code.codes[k, :, n]
            largest = max(abs(float(d[:, m] @ s[k, :, n])) for m in range(9))
            assert facts["lambda_share"][k, n].item() == pytest.approx(0.1 / largest, rel=1e-5)
            assert facts["zeros"][k, n].item() == pytest.approx(sum(float(x) == 0 for x in a) / 9)
    torch.testing.assert_close(facts["gap"], code.gap / 0.1)


def test_the_chosen_rho_has_the_smallest_gap_and_is_kept_in_the_state():
    """Features of a hundredth of the size want a rho that is smaller; lambda and steps stay."""
    g = torch.Generator().manual_seed(0)
    b = DictionaryBank(2, 6, 9, CodingSpec(1e-3, 30.0, 12, tol=0.5), g)
    s = 0.01 * torch.rand(2, 6, 40, generator=g)
    multiples = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    gaps = {
        30.0 * m: admm_lasso(b.dictionary.detach(), s, lam=1e-3, rho=30.0 * m, steps=12).gap.mean() for m in multiples
    }
    line = b.choose_rho(s)
    best = min(gaps, key=gaps.__getitem__)
    # What a file can hold, so that a run that is loaded goes on with the same.
    assert b.coding == CodingSpec(1e-3, b.rho.item(), 12, tol=0.5) and best < 30 and b.rho.item() == pytest.approx(best)
    assert line.startswith(
        f"rho {best:.3g}: mean optimality gap {float(gaps[best]) / 1e-3:.2g} lambda in 12 steps, where 30"
    )
    other = DictionaryBank(2, 6, 9, CodingSpec(1e-3, 30.0, 12))
    other.load_state_dict(b.state_dict())
    assert other.coding.rho == b.coding.rho
    other.set_lambda(0.3)
    assert other.coding.lam == other.lambdaV.item()


def test_a_feature_of_zeros_has_a_finite_share():
    b, s = bank(), torch.zeros(2, 6, 3)
    assert b.facts(s, b.code(s))["lambda_share"].isfinite().all()


def test_the_penalty_is_chosen_by_samples_of_the_whole_set(monkeypatch):
    """Those of a set in the order of its classes."""
    seen = []
    monkeypatch.setattr(dictionary, "admm_lasso", lambda D, s, **how: (seen.append(s), admm_lasso(D, s, **how))[1])
    s = torch.rand(2, 6, 1234)
    bank().choose_rho(s)
    assert torch.equal(seen[0], s[:, :, ::3])


def test_steps_that_are_too_few_are_said_with_the_number_that_would_do():
    g = torch.Generator().manual_seed(0)
    s = torch.rand(1, 6, 40, generator=g)
    few = DictionaryBank(1, 6, 40, CodingSpec(1e-3, 1.0, 3), torch.Generator().manual_seed(1))
    D = few.dictionary.detach()
    line = few.choose_rho(s)
    rho = few.rho.item()
    gaps = {n: admm_lasso(D, s, lam=1e-3, rho=rho, steps=n).gap.mean().item() / 1e-3 for n in (3, 6, 12, 24, 48)}
    enough = next((n for n, gap in gaps.items() if gap <= 0.1), 48)
    assert enough > 3 and f"{enough} steps (--sr_admm_stage)" in line and f"give {gaps[enough]:.2g}" in line
    many = DictionaryBank(1, 6, 40, CodingSpec(1e-3, 1.0, 1600), torch.Generator().manual_seed(1))
    assert "--sr_admm_stage" not in many.choose_rho(s)
