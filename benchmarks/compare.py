"""Ours against the published formulation: the same inputs, in one process, in turns, results compared first."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import profile


@dataclass(frozen=True)
class Part:
    """Something to measure.

    name, size: what, and how large. ours, published: do it once and return the result.
    check: raises AssertionError where the two results do not agree as far as they should; returns a remark.
    work: floating-point operations that ours needs, for the share of the ceiling; None where that says nothing.
    """

    name: str
    size: str
    ours: Callable[[], Any]
    published: Callable[[], Any]
    check: Callable[[Any, Any], str]
    work: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Seconds are medians, bytes the peak that one call allocates beyond what was there."""

    part: Part
    ours_s: float
    published_s: float
    ours_bytes: int
    published_bytes: int
    remark: str

    @property
    def ratio(self) -> float:
        return self.published_s / self.ours_s


def compare(part: Part, device: torch.device, *, repeats: int) -> Comparison:
    """Check that both agree, then time them in turns, `repeats` times each, after one call to warm up."""
    remark = part.check(part.ours(), part.published())
    seconds: dict[str, list[float]] = {"ours": [], "published": []}
    for _ in range(repeats):
        for name, run in (("ours", part.ours), ("published", part.published)):
            seconds[name].append(timed(run, device))
    ours, published = (statistics.median(values) for values in seconds.values())
    return Comparison(part, ours, published, peak_bytes(part.ours, device), peak_bytes(part.published, device), remark)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    _wait(device)
    begun = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begun


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The largest sum of tensors allocated at one time by a call, beyond those there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True, use_kineto=True) as record:
        result = run()
    del result
    held = peak = 0
    for event in record.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
