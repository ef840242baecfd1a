import dataclasses
import json

import pytest
import torch

from common.dist import World
from common.errors import RunStopped, Terminated
from common.flags import Flags
from common.run import Run
from datasets.loading import Loading
from datasets.sets import floats, image_set
from training.loop import batches, fit, steps_per_epoch
from training.recipe import Check, Recipe, Shown, Step


@pytest.mark.parametrize(
    "n, batch_size, sizes",
    [(7, 3, [3, 4]), (6, 3, [3, 3]), (8, 3, [3, 3, 2]), (2, 5, [2]), (1, 5, [1]), (3, 1, [1, 1, 1]), (3, 2, [3])],
)
def test_a_last_batch_of_one_joins_the_batch_before(n, batch_size, sizes):
    data = image_set(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2), torch.arange(n))
    found = list(batches(data, batch_size, loading=Loading(views=2), seed=0, epoch=1))
    assert [b.images.shape[1] for b in found] == sizes and steps_per_epoch(n, batch_size) == len(sizes)
    assert sorted(torch.cat([b.labels for b in found]).tolist()) == list(range(n))
    for b in found:
        assert b.images.shape == (2, len(b.labels), 3, 2, 2)
        assert torch.equal(b.images[:, :, 0, 0, 0].long(), b.labels.expand(2, -1))


def test_a_batch_has_the_places_of_all_its_images_and_a_rank_the_pixels_of_its_shard():
    """Labels differ from places; with several ranks, `local_images` leaves out the mix partner of the last image."""
    pixels = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 3, 2, 2)
    data = image_set(pixels, 10 + torch.arange(7))
    whole = list(batches(data, 4, loading=Loading(flip=False), seed=0, epoch=1))
    order = torch.cat([b.index for b in whole]).tolist()
    assert sorted(order) == list(range(7)) != order
    for rank in range(2):
        ranks = list(batches(data, 4, loading=Loading(flip=False), seed=0, epoch=1, world=World(rank, 2)))
        for b, all_of_it in zip(ranks, whole, strict=True):
            assert torch.equal(b.index, all_of_it.index) and torch.equal(b.labels, 10 + b.index)
            assert b.index.dtype == torch.int64 and torch.equal(all_of_it.images[0, :, 0, 0, 0].long(), b.index)
            shard = b.index[b.shard.indices()]
            assert torch.equal(b.images[0, :, 0, 0, 0].long(), shard) and len(shard) == 3
            assert torch.equal(b.local_images[0, :, 0, 0, 0].long(), shard[:2])


def test_images_are_loaded_as_the_recipe_says(tmp_path):
    recipe, run, _ = make(tmp_path / "run", 1)
    seen = []

    def losses(batch):
        seen.append(batch)
        return recipe.losses(batch)

    go(dataclasses.replace(recipe, losses=losses, loading=Loading(views=3, flip=False)), run, 1)
    assert [b.images.shape for b in seen] == [(3, 4, 3, 2, 2), (3, 4, 3, 2, 2), (3, 2, 3, 2, 2)]
    assert all(torch.equal(view, recipe.data.images[b.index]) for b in seen for view in b.images)


def test_order_follows_seed_and_epoch():
    data = image_set(torch.zeros(50, 3, 2, 2, dtype=torch.uint8), torch.arange(50))

    def order(seed, epoch):
        return torch.cat([b.labels for b in batches(data, 8, loading=Loading(), seed=seed, epoch=epoch)]).tolist()

    assert order(0, 1) == order(0, 1) != order(0, 2) != order(1, 2)


