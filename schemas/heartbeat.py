"""The heartbeat of a running stage, `work/progress.json`, which other commands show. No result depends on it."""

from __future__ import annotations

from pydantic import Field

from capgap.schemas import manifest
from capgap.schemas.base import Record


class Count(Record):
    """The progress of a stage in the units that it counts now."""

    title: str
    """What the stage is doing, for example `corpus: tokenize student`."""

    done: int
    """Number of finished units, including those of earlier processes."""

    total: int
    """Number of all units."""

    unit: str
    """Name of the units, in the plural."""

    tokens_per_s: float | None = None
    """Tokens per second of this process since it began to count; None if it counts no tokens."""

    eta_s: float | None = None
    """Seconds until the last unit is finished, at the rate of this process; None before its first unit."""

    note: str = ""
    """Text that is shown behind the progress bar."""


class Units(Record):
    """The units of work of a stage, and how finished units are recognised: `work/plan.json`."""

    unit: str
    """Name of the units, in the plural."""

    total: manifest.Count
    """Number of all units."""

    pattern: manifest.InnerPath
    """Glob below `work` of the files of finished units: one file per unit, or one named after the number of units."""


class End(Record):
    """How a process ended that did not finish its stage."""

    what: str
    """The last line that it printed."""

    exit_code: int
    """Exit code of the command."""


class Heartbeat(Record):
    """Which process works on a folder, and how far it is. Times are seconds since 1970 by that machine's clock."""

    machine: str
    """Host name."""

    namespace: str
    """Boot of the machine and namespace of process ids. Process ids can be compared only if both are equal."""

    pid: int = Field(ge=1, lt=1 << 31)
    """Process id."""

    pid_started: int | None
    """Start of the process in the kernel's clock ticks, which tells it from a later process with the same id. None on
    systems other than Linux."""

    phase: str
    """What the process does while it counts nothing, for example `waits for its device`."""

    device: str = ""
    """Device of the stage's model, for example `cuda:0`; empty before the model is on one."""

    count: Count | None = None
    """Progress in units; None before the stage counts any."""

    begun_s: float
    """Time at which the process took the folder."""

    advanced_s: float
    """Time of its last progress."""

    written_s: float
    """Time at which this heartbeat was written."""

    ended: End | None = None
    """How the process ended; None while it runs, or if it was killed."""
