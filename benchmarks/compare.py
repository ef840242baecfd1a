"""Ours against the published formulation: the same inputs, in one process, in turns, results compared first."""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from common.device import reuse_host_memory

# A part whose rounds are slow gets fewer of them: as many as fit in so many seconds, one at least; and sides that take
# so many seconds are not warmed up.
_SECONDS, _SLOW = 120, 1.0
# From malloc.h; the sizes are the largest that glibc lets its thresholds grow to by themselves.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_GLIBC = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 * 2**20, _M_TRIM_THRESHOLD: 64 * 2**20}


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

    published_s: under glibc's own memory policy, as a process has it that sets nothing; published_kept_s: under ours.
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


def compare(part: Part, device: torch.device, *, repeats: int) -> Comparison:
    """Check that both agree, then time them in turns, `repeats` times each or as often as time allows."""
    reuse_host_memory()
    mine, ours_bytes = peak_bytes(part.ours, device)
    begun = time.perf_counter()
    theirs, published_bytes = peak_bytes(part.published, device)
    taken = time.perf_counter() - begun
    remark = part.check(mine, theirs)
    del mine, theirs
    with FlopCounterMode(display=False) as counter:
        part.ours()
    rounds = max(1, min(repeats, int(_SECONDS / (3 * taken))))
    sides = (
        (part.ours, reuse_host_memory),
        (part.published, glibc_memory),
        (part.published, reuse_host_memory),
    )
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for (run, policy), found in zip(sides, seconds, strict=True):
            policy()
            if taken < _SLOW:
                run()  # The heap grows to what this side keeps, and settles; of no weight in a slow part.
                run()
            found.append(timed(run, device))
    reuse_host_memory()
    ours, published, kept = (statistics.median(found) for found in seconds)
    work = counter.get_total_flops()
    return Comparison(part, rounds, ours, published, kept, ours_bytes, published_bytes, work, remark)


def glibc_memory() -> None:
    """Hand freed blocks back to the system as glibc does when nobody tells it otherwise (glibc only; else nothing).

    It raises its thresholds as a process frees large blocks; a setting once made stops that, so they are set to where
    it would end, which favours the published side.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in _GLIBC.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


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
