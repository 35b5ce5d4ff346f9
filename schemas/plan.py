"""What `capgap plan` finds of a run, as data."""

from __future__ import annotations

from pydantic import JsonValue

from capgap.schemas.base import Record
from capgap.schemas.law_prediction import Prediction


class Figure(Record):
    """A number, and where it comes from; without the number, what is missing."""

    value: float | None
    """The number; None where nothing supports one."""

    source: str
    """What it was counted, measured or computed from; or what to give."""


class StagePlan(Record):
    """What one instance of a stage will take."""

    instance: str
    """For example `train/distilled/seed-0`."""

    state: str
    """current, stale, partial, missing or reused; what is current or reused costs nothing any more."""

    tokens: Figure
    """Targets that it works on."""

    disk_bytes: Figure
    """Bytes of its finished folder."""

    scratch_bytes: Figure
    """More that it takes while it works."""

    tokens_per_s: Figure
    """Throughput of one engine, or one training."""

    device_hours: Figure
    """Hours of its devices together; 0 where it is current or reused."""


class BreakEven(Record):
    """From how many students a cache costs less than a teacher beside each of them."""

    accounting: str
    """What is counted: floating-point operations, or seconds of a device."""

    num_students: int | None
    """The least number; None where a cache never costs less, or where something is missing."""

    source: str
    """The figures behind it, or what is missing."""


class RunPlan(Record):
    """What all stages of a run will take, and what is known of the choice of its teacher."""

    name: str
    """The run's."""

    teacher_parameters: Figure
    """All of the teacher's."""

    student_parameters: Figure
    """All of the student's."""

    stages: tuple[StagePlan, ...]
    """In order."""

    needed_bytes: Figure
    """Disk that is still to be filled: of everything that is not current, and the largest scratch."""

    free_bytes: int
    """Free where the run writes."""

    device_hours: Figure
    """Device hours of everything that is not current."""

    num_students: int
    """That this run trains from the cache."""

    break_even: tuple[BreakEven, ...]
    """By accounting."""

    laws: tuple[Prediction, ...]
    """What the published laws predict; none where the student's size or its tokens are not known."""

    notes: tuple[str, ...]
    """What else to know."""


class Calibration(Record):
    """Rates that `capgap plan --calibrate` probed, kept as `calibration.json` in the run's folder."""

    device: str
    """What they were probed on."""

    made: str
    """When, as ISO 8601."""

    resolved: dict[str, JsonValue]
    """The run file with its flags: a rate counts where the settings that decide it are the same."""

    tokens_per_s: dict[str, Figure]
    """By stage; without a number, why it could not be probed."""
