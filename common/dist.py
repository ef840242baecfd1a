"""Several processes that train or evaluate together, as `torchrun` starts them: on one machine or many, on GPUs (nccl)
or CPUs (gloo).

One rule carries the gradients: every process holds the losses of the whole batch, but they depend on the weights by way
of its own images only. So gradients add up over processes to that of the whole batch, whatever the loss.

Letters: W processes, B images of a batch, p = ceil(B / W) images of one process, R blocks, each of all images.
"""

import contextlib
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.device import pick_device
from common.errors import RunStopped, UserError, report

T = TypeVar("T")

# Longer than any part of a run in which one process works and the others wait for it.
_PATIENCE = timedelta(minutes=30)
# Seconds after which the first process says that it waits for others.
_REPORT_WAITING_S = 15.0
# What gloo and nccl say in a process whose partner has gone.
_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|timed out|timeout|socket|remote process", re.I)


@dataclass(frozen=True)
class World:
    """Which process this is: `rank` of `size`, and of those on this machine `local_rank`. The default: the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of(cls, env: Mapping[str, str]) -> "World":
        """As the launcher says in the environment. Raises: UserError where it does not make sense."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        try:
            rank, size, local_rank = (int(env.get(name, default)) for name, default in zip(names, "010", strict=True))
        except ValueError:
            raise UserError(f"torchrun: {', '.join(names)} in the environment must be whole numbers") from None
        if not 0 <= rank < size or local_rank < 0:
            raise UserError(f"torchrun: RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank} cannot be")
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if size > 1 and missing:
            raise UserError(
                f"WORLD_SIZE is {size} in the environment, without {', '.join(missing)}: start several processes with"
                " torchrun, or unset WORLD_SIZE to run one"
            )
        return cls(rank, size, local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def shard(self, batch: int) -> "Shard":
        """This process's part of a batch of so many images."""
        return Shard(batch, self)

    def shard_list(self, items: list[T]) -> list[T]:
        """This process's part of a list, in order; `collect` of the parts, one after the other, is the list."""
        each, more = divmod(len(items), self.size)
        start = self.rank * each + min(self.rank, more)
        return items[start : start + each + (self.rank < more)]

    def broadcast_object(self, value: T) -> T:
        """The first process's value, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have in the first process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    @torch.no_grad()
    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add gradients up over all processes, in one message; those that are None must be so everywhere."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not grads:
            return
        message = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(message)
        parts = message.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view(grad.shape) for part, grad in zip(parts, grads, strict=True)])

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:
        """A part of the work whose errors end all ranks: the lowest rank with an error reports it, the others exit.

        Raises: the error, or SystemExit with the exit code that belongs to it.
        """
        if self.size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        codes = self.all_gather_object(None if failure is None else 2 if isinstance(failure, UserError) else 1)
        failed = [(rank, code) for rank, code in enumerate(codes) if code is not None]
        if failed and failure is not None and failed[0][0] == self.rank:
            raise failure
        if failed:
            raise SystemExit(failed[0][1])

    def error_on_main(self, error: Exception, code: int) -> BaseException:
        """What to raise where all ranks find the same error: the main rank reports it, the others exit with `code`."""
        return error if self.is_main else SystemExit(code)

    def max_over_ranks(self, asked: Callable[[], int]) -> Callable[[], int]:
        """The largest answer of any process: the same in all, one call late, so that no step waits for it."""
        if self.size == 1:
            return asked
        pending: list[tuple[dist.Work, Tensor]] = []

        def answer() -> int:
            before = 0
            if pending:
                work, flag = pending.pop()
                work.wait()
                before = int(flag)
            flag = torch.tensor(int(asked()))
            pending.append((dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag))
            return before

        return answer


SINGLE = World()


@dataclass(frozen=True)
class Shard:
    """One process's part of a batch of `batch` images: p of them in order; past the last one comes the first again.

    What comes again is computed in vain, so that all parts are of one size, and left out when parts are joined; only
    batch normalisation sees it, in a batch that W does not divide.
    """

    batch: int
    world: World = SINGLE

    @property
    def size(self) -> int:
        """p."""
        return -(-self.batch // self.world.size)

    @property
    def num_real(self) -> int:
        """How many of the p are no repetition."""
        return min(max(self.batch - self.world.rank * self.size, 0), self.size)

    def indices(self, device: torch.device | str = "cpu") -> Tensor:
        """Places in the batch, (p,). With several processes (p + 1,): the last is there to be mixed with."""
        if self.world.size == 1:
            return torch.arange(self.batch, device=device)
        start = self.world.rank * self.size
        return torch.arange(start, start + self.size + 1, device=device) % self.batch

    def rows(self, blocks: int, device: torch.device | str = "cpu") -> Tensor:
        """Places (R * p,) of its images in R blocks of the whole batch."""
        own = self.indices(device)[: self.size]
        return (torch.arange(blocks, device=device)[:, None] * self.batch + own).flatten()

    def all_gather(self, x: Tensor) -> Tensor:
        """Rows of R blocks, x (R * p, ...), of all processes: (R * B, ...). Gradients flow into the own ones."""
        if self.world.size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world.size)]
        dist.all_gather(parts, x.detach().contiguous())
        parts[self.world.rank] = x
        return torch.cat([part.unflatten(0, (-1, self.size)) for part in parts], 1)[:, : self.batch].flatten(0, 1)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over all processes, each of which has summed over its `own` images. Gradients: as `gather`."""
        return x if self.world.size == 1 else _Sum.apply(x)

    def count_once(self, x: Tensor) -> Tensor:
        """What all processes compute alike, and what only one of them shall add to the gradients."""
        return x if self.world.is_main else x.detach()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


@contextlib.contextmanager
def _report_waiting(world: World) -> Iterator[None]:
    """A part of the work that waits for other processes: after a while the first says so."""
    text = f"waiting for all of {world.size} processes (WORLD_SIZE in the environment) ..."
    timer = threading.Timer(_REPORT_WAITING_S, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    if world.is_main:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _store(world: World) -> dist.Store:
    """Where processes find each other, under a name that is of this start alone.

    torchrun keeps one store through all its restarts, in which gloo would find the addresses of processes that are gone
    and wait for them. So the first process gives the name to each of the others that asks for it under a new word.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=_PATIENCE))
    name = uuid.uuid4().hex
    if not world.is_main:
        store.set(f"asks/{world.rank}", name)
        name = store.get(f"name/{name}").decode()  # waits for it
        store.add(f"met/{name}", 1)
        return dist.PrefixStore(name, store)
    patience = time.monotonic() + _PATIENCE.total_seconds()
    while store.add(f"met/{name}", 0) < world.size - 1:
        for rank in range(1, world.size):
            if store.check([f"asks/{rank}"]):
                store.set(f"name/{store.get(f'asks/{rank}').decode()}", name)
        if time.monotonic() > patience:
            raise RunStopped(f"not all of {world.size} processes came within {_PATIENCE}")
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


@contextlib.contextmanager
def report_once() -> Iterator[None]:
    """Before the process group exists all ranks find the same errors in the flags: local rank 0 reports them."""
    try:
        yield
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(2) from None
        raise


@contextlib.contextmanager
def processes(device: str) -> Iterator[World]:
    """Join the processes that the launcher has started, on `device` (--device); one alone joins nothing.

    What other ranks than the main one print is dropped. One that fails reports its error and exits at once: to part in
    order it would have to wait for the others, which wait for it.
    """
    with report_once():
        world = World.of(os.environ)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # Counted, not picked: each process would otherwise take memory of the first GPU as well.
        gpus = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
        if world.size > 1 and 0 < gpus < here:
            raise UserError(f"--device {device}: {here} processes here, but {gpus} GPU(s)")
        kind = pick_device(device, world.local_rank if world.size > 1 else None)
    if world.size == 1:
        yield world
        return
    backend = "gloo"
    if kind.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
    with _report_waiting(world):
        store = _store(world)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_PATIENCE)
    try:
        with contextlib.ExitStack() as stack:
            if not world.is_main:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield world
    except SystemExit as end:
        _end(end.code if isinstance(end.code, int) else 1)
    except BaseException as error:
        _end(report(_lost(error, world)))
    dist.destroy_process_group()
    # Not by way of the interpreter's own end, in which threads that gloo leaves behind have aborted finished runs.
    _end(0)


def _lost(error: BaseException, world: World) -> BaseException:
    """The error itself, or in its place that another process has gone."""
    if not isinstance(error, RuntimeError) or not (isinstance(error, dist.DistError) or _GONE.search(str(error))):
        return error
    why = "" if _GONE.search(str(error)) else f" ({str(error).strip().splitlines()[0]})"
    return RunStopped(
        f"process {world.rank} of {world.size} has lost touch with the others{why}. If one of them has failed, its own"
        " last lines say why; the same command goes on from the last checkpoint"
    )


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
