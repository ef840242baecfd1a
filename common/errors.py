"""Errors told to the person at the keyboard in one line, and the exit codes that go with them."""

import functools
import sys
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
        except UserError as error:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            return 2
        except RunStopped as error:
            print(f"stopped: {_one_line(error)}", file=sys.stderr)
            return 1
        except Terminated as error:
            print(f"stopped: {_one_line(error)}", file=sys.stderr)
            return 143
        except KeyboardInterrupt:
            print("interrupted; start the same command again to go on from the last checkpoint", file=sys.stderr)
            return 130

    return wrapped


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
