"""How long all processes of a stage worked on it, for the manifest: rates divide all its tokens by all their time.

a killed process: begin and end are in its heartbeat ----> begin --> work/seconds.json --> manifest
a slice that leaves the rest to others --> add_seconds -----------------/
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from capgap.pipeline.stage.heartbeat import heartbeat_files, read_heartbeats
from capgap.pipeline.store.files import write_atomically
from capgap.schemas.heartbeat import Heartbeat

_NOTE_NAME = "seconds.json"


def add_seconds(work: Path, seconds: float) -> None:
    """Write down how long a process that does not finish the stage worked on it.

    Args:
        work: The stage folder's `work`, which no other process changes meanwhile.
        seconds: Seconds to add to those of earlier processes.
    """
    write_atomically(work / _NOTE_NAME, json.dumps(_noted(work) + seconds))


def take_over(work: Path) -> None:
    """Write down how long ended processes worked, before new heartbeats replace theirs.

    The caller has locked the folder for itself.
    """
    if seconds := sum(map(_of, read_heartbeats(work))):
        add_seconds(work, seconds)
    for path in heartbeat_files(work):
        path.unlink(missing_ok=True)


def earlier_s(work: Path) -> float:
    """Return the seconds that all processes but this one worked."""
    others = [beat for beat in read_heartbeats(work) if (beat.machine, beat.pid) != (os.uname().nodename, os.getpid())]
    return _noted(work) + sum(map(_of, others))


def _of(beat: Heartbeat) -> float:
    # a clock may have been set back
    return max(0.0, beat.written_s - beat.begun_s)


def _noted(work: Path) -> float:
    """Return the seconds in the note; 0 where it cannot be read, because no result depends on it."""
    try:
        found = json.loads((work / _NOTE_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return 0.0
    return float(found) if isinstance(found, float | int) else 0.0
