"""Signals that ask a run to save and end, in the process that trains and in those that load pictures for it."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

# Clusters and torchrun send the first, a keyboard the second, a closed terminal the third, Slurm (--signal) the last.
STOP = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
# A second interrupt after so many seconds ends at once; before, it is the first one passed on by a launcher.
_AGAIN_S = 3.0
# Seconds until an interrupt is tried again.
_RETRY_S = 0.05
# Seconds that a process that loads pictures goes on after SIGTERM, if nothing ends it before.
_LEFT_S = 300


@contextlib.contextmanager
def whole_imports() -> Iterator[None]:
    """An interrupt that comes during an import takes effect after it, for as long as this lasts.

    Half-way it would be swallowed by some packages, and leave others broken. Where something else than Python's own
    handler is in place, and outside the main thread, nothing changes.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                again = threading.Timer(_RETRY_S, os.kill, (os.getpid(), number))
                again.daemon = True
                again.start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Which of the signals `STOP` has come, 0 for none. Outside the main thread: never one.

    Signals that are ignored at the start, as under nohup, stay so. Raises: KeyboardInterrupt for a second interrupt.
    """
    asked: list[tuple[int, float]] = []
    own = os.getpid()

    def ask(number: int, frame: object) -> None:
        if os.getpid() != own:
            return  # a process that loads pictures, and that only copied this handler
        if number == signal.SIGINT and any(n == number and time.monotonic() - at > _AGAIN_S for n, at in asked):
            raise KeyboardInterrupt
        asked.append((number, time.monotonic()))

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    heard = [number for number in STOP if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield lambda: asked[0][0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_workers(start: Callable[[], T]) -> T:
    """start(), in which processes are forked that hear no signal of `STOP` before `obey_later` runs in them."""
    if not hasattr(signal, "pthread_sigmask"):
        return start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        return start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_later(*_: Any) -> None:
    """In a process that loads pictures: SIGTERM to the whole group is for the process that trains, which still needs
    pictures until it has saved, and then ends the others.

    Other signals do nothing there: the handler of `stop_signals` is copied, and torch's loader ignores an interrupt.
    """
    # Not for ever: it is also what Python sends to processes that are left at its end.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LEFT_S))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
