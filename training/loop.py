"""The one training loop. It knows recipes and run folders, no mode."""

import contextlib
import math
import time
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from common.device import peak_memory
from common.dist import SINGLE, World
from common.errors import RunStopped, Terminated, UserError
from common.progress import progress
from common.run import Run
from common.seed import generator, seed_of
from datasets import ImageSet, Loading, PictureSet
from training.recipe import Batch, Recipe


def batches(
    data: ImageSet | PictureSet,
    batch_size: int,
    *,
    loading: Loading,
    seed: int,
    epoch: int,
    first: int = 0,
    world: World = SINGLE,
) -> Generator[Batch]:
    """One epoch of shuffled batches, loaded as `loading` says; a last batch of one joins the batch before.

    first: the step to begin with. world: several ranks get the same batches, and in them the images of their shard.
    """
    order = torch.randperm(len(data), generator=generator(seed, "order", epoch)).to(data.index_device)
    labels = data.labels.to(data.index_device)
    parts = _split(order, batch_size)
    loaded = data.batches(parts, loading, seed=seed, epoch=epoch, first=first, world=world)
    for step, images in enumerate(loaded, first):
        index = parts[step]
        labels_B, index_B = (x.to(data.device, non_blocking=True) for x in (labels[index], index))
        yield Batch(images, labels_B, index_B, epoch, step, world.shard(len(index)))


def steps_per_epoch(images: int, batch_size: int) -> int:
    """How many batches `batches` yields."""
    return max(1, math.ceil(images / batch_size) - (images % batch_size == 1 and images > 1 and batch_size > 1))


def _split(order: Tensor, batch_size: int) -> list[Tensor]:
    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1 and batch_size > 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def never() -> int:
    """No signal asks the run to stop."""
    return 0


def fit(
    recipe: Recipe,
    run: Run,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    save_step: int,
    save_minutes: float = 0.0,
    stop: Callable[[], int] = never,
    world: World = SINGLE,
) -> None:
    """Train `recipe` up to epoch `epochs`, from where `run` stands.

    Writes a checkpoint every `save_step` epochs, every `save_minutes` minutes (0: not by time) and at the end. The
    device is read once an epoch: losses are summed there, and a non-finite one is told by the epoch and the step at
    which it first appeared. stop: looked at after every step; when it gives the number of a signal, the run saves where
    it stands and ends.
    Every draw follows from seed, epoch and step, so a run goes on bit for bit from any step.
    world: this process among those that train together, each on its shard of every batch; `run` writes in the first
    only, and `state` is the same in all.
    Raises: RunStopped for a non-finite loss, and the checkpoint before it stays; Terminated when asked to stop.
    """
    total_steps = steps_per_epoch(len(recipe.data), batch_size)
    first, first_step, meter = recipe.first_epoch, 0, _Meter()
    if run.state is not None:
        first, first_step = run.state["epoch"], run.state.get("step", 0)
        if first_step >= total_steps:
            raise UserError(
                f"--data_path: the run in {run.folder} stands at step {first_step} of an epoch, which now has"
                f" {total_steps}; put its training images back, or give another --suffix"
            )
        _restore(recipe, run.state)
        meter = _Meter.of(run.state.get("meter"))
        within = f", step {first_step} of {total_steps} of the next" if first_step else ""
        run.say(f"continuing after epoch {first}{within}")
    else:
        recipe.begin(run)
        run.save(*_state(recipe, first))
    # The same answers in all processes, whoever hears the signal and whatever the clocks say.
    stop, due = world.max_over_ranks(stop), world.max_over_ranks(lambda: next_save.is_now())
    ringing: set[str] = set()
    next_save = _Due(save_minutes)
    started = told = time.monotonic()
    for epoch in range(first + 1, epochs + 1):
        begun = time.monotonic()
        done, lr = 0, 0.0
        which = {"seed": seed, "epoch": epoch, "first": first_step}
        steps = batches(recipe.data, batch_size, loading=recipe.loading, **which, world=world)
        with contextlib.closing(steps):  # Processes that load pictures end with it, whatever ends this.
            for batch in progress(steps, total=total_steps - first_step, label=f"epoch {epoch}/{epochs}"):
                lr = recipe.before_step(epoch - 1 + batch.step / total_steps)
                # Layers that draw at random (dropout in models of timm) know the global generator only.
                torch.manual_seed(seed_of(seed, "layers", epoch, batch.step) + world.rank)
                meter.add(descend(recipe, batch, world))
                done = batch.step + 1
                if done == total_steps:
                    continue  # The end of the epoch saves by rules of its own.
                asked = stop()
                if due() or asked:
                    _read(meter, run, epoch, world)  # What is spoilt is not kept.
                    run.save(*_state(recipe, epoch - 1, done, meter))
                    next_save = _Due(save_minutes)
                if asked:
                    stopped = Terminated(f"asked to stop in epoch {epoch}; saved after step {done}. {_GO_ON}", asked)
                    raise world.error_on_main(stopped, stopped.code)
        values = _read(meter, run, epoch, world)
        elapsed = time.monotonic() - begun
        batch_time = elapsed / max(1, done - first_step)
        speed = len(recipe.data) * (done - first_step) / total_steps / max(elapsed, 1e-9)
        values |= {"train/lr": lr, "train/batch_time": batch_time, "train/images_per_second": speed}
        values |= {f"train/{name}": value for name, value in peak_memory(recipe.data.device).items()}
        values |= recipe.end_epoch(epoch) if world.is_main else {}
        first_step, meter = 0, _Meter()
        run.record(epoch, values)
        ringing = _ring(recipe, run, epoch, values, ringing)
        if world.is_main and (epoch == first + 1 or epoch % save_step == 0):
            run.show(epoch, *recipe.show(epoch))
        left = (time.monotonic() - started) / (epoch - first) * (epochs - epoch)
        # Epochs of a small set take a fraction of a second; one line a second is enough to read.
        if epoch in (first + 1, epochs) or time.monotonic() - told >= 1:
            run.say(f"epoch {epoch}/{epochs}  {_line(values)}  {elapsed:.1f} s, about {left:.0f} s left")
            told = time.monotonic()
        asked = stop()
        if epoch == epochs and world.is_main:
            recipe.finish(run)
        if due() or epoch % save_step == 0 or epoch == epochs or asked:
            run.save(*_state(recipe, epoch))
            next_save = _Due(save_minutes)
        if asked and epoch < epochs:
            stopped = Terminated(f"asked to stop; saved after epoch {epoch}. {_GO_ON}", asked)
            raise world.error_on_main(stopped, stopped.code)


