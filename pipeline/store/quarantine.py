"""Files known to be damaged, by name: `quarantine.json` beside the manifest.

`capgap verify --quarantine` writes it. A reader raises at such a shard without opening it, a training that may skip
takes other sequences, and the stage that wrote it makes it anew when it is run again, whatever its digest says: that
may have been taken of bytes that were damaged already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from capgap.pipeline.store.files import read_small, write_atomically
from capgap.schemas.errors import CorruptError

QUARANTINE_NAME = "quarantine.json"


def read_quarantine(folder: Path) -> dict[str, str]:
    """What is wrong with each damaged file, by its path in the folder.

    Raises:
        CorruptError: the list cannot be understood.
    """
    path = folder / QUARANTINE_NAME
    try:
        found = json.loads(read_small(path))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(why, str) for why in found.values()):
        raise CorruptError(
            "the list of damaged files cannot be understood",
            where=path,
            expected="reasons by file name",
            fix="delete it and run `capgap verify --quarantine` again",
        )
    return found


def write_quarantine(folder: Path, damaged: Mapping[str, str]) -> None:
    """Make the list say exactly this."""
    if damaged:
        write_atomically(folder / QUARANTINE_NAME, json.dumps(dict(damaged), indent=1))
    else:
        (folder / QUARANTINE_NAME).unlink(missing_ok=True)
