import pytest
import torch

from training.losses.dictionary import dictionary_terms


def test_terms_are_sums_over_samples_and_atoms():
    D = torch.tensor([[[3.0, 0.3], [4.0, 0.4]]])  # norms 5 and 0.5
    codes = torch.tensor([[[1.0, 0.0], [0.0, -2.0]]])
    S = torch.tensor([[[3.0, 0.4], [3.0, -0.8]]])  # residuals (0, -1) and (1, 0)
    for mode, norm in ((0, 4.0 + 0.5), (1, 4.0)):
        terms = dictionary_terms(D, codes, S, constraint_mode=mode)
        assert terms["fit"].item() == pytest.approx(2.0) and terms["l1"].item() == pytest.approx(3.0)
        assert terms["atom_norm"].item() == pytest.approx(norm)
    assert dictionary_terms(D, codes, S, constraint_mode=1, constraint=4.0)["atom_norm"].item() == pytest.approx(1.0)


def test_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="constraint_mode"):
        dictionary_terms(torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 2), constraint_mode=2)
