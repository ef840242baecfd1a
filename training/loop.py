"""The one training loop. It knows recipes and run folders, no mode."""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from common.errors import RunStopped
from common.progress import progress
from common.run import Run
from common.seed import generator, seed_of
from datasets import ImageSet, PictureSet
from training.recipe import Batch, Recipe


def batches(data: ImageSet | PictureSet, batch_size: int, *, copies: int, seed: int, epoch: int) -> Iterator[Batch]:
    """One epoch of shuffled batches, each image in `copies` copies; a last batch of one joins the batch before."""
    order = torch.randperm(len(data), generator=generator(seed, "order", epoch)).to(data.index_device)
    labels = data.labels.to(data.index_device)
    parts = _split(order, batch_size)
    for step, images in enumerate(data.copies(parts, copies, seed=seed, epoch=epoch)):
        yield Batch(images, labels[parts[step]].to(data.device, non_blocking=True), epoch, step)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """How many batches `batches` yields."""
    return max(1, math.ceil(images / batch_size) - (images % batch_size == 1 and images > 1 and batch_size > 1))


def _split(order: Tensor, batch_size: int) -> list[Tensor]:
    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1 and batch_size > 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def fit(recipe: Recipe, run: Run, *, epochs: int, batch_size: int, copies: int, seed: int, save_step: int) -> None:
    """Train `recipe` up to epoch `epochs`, from where `run` stands, on `copies` copies of each image.

    Writes a checkpoint every `save_step` epochs and at the end. The device is read once an epoch: losses are summed
    there, and a non-finite one is told by the epoch and the step at which it first appeared.
    Raises: RunStopped for a non-finite loss; the checkpoint before it stays.
    """
    total_steps = steps_per_epoch(len(recipe.data), batch_size)
    first = recipe.first_epoch
    if run.state is not None:
        _restore(recipe, run.state)
        first = run.state["epoch"]
        run.say(f"continuing after epoch {first}")
    else:
        recipe.begin(run)
        _save(recipe, run, first)
    started = told = time.monotonic()
    for epoch in range(first + 1, epochs + 1):
        begun = time.monotonic()
        meter = _Meter()
        steps = batches(recipe.data, batch_size, copies=copies, seed=seed, epoch=epoch)
        lr = 0.0
        for batch in progress(steps, total=total_steps, label=f"epoch {epoch}/{epochs}"):
            lr = recipe.before_step(epoch - 1 + batch.step / total_steps)
            # Layers that draw at random (dropout in models of timm) know the global generator only.
            torch.manual_seed(seed_of(seed, "layers", epoch, batch.step))
            meter.add(_descend(recipe, batch))
        values, bad_step = meter.read()
        if bad_step is not None:
            raise RunStopped(
                f"non-finite loss in epoch {epoch}, step {bad_step}; the checkpoint before it is in {run.folder}."
                " A lower --lr_init (stage 2: --sr_lr) is the usual remedy"
            )
        elapsed = time.monotonic() - begun
        values |= {"train/lr": lr, "train/batch_time": elapsed / total_steps, **recipe.end_epoch(epoch)}
        run.record(epoch, values)
        left = (time.monotonic() - started) / (epoch - first) * (epochs - epoch)
        # Epochs of a small set take a fraction of a second; one line a second is enough to read.
        if epoch in (first + 1, epochs) or time.monotonic() - told >= 1:
            run.say(f"epoch {epoch}/{epochs}  {_line(values)}  {elapsed:.1f} s, about {left:.0f} s left")
            told = time.monotonic()
        if epoch % save_step == 0 or epoch == epochs:
            _save(recipe, run, epoch)
    recipe.finish(run)


def _descend(recipe: Recipe, batch: Batch) -> dict[str, Tensor]:
    losses, watch = recipe.losses(batch)
    for optimizer in recipe.optimizers:
        optimizer.zero_grad(set_to_none=True)
    total = torch.stack(list(losses.values())).sum()
    if total.requires_grad:
        total.backward()
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

    def add(self, values: dict[str, Tensor]) -> None:
        self.names = list(values)
        self.rows.append(torch.stack([v.detach().float() for v in values.values()]))

    def read(self) -> tuple[dict[str, float], int | None]:
        """The means, and the first step at which a value was not finite."""
        table = torch.stack(self.rows).cpu()
        bad = (~table.isfinite()).any(1).nonzero().flatten().tolist()
        return dict(zip(self.names, table.mean(0).tolist(), strict=True)), bad[0] if bad else None


def _line(values: dict[str, float]) -> str:
    return "  ".join(f"{tag.removeprefix('train/')} {value:.4g}" for tag, value in values.items())


def _save(recipe: Recipe, run: Run, epoch: int) -> None:
    state = {
        "epoch": epoch,
        "model": recipe.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in recipe.optimizers],
    }
    run.save(recipe.model.state_dict(), state)


def _restore(recipe: Recipe, state: dict) -> None:
    recipe.model.load_state_dict(state["model"])
    for optimizer, saved in zip(recipe.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
