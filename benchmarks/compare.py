"""Ours against the published formulation: the same inputs, in turns, results compared first."""

import contextlib
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from common.device import pick_device, reuse_host_memory

# Sides that take more seconds are not warmed up, those that take less are quick.
_SLOW, _QUICK = 3.0, 0.3

Result = TypeVar("Result")


@dataclass(frozen=True)
class Part:
    """Something to measure.

    name, size: what, and how large. ours, published: do it once and return the result.
    check: raises AssertionError where the two results do not agree as far as they should; returns a remark.
    traffic: bytes that have to be read or written whatever the formulation, where that is what bounds the part.
    arithmetic: the ceiling (a field of `Ceilings`) that its operations are held against.
    """

    name: str
    size: str
    ours: Callable[[], Any]
    published: Callable[[], Any]
    check: Callable[[Any, Any], str]
    traffic: float = 0.0
    arithmetic: str = "product"


@dataclass(frozen=True)
class Comparison:
    """Seconds are medians of `rounds` rounds, bytes the peak that one call allocates beyond what was there.

    published_kept_s: in the process of ours, under our memory policy. published_s: in a process of its own that sets
    nothing, as a user of the published program has it; on a GPU, which host memory does not bound, the same.
    name, size, traffic, arithmetic: of the part.
    work: floating-point operations of the products and convolutions of ours.
    """

    name: str
    size: str
    traffic: float
    arithmetic: str
    rounds: int
    ours_s: float
    published_s: float
    published_kept_s: float
    ours_bytes: int
    published_bytes: int
    work: int
    remark: str

    @property
    def ratio(self) -> float:
        return self.published_s / self.ours_s

    @property
    def kept_ratio(self) -> float:
        return self.published_kept_s / self.ours_s

    def share(self, product: float, copy: float) -> float:
        """Of the ceiling: what `product` FLOP/s and `copy` bytes/s need, over what ours takes."""
        return max(self.work / product, self.traffic / copy) / self.ours_s


def compare(
    make: Callable[[torch.device], Part], device: torch.device, *, repeats: int, seconds: float = math.inf
) -> Comparison:
    """Check that both sides of the part that `make` makes agree, then time them in turns, `repeats` times each or,
    where that takes longer, as often as about so many `seconds` allow, once at least; ten calls at a time where they
    are quick.

    `make` is called in another process, too, hence to be pickled. Memory is counted last, since the profiler leaves
    holes in it that later calls stumble over.
    """
    reuse_host_memory()
    device = pick_device(str(device))  # With what it sets in a process.
    part = make(device)
    mine = part.ours()
    begun = time.perf_counter()
    theirs = part.published()
    taken = time.perf_counter() - begun
    remark = part.check(mine, theirs)
    del mine, theirs
    calls = 10 if taken < _QUICK else 1
    rounds = max(1, int(min(repeats, seconds / (3 * calls * taken))))
    sides: dict[str, Callable[[], float]] = {
        "ours": partial(timed, part.ours, device, calls),
        "kept": partial(timed, part.published, device, calls),
    }
    with _alone(make, device, calls) if device.type == "cpu" else contextlib.nullcontext(sides["kept"]) as alone:
        sides["published"] = alone
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                if taken < _SLOW:
                    side()  # Caches fill, the heap grows to what this side keeps; of no weight in a slow part.
                times[name].append(side())
    ours, kept, published = (statistics.median(found) for found in times.values())
    with FlopCounterMode(display=False) as counter:
        part.ours()
    (_, ours_bytes), (_, published_bytes) = peak_bytes(part.ours, device), peak_bytes(part.published, device)
    return Comparison(
        name=part.name,
        size=part.size,
        traffic=part.traffic,
        arithmetic=part.arithmetic,
        rounds=rounds,
        ours_s=ours,
        published_s=published,
        published_kept_s=kept,
        ours_bytes=ours_bytes,
        published_bytes=published_bytes,
        work=counter.get_total_flops(),
        remark=remark,
    )


def apart(run: Callable[..., Result], *args: Any, **settings: Any) -> Result:
    """What `run` returns in a process of its own, which nothing measured before has left its mark on."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run, *args, **settings).result()


@contextlib.contextmanager
def _alone(make: Callable[[torch.device], Part], device: torch.device, calls: int) -> Iterator[Callable[[], float]]:
    """What times `calls` of the published side of a part, in a process that lives as long as the context."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawned, _hold, (make, device, torch.get_num_threads())) as process:
        yield lambda: process.submit(_published_seconds, device, calls).result()


# What the process of `_alone` measures.
_HELD: list[Part] = []


def _hold(make: Callable[[torch.device], Part], device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    _HELD.append(make(device))
    # glibc raises its thresholds to the size of a block that is freed, up to 32 MiB: as far as they go, which favours
    # this side, and as far as they would be in a process that has trained a network.
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _published_seconds(device: torch.device, calls: int) -> float:
    return timed(_HELD[0].published, device, calls)


def timed(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call, the device's work included; the mean of `calls` of them."""
    wait(device)
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    wait(device)
    return (time.perf_counter() - begun) / calls


def peak_bytes(run: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What a call returns, and the largest sum of tensors it has allocated at one time, beyond those there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True, use_kineto=True) as record:
        result = run()
    held = peak = 0
    for event in record.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return result, peak


def distance(found: Tensor | None, exact: Tensor | None) -> float:
    """Euclidean, relative to `exact`, in float64; 0 where both are."""
    assert found is not None and exact is not None
    found, exact = found.double(), exact.double()
    return float((found - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny))


def wait(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
