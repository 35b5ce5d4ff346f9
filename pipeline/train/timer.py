"""Where the time of a training goes: to its steps, to waiting for the loader, or to measurements between them."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from capgap.pipeline.store import Batch


class TrainingTimer:
    """Counts the seconds in which no step was computed.

    Attributes:
        data_wait_s: seconds spent waiting for the loader's next micro-batch.
        excluded_s: seconds spent in measurements, which are no part of the training.
    """

    def __init__(self) -> None:
        self.data_wait_s = self.excluded_s = 0.0

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Count the time of the block as no part of the training."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.excluded_s += time.monotonic() - begun


class Loader(Protocol):
    """What yields the micro-batches of a training, and can go on where it stopped."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Generator[Batch, None, None] | Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class TimedLoader:
    """The same loader; the timer counts how long each micro-batch was waited for."""

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
        """As the loader's."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As the loader's."""
        self._loader.load_state_dict(state)
