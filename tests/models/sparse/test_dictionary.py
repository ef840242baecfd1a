import torch

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
