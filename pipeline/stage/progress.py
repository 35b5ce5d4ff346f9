"""How far a stage is: on a terminal a bar of rich with tokens/s and time left, elsewhere a line now and then.

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

# the first line comes early, to show that work goes on; the others come now and then
_FIRST_LINE_S, _QUIET_INTERVAL_S = 2.0, 15.0


class Meter(Protocol):
    """Counts finished steps and the tokens in them."""

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        """Count `steps` more finished steps with `tokens` tokens in all; `note` is shown after the count."""

    def advance_within(self, steps: float) -> None:
        """Count a part of the steps at work; the `advance` that counts them as finished does not count it again."""


@contextmanager
def progress(title: str, num_steps: int, unit: str, done: int = 0, *, lines: bool = True) -> Iterator[Meter]:
    """Show a meter for `num_steps` steps of `unit`, of which `done` were finished by an earlier run.

    Without `lines` nothing is logged away from a terminal, because the caller logs lines of its own.
    """
    with _counted(Count(title=title, done=done, total=num_steps, unit=unit)) as tally:
        if _bars_are_seen():
            with _terminal_bar() as bar:
                task = bar.add_task(title, total=num_steps, completed=done, rate="", note="")
                with _heard(_Both(_Bar(bar, task, done), tally)) as meter:
                    yield meter
        else:
            shown = _Lines(title, num_steps, unit, done) if lines else _Silence()
            with _heard(_Both(shown, tally)) as meter:
                yield meter


def advance_within(steps: float) -> None:
    """Report to the meter of this process's stage that `steps` more of the steps at work are done.

    It is for code that knows how far a unit is and has no meter: a shard of a cache takes minutes or hours. Without a
    meter in this process, the steps are added up for `unheard`.
    """
    global _unheard
    if _current is not None:
        _current.advance_within(steps)
    else:
        _unheard += steps


def unheard() -> float:
    """Return the sum of `advance_within` in this process where there was no meter, for a process that has one."""
    return _unheard


_current: Meter | None = None
_unheard = 0.0


@contextmanager
def _counted(begun: Count) -> Iterator[_Tally]:
    """Add the count to the stage's heartbeat, where there is one, for as long as the block runs."""
    beat, tally = current_heartbeat(), _Tally(begun)
    if beat is None:
        yield tally
        return
    beat.count_with(tally.count)
    try:
        yield tally
    finally:
        beat.count_with(None)


@contextmanager
def _heard(meter: Meter) -> Iterator[Meter]:
    """Make this the meter that `advance_within` reports to while the block runs."""
    global _current
    before, _current = _current, meter
    try:
        yield meter
    finally:
        _current = before


def _bars_are_seen() -> bool:
    # no bar is drawn among lines of JSON
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

    def advance_within(self, steps: float) -> None:
        self._shown.advance_within(steps)
        self._tally.advance_within(steps)


class _Tally:
    """Counts steps and tokens; rates are computed only when asked for, since a corpus has millions of documents."""

    def __init__(self, begun: Count) -> None:
        self._begun, self._steps, self._tokens, self._note = begun, 0, 0, ""
        self._start, self._within = time.monotonic(), 0.0

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        self._steps, self._tokens, self._note = self._steps + steps, self._tokens + tokens, note
        self._within = max(0.0, self._within - steps)

    def advance_within(self, steps: float) -> None:
        self._within += steps

    def count(self) -> Count:
        begun, tokens = self._begun, self._tokens
        steps = min(self._steps + int(self._within), max(self._steps, begun.total - begun.done))
        elapsed, done = max(time.monotonic() - self._start, 1e-9), begun.done + steps
        known: dict[str, object] = {"done": done, "note": self._note}
        if tokens:
            known["tokens_per_s"] = round(tokens / elapsed, 1)
        if steps:
            known["eta_s"] = round(elapsed / steps * (begun.total - done), 1)
        return begun.model_copy(update=known)


class _Bar:
    def __init__(self, bar: Progress, task: TaskID, done: int) -> None:
        self._bar, self._task, self._tokens, self._start = bar, task, 0, time.monotonic()
        self._done, self._within = done, 0.0

    def advance_within(self, steps: float) -> None:
        self._within += steps
        self._bar.update(self._task, completed=self._done + int(self._within))

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        self._done, self._within = self._done + steps, max(0.0, self._within - steps)
        self._tokens += tokens
        rate = f"{self._tokens / max(time.monotonic() - self._start, 1e-9):,.0f} tok/s" if self._tokens else ""
        self._bar.update(self._task, completed=self._done + int(self._within), rate=rate, note=note)


class _Silence:
    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        pass

    def advance_within(self, steps: float) -> None:
        pass


class _Lines:
    def __init__(self, title: str, num_steps: int, unit: str, done: int) -> None:
        self._title, self._num_steps, self._unit, self._done, self._first = title, num_steps, unit, done, done
        self._tokens, self._start = 0, time.monotonic()
        self._next = self._start + _FIRST_LINE_S

    def advance_within(self, steps: float) -> None:
        """Do nothing, because the lines count only finished steps."""

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
