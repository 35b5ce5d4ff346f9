"""Notes of the finished units of a stage's work: one file each in a folder of `work`, named by the unit's number.

Readers list the folder and open no file, because network file systems always answer a listing afresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from capgap.schemas.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class UnitNotes:
    """The notes of one stage.

    Attributes:
        folder: Folder of the stage.
        work: Work folder of the stage.
        name: Name of the folder of notes below the work folder.
        total: Number of units to make.
    """

    folder: Path
    work: Path
    name: str
    total: int

    def path(self, unit: int) -> Path:
        """Return the path of a unit's note, which exists once the unit is finished."""
        return self.work / self.name / f"{unit:06d}.json"

    def made(self) -> set[int]:
        """Return the numbers of the units that have a note."""
        try:
            return {int(path.stem) for path in (self.work / self.name).glob("*.json")}
        except FileNotFoundError:
            return set()

    def all_made(self) -> bool:
        """Return whether every unit has a note; the process that writes the manifest verifies the units."""
        return len(self.made()) == self.total

    def is_over(self) -> bool:
        """Return whether the manifest exists, whose writer removes the work folder with all notes after it."""
        return (self.folder / MANIFEST_NAME).is_file()
