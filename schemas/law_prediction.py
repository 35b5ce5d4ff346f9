"""What a published law predicts for a student, as data."""

from __future__ import annotations

from pydantic import Field

from capgap.schemas.base import Record


class Prediction(Record):
    """What a published law predicts for this student."""

    law: str
    """Its name."""

    source: str
    """Where it was published."""

    validity: str
    """What it was measured on."""

    within_validity: bool
    """Whether this student, these teachers and these tokens lie in there."""

    best_size: float | None
    """Parameters of the best teacher; None where the law has no optimum within what was looked at."""

    summary: str
    """The prediction in words, with what it rests on."""

    losses: dict[str, float] = Field(default_factory=dict)
    """Predicted loss of the student by teacher, nats/token, for a law that gives one."""

    disagreement: str = ""
    """How it stands to the measurement, or to the other laws."""

    @property
    def sentence(self) -> str:
        """The law and its prediction, marked where they go beyond what was measured."""
        return f"{self.law}{'' if self.within_validity else ' (outside what it was measured on)'}: {self.summary}"
