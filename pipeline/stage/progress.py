"""How far a stage is: a rich bar with tokens/s and time left on a terminal, else a line now and then.

meter --> bar, or lines
      --> heartbeat, on disk, in either case
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.heartbeat import current_heartbeat
from capgap.schemas.heartbeat import Count

# a line at once that it goes on, then now and then
_FIRST_LINE_S, _QUIET_INTERVAL_S = 2.0, 15.0


class Meter(Protocol):
    """Counts finished steps and the tokens in them."""

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        """Count `steps` more steps holding `tokens` tokens; `note` is shown behind them."""


@contextmanager
def progress(title: str, num_steps: int, unit: str, done: int = 0, *, lines: bool = True) -> Iterator[Meter]:
    """A meter for `num_steps` steps of `unit`, of which `done` were finished by an earlier run.

    Without `lines` nothing is logged off a terminal: the caller has lines of its own.
    """
    with _counted(Count(title=title, done=done, total=num_steps, unit=unit)) as tally:
        if _bars_are_seen():
            with _terminal_bar() as bar:
                yield _Both(_Bar(bar, bar.add_task(title, total=num_steps, completed=done, rate="", note="")), tally)
        else:
            yield _Both(_Lines(title, num_steps, unit, done) if lines else _Silence(), tally)


@contextmanager
def _counted(begun: Count) -> Iterator[_Tally]:
    """Put the count into the stage's heartbeat, where there is one, for as long as the block runs."""
    beat, tally = current_heartbeat(), _Tally(begun)
    if beat is None:
        yield tally
        return
    beat.count_with(tally.count)
    try:
        yield tally
    finally:
        beat.count_with(None)


def _bars_are_seen() -> bool:
    # a bar among lines of JSON is none
    return sys.stderr.isatty() and os.environ.get("CAPGAP_LOG_FORMAT", "text") == "text"


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


class _Both:
    def __init__(self, shown: Meter, tally: _Tally) -> None:
        self._shown, self._tally = shown, tally

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        self._shown.advance(steps, tokens, note)
        self._tally.advance(steps, tokens, note)


class _Tally:
    """Counts, and works out rates when it is asked: a corpus has millions of documents."""

    def __init__(self, begun: Count) -> None:
        self._begun, self._steps, self._tokens, self._note = begun, 0, 0, ""
        self._start = time.monotonic()

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        self._steps, self._tokens, self._note = self._steps + steps, self._tokens + tokens, note

    def count(self) -> Count:
        steps, tokens, begun = self._steps, self._tokens, self._begun
        elapsed, done = max(time.monotonic() - self._start, 1e-9), begun.done + steps
        known: dict[str, object] = {"done": done, "note": self._note}
        if tokens:
            known["tokens_per_s"] = round(tokens / elapsed, 1)
        if steps:
            known["eta_s"] = round(elapsed / steps * (begun.total - done), 1)
        return begun.model_copy(update=known)


class _Bar:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task, self._tokens, self._start = bar, task, 0, time.monotonic()

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        self._tokens += tokens
        rate = f"{self._tokens / max(time.monotonic() - self._start, 1e-9):,.0f} tok/s" if self._tokens else ""
        self._bar.update(self._task, advance=steps, rate=rate, note=note)


class _Silence:
    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        pass


class _Lines:
    def __init__(self, title: str, num_steps: int, unit: str, done: int) -> None:
        self._title, self._num_steps, self._unit, self._done, self._first = title, num_steps, unit, done, done
        self._tokens, self._start = 0, time.monotonic()
        self._next = self._start + _FIRST_LINE_S

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        self._done += steps
        self._tokens += tokens
        now = time.monotonic()
        if now < self._next and self._done < self._num_steps:
            return
        self._next = now + _QUIET_INTERVAL_S
        elapsed = max(now - self._start, 1e-9)
        left_s = elapsed / max(self._done - self._first, 1) * (self._num_steps - self._done)
        rate = self._tokens / elapsed
        event(
            "progress",
            f"{self._title}: {self._done} of {self._num_steps} {self._unit}"
            + (f", {rate:,.0f} tokens/s" if self._tokens else "")
            + f", {left_s:.0f} s left"
            + (f", {note}" if note else ""),
            title=self._title,
            done=self._done,
            total=self._num_steps,
            unit=self._unit,
            tokens_per_s=round(rate, 1) if self._tokens else None,
            eta_s=round(left_s, 1),
            note=note or None,
        )
