"""Measures the time that a training spends on waiting for its loader and on measurements between its steps."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from capgap.pipeline.store import Batch


class TrainingTimer:
    """Counts the seconds in which no step is computed.

    Attributes:
        data_wait_s: Seconds spent waiting for the loader's next micro-batch.
        excluded_s: Seconds spent in measurements, which do not count as training.
    """

    def __init__(self) -> None:
        self.data_wait_s = self.excluded_s = 0.0

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Count the time of the block as `excluded_s`."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.excluded_s += time.monotonic() - begun


class Loader(Protocol):
    """An iterable over the micro-batches of a training, which can resume from a saved state."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Generator[Batch, None, None] | Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a stored state."""


class TimedLoader:
    """Wraps a loader, and lets a timer count how long each micro-batch is waited for."""

    def __init__(self, loader: Loader, timer: TrainingTimer) -> None:
        self._loader, self._timer = loader, timer

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        try:
            while True:
                begun = time.monotonic()
                batch = next(batches, None)
                self._timer.data_wait_s += time.monotonic() - begun
                if batch is None:
                    return
                yield batch
        finally:
            if isinstance(batches, Generator):
                batches.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped loader."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the wrapped loader resume from a stored state."""
        self._loader.load_state_dict(state)
