"""The table of the law of capacity gap: one row for each run of a grid, as JSON lines.

A grid is teachers x students x token budgets x alpha x init x seeds. JSON lines, because a grid has hundreds of rows
and not millions, a finished run appends one line, and a difference between two tables can be read.

A run that was planned and has no result stands in the table too, with `loss` null and the reason in `missing`: so a run
that failed is known by name and not by its absence.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import Record
from capgap.schemas.run_cache import Profile, RecordingName

Setting = str | int | float | bool | None
Init = Literal["common", "pruned"]


class LawModel(Record):
    """Size of a model."""

    name: str = Field(min_length=1)
    """As the grid calls it."""

    num_parameters: int = Field(gt=0)
    """All of them, tied ones once."""

    num_non_embedding_parameters: int = Field(gt=0)
    """Without embedding and head."""


class LawTeacher(LawModel):
    """Size and quality of a teacher."""

    loss: float | None = Field(gt=0)
    """Cross-entropy on the grid's held-out text, nats/token; None where it was not measured, for a run without a
    result."""

    train_tokens: int | None = Field(None, gt=0)
    """Tokens that it was trained on, for what it cost; None where that is not known."""

    @property
    def known_loss(self) -> float:
        """The loss of a teacher that a finished run had: there it was measured."""
        assert self.loss is not None
        return self.loss


class LawCache(Record):
    """The cache that a student learned from."""

    identity: str = Field(min_length=1)
    """The identity in its manifest: rows that name the same one share it."""

    recording: RecordingName
    """Which of its recordings was read."""

    num_ids: int = Field(gt=0)
    """Samples (`sampled`) or top-k tokens (`topk`) of each distribution."""

    profile: Profile | None = None
    """How exactly `topk` logprobs are stored; None for `sampled`."""

    temperature: float = Field(gt=0)
    """The temperature at which teacher and student were compared."""

    num_tokens: int = Field(gt=0)
    """Tokens that the teacher scored."""

    @property
    def kept(self) -> str:
        """What was kept of each distribution, in words; equal for all caches of a grid."""
        return kept_text(self.recording, self.num_ids, self.profile, self.temperature)


def kept_text(recording: RecordingName, num_ids: int, profile: Profile | None, temperature: float) -> str:
    """What a recording keeps of each distribution, in words that are equal where it is equal."""
    return f"{recording} of {num_ids}{f', {profile}' if profile else ''}, temperature {temperature:g}"


class LawRun(Record):
    """One student, trained once."""

    student: LawModel
    """What was trained."""

    teacher: LawTeacher | None
    """Whose distributions it learned; None in the supervised arm."""

    cache: LawCache | None
    """Where they were kept; None in the supervised arm."""

    budget: str = Field(min_length=1)
    """Name of the column of the grid that says how long students train, e.g. `20 tokens a parameter`."""

    tokens: int = Field(ge=0)
    """Targets that the student was trained on; 0 for the untrained student, whose `kl` is the initial one."""

    alpha: float = Field(ge=0, le=1)
    """Weight of the KL to the teacher; 0 in the supervised arm and only there."""

    init: Init = "common"
    """`common`: first weights that do not depend on the teacher. `pruned`: cut out of a teacher."""

    init_source: str | None = None
    """Name of the teacher that a `pruned` student was cut out of."""

    arm: str = Field(min_length=1)
    """Name of the arm in the run file."""

    seed: int = Field(ge=0)
    """Seed of first weights and data order: runs of one seed are paired."""

    loss: float | None
    """Cross-entropy of the trained student on the held-out text, nats/token; None where there is no result."""

    missing: str | None = None
    """Why there is no result."""

    metrics: dict[str, float] = Field(default_factory=dict)
    """Further measurements of the student by name, e.g. `kl`, `top1`, `ece`, `mmlu`; kept here, not fitted."""

    wall_s: float | None = Field(None, ge=0)
    """Seconds that the training took, those of killed processes among them."""

    common: dict[str, Setting] = Field(default_factory=dict)
    """What must be equal in all rows, by name: tokenizer, corpus, held-out text, context rule, precision, ..."""

    per_student: dict[str, Setting] = Field(default_factory=dict)
    """What must be equal in all rows of one student and budget, by name: learning rate, batch, ..."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        supervised = self.teacher is None
        if supervised != (self.alpha == 0):
            raise ValueError(
                f"alpha: found {self.alpha:g} {'without' if supervised else 'with'} a teacher, expected 0 without one "
                "and more than 0 with one"
            )
        if supervised != (self.cache is None):
            raise ValueError("cache: expected one where there is a teacher, and none in the supervised arm")
        if (self.init == "pruned") != (self.init_source is not None):
            raise ValueError("init_source: expected the teacher's name where init is pruned, and nothing otherwise")
        if (self.loss is None) == (self.missing is None):
            raise ValueError("missing: expected the reason where loss is null, and nothing where there is a loss")
        if self.loss is not None and self.teacher is not None and self.teacher.loss is None:
            raise ValueError("teacher.loss: found nothing beside a student's loss, expected the teacher's too")
        if self.loss is not None and not (math.isfinite(self.loss) and self.loss > 0):
            raise ValueError(f"loss: found {self.loss}, expected a finite number above 0, or null and a reason")
        return self

    @property
    def name(self) -> str:
        """How people call the run; different for all rows of a table."""
        teacher = self.teacher.name if self.teacher else "supervised"
        init = self.init if self.init_source is None else f"{self.init} from {self.init_source}"
        return f"{self.student.name}, {teacher}, {self.budget}, alpha {self.alpha:g}, {init}, seed {self.seed}"
