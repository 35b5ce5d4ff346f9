"""Units of work, each under a lock of its own, so that two processes never make the same one at a time.

A lock ends with its process: what a killed process had claimed is free again, for whoever may make it.
"""

from __future__ import annotations

from collections.abc import Iterator

from capgap.pipeline.stage.context import Slice
from capgap.pipeline.stage.unit_notes import UnitNotes
from capgap.pipeline.store.locks import ProcessLock


class Claims:
    """The locks on units that this process is at.

    Args:
        notes: where finished units are noted.
        part: which units this process may make.
    """

    def __init__(self, notes: UnitNotes, part: Slice) -> None:
        self._notes, self._part = notes, part
        self._held: dict[int, ProcessLock] = {}
        self._folder = notes.work / f"claims-{notes.name}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def take_each(self) -> Iterator[int]:
        """Each unit of the slice, once it is claimed, until all are made or claimed by others."""
        taken = True
        while taken:
            taken, made = False, self._notes.made()
            for unit in filter(self._part.has, range(self._notes.total)):
                if unit not in made and self._take(unit):
                    taken = True
                    yield unit
                    made = self._notes.made()

    def release(self, unit: int) -> None:
        """Let a unit go: it is made."""
        self._held.pop(unit).close()

    def close(self) -> None:
        """Let all go that are held."""
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
