"""The one training loop. It knows recipes and run folders, no mode."""

import contextlib
import math
import time
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from common.device import peak_memory
from common.dist import SINGLE, World
from common.progress import progress
from common.run import Run
from common.seed import generator, seed_of
from datasets import ImageSet, Loading, PictureSet
from datasets.table import Table
from training.keeper import Observer, RunKeeper
from training.meter import Meter
from training.recipe import Batch, Recipe


def batches(
    data: ImageSet | PictureSet | Table,
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
    observer: Observer | None = None,
    world: World = SINGLE,
) -> None:
    """Train `recipe` up to epoch `epochs`, or until it has converged, from where `run` stands.

    Writes a checkpoint every `save_step` epochs, every `save_minutes` minutes (0: not by time) and at the end. The
    device is read once an epoch: losses are summed there, and a non-finite one is reported by the epoch and the step at
    which it first appeared. stop: looked at after every step; when it gives the number of a signal, the run saves where
    it stands and ends.
    Every draw follows from seed, epoch and step, so a run goes on bit for bit from any step.
    world: this rank among those that train together, each on its shard of every batch; `run` writes on the main rank
    only, and its `state` is the same on all.
    Raises: RunStopped for a non-finite loss, and the checkpoint before it stays; Terminated when asked to stop.
    """
    steps = steps_per_epoch(len(recipe.data), batch_size)
    keeper = RunKeeper(
        recipe,
        run,
        world,
        epochs=epochs,
        steps=steps,
        save_step=save_step,
        save_minutes=save_minutes,
        stop=stop,
        observer=observer,
    )
    done, first_step, meter = keeper.start()
    for epoch in range(done + 1, epochs + 1):
        begun, lr = time.monotonic(), 0.0
        which = {"seed": seed, "epoch": epoch, "first": first_step}
        loaded = batches(recipe.data, batch_size, loading=recipe.loading, **which, world=world)
        with contextlib.closing(loaded):  # Processes that load pictures end with it, whatever ends this.
            for batch in progress(loaded, total=steps - first_step, label=f"epoch {epoch}/{epochs}"):
                lr = set_lr(recipe, epoch - 1 + batch.step / steps)
                # Layers that draw at random (dropout in models of timm) know the global generator only.
                torch.manual_seed(seed_of(seed, "layers", epoch, batch.step) + world.rank)
                meter.add(descend(recipe, batch, world))
                recipe.after_step()
                if recipe.average is not None:
                    recipe.average.update(recipe.model)
                keeper.after_step(epoch, batch.step, meter)
        values = keeper.read(epoch, meter)
        seconds = time.monotonic() - begun
        values |= {"train/lr": lr, **speed(recipe.data, steps, steps - first_step, seconds)}
        end = recipe.end_epoch(epoch)
        keeper.after_epoch(epoch, values, seconds, end)
        if end.converged:
            break
        first_step, meter = 0, Meter()


def set_lr(recipe: Recipe, epoch: float) -> float:
    """Give the first optimizer the learning rate of `epoch` (fractional), or leave it its own without a schedule, and
    return it; 0 without an optimizer."""
    groups = recipe.optimizers[0].param_groups if recipe.optimizers else []
    if recipe.lr is None:
        return groups[0]["lr"] if groups else 0.0
    lr = recipe.lr(epoch)
    for group in groups:
        group["lr"] = lr
    return lr


def speed(data: ImageSet | PictureSet | Table, steps: int, done: int, seconds: float) -> dict[str, float]:
    """How fast `done` of an epoch's `steps` were, and the peak memory so far, by tag."""
    images = len(data) * done / steps / max(seconds, 1e-9)
    found = {"train/batch_time": seconds / max(1, done), "train/images_per_second": images}
    return found | {f"train/{name}": value for name, value in peak_memory(data.device).items()}


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
