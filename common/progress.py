"""Progress of long work: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], *, total: int, label: str, every_s: float = 20.0) -> Iterator[T]:
    """Yield `items`; on a terminal under a bar, elsewhere with one line at most every `every_s` seconds."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, leave=False)
        return
    start = printed = time.monotonic()
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - printed >= every_s and n < total:
            left = (now - start) / n * (total - n)
            print(f"{label}: {n}/{total}, about {left:.0f} s left", flush=True)
            printed = now
