"""The list of damaged files, `quarantine.json` next to the manifest.

`capgap verify --quarantine` writes the list. A reader raises an error at a listed shard without opening it, and a
training that may skip takes other sequences. The stage that wrote the shard makes it again on its next run, even if its
digest is right, because the digest may have been computed from damaged bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from capgap.pipeline.store.files import read_small, write_atomically
from capgap.schemas.errors import CorruptError

QUARANTINE_NAME = "quarantine.json"


def read_quarantine(folder: Path) -> dict[str, str]:
    """Return the fault of each damaged file, by the file's path in the folder.

    Raises:
        CorruptError: The list is no JSON object of texts.
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
    """Replace the list of damaged files, or remove it if no file is damaged."""
    if damaged:
        write_atomically(folder / QUARANTINE_NAME, json.dumps(dict(damaged), indent=1))
    else:
        (folder / QUARANTINE_NAME).unlink(missing_ok=True)
