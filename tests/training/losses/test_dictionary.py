import pytest
import torch

from training.losses.dictionary import atom_norm, code_terms


def test_terms_are_sums_over_samples_and_atoms():
    D = torch.tensor([[[3.0, 0.3], [4.0, 0.4]]])  # norms 5 and 0.5
    codes = torch.tensor([[[1.0, 0.0], [0.0, -2.0]]])
    S = torch.tensor([[[3.0, 0.4], [3.0, -0.8]]])  # residuals (0, -1) and (1, 0)
    fit, l1 = code_terms(D, codes, S)
    assert fit.item() == pytest.approx(2.0) and l1.item() == pytest.approx(3.0)
    assert [atom_norm(D, mode).item() for mode in (0, 1)] == pytest.approx([4.0 + 0.5, 4.0])
    assert atom_norm(D, 1, constraint=4.0).item() == pytest.approx(1.0)


def test_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="mode must be 0"):
        atom_norm(torch.ones(1, 2, 2), 2)
