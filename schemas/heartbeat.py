"""The heartbeat of a stage that is at work: `work/progress.json`. No result depends on it."""

from __future__ import annotations

from pydantic import Field

from capgap.schemas import manifest
from capgap.schemas.base import Record


class Count(Record):
    """How far a stage is in what it counts now."""

    title: str
    """What is being done, for example `corpus: tokenize student`."""

    done: int
    """Finished units, those of earlier processes among them."""

    total: int
    """Units in all."""

    unit: str
    """What is counted, in the plural."""

    tokens_per_s: float | None = None
    """The rate of this process, since it began to count; None where no tokens are counted."""

    eta_s: float | None = None
    """Seconds to the last unit, at the pace of this process; None before the first one."""

    note: str = ""
    """What stands behind the progress bar."""


class Units(Record):
    """What a stage has to do, and where its finished units are seen: `work/plan.json`."""

    unit: str
    """What is counted, in the plural."""

    total: manifest.Count
    """How many there are."""

    pattern: manifest.InnerPath
    """Glob below `work` of the files of which there is one a unit, or one named after the number of finished units."""


class End(Record):
    """How a process ended that did not finish its stage."""

    what: str
    """Its last line."""

    exit_code: int
    """As the command ends."""


class Heartbeat(Record):
    """Who is at work on a folder, and how far. Times are seconds since 1970 by the clock of that machine."""

    machine: str
    """Host name."""

    namespace: str
    """The start of the machine and the namespace of process ids; a process id means something only within both."""

    pid: int = Field(ge=1, lt=1 << 31)
    """Process id."""

    pid_started: int | None
    """When the process began, in the kernel's own count: another process may get its id later. None off Linux."""

    phase: str
    """What it does outside of what it counts, for example `waits for its device`."""

    device: str = ""
    """Where its model is, as `cuda:0`; empty where it has none yet."""

    count: Count | None = None
    """How far it is; None before it counts."""

    begun_s: float
    """When the process took the folder."""

    advanced_s: float
    """When it last got on."""

    written_s: float
    """When it wrote this."""

    ended: End | None = None
    """How it ended; None while it is at work, or where it was killed."""
