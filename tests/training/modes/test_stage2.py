"""Stage 2 as a whole: where its dictionaries start, what they are started on, what is checked at the end."""

from pathlib import Path

import pytest
import torch

import train_cocsr
from common.errors import UserError
from common.seed import seed_of
from datasets.augment import AlignedSpec
from datasets.shifts import ShiftSpec
from datasets.views import DrawSpec, draw_views
from models.sparse.dictionary import CodingSpec, DictionaryBank
from tests.conftest import SHIFT, TINY
from tests.training.test_recipes import recipe_of
from training import loop
from training.modes import cocsr_dict
from training.modes.cocsr_dict import DictionaryLossSpec, dictionary_step, training_features

ATOMS = 100  # twice as many are more than the 122 pictures of a class


class Nowhere:
    """A run that writes nothing."""

    def say(self, text: str) -> None:
        pass

    def keep(self, name: str, tensors: dict, epoch: int) -> None:
        pass


def started(start: Path, monkeypatch, *more: str) -> tuple[torch.Tensor, int, cocsr_dict.Recipe]:
    """The features that k-means gets, the seed of its generator, and the recipe after its start."""
    seen: list = []
    real = cocsr_dict.kmeans

    def kmeans(x_KNF, centres, *, generator):
        seen.append((x_KNF, generator.initial_seed()))
        return real(x_KNF, centres, generator=generator)

    monkeypatch.setattr(cocsr_dict, "kmeans", kmeans)
    recipe = recipe_of("cocsr_dict", start, "--ini_sr_dict_train", *more)
    recipe.begin(Nowhere())  # type: ignore[arg-type]
    ((features, seed),) = seen
    return features, seed, recipe


def by_hand(model, data, passes: int, seed: int = 0, resize_factor: float = 0.08) -> torch.Tensor:
    """Features (K, passes * N, F), pass by pass and draw by draw of the whole set at once."""
    shifts = ShiftSpec("rotation").functions()
    draws = DrawSpec(shifts, AlignedSpec(resize_factor=resize_factor), seed, "k-means draw", len(data))
    rows = []
    for t in range(passes):
        ((_, views),) = draw_views(data, draws, t)
        rows.append(model(views).s.unflatten(0, (len(data), 4)))
    return torch.cat(rows).transpose(0, 1)


@pytest.mark.parametrize("wanted, passes", [(1, 1), (122, 1), (123, 2), (300, 3)])
def test_k_means_sees_as_many_passes_as_give_the_features_it_asks_for_each_a_draw_of_its_own(wanted, passes, start):
    recipe = recipe_of("cocsr_dict", start)
    draws = DrawSpec(ShiftSpec("rotation").functions(), AlignedSpec(), 0, "k-means draw", 50)
    found = training_features(recipe.model, recipe.data, draws, at_least=wanted)
    assert found.shape == (4, passes * 122, 64)
    expected = by_hand(recipe.model, recipe.data, passes)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert all((a - b).abs().max() > 1e-2 for n, a in enumerate(found.split(122, 1)) for b in found.split(122, 1)[:n])


def test_k_means_asks_for_two_augmented_features_of_each_atom(start, monkeypatch):
    features, seed, recipe = started(
        start, monkeypatch, "--seed", "3", "--resize_factor", "0.5", "--sr_dict_size", str(ATOMS)
    )
    assert features.shape == (4, 244, 64) and seed == seed_of(3, "k-means")
    expected = by_hand(recipe.model, recipe.data, 2, seed=3, resize_factor=0.5)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


def test_k_means_atoms_have_the_norm_of_the_constraint(start, monkeypatch):
    _, _, recipe = started(start, monkeypatch, "--loss_dict_constr_value", "2.5")
    torch.testing.assert_close(recipe.model.sr_nets.dictionary.norm(dim=1), torch.full((4, 12), 2.5))


