"""Errors told to the person at the keyboard in one line, and the exit codes that go with them."""

import functools
import sys
import traceback
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Something the user can put right. The message names the flag and what would be right; exit code 2."""


class RunStopped(Exception):
    """A run that cannot go on (a non-finite loss, say). The last good checkpoint stays; exit code 1."""


class Terminated(Exception):
    """A run that was told to end (SIGTERM) and has saved where it stands; exit code 143, as a shell gives."""


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Turn `main(argv)` into a command: exit codes instead of tracebacks for what a user can put right."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except (UserError, RunStopped, Terminated, KeyboardInterrupt) as error:
            return tell(error)

    return wrapped


def tell(error: BaseException) -> int:
    """Print an error as a command ends with it, in one line or as a traceback; its exit code."""
    match error:
        case UserError():
            text, code = f"error: {_one_line(error)}", 2
        case RunStopped():
            text, code = f"stopped: {_one_line(error)}", 1
        case Terminated():
            text, code = f"stopped: {_one_line(error)}", 143
        case KeyboardInterrupt():
            text, code = "interrupted; start the same command again to go on from the last checkpoint", 130
        case _:
            text, code = "".join(traceback.format_exception(error)).rstrip(), 1
    print(text, file=sys.stderr, flush=True)
    return code


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
