"""What the loop does in every step: when rates are asked for, what is descended, averaged, seeded and saved."""

import dataclasses
import json
import math

import pytest
import torch

from common.dist import SINGLE, Shard
from common.errors import Terminated
from common.run import Run
from tests.conftest import SHIFT, TINY
from tests.training.test_loop import make
from training import keeper, launch
from training.loop import descend, fit
from training.recipe import Batch, Recipe, Step

SETTINGS = {"batch_size": 4, "seed": 0}  # of the 10 images of `make`, 3 steps an epoch


def trained(recipe: Recipe, run: Run, epochs: int = 2, save_step: int = 10, **settings) -> list[dict[str, float]]:
    """The rows of metrics.jsonl."""
    run.open()
    try:
        fit(recipe, run, epochs=epochs, save_step=save_step, **SETTINGS, **settings)
    finally:
        run.close()
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_rates_are_asked_for_before_each_step_at_the_epochs_that_are_done(tmp_path):
    asked = []
    for stops in (True, False):  # stopped after its second step, and gone on
        recipe, run, _ = make(tmp_path / "run", 2)
        recipe = dataclasses.replace(recipe, lr=lambda epoch: asked.append(epoch) or 0.1 * len(asked))
        calls = []

        def stop(calls=calls, stops=stops):
            calls.append(1)
            return stops and len(calls) == 2

        if stops:
            with pytest.raises(Terminated, match="after step 2"):
                trained(recipe, run, stop=stop)
        else:
            rows = trained(recipe, run, stop=stop)
    assert asked == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    assert [row["train/lr"] for row in rows] == pytest.approx([0.3, 0.6])  # of the last step of each epoch


def two_terms() -> tuple[Recipe, Batch]:
    """Two weights with an optimiser each; losses a^2 and 3 (a + b), whose gradients at (2, 5) are (4 + 3, 3)."""
    model = torch.nn.ParameterDict({"a": torch.tensor(2.0), "b": torch.tensor(5.0)})
    optimizers = (torch.optim.SGD([model["a"]], 0.1), torch.optim.SGD([model["b"]], 0.01))

    def losses(batch: Batch) -> Step:
        return Step({"x": model["a"] ** 2, "y": 3 * (model["a"] + model["b"])}, {"seen": model["b"].detach().clone()})

    recipe = Recipe(model, None, losses, optimizers, lambda epoch: 0.1)  # type: ignore[arg-type]
    return recipe, Batch(torch.zeros(1, 2, 3, 2, 2), torch.zeros(2), torch.arange(2), 1, 0, Shard(2))


def test_a_step_goes_down_the_sum_of_the_terms_with_every_optimiser_and_forgets_its_gradient():
    recipe, batch = two_terms()
    found = descend(recipe, batch, SINGLE)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"train/loss_x": 4.0, "train/loss_y": 21.0, "seen": 5.0, "train/grad_norm": math.sqrt(7**2 + 3**2)}
    )
    a, b = (p.item() for p in recipe.model.parameters())
    assert (a, b) == pytest.approx((2 - 0.1 * 7, 5 - 0.01 * 3))
    found = descend(recipe, batch, SINGLE)
    assert float(found["train/grad_norm"]) == pytest.approx(math.hypot(2 * a + 3, 3))
    assert [p.item() for p in recipe.model.parameters()] == pytest.approx([a - 0.1 * (2 * a + 3), b - 0.03])


def test_values_of_an_epoch_are_means_over_its_steps(tmp_path):
    recipe, run, _ = make(tmp_path / "run", 2)
    real, seen = recipe.losses, []

    def losses(batch: Batch) -> Step:
        step = real(batch)
        seen.append(float(step.losses["fit"].detach()))
        return Step(step.losses, {"sr/gap": torch.tensor(10.0 * batch.epoch + batch.step)})

    rows = trained(dataclasses.replace(recipe, losses=losses), run)
    assert [row["train/loss_fit"] for row in rows] == pytest.approx([sum(seen[:3]) / 3, sum(seen[3:]) / 3])
    assert [row["sr/gap"] for row in rows] == [11.0, 21.0]


def test_layers_that_draw_are_seeded_anew_in_every_step(tmp_path):
    found = []
    for n in range(2):
        torch.manual_seed(n)
        recipe, run, _ = make(tmp_path / str(n), 2)
        real, seeds = recipe.losses, []
        watched = dataclasses.replace(
            recipe, losses=lambda batch, real=real, seeds=seeds: seeds.append(torch.initial_seed()) or real(batch)
        )
        trained(watched, run)
        found.append(seeds)
    assert found[0] == found[1] and len(set(found[0])) == 6


def test_checkpoints_come_every_so_many_epochs_and_at_the_end(tmp_path, monkeypatch):
    recipe, run, _ = make(tmp_path / "run", 5)
    saved, save = [], run.save
    monkeypatch.setattr(run, "save", lambda weights, state: saved.append(state["epoch"]) or save(weights, state))
    trained(recipe, run, epochs=5, save_step=2)
    assert saved == [0, 2, 4, 5]


def test_minutes_between_checkpoints_are_minutes(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now[0])
    assert keeper._in_minutes(2.5) == 1000.0 + 150 and keeper._in_minutes(0) == math.inf


def test_flags_of_the_run_reach_the_loop(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(launch, "fit", lambda recipe, run, **settings: seen.update(settings))
    import train

    args = [*TINY, *SHIFT, "--mode", "simclr_CSI", "--seed", "7", "--epochs", "3", "--save_step", "2"]
    assert train.main([*args, "--save_minutes", "0.5", "--log_root", str(tmp_path), "--device", "cpu"]) == 0
    expected = {"epochs": 3, "batch_size": 61, "seed": 7, "save_step": 2, "save_minutes": 0.5}
    assert {name: seen[name] for name in expected} == expected
