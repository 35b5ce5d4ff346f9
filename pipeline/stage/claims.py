"""Claims on units of work: each unit has a lock of its own, so that no two processes make the same one at a time.

A lock ends with the process that holds it, so another process may claim what a killed one left unfinished.
"""

from __future__ import annotations

from collections.abc import Iterator

from capgap.pipeline.stage.context import Slice
from capgap.pipeline.stage.unit_notes import UnitNotes
from capgap.pipeline.store.locks import ProcessLock


class Claims:
    """The locks on the units that this process is working on.

    Args:
        notes: Notes of the finished units.
        part: Slice of the units that this process may make.
    """

    def __init__(self, notes: UnitNotes, part: Slice) -> None:
        self._notes, self._part = notes, part
        self._held: dict[int, ProcessLock] = {}
        self._folder = notes.work / f"claims-{notes.name}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def take_each(self) -> Iterator[int]:
        """Claim and yield one unit of the slice after another, until all are finished or claimed by other processes."""
        taken = True
        while taken:
            taken, made = False, self._notes.made()
            for unit in filter(self._part.has, range(self._notes.total)):
                if unit not in made and self._take(unit):
                    taken = True
                    yield unit
                    made = self._notes.made()

    def release(self, unit: int) -> None:
        """Release the lock of a finished unit."""
        self._held.pop(unit).close()

    def close(self) -> None:
        """Release every lock that this process holds."""
        for unit in list(self._held):
            self.release(unit)

    def _take(self, unit: int) -> bool:
        if unit in self._held:
            return False
        try:
            lock = ProcessLock(self._folder / f"{unit:06d}.lock")
        except FileNotFoundError:
            # the work folder is gone: the manifest was written
            return False
        if not lock.exclusive() or unit in self._notes.made() or self._notes.is_over():
            lock.close()
            return False
        self._held[unit] = lock
        return True
