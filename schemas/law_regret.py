"""The part of `law.json` about rules for choosing a teacher: what a student loses that follows each of them."""

from __future__ import annotations

from capgap.schemas.base import Record
from capgap.schemas.law import Init
from capgap.schemas.results import Interval


class Choice(Record):
    """What a rule chose for one student, without having seen that student's losses."""

    student: str
    """Its name."""

    teacher: str
    """The teacher chosen."""

    regret: float
    """Loss of the student with this teacher minus that with its best, nats/token."""


class RuleScore(Record):
    """One rule for choosing a teacher, over all students."""

    name: str
    """The rule's name."""

    formula: str
    """What it chooses, in words."""

    regret: float | None
    """Mean over students, nats/token; None where the rule could not be followed."""

    interval: Interval | None = None
    """95 % of the regret over resampled seeds, the best teacher and what the rule fits being found anew each time."""

    behind: Interval | None = None
    """95 % of the regret minus that of the first rule, over the same resamples."""

    choices: tuple[Choice, ...] = ()
    """By student."""

    outside: tuple[str, ...] = ()
    """Students that lie outside what a published rule was measured on."""

    refused: str | None = None
    """Why the rule could not be followed."""


class RegretTable(Record):
    """All rules over the students of one budget, alpha and init, the one of least regret first."""

    budget: str
    """Name."""

    alpha: float
    """Weight of the KL."""

    init: Init
    """Where the first weights come from."""

    students: tuple[str, ...]
    """Those that the rules are scored on."""

    num_seeds: int
    """Seeds that are complete for all of these students."""

    floor: float
    """Mean over students and seeds of what is lost by the teacher that was best in the student's other seeds: the noise
    of seeds alone costs that much."""

    rules: tuple[RuleScore, ...]
    """By regret; those that could not be followed last."""

    @property
    def title(self) -> str:
        """How people call it."""
        return f"{self.budget}, alpha {self.alpha:g}, {self.init} init"
