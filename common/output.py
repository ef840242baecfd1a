"""What is printed: a stream that fails (nobody reads it any more, its disk is full) ends no work."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Safe:
    """A text stream; what its encoding lacks is escaped, and what cannot be written is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):  # ValueError: closed
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """Send what is buffered nowhere, and all that follows: Python would fail over it at its end, exit code 120."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Standard output and standard error are safe within."""
    with contextlib.redirect_stdout(_safe(sys.stdout)), contextlib.redirect_stderr(_safe(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _safe(stream: TextIO | None) -> Any:
    if isinstance(stream, _Safe):
        return stream
    return _Safe(stream or open(os.devnull, "w"))  # noqa: SIM115