def test_without_k_means_the_dictionary_is_drawn_and_stays_as_it_is_drawn(start):
    recipe = recipe_of("cocsr_dict", start)
    before = recipe.model.sr_nets.dictionary.detach().clone()
    recipe.begin(Nowhere())  # type: ignore[arg-type]
    assert torch.equal(before, recipe.model.sr_nets.dictionary)


def test_lambda_is_a_share_of_the_median_lambda_max_and_codes_follow(start, monkeypatch):
    s_KNF, _, recipe = started(start, monkeypatch, "--sr_lambda_rel", "0.3")
    bank = recipe.model.sr_nets
    largest = (bank.dictionary.detach().mT @ s_KNF.mT).abs().amax(1)
    assert bank.coding.lam == pytest.approx(0.3 * largest.median().item(), rel=1e-6) == float(bank.lambdaV)
    assert bank.code(s_KNF.mT).codes.ne(0).any()
    # A run that goes on has the file's lambda and not that of the flags.
    again = recipe_of("cocsr_dict", start, "--sr_lambda_rel", "0.3")
    again.model.load_state_dict(recipe.model.state_dict())
    assert again.model.sr_nets.coding.lam == pytest.approx(bank.coding.lam, rel=1e-6)


def test_the_gap_is_reported_in_units_of_lambda_as_a_mean_over_samples():
    bank = DictionaryBank(2, 6, 8, CodingSpec(0.05, 1.0, 3), torch.Generator().manual_seed(0))
    s = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    watched = dictionary_step(bank, s, DictionaryLossSpec(1.0, 1.0, 0.0, 0, 1.0, False, None)).watch
    assert float(watched["sr/gap"]) == pytest.approx(float(bank.code(s).gap.mean()) / 0.05, rel=1e-5)


@pytest.mark.parametrize(
    "given, cause",
    [
        ("--sr_lr 0.1", "--freeze_sr_dict"),
        ("--sr_decay_lr 0.1", "--freeze_sr_dict"),
        ("--loss_dict_margin 1", "--freeze_sr_dict"),
        ("--sr_lambda 0.1", "--sr_lambda_rel 0.3"),
        ("--loss_dict_margin_temperature 2", "--loss_dict_margin 0"),
    ],
)
def test_a_flag_that_another_one_leaves_without_effect_is_told(given, cause, start, capsys):
    recipe_of("cocsr_dict", start, *given.split(), *cause.split())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert given.split()[0] in line and cause.split()[0] in line


@pytest.mark.parametrize(
    "given", ["--sr_lr 0.1", "--sr_lambda 0.1", "--loss_dict_margin_temperature 2 --loss_dict_margin 1"]
)
def test_a_flag_that_has_an_effect_is_not(given, start, capsys):
    recipe_of("cocsr_dict", start, *given.split())
    assert "no effect" not in capsys.readouterr().out


def test_deep_supervision_past_the_last_step_is_refused(start):
    recipe_of("cocsr_dict", start, "--sr_admm_stage", "20", "--loss_sr_deep_supervision", "19")
    with pytest.raises(UserError, match="--loss_sr_deep_supervision: .* 0 to 19"):
        recipe_of("cocsr_dict", start, "--sr_admm_stage", "20", "--loss_sr_deep_supervision", "20")


def test_a_network_that_did_not_stay_frozen_ends_the_run(stage1, tmp_path, monkeypatch, capsys):
    real = loop.descend

    def descend(recipe, batch, world):
        with torch.no_grad():
            recipe.model.feature_net.linear.bias += 1e-6
        return real(recipe, batch, world)

    monkeypatch.setattr(loop, "descend", descend)
    args = [*TINY, *SHIFT, "--resume_path", str(stage1), "--epochs", "3", "--sr_dict_size", "8"]
    try:
        code = train_cocsr.main([*args, "--log_root", str(tmp_path)])
        told = capsys.readouterr().err
    except RuntimeError as error:
        code, told = 1, str(error)
    assert code == 1 and "frozen network changed" in told and "linear.bias" in told
