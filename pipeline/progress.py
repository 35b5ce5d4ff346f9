"""One progress bar for every stage: a rich bar with tokens/s and time left on a terminal, else a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LOG = logging.getLogger("capgap")
_QUIET_INTERVAL_S = 15.0


class Meter(Protocol):
    """Counts finished steps and the tokens in them."""

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        """Count `steps` more steps holding `tokens` tokens; `note` is shown behind them."""


@contextmanager
def progress(title: str, num_steps: int, unit: str, done: int = 0) -> Iterator[Meter]:
    """A meter for `num_steps` steps of `unit`, of which `done` were finished by an earlier run."""
    if sys.stderr.isatty():
        with _terminal_bar() as bar:
            yield _Bar(bar, bar.add_task(title, total=num_steps, completed=done, rate="", note=""))
    else:
        yield _Lines(title, num_steps, unit, done)


def _terminal_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>14}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        refresh_per_second=4,
    )


class _Bar:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task, self._tokens, self._start = bar, task, 0, time.monotonic()

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        self._tokens += tokens
        rate = f"{self._tokens / max(time.monotonic() - self._start, 1e-9):,.0f} tok/s" if self._tokens else ""
        self._bar.update(self._task, advance=steps, rate=rate, note=note)


class _Lines:
    def __init__(self, title: str, num_steps: int, unit: str, done: int) -> None:
        self._title, self._num_steps, self._unit, self._done, self._first = title, num_steps, unit, done, done
        self._tokens, self._start = 0, time.monotonic()
        self._last = self._start

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        self._done += steps
        self._tokens += tokens
        now = time.monotonic()
        if now - self._last < _QUIET_INTERVAL_S and self._done < self._num_steps:
            return
        self._last = now
        elapsed = max(now - self._start, 1e-9)
        left_s = elapsed / max(self._done - self._first, 1) * (self._num_steps - self._done)
        rate = f", {self._tokens / elapsed:,.0f} tokens/s" if self._tokens else ""
        tail = f", {note}" if note else ""
        _LOG.info(
            "%s: %d of %d %s%s, %.0f s left%s", self._title, self._done, self._num_steps, self._unit, rate, left_s, tail
        )
