"""What one process of several does in `test_processes`: a module of its own, since processes import it afresh."""

import itertools
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.modules.batchnorm import _BatchNorm

from common.dist import World
from common.flags import build_parser, parse
from datasets import DataSource, ImageSet, split_one_class
from datasets.one_class import SplitSpec
from program import SPECS
from training import STAGE1, STAGE2
from training.loop import batches, descend, set_lr

STEPS, BATCH = 5, 25  # the last batch of the 122 images of a class has 22


def found_by(world_size: int, folder: Path, cases: dict[str, list[str]]) -> list[dict[str, Any]]:
    """What each of so many processes finds: `findings` of every case, joined by gloo where there are several.

    They are forked from a process that has imported this module and done nothing else.
    """
    multiprocessing.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_work, (world_size, port, folder, cases), world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _work(rank: int, size: int, port: int, folder: Path, cases: dict[str, list[str]]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    # Pictures, draws and networks in float64, so that nothing differs but the order of sums.
    torch.set_default_dtype(torch.float64)
    batch = ImageSet.batch
    ImageSet.batch = lambda self, index: batch(self, index).double()
    dist.init_process_group("gloo", rank=rank, world_size=size)
    world = World(rank, size, rank)
    found: dict[str, Any] = {name: findings(args, world) for name, args in cases.items()}
    found["gather"] = gathered(world)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def findings(args: list[str], world: World) -> dict[str, Any]:
    """The losses and the gradient of the first step of a mode in float64, and the weights after `STEPS` steps."""
    modes = STAGE1 | STAGE2
    flags = parse(args, build_parser("x", modes, "simclr", SPECS))
    mode = modes[flags.mode]
    split = split_one_class(
        "digits", DataSource.of(flags, "digits", training=True), flags.of(SplitSpec).one_class_idx, 8
    )
    recipe = mode.build(flags, split, world)
    # Normalisation by running statistics: those of a batch are its part's, where several CPUs share it.
    recipe.model.double()
    for module in recipe.model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    recipe.begin(_Nowhere())
    steps = itertools.islice(batches(recipe.data, BATCH, loading=recipe.loading, seed=0, epoch=1, world=world), STEPS)
    found: dict[str, Any] = {}
    for batch in steps:
        set_lr(recipe, batch.step / STEPS)
        values = descend(recipe, batch, world)
        recipe.after_step()
        if recipe.average is not None:
            recipe.average.update(recipe.model)
        if batch.step == 0:
            grads = {name: p.grad.clone() for name, p in recipe.model.named_parameters() if p.grad is not None}
            found |= {"values": {k: float(v) for k, v in values.items()}, "grads": grads}
    return {**found, "weights": recipe.result.state_dict()}


class _Nowhere:
    def say(self, text: str) -> None:
        pass

    def keep(self, name: str, tensors: dict, epoch: int) -> None:
        pass


def gathered(world: World) -> dict[str, torch.Tensor]:
    """The gradient of a loss of gathered rows with respect to this process's own: ours and diffdist's."""
    import diffdist.functional

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return (rows @ rows.T).tanh().square().sum()

    images = 3 * world.size
    rows = torch.randn(2 * images, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shard = world.shard(images)
    own = rows[shard.rows(2)]
    ours, theirs = (own.clone().requires_grad_() for _ in range(2))
    whole = shard.all_gather(ours)
    assert torch.equal(whole, rows)
    loss(whole).backward()
    # diffdist adds the gradients of all processes' losses, each of which is the whole one.
    parts = diffdist.functional.all_gather([torch.zeros_like(own) for _ in range(world.size)], theirs)
    joined = torch.cat([part.unflatten(0, (2, -1)) for part in parts], 1).flatten(0, 1)
    (loss(joined) / world.size).backward()
    rows.requires_grad_()
    loss(rows).backward()
    return {"ours": ours.grad, "theirs": theirs.grad, "right": rows.grad[shard.rows(2)]}
