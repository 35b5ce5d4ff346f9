"""Scores rules for choosing a teacher by regret: the loss with the chosen teacher minus the loss with the best one.

Legend: M teachers, R seeds, B sets of mean losses.

Each student is left out in turn. A rule with a constant fits it to the other students, and its choice is compared with
the best teacher of the student that was left out. For intervals, whole seeds are resampled, alike for all students, and
both the constants and the best teachers are determined anew from each resample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from capgap.pipeline.eval.intervals import interval_of, resample_weights
from capgap.pipeline.law.grid import TeacherCurve, size_of
from capgap.pipeline.law.rules import RULES, Rule, Student, is_outside
from capgap.schemas.law_curve import Size
from capgap.schemas.law_regret import Choice, RegretTable, RuleScore

Array = npt.NDArray[np.float64]

NUM_RESAMPLES = 1000
_MIN_SEEDS = 2


def regret_tables(curves: Sequence[TeacherCurve], size: Size) -> tuple[RegretTable, ...]:
    """Score all rules for each budget, alpha and init.

    Students with fewer than two teachers or two complete seeds are left out. A group whose students have fewer than two
    complete seeds in common has no table.
    """
    groups: dict[tuple[str, float, str], list[TeacherCurve]] = {}
    for curve in curves:
        if len(curve.teachers) > 1 and len(curve.seeds) >= _MIN_SEEDS:
            groups.setdefault((curve.init, curve.alpha, curve.budget), []).append(curve)
    return tuple(table for group in groups.values() if (table := _table(group, size)) is not None)


def _table(curves: Sequence[TeacherCurve], size: Size) -> RegretTable | None:
    seeds = sorted(set.intersection(*(set(curve.seeds) for curve in curves)))
    if len(seeds) < _MIN_SEEDS:
        return None
    losses = [curve.losses_MR[:, [curve.seeds.index(seed) for seed in seeds]] for curve in curves]
    weights_BR = np.concatenate([np.ones((1, len(seeds))), resample_weights(len(seeds), NUM_RESAMPLES)])
    students = [
        _student(curve, size, (weights_BR @ losses_MR.T) / len(seeds))
        for curve, losses_MR in zip(curves, losses, strict=True)
    ]
    scores = _scores(students)
    return RegretTable(
        budget=curves[0].budget,
        alpha=curves[0].alpha,
        init=curves[0].init,
        students=tuple(student.name for student in students),
        num_seeds=len(seeds),
        floor=float(np.mean([_lost_to_noise(losses_MR) for losses_MR in losses])),
        rules=scores,
    )


def _student(curve: TeacherCurve, size: Size, means_BM: Array) -> Student:
    return Student(
        name=curve.student.name,
        size=size_of(curve.student, size),
        tokens=curve.tokens,
        alone=float(curve.supervised_MR.mean()),
        teachers=tuple(teacher.name for teacher in curve.teachers),
        sizes_M=np.array([float(size_of(teacher, size)) for teacher in curve.teachers]),
        losses_M=np.array([teacher.known_loss for teacher in curve.teachers]),
        initial_kl_M=None if curve.initial_kl is None else np.array(curve.initial_kl),
        means_BM=means_BM,
    )


def _scores(students: Sequence[Student]) -> tuple[RuleScore, ...]:
    followed: list[tuple[Array, Rule, tuple[Choice, ...]]] = []
    refused = []
    for rule in RULES:
        why = rule.refusal(students)
        if why is not None:
            refused.append(RuleScore(name=rule.name, formula=rule.formula, regret=None, refused=why))
        else:
            followed.append(_follow(rule, students))
    followed.sort(key=lambda one: float(one[0][0]))
    first_B = followed[0][0]
    scored = [
        RuleScore(
            name=rule.name,
            formula=rule.formula,
            regret=float(regret_B[0]),
            interval=interval_of(regret_B[1:]),
            behind=None if i == 0 else interval_of((regret_B - first_B)[1:]),
            choices=choices,
            outside=tuple(one.name for one in students if rule.published and is_outside(rule.published, one)),
        )
        for i, (regret_B, rule, choices) in enumerate(followed)
    ]
    return (*scored, *refused)


def _follow(rule: Rule, students: Sequence[Student]) -> tuple[Array, Rule, tuple[Choice, ...]]:
    """Return the rule's mean regret over students for each set of means [B], the rule, and its choices as measured."""
    regrets, choices = [], []
    for student in students:
        chosen_B = rule.choose(student, [other for other in students if other is not student])
        regret_B = student.lost[np.arange(len(chosen_B)), chosen_B]
        regrets.append(regret_B)
        teacher = student.teachers[int(chosen_B[0])]
        choices.append(Choice(student=student.name, teacher=teacher, regret=float(regret_B[0])))
    mean_B: Array = np.mean(regrets, axis=0)
    return mean_B, rule, tuple(choices)


def _lost_to_noise(losses_MR: Array) -> float:
    """Return the mean regret over seeds of the teacher that is best in all other seeds, nats/token."""
    others_MR = losses_MR.sum(1, keepdims=True) - losses_MR
    chosen_R = np.argmin(others_MR, axis=0)
    return float(losses_MR[chosen_R, np.arange(losses_MR.shape[1])].mean() - losses_MR.mean(1).min())
