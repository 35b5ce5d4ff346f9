"""The result of `capgap law plan` as data: what a grid will take, and which differences it will show."""

from __future__ import annotations

from capgap.schemas.base import Record
from capgap.schemas.plan import Figure


class PhasePlan(Record):
    """The estimated work of all runs of one kind together."""

    phase: str
    """Kind of the runs: corpus, teachers, caches, prunings (if the grid prunes students), students or measurements."""

    num_runs: int
    """Number of runs."""

    num_left: int
    """Number of runs that still have to be made, because they are not current."""

    tokens: Figure
    """Number of targets of all remaining runs."""

    flops: Figure
    """Floating-point operations of the remaining runs, for N parameters and D tokens: 6 N D for a training, 2 N D for a
    forward pass."""

    disk_bytes: Figure
    """Bytes of the finished folders of the remaining runs."""

    device_hours: Figure
    """Device hours of the remaining runs."""


class StudentPower(Record):
    """Which differences between teachers a student of the grid will show, estimated from the noise of a pilot grid."""

    student: str
    """Name of the student in the grid."""

    pilot: str
    """Curve of the pilot grid whose noise is used: that of the student nearest in size."""

    size_ratio: float
    """Number of parameters of the student over that of the pilot's student."""

    noise: float
    """Standard deviation of a run's loss in the pilot after the effects of seed and teacher are removed, in nats."""

    noise_limit: float
    """Upper limit of the true noise with probability 0.9, in nats."""

    smallest: float | None
    """Smallest difference between two teachers that the grid shows with probability 0.8, in nats/token; None for a grid
    of one seed or one teacher, which shows none."""

    smallest_cautious: float | None
    """The smallest difference that the grid shows if the noise is as large as `noise_limit`."""

    wished: float
    """The difference that the user would like to see, in nats/token."""

    seeds_needed: int | None
    """Number of seeds that show `wished` with probability 0.8; None if it takes more than 500, or with one teacher."""

    seeds_needed_cautious: int | None
    """The number of seeds needed if the noise is as large as `noise_limit`."""


class LawPlan(Record):
    """The estimated work of all runs of a grid."""

    name: str
    """Name of the grid."""

    num_teachers: int
    """Number of teachers."""

    num_students: int
    """Number of students."""

    num_rows: int
    """Number of rows of the grid's table: student x (teacher x alpha, or supervised) x budget x seed; pruned students
    have a supervised row for each teacher."""

    num_processes: int
    """Number of stages that remain, each in its own process."""

    num_workers: int | None
    """Number of processes that work at the same time; None if the grid's device is not on this machine."""

    phases: tuple[PhasePlan, ...]
    """The phases in order."""

    flops: Figure
    """Floating-point operations of everything that remains."""

    disk_bytes: Figure
    """Bytes of everything that remains, plus the temporary files of as many stages as there are workers."""

    device_hours: Figure
    """Device hours of everything that remains."""

    hours: Figure
    """Hours until everything is finished: device hours over workers."""

    powers: tuple[StudentPower, ...]
    """Differences that each student will show; empty without a pilot."""

    notes: tuple[str, ...]
    """Further remarks."""
