"""The result of `capgap plan` as data: what the stages of a run will take."""

from __future__ import annotations

from pydantic import JsonValue

from capgap.schemas.base import Record
from capgap.schemas.law_prediction import Prediction


class Figure(Record):
    """A number with its source; if there is no number, what is missing."""

    value: float | None
    """The number; None if it cannot be estimated."""

    source: str
    """How the number was counted, measured or computed; without a number, what the user can provide to get one."""


class StagePlan(Record):
    """The estimated work of one instance of a stage."""

    instance: str
    """Name of the instance, for example `train/distilled/seed-0`."""

    state: str
    """State of the instance: current, stale, partial, missing or reused. A current or reused one needs no more work."""

    tokens: Figure
    """Number of targets that the instance processes."""

    disk_bytes: Figure
    """Bytes of its finished folder."""

    scratch_bytes: Figure
    """Bytes of temporary files while it works, in addition to the finished folder."""

    tokens_per_s: Figure
    """Throughput of one engine or one training, in tokens per second."""

    device_hours: Figure
    """Hours of all its devices together; 0 if it is current or reused."""


class BreakEven(Record):
    """The number of students from which a cache costs less than running the teacher beside each student."""

    accounting: str
    """What is counted: floating-point operations, or seconds of a device."""

    num_students: int | None
    """The smallest such number; None if a cache never costs less, or if a figure is missing."""

    source: str
    """The figures that the number is computed from, or what is missing."""


class RunPlan(Record):
    """The estimated work of all stages of a run, and what published laws say about the choice of its teacher."""

    name: str
    """Name of the run."""

    teacher_parameters: Figure
    """Number of all the teacher's parameters."""

    student_parameters: Figure
    """Number of all the student's parameters."""

    stages: tuple[StagePlan, ...]
    """The stages in order."""

    needed_bytes: Figure
    """Bytes of disk still needed: for everything that is not current, plus the largest temporary files of one stage."""

    free_bytes: int
    """Free bytes on the disk to which the run writes."""

    device_hours: Figure
    """Device hours of everything that is not current."""

    num_students: int
    """Number of students that this run trains from the cache."""

    break_even: tuple[BreakEven, ...]
    """Break-even points, one for each accounting."""

    laws: tuple[Prediction, ...]
    """Predictions of the published laws; empty if the student's size or tokens are not known."""

    notes: tuple[str, ...]
    """Further remarks."""


class Calibration(Record):
    """Rates that `capgap plan --calibrate` measured, stored as `calibration.json` in the run's folder."""

    device: str
    """Device on which they were measured."""

    made: str
    """Time of the measurement, in ISO 8601."""

    resolved: dict[str, JsonValue]
    """The run file with its flags, and the kind of device in place of `auto`. A rate is used only if the settings that
    affect it are unchanged."""

    tokens_per_s: dict[str, Figure]
    """Tokens per second by stage; without a number, why it could not be measured."""
