"""stdout and stderr of a command: whoever writes to them in this process, no credential leaves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from capgap.schemas.secrets import redacted


@contextmanager
def redacted_streams() -> Iterator[None]:
    """While the block runs, all that Python code prints is redacted: tables, warnings, tracebacks, other packages."""
    _open_what_is_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Redacted(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _open_what_is_closed() -> None:
    """Let what nobody wants to read go nowhere, as where a shell was told `>&-`.

    Python has no stream then; and the next file that is opened, say a shard, would get the stream's number, and
    whatever a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # the lowest that is free is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 (for as long as the process lives)


class _Redacted:
    """A text stream that redacts each text on its way; everything else is the stream's own."""

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
