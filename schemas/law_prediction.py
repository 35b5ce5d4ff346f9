"""The prediction of a published law for a student, as data."""

from __future__ import annotations

from pydantic import Field

from capgap.schemas.base import Record


class Prediction(Record):
    """The prediction of a published law for one student."""

    law: str
    """Name of the law."""

    source: str
    """Publication of the law."""

    validity: str
    """Range of models and tokens on which the law was measured, in words."""

    within_validity: bool
    """Whether this student, its teachers and its tokens are within that range."""

    best_size: float | None
    """Number of parameters of the best teacher; None if the law has no optimum in the range that was searched."""

    summary: str
    """The prediction in words, with the numbers that it is based on."""

    losses: dict[str, float] = Field(default_factory=dict)
    """Predicted loss of the student by teacher, in nats/token, if the law predicts losses."""

    disagreement: str = ""
    """Comparison of the prediction with the measurement, or with the other laws, in words."""

    @property
    def sentence(self) -> str:
        """The law and its prediction in a sentence, marked if it is outside the law's range."""
        return f"{self.law}{'' if self.within_validity else ' (outside what it was measured on)'}: {self.summary}"
