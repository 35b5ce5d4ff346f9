"""Removes credentials from everything that this process writes to stdout and stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from capgap.schemas.secrets import redacted


@contextmanager
def redacted_streams() -> Iterator[None]:
    """Redact all that Python code prints in the block: tables, warnings, tracebacks, output of other packages."""
    _open_what_is_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Redacted(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _open_what_is_closed() -> None:
    """Open /dev/null in place of standard streams that are closed, for example by `>&-` in a shell.

    Otherwise Python has no stream, and the next file that is opened, such as a shard, gets the stream's number and with
    it whatever a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # os.open returns the lowest free number, which is the closed stream's
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 (stays open until the process ends)


class _Redacted:
    """A text stream that redacts each text before writing it to another stream, and else behaves like that stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
