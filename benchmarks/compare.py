"""Ours against the published formulation: the same inputs, in turns, results compared first."""

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from common.device import reuse_host_memory

# A part whose rounds are slow gets fewer of them: as many as fit in so many seconds, one at least; and sides that take
# so many seconds are not warmed up.
_SECONDS, _SLOW = 120, 1.0


@dataclass(frozen=True)
class Part:
    """Something to measure.

    name, size: what, and how large. ours, published: do it once and return the result.
    check: raises AssertionError where the two results do not agree as far as they should; returns a remark.
    traffic: bytes that have to be read or written whatever the formulation, where that is what bounds the part.
    """

    name: str
    size: str
    ours: Callable[[], Any]
    published: Callable[[], Any]
    check: Callable[[Any, Any], str]
    traffic: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Seconds are medians of `rounds` rounds, bytes the peak that one call allocates beyond what was there.

    published_kept_s: in the process of ours, under our memory policy. published_s: in a process of its own that sets
    nothing, as a user of the published program has it; on a GPU, which host memory does not bound, the same.
    work: floating-point operations of the products and convolutions of ours.
    """

    part: Part
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
        return max(self.work / product, self.part.traffic / copy) / self.ours_s


def compare(make: Callable[[torch.device], Part], device: torch.device, *, repeats: int) -> Comparison:
    """Check that both sides of the part that `make` makes agree, then time them in turns, `repeats` times each or as
    often as time allows. `make` is called in another process, too, hence to be pickled."""
    reuse_host_memory()
    part = make(device)
    mine, ours_bytes = peak_bytes(part.ours, device)
    begun = time.perf_counter()
    theirs, published_bytes = peak_bytes(part.published, device)
    taken = time.perf_counter() - begun
    remark = part.check(mine, theirs)
    del mine, theirs
    with FlopCounterMode(display=False) as counter:
        part.ours()
    rounds = max(1, min(repeats, int(_SECONDS / (3 * taken))))
    sides: dict[str, Callable[[], float]] = {
        "ours": partial(timed, part.ours, device),
        "kept": partial(timed, part.published, device),
    }
    with _alone(make, device) if device.type == "cpu" else contextlib.nullcontext(sides["kept"]) as alone:
        sides["published"] = alone
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                if taken < _SLOW:
                    side()  # Caches fill, the heap grows to what this side keeps; of no weight in a slow part.
                seconds[name].append(side())
    ours, kept, published = (statistics.median(found) for found in seconds.values())
    work = counter.get_total_flops()
    return Comparison(part, rounds, ours, published, kept, ours_bytes, published_bytes, work, remark)


@contextlib.contextmanager
def _alone(make: Callable[[torch.device], Part], device: torch.device) -> Iterator[Callable[[], float]]:
    """What times the published side of a part once, in a process that lives as long as the context."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawned, _hold, (make, device, torch.get_num_threads())) as process:
        yield lambda: process.submit(_published_seconds, device).result()


# What the process of `_alone` measures.
_HELD: list[Part] = []


def _hold(make: Callable[[torch.device], Part], device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    _HELD.append(make(device))
    # glibc raises its thresholds to the size of a block that is freed, up to 32 MiB: as far as they go, which favours
    # this side, and as far as they would be in a process that has trained a network.
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _published_seconds(device: torch.device) -> float:
    return timed(_HELD[0].published, device)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    _wait(device)
    begun = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begun


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
