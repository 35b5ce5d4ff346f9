"""Which units of a stage's work are finished: one file each in a folder of `work`, named by the unit's number.

Whoever looks lists the folder, and looks at no file: network file systems answer that afresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from capgap.schemas.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class UnitNotes:
    """The notes of one stage.

    Attributes:
        folder: of the stage.
        work: its work folder.
        name: of the folder of notes below that.
        total: units that there are to make.
    """

    folder: Path
    work: Path
    name: str
    total: int

    def path(self, unit: int) -> Path:
        """The note of a unit, which stands when it is finished."""
        return self.work / self.name / f"{unit:06d}.json"

    def made(self) -> set[int]:
        """Units that say they are finished."""
        try:
            return {int(path.stem) for path in (self.work / self.name).glob("*.json")}
        except FileNotFoundError:
            return set()

    def all_made(self) -> bool:
        """Whether all do; whoever writes the manifest verifies them."""
        return len(self.made()) == self.total

    def is_over(self) -> bool:
        """Whether the manifest stands: whoever writes it removes the work folder after it, and all notes with it."""
        return (self.folder / MANIFEST_NAME).is_file()
