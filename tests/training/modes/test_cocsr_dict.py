from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from evals.coding import code_in_all
from models.sparse.admm import admm_lasso
from models.sparse.dictionary import CodingSpec, DictionaryBank
from training.modes.cocsr_dict import DictionaryLossSpec, check_frozen, dictionary_step, moved

WEIGHTS = DictionaryLossSpec(2.0, 0.3, 0.7, 1, 0.5, False, None)


def test_step_weighs_the_terms_and_sums_over_the_batch():
    bank = DictionaryBank(2, 6, 8, CodingSpec(0.05, 1.0, 40), torch.Generator().manual_seed(0))
    s = torch.randn(2, 6, 5)
    step = dictionary_step(bank, s, WEIGHTS)
    codes = bank.code(s).codes
    expected = {"sr": 2.0 * (s - bank.dictionary @ codes).square().sum(), "sr_l1": 0.3 * codes.abs().sum()}
    expected["sr_dict"] = 0.7 * (bank.dictionary.norm(dim=1) - 0.5).clamp(min=0).sum()
    for name, value in expected.items():
        torch.testing.assert_close(step.losses[name], value)
    assert step.watch["sr/sparsity"].item() == pytest.approx((codes == 0).float().mean().item())
    assert step.watch["sr/atom_norm"].item() == pytest.approx(1.0)
    assert step.watch["sr/dead_atoms"].item() == pytest.approx((codes == 0).all(2).float().mean().item())
    # Twice the batch, twice the fit: sums, as published.
    twice = dictionary_step(bank, s.repeat(1, 1, 2), WEIGHTS)
    torch.testing.assert_close(twice.losses["sr"], 2 * step.losses["sr"])


def test_deep_supervision_adds_the_terms_of_earlier_steps():
    """Codes of step t, counted from 0, are those of a solver that stops after t + 1 steps."""
    bank = DictionaryBank(2, 6, 8, CodingSpec(0.05, 1.0, 40), torch.Generator().manual_seed(0)).double()
    s = torch.randn(2, 6, 5, dtype=torch.float64)
    step = dictionary_step(bank, s, DictionaryLossSpec(2.0, 0.3, 0.7, 1, 0.5, False, "19,9"))
    every = [admm_lasso(bank.dictionary, s, lam=0.05, steps=n).codes for n in (40, 10, 20)]
    assert (every[1] - every[0]).abs().max() > 1e-4
    fit = sum((s - bank.dictionary @ a).square().sum() for a in every)
    torch.testing.assert_close(step.losses["sr"], 2.0 * fit)
    torch.testing.assert_close(step.losses["sr_l1"], 0.3 * sum(a.abs().sum() for a in every))


@pytest.mark.parametrize("steps", ["a", "9;19", "-1", "9,", ""])
def test_steps_that_are_no_list_are_refused(steps):
    with pytest.raises(UserError, match="--loss_sr_deep_supervision"):
        DictionaryLossSpec(1.0, 1.0, 1.0, 0, 1.0, False, steps)


def test_detached_codes_leave_the_direct_gradient_only():
    bank = DictionaryBank(1, 6, 8, CodingSpec(0.05, 1.0, 40), torch.Generator().manual_seed(0))
    s = torch.randn(1, 6, 5)
    only_fit = DictionaryLossSpec(1.0, 1.0, 0.0, 0, 1.0, True, None)
    sum(dictionary_step(bank, s, only_fit).losses.values()).backward()
    codes = bank.code(s).codes.detach()
    direct = -2 * (s - bank.dictionary.detach() @ codes) @ codes.mT
    torch.testing.assert_close(bank.dictionary.grad, direct, atol=1e-4, rtol=1e-4)


def test_a_single_changed_bit_of_the_frozen_network_is_reported():
    before = {"feature_net.w": torch.ones(3), "feature_net.n": torch.tensor(0), "sr_nets.dictionary": torch.ones(1)}
    check_frozen(before, {k: v.clone() for k, v in before.items()})
    check_frozen(before, {**before, "sr_nets.dictionary": torch.zeros(1)})
    after = {**before, "feature_net.w": torch.nextafter(before["feature_net.w"], torch.tensor(2.0))}
    with pytest.raises(RuntimeError, match="frozen network changed.*w"):
        check_frozen(before, after)


def test_how_far_the_dictionary_moved_is_reported_with_the_reason():
    start = torch.ones(1, 2, 2)
    assert "changed by 1.00e-01" in moved(start, 1.1 * start, trained=True)
    assert "hardly trained" in moved(start, 1.0001 * start, trained=True)
    assert "--freeze_sr_dict" in moved(start, start, trained=False)


def test_the_margin_and_its_gradient_by_a_double_loop():
    """Cross-entropy of the own dictionary over shifts and samples, in float64, through the unrolled codes."""
    bank = DictionaryBank(3, 6, 8, CodingSpec(0.05, 1.0, 30), torch.Generator().manual_seed(0)).double()
    s = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spec = replace(WEIGHTS, loss_dict_margin=2.0, loss_dict_margin_temperature=0.3)
    step = dictionary_step(bank, s, spec)
    assert set(step.losses) - set(dictionary_step(bank, s, WEIGHTS).losses) == {"sr_margin"}
    (gradient,) = torch.autograd.grad(step.losses["sr_margin"], bank.dictionary)
    twin = bank.dictionary.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        for n in range(4):
            weights = []
            for j in range(3):
                a = admm_lasso(twin[j : j + 1], s[k, :, n][None, :, None], lam=0.05, steps=30).codes[0, :, 0]
                cost = 0.5 * (s[k, :, n] - twin[j] @ a).square().sum() + 0.05 * a.abs().sum()
                weights.append(cost ** (-1 / 0.3))
            total = total - (weights[k] / sum(weights)).log()
    torch.testing.assert_close(step.losses["sr_margin"], 2.0 * total)
    (expected,) = torch.autograd.grad(2.0 * total, twin)
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-7)


def test_descending_the_margin_makes_dictionaries_tell_shifts_apart():
    bank = DictionaryBank(2, 6, 8, CodingSpec(0.05, 1.0, 30), torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(2, 6, 1, generator=g)
    s = centres + 0.5 * torch.randn(2, 6, 40, generator=g)
    optimizer = torch.optim.Adam(bank.parameters(), 0.01)

    def right() -> float:
        cross = code_in_all(bank, s.permute(2, 0, 1), bank.system()).objective.detach()
        return (cross.argmin(2) == torch.arange(2)).float().mean().item()

    before = right()
    for _ in range(40):
        optimizer.zero_grad()
        dictionary_step(bank, s, replace(WEIGHTS, loss_dict_margin=1.0)).losses["sr_margin"].backward()
        optimizer.step()
    assert before < 0.9 < right()
