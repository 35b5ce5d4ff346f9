"""The table of the law of capacity gap: one row for each run of a grid, as JSON lines.

A grid is teachers x students x token budgets x alpha x init x seeds. JSON lines are enough for hundreds of rows, let a
finished run append one line, and make the difference between two tables readable.

A planned run without a result has a row too, with `loss` null and the reason in `missing`, so that every failed run is
listed by name.
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
    """Name and size of a model of the grid."""

    name: str = Field(min_length=1)
    """Name of the model in the grid."""

    num_parameters: int = Field(gt=0)
    """Number of all parameters; tied ones count once."""

    num_non_embedding_parameters: int = Field(gt=0)
    """Number of parameters without embedding and head."""


class LawTeacher(LawModel):
    """Size and quality of a teacher."""

    loss: float | None = Field(gt=0)
    """Cross-entropy on the grid's held-out text, in nats/token; None if it was not measured, which only a run without a
    result may have."""

    train_tokens: int | None = Field(None, gt=0)
    """Number of tokens that the teacher was trained on, from which its cost follows; None if it is not known."""

    @property
    def known_loss(self) -> float:
        """The loss of the teacher of a finished run, for which it was always measured."""
        assert self.loss is not None
        return self.loss


class LawCache(Record):
    """The cache that a student learned from."""

    identity: str = Field(min_length=1)
    """The identity in the cache's manifest. Rows with the same identity share one cache."""

    recording: RecordingName
    """The recording of the cache that was read."""

    num_ids: int = Field(gt=0)
    """Number of samples (`sampled`) or top-k tokens (`topk`) stored of each distribution."""

    profile: Profile | None = None
    """How exactly `topk` logprobs are stored; None for `sampled`."""

    temperature: float = Field(gt=0)
    """The temperature at which teacher and student were compared."""

    num_tokens: int = Field(gt=0)
    """Number of tokens that the teacher scored."""

    @property
    def kept(self) -> str:
        """The form in which distributions are stored, in words; equal for all caches of a grid."""
        return kept_text(self.recording, self.num_ids, self.profile, self.temperature)


def kept_text(recording: RecordingName, num_ids: int, profile: Profile | None, temperature: float) -> str:
    """Return the form in which distributions are stored, in words. Equal forms give equal texts."""
    return f"{recording} of {num_ids}{f', {profile}' if profile else ''}, temperature {temperature:g}"


class LawRun(Record):
    """One row of the table: one student, trained once."""

    student: LawModel
    """The student that was trained."""

    teacher: LawTeacher | None
    """The teacher whose distributions the student learned from; None in the supervised arm."""

    cache: LawCache | None
    """The cache of these distributions; None in the supervised arm."""

    budget: str = Field(min_length=1)
    """Name of the grid's budget, which says how long students train, e.g. `20 tokens a parameter`."""

    tokens: int = Field(ge=0)
    """Number of targets that the student was trained on; 0 for the untrained student, whose `kl` is the initial KL."""

    alpha: float = Field(ge=0, le=1)
    """Weight of the KL to the teacher; 0 in the supervised arm and only there."""

    init: Init = "common"
    """`common`: initial weights that do not depend on the teacher. `pruned`: weights pruned from a teacher."""

    init_source: str | None = None
    """Name of the teacher from which a `pruned` student was pruned."""

    arm: str = Field(min_length=1)
    """Name of the arm in the run file."""

    seed: int = Field(ge=0)
    """Seed of initial weights and data order. Runs of one seed are compared in pairs."""

    loss: float | None
    """Cross-entropy of the trained student on the held-out text, in nats/token; None if there is no result."""

    missing: str | None = None
    """Why there is no result; None if there is one."""

    metrics: dict[str, float] = Field(default_factory=dict)
    """Further measurements of the student by name, e.g. `kl`, `top1`, `ece`, `mmlu`. No law is fitted to them."""

    wall_s: float | None = Field(None, ge=0)
    """Duration of the training in seconds, including killed processes."""

    common: dict[str, Setting] = Field(default_factory=dict)
    """Settings that must be equal in all rows, by name: tokenizer, corpus, held-out text, context rule and so on."""

    per_student: dict[str, Setting] = Field(default_factory=dict)
    """Settings that must be equal in all rows of one student and budget, by name: learning rate, batch and so on."""

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
        """The name of the run in messages, which is different for every row of a table."""
        teacher = self.teacher.name if self.teacher else "supervised"
        init = self.init if self.init_source is None else f"{self.init} from {self.init_source}"
        return f"{self.student.name}, {teacher}, {self.budget}, alpha {self.alpha:g}, {init}, seed {self.seed}"