_GO_ON = "The same command goes on from there"


def _ring(recipe: Recipe, run: Run, epoch: int, values: dict[str, float], before: set[str]) -> set[str]:
    """Tell the checks that ring now and did not ring after the epoch before; all that ring now."""
    now = {alarm.text for alarm in recipe.checks if alarm.triggered(values)}
    for alarm in recipe.checks:
        if alarm.text in now - before:
            run.say(f"warning: epoch {epoch}, {alarm.tag} {values[alarm.tag]:.3g}: {alarm.text}")
    return now


def _read(meter: "_Meter", run: Run, epoch: int, world: World) -> dict[str, float]:
    """The means of an epoch so far. Raises: RunStopped where one is not finite."""
    values, bad_step = meter.read()
    if bad_step is not None:
        error = RunStopped(
            f"non-finite loss in epoch {epoch}, step {bad_step}; the checkpoint before it is in {run.folder}."
            " A lower --lr_init (stage 2: --sr_lr) is the usual remedy"
        )
        raise world.error_on_main(error, 1)
    return values


def descend(recipe: Recipe, batch: Batch, world: World) -> dict[str, Tensor]:
    """One step down the sum of the losses of a batch, gradients added up over processes; what is to be watched, by tag,
    scalars that stay on the device."""
    losses, watch = recipe.losses(batch)
    for optimizer in recipe.optimizers:
        optimizer.zero_grad(set_to_none=True)
    total = torch.stack(list(losses.values())).sum()
    if total.requires_grad:
        total.backward()
    world.all_reduce_gradients(recipe.model.parameters())
    grads = [p.grad for p in recipe.model.parameters() if p.grad is not None]
    if grads:
        watch = {**watch, "train/grad_norm": torch.nn.utils.get_total_norm(grads)}
    for optimizer in recipe.optimizers:
        optimizer.step()
    return {**{f"train/loss_{name}": value.detach() for name, value in losses.items()}, **watch}


class _Meter:
    """Means of named scalars over the steps of an epoch, kept on the device until `read`."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.names: list[str] = []
        self._before: list[Tensor] = []

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> "_Meter":
        """A meter that goes on from `state()`; a fresh one for None."""
        meter = cls()
        if state is not None:
            meter.names, meter._before = list(state["names"]), [state["rows"]]
        return meter

    def state(self) -> dict[str, Any]:
        """What it has seen, on the CPU."""
        return {"names": self.names, "rows": self._table()}

    def _table(self) -> Tensor:
        return torch.cat([*self._before, torch.stack(self.rows).cpu()])

    def add(self, values: dict[str, Tensor]) -> None:
        self.names = list(values)
        self.rows.append(torch.stack([v.detach().float() for v in values.values()]))

    def read(self) -> tuple[dict[str, float], int | None]:
        """The means, and the first step at which a value was not finite."""
        table = self._table()
        bad = (~table.isfinite()).any(1).nonzero().flatten().tolist()
        return dict(zip(self.names, table.mean(0).tolist(), strict=True)), bad[0] if bad else None


def _line(values: dict[str, float]) -> str:
    return "  ".join(f"{tag.removeprefix('train/')} {value:.4g}" for tag, value in values.items())


class _Due:
    """A time so many minutes from now; never, for 0."""

    def __init__(self, minutes: float):
        self._at = time.monotonic() + 60 * minutes if minutes > 0 else math.inf

    def is_now(self) -> bool:
        return time.monotonic() >= self._at


def _state(recipe: Recipe, epoch: int, step: int = 0, meter: "_Meter | None" = None) -> tuple[dict, dict]:
    """The weights, and all that a run needs to go on.

    step: how many steps of the epoch after `epoch` are done, whose values `meter` has.
    """
    weights = recipe.model.state_dict()
    return weights, {
        "epoch": epoch,
        "step": step,
        "meter": meter.state() if meter is not None else None,
        "model": weights,
        "optimizers": [optimizer.state_dict() for optimizer in recipe.optimizers],
    }


def _restore(recipe: Recipe, state: dict) -> None:
    try:
        recipe.model.load_state_dict(state["model"])
        for optimizer, saved in zip(recipe.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"--data_path: what the run has saved does not fit its network now ({reason}); have classes been added or"
            " removed? Put them back, or give another --suffix"
        ) from None