def make(folder, epochs, fail_at=None):
    """A linear model under a plain loss; every draw is a function of (epoch, step)."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    data = image_set(torch.randint(0, 256, (10, 3, 2, 2), dtype=torch.uint8), torch.zeros(10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    begun = []

    def losses(batch):
        loss = model(floats(batch.images[0]).mean((2, 3))).square().mean()
        if (batch.epoch, batch.step) == fail_at:
            loss = loss * torch.nan
        return Step({"fit": loss}, {"sr/gap": loss.detach()})

    run = Run(
        folder, Flags({"mode": "m", "dataset": "d", "epochs": epochs, "overwrite": False}), weights="w", resume="r"
    )
    recipe = Recipe(
        model, data, losses, (optimizer,), lambda epoch: 0.1 / (1 + epoch), begin=lambda run: begun.append(run)
    )
    return recipe, run, begun


def go(recipe, run, epochs, save_step=1):
    run.open()
    fit(recipe, run, epochs=epochs, batch_size=4, seed=0, save_step=save_step)
    run.close()
    return [p.detach().clone() for p in recipe.model.parameters()]


def test_an_interrupted_run_ends_bitwise_where_an_uninterrupted_one_does(tmp_path):
    recipe, run, begun = make(tmp_path / "whole", 6)
    whole = go(recipe, run, 6)
    assert len(begun) == 1
    recipe, run, _ = make(tmp_path / "parts", 6)
    go(recipe, run, 3)  # as if killed after epoch 3
    recipe, run, begun = make(tmp_path / "parts", 6)
    assert run.state["epoch"] == 3
    parts = go(recipe, run, 6)
    assert not begun and all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_non_finite_loss_stops_with_epoch_and_step_and_keeps_the_checkpoint_before(tmp_path):
    recipe, run, _ = make(tmp_path / "run", 5, fail_at=(3, 1))
    with pytest.raises(RunStopped, match="epoch 3, step 1"):
        go(recipe, run, 5)
    state = torch.load(tmp_path / "run" / "r", weights_only=True)
    assert state["epoch"] == 2 and all(v.isfinite().all() for v in state["model"].values())


def test_a_run_goes_on_from_any_step(tmp_path):
    """Stopped after each step in turn, with checkpoints by time in between, it ends where the whole one does."""
    recipe, run, _ = make(tmp_path / "whole", 3)
    whole = go(recipe, run, 3)
    rows = (tmp_path / "whole" / "metrics.jsonl").read_text()
    settings = {"epochs": 3, "batch_size": 4, "seed": 0, "save_step": 1, "save_minutes": 1e-9}
    for _ in range(20):
        recipe, run, _ = make(tmp_path / "parts", 3)
        steps = []

        def stop(steps=steps):
            steps.append(1)
            return len(steps) == 1

        run.open()
        try:
            fit(recipe, run, **settings, stop=stop)
            break
        except Terminated as asked:
            assert "saved after" in str(asked)
        finally:
            run.close()
    # 10 images in batches of 4 are 3 steps an epoch; every start made one step, the last of all none.
    assert all(torch.equal(a, b) for a, b in zip(whole, recipe.model.parameters(), strict=True))

    def fit_of(text):
        return [(row["epoch"], row["train/loss_fit"]) for row in map(json.loads, text.splitlines())]

    assert fit_of((tmp_path / "parts" / "metrics.jsonl").read_text()) == fit_of(rows)


def test_alarms_ring_once_and_pictures_come_with_checkpoints(tmp_path, capsys):
    recipe, run, _ = make(tmp_path / "run", 5)
    seen, shown = [], []
    recipe = dataclasses.replace(
        recipe,
        checks=(
            Check("sr/gap", "flat, try --x", below=10.0),
            Check("sr/gap", "steep", above=10.0),
            Check("no", "no", 1.0),
        ),
        show=lambda epoch: seen.append(epoch) or Shown({"a": torch.zeros(3, 2, 2)}, {"b": torch.ones(4)}),
    )
    run.show = lambda *args: shown.append(args)
    go(recipe, run, 5, save_step=2)
    assert seen == [1, 2, 4] and [args[0] for args in shown] == seen
    told = capsys.readouterr().out
    assert told.count("warning: epoch 1, sr/gap") == 1 and told.count("warning") == 1 and "flat, try --x" in told
