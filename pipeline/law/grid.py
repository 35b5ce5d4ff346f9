"""Splits the table into curves: the losses of one student over all its teachers, at complete seeds.

Legend: M teachers, R seeds.

Seeds are paired: runs of one seed share first weights and data order, so the effect of the seed cancels in differences
between teachers. This requires that every teacher has a run at the seed. A seed with a missing run is therefore left
out of its curve as a whole, and the missing run is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.schemas.law import Init, LawModel, LawRun, LawTeacher
from capgap.schemas.law_curve import Size

Array = npt.NDArray[np.float64]

_Cell = tuple[str | None, str | None, int]
"""Names of the teacher and of the teacher that the student was cut out of, and the seed."""


@dataclass(frozen=True)
class TeacherCurve:
    """The losses of a student over its teachers, for one budget, alpha and init.

    Attributes:
        student: Name and size of the student.
        budget: Name of the token budget.
        tokens: Number of training targets.
        alpha: Weight of the KL.
        init: Source of the first weights.
        teachers: Teachers with at least one finished run, the smallest first.
        seeds: Complete seeds.
        left_out_seeds: Seeds with a missing run.
        left_out_teachers: Names of the teachers without a finished run.
        losses_MR: Losses of the student, nats/token.
        supervised_MR: Losses of the same student without a teacher, nats/token; all rows are equal for a common init.
        missing: Names of the runs without a result, with the reason.
        initial_kl: KL from each teacher to the untrained student, mean over seeds, nats/token; None where the table
            lacks rows of 0 tokens for one of the teachers.
    """

    student: LawModel
    budget: str
    tokens: int
    alpha: float
    init: Init
    teachers: tuple[LawTeacher, ...]
    seeds: tuple[int, ...]
    left_out_seeds: tuple[int, ...]
    left_out_teachers: tuple[str, ...]
    losses_MR: Array
    supervised_MR: Array
    missing: tuple[str, ...]
    initial_kl: tuple[float, ...] | None


def size_of(model: LawModel, size: Size) -> int:
    """Return the number of parameters of a model, with or without the embedding as `size` says."""
    return model.num_parameters if size == "total" else model.num_non_embedding_parameters


def curves(runs: Sequence[LawRun]) -> tuple[TeacherCurve, ...]:
    """Return all curves of a table; rows of untrained students belong to none.

    Curves are grouped by init, alpha and budget, and ordered by the student's size within a group. Groups with the most
    students come first. The grid's teachers and seeds for a student are those that occur in the student's rows.
    """
    keys = {
        (run.init, run.alpha, run.tokens, run.budget, run.student.num_parameters, run.student.name)
        for run in runs
        if run.teacher is not None and run.tokens > 0
    }
    num_students = Counter((init, alpha, budget) for init, alpha, _, budget, *_ in keys)
    ordered = sorted(
        keys, key=lambda key: (-num_students[key[0], key[1], key[3]], key[0], key[1], key[3], key[4], key[5])
    )
    return tuple(_curve(runs, _Key(key[5], key[3], key[1], key[0])) for key in ordered)


def seeds_of(runs: Sequence[LawRun], student: str) -> tuple[int, ...]:
    """Return the seeds that occur in the table's rows of a student."""
    return tuple(sorted({run.seed for run in runs if run.student.name == student}))


def missing_runs(runs: Sequence[LawRun]) -> tuple[str, ...]:
    """Return the name of every run of the grid without a result, with the reason."""
    named = [name for curve in curves(runs) for name in curve.missing]
    return tuple(dict.fromkeys(named))


@dataclass(frozen=True)
class _Key:
    student: str
    budget: str
    alpha: float
    init: Init

    def source(self, teacher: str) -> str | None:
        """Return the teacher that a student of this curve was cut out of; None with a common init."""
        return teacher if self.init == "pruned" else None


def _curve(runs: Sequence[LawRun], key: _Key) -> TeacherCurve:
    own_runs = [run for run in runs if run.student.name == key.student]
    seeds = seeds_of(runs, key.student)
    candidates = {run.teacher.name: run.teacher for run in own_runs if run.teacher is not None}
    ordered = sorted(
        candidates.values(), key=lambda teacher: (teacher.num_parameters, -(teacher.loss or 0), teacher.name)
    )
    here = [run for run in own_runs if run.budget == key.budget and run.init == key.init]
    cells: dict[_Cell, LawRun] = {
        (run.teacher.name if run.teacher else None, run.init_source, run.seed): run
        for run in here
        if run.alpha in (0, key.alpha) and (run.teacher is None or run.init_source == key.source(run.teacher.name))
    }
    finished = {cell for cell, run in cells.items() if run.loss is not None}
    teachers = tuple(
        one for one in ordered if any((one.name, key.source(one.name), seed) in finished for seed in seeds)
    )
    taught = {teacher.name for teacher in teachers}
    missing: dict[str, None] = {}
    incomplete: set[int] = set()
    for seed in seeds:
        for teacher in ordered:
            source = key.source(teacher.name)
            for cell in ((teacher.name, source, seed), (None, source, seed)):
                if cell not in finished:
                    missing[_named(key, cell, cells.get(cell))] = None
                    incomplete |= {seed} if teacher.name in taught else set()
    complete = tuple(seed for seed in seeds if seed not in incomplete)

    def losses(alone: bool) -> Array:
        values = [
            cells[None if alone else teacher.name, key.source(teacher.name), seed].loss
            for teacher in teachers
            for seed in complete
        ]
        return np.array(values, dtype=np.float64).reshape(len(teachers), len(complete))

    return TeacherCurve(
        student=own_runs[0].student,
        budget=key.budget,
        tokens=here[0].tokens,
        alpha=key.alpha,
        init=key.init,
        teachers=teachers,
        seeds=complete,
        left_out_seeds=tuple(sorted(incomplete)),
        left_out_teachers=tuple(teacher.name for teacher in ordered if teacher.name not in taught),
        losses_MR=losses(alone=False),
        supervised_MR=losses(alone=True),
        missing=tuple(missing),
        initial_kl=_initial_kl(own_runs, key, teachers),
    )


def _initial_kl(own_runs: Sequence[LawRun], key: _Key, teachers: Sequence[LawTeacher]) -> tuple[float, ...] | None:
    """Return the KL from each teacher to the untrained student, from rows of 0 tokens with any alpha."""
    found: dict[str, dict[int, float]] = {}
    for run in own_runs:
        if run.tokens == 0 and run.init == key.init and run.teacher is not None and run.metrics.get("kl", 0) > 0:
            found.setdefault(run.teacher.name, {})[run.seed] = run.metrics["kl"]
    if any(teacher.name not in found for teacher in teachers):
        return None
    return tuple(sum(found[one.name].values()) / len(found[one.name]) for one in teachers)


def _named(key: _Key, cell: _Cell, run: LawRun | None) -> str:
    """Return the name of a run without a result, with the reason."""
    if run is not None:
        return f"{run.name}: {run.missing}"
    teacher, source, seed = cell
    alpha = key.alpha if teacher else 0
    init = key.init if source is None else f"{key.init} from {source}"
    who = f"{key.student}, {teacher or 'supervised'}, {key.budget}, alpha {alpha:g}, {init}, seed {seed}"
    return f"{who}: no row in the table"
