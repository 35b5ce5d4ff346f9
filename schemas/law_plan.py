"""What `capgap law plan` finds of a grid, as data."""

from __future__ import annotations

from capgap.schemas.base import Record
from capgap.schemas.plan import Figure


class PhasePlan(Record):
    """All runs of one kind, together."""

    phase: str
    """corpus, teachers, caches, prunings (of a grid with pruned students), students or measurements."""

    num_runs: int
    """How many there are."""

    num_left: int
    """How many are not current."""

    tokens: Figure
    """Targets that those that are left work on, together."""

    flops: Figure
    """Their floating-point operations: 6 N D for a training, 2 N D for a forward pass."""

    disk_bytes: Figure
    """Bytes of their finished folders."""

    device_hours: Figure
    """Hours of their devices together."""


class StudentPower(Record):
    """The differences between teachers that a student of the grid will show, by the noise of a pilot."""

    student: str
    """Name in the grid."""

    pilot: str
    """Curve of the pilot whose noise is taken: that of the student nearest in size."""

    size_ratio: float
    """Parameters of the student over those of the pilot's."""

    noise: float
    """Standard deviation of one run of the pilot, once its seed and its teacher are taken away, nats."""

    noise_limit: float
    """What the true noise lies below with probability 0.9."""

    smallest: float | None
    """Smallest difference of two teachers that the grid shows with probability 0.8, nats/token; None for a grid of one
    seed or one teacher, which shows none."""

    smallest_cautious: float | None
    """The same where the noise is as large as its limit."""

    wished: float
    """A difference that one would like to see, nats/token."""

    seeds_needed: int | None
    """Seeds that show it with probability 0.8; None where that takes more than 500, or there is one teacher."""

    seeds_needed_cautious: int | None
    """The same where the noise is as large as its limit."""


class LawPlan(Record):
    """What all runs of a grid will take."""

    name: str
    """The grid's."""

    num_teachers: int
    """Teachers."""

    num_students: int
    """Students."""

    num_rows: int
    """Rows of its table: student x (teacher x alpha, or none) x budget x seed; of a pruned student none stands for each
    teacher."""

    num_processes: int
    """Stages that are left, each a process."""

    num_workers: int | None
    """Side by side; None where the grid's device is not there to count."""

    phases: tuple[PhasePlan, ...]
    """In order."""

    flops: Figure
    """Floating-point operations of everything that is left."""

    disk_bytes: Figure
    """Bytes of everything that is left, and the largest scratch of as many stages as there are workers."""

    device_hours: Figure
    """Device hours of everything that is left."""

    hours: Figure
    """Until it is done: device hours over workers."""

    powers: tuple[StudentPower, ...]
    """By student; none without a pilot."""

    notes: tuple[str, ...]
    """What else to know."""
