"""The part of `law.json` about rules for choosing a teacher, and how much worse students are by following them."""

from __future__ import annotations

from capgap.schemas.base import Record
from capgap.schemas.law import Init
from capgap.schemas.results import Interval


class Choice(Record):
    """The teacher that a rule chose for one student, without having seen that student's losses."""

    student: str
    """Name of the student."""

    teacher: str
    """Name of the chosen teacher."""

    regret: float
    """Loss of the student with this teacher minus its loss with its best teacher, in nats/token."""


class RuleScore(Record):
    """One rule for choosing a teacher, over all students."""

    name: str
    """The rule's name."""

    formula: str
    """Which teacher the rule chooses, in words."""

    regret: float | None
    """Mean regret over students, in nats/token; None if the rule could not be applied."""

    interval: Interval | None = None
    """The 95 % interval of the regret over resampled seeds. Best teacher and rule are fitted again in each resample."""

    behind: Interval | None = None
    """The 95 % interval of the regret minus that of the first rule, over the same resamples."""

    choices: tuple[Choice, ...] = ()
    """The rule's choice for each student."""

    outside: tuple[str, ...] = ()
    """Students outside the range on which a published rule was measured."""

    refused: str | None = None
    """Why the rule could not be applied; None if it was."""


class RegretTable(Record):
    """All rules over the students of one budget, alpha and init, the rule of least regret first."""

    budget: str
    """Name of the budget."""

    alpha: float
    """Weight of the KL."""

    init: Init
    """Where the initial weights come from."""

    students: tuple[str, ...]
    """Students on which the rules are scored."""

    num_seeds: int
    """Number of seeds for which no run of these students is missing."""

    floor: float
    """Mean regret, over students and seeds, of choosing the teacher that is best in the student's other seeds. The
    noise of seeds alone costs that much, in nats/token."""

    rules: tuple[RuleScore, ...]
    """The rules by regret; rules that could not be applied come last."""

    @property
    def title(self) -> str:
        """The name of the table in headings."""
        return f"{self.budget}, alpha {self.alpha:g}, {self.init} init"
