"""Errors reported to the person at the keyboard in one line, and the exit codes that go with them."""

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from common.output import safe_output
from common.signals import whole_imports


class UserError(Exception):
    """Something the user can put right. The message names the flag and what would be right; exit code 2."""


class RunStopped(Exception):
    """A run that cannot go on (a non-finite loss, say). The last good checkpoint stays; exit code 1."""


class Terminated(Exception):
    """A run that a signal asked to end, after it has saved its state; exit code 128 + number, as a shell gives."""

    def __init__(self, text: str, number: int = signal.SIGTERM):
        super().__init__(text)
        self.code = 128 + number


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Turn `main(argv)` into a command: exit codes instead of tracebacks for what a user can put right.

    Output that nobody reads, or that a terminal cannot show, ends nothing. Scripts import what takes time within
    `main`, so that an interrupt in the first seconds is reported like any other.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        with safe_output(), whole_imports():
            try:
                return main(argv) or 0
            except (UserError, RunStopped, Terminated, KeyboardInterrupt) as error:
                return report(error)

    return wrapped


def report(error: BaseException) -> int:
    """Print an error as a command ends with it, in one line or as a traceback; its exit code."""
    match error:
        case UserError():
            text, code = f"error: {_one_line(error)}", 2
        case RunStopped():
            text, code = f"stopped: {_one_line(error)}", 1
        case Terminated():
            text, code = f"stopped: {_one_line(error)}", error.code
        case KeyboardInterrupt():
            text, code = "interrupted; what was written is whole, and the same command may be started again", 130
            if os.environ.get("LOCAL_RANK", "0") != "0":
                return code  # Of several processes on a machine the first reports it.
        case _:
            text, code = "".join(traceback.format_exception(error)).rstrip(), 1
    print(text, file=sys.stderr, flush=True)
    return code


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
