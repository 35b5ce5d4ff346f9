"""Rules that choose a teacher for a student without knowing the student's own losses.

Legend: M teachers of a student, B sets of mean losses (the first as measured, the others from resampled seeds), K tried
values of a rule's constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.pipeline.plan.published import (
    CAPACITY_GAP,
    DISTILLATION_SCALING,
    GAP_SLOPE,
    PublishedLaw,
    distilled_loss,
    gap_best_teacher,
)

Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

_NUM_TRIED = 241  # K, number of values that are tried for a rule's constant


@dataclass(frozen=True)
class Student:
    """The facts that a rule may use about a student, and the losses by which the rule is scored.

    Attributes:
        name: Name of the student.
        size: Number of parameters of the student.
        tokens: Number of tokens that the student was trained on.
        alone: Mean loss of the student without a teacher, nats/token.
        teachers: Names of the teachers.
        sizes_M: Numbers of parameters of the teachers.
        losses_M: The teachers' own losses, nats/token.
        initial_kl_M: KL from each teacher to the untrained student, nats/token; None where it was not measured.
        means_BM: Mean losses of the student with each teacher, nats/token, for each set of means.
    """

    name: str
    size: float
    tokens: int
    alone: float
    teachers: tuple[str, ...]
    sizes_M: Array
    losses_M: Array
    initial_kl_M: Array | None
    means_BM: Array

    @property
    def lost(self) -> Array:
        """Loss with each teacher minus the loss with the best teacher, nats/token [B, M]."""
        above_BM: Array = self.means_BM - self.means_BM.min(1, keepdims=True)
        return above_BM


Place = Callable[[Student], Array]
"""Function that returns the places [M] of a student's teachers on the axis on which a rule has a constant."""


@dataclass(frozen=True)
class Rule:
    """A rule that chooses a teacher.

    Attributes:
        name: Name of the rule in tables.
        formula: What the rule chooses, in words.
        choose: Function from the student and the other students to the index of the chosen teacher, for each set of
            means [B].
        needs_others: Whether the rule fits its constant to the other students.
        needs_initial_kl: Whether the rule reads the KL to the untrained student.
        needs_losses: Whether the rule reads the teachers' own losses.
        published: The published law that the rule follows, with its range; None for other rules.
    """

    name: str
    formula: str
    choose: Callable[[Student, Sequence[Student]], Int64Array]
    needs_others: bool = False
    needs_initial_kl: bool = False
    needs_losses: bool = False
    published: PublishedLaw | None = None

    def refusal(self, students: Sequence[Student]) -> str | None:
        """Return why the rule cannot be followed for these students; None where it can."""
        if self.needs_others and len(students) < 2:
            return "it is fitted to the other students, and there is none"
        if self.needs_initial_kl and any(one.initial_kl_M is None for one in students):
            return "the untrained students were not measured: add a budget of 0 tokens to the grid"
        return None


def _always(student: Student, index: int) -> Int64Array:
    return np.full(len(student.means_BM), index, dtype=np.int64)


def _nearest(student: Student, size: float) -> Int64Array:
    return _always(student, int(np.argmin(np.abs(np.log(student.sizes_M / size)))))


def _capacity_gap(student: Student, others: Sequence[Student]) -> Int64Array:
    return _nearest(student, gap_best_teacher(student.size) or GAP_SLOPE * student.size)


def _scaling(student: Student, others: Sequence[Student]) -> Int64Array:
    foretold = [distilled_loss(student.size, student.tokens, loss, student.alone) for loss in student.losses_M]
    return _always(student, int(np.argmin(foretold)))


def _largest(student: Student, others: Sequence[Student]) -> Int64Array:
    return _always(student, int(np.argmax(student.sizes_M)))


def _own_size(student: Student, others: Sequence[Student]) -> Int64Array:
    return _nearest(student, student.size)


def _least_initial_kl(student: Student, others: Sequence[Student]) -> Int64Array:
    assert student.initial_kl_M is not None
    return _always(student, int(np.argmin(student.initial_kl_M)))


def _constant(place: Place) -> Callable[[Student, Sequence[Student]], Int64Array]:
    """Return the choice of the teacher that is nearest to the constant with the least regret of the other students.

    `place` gives the teachers' places on the axis of the constant.
    """

    def choose(student: Student, others: Sequence[Student]) -> Int64Array:
        every = np.concatenate([place(one) for one in others])
        tried_K = np.linspace(every.min(), every.max(), _NUM_TRIED)

        def nearest(one: Student, places: Array) -> Int64Array:
            index: Int64Array = np.argmin(np.abs(place(one) - places[..., None]), axis=-1)
            return index

        lost_BK = np.sum([one.lost[:, nearest(one, tried_K)] for one in others], axis=0)
        best_BK = lost_BK <= lost_BK.min(1, keepdims=True) + 1e-12
        return nearest(student, _middle_of_first(best_BK, tried_K))

    return choose


def _middle_of_first(best_BK: npt.NDArray[np.bool_], tried_K: Array) -> Array:
    """Return the middle [B] of the first run of tried places with the least regret.

    All places of the run are equally good; its ends only depend on which teachers were tried.
    """
    first_B = np.argmax(best_BK, axis=1)
    after_BK = ~best_BK & (np.arange(len(tried_K)) > first_B[:, None])
    last_B = np.where(after_BK.any(1), np.argmax(after_BK, axis=1) - 1, len(tried_K) - 1)
    middle_B: Array = (tried_K[first_B] + tried_K[last_B]) / 2
    return middle_B


def _log_ratio(student: Student) -> Array:
    ratio_M: Array = np.log(student.sizes_M / student.size)
    return ratio_M


def _log_size(student: Student) -> Array:
    size_M: Array = np.log(student.sizes_M)
    return size_M


def _loss_ratio(student: Student) -> Array:
    ratio_M: Array = student.losses_M / student.alone
    return ratio_M


def _log_initial_kl(student: Student) -> Array:
    assert student.initial_kl_M is not None
    kl_M: Array = np.log(student.initial_kl_M)
    return kl_M


RULES = (
    Rule("constant ratio, fitted", "nearest to k S, k from the other students", _constant(_log_ratio), True),
    Rule("one teacher for all, fitted", "nearest to T, T from the other students", _constant(_log_size), True),
    Rule(
        "constant ratio of losses, fitted",
        "teacher's loss nearest to r times the student's loss without a teacher, r from the other students",
        _constant(_loss_ratio),
        True,
        needs_losses=True,
    ),
    Rule(
        "constant initial KL, fitted",
        "KL to the untrained student nearest to c, c from the other students",
        _constant(_log_initial_kl),
        True,
        True,
    ),
    Rule("least initial KL", "least KL to the untrained student", _least_initial_kl, needs_initial_kl=True),
    Rule(
        CAPACITY_GAP.name,
        "nearest to 2.498 S - 11.498M, or to 2.498 S where that is smaller than the student",
        _capacity_gap,
        published=CAPACITY_GAP,
    ),
    Rule(
        DISTILLATION_SCALING.name,
        "least predicted loss, from the measured losses of the teacher and of the student without one",
        _scaling,
        needs_losses=True,
        published=DISTILLATION_SCALING,
    ),
    Rule("largest teacher", "most parameters", _largest),
    Rule("own size", "nearest to the student's parameters", _own_size),
)


def is_outside(law: PublishedLaw, student: Student) -> bool:
    """Return whether a student and its teachers are outside the range in which the law was measured."""
    return not law.covers(student.size, student.tokens, student.sizes_M.tolist())
