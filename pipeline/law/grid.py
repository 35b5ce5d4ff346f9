"""Cuts the table into curves: one student over all its teachers, in seeds that are complete.

Legend: M teachers, R seeds.

Seeds are paired: runs of one seed share first weights and data order, so the seed's own luck cancels between teachers,
but only among runs that are all there. A seed for which one run is missing is left out of its curve whole, and the
missing run is named; a mean over unequal seeds would compare luck.
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
"""Teacher, what the student was cut out of, seed."""


@dataclass(frozen=True)
class TeacherCurve:
    """One student, budget, alpha and init.

    Attributes:
        student: its size.
        teachers: with at least one finished run, smallest first.
        seeds: complete ones.
        left_out_seeds: with a run missing.
        left_out_teachers: without any finished run.
        losses_MR: the students', nats/token.
        supervised_MR: of the same student without a teacher; rows are alike where the init is common.
        missing: names of the runs that are not there, with the reason.
        initial_kl: from each teacher to the untrained student, mean over seeds, nats/token; None where the table has no
            rows of 0 tokens for all of these teachers.
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
    """Parameters, counted as asked."""
    return model.num_parameters if size == "total" else model.num_non_embedding_parameters


def curves(runs: Sequence[LawRun]) -> tuple[TeacherCurve, ...]:
    """All curves of a table; untrained students make none.

    By init, alpha and budget, those with the most students first, and within them by the student's size. What the grid
    holds is read off the table: a student's teachers and seeds are all that it has a row with.
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
    """Seeds that the grid has for a student."""
    return tuple(sorted({run.seed for run in runs if run.student.name == student}))


def missing_runs(runs: Sequence[LawRun]) -> tuple[str, ...]:
    """Every run of the grid without a result, with the reason."""
    named = [name for curve in curves(runs) for name in curve.missing]
    return tuple(dict.fromkeys(named))


@dataclass(frozen=True)
class _Key:
    student: str
    budget: str
    alpha: float
    init: Init

    def source(self, teacher: str) -> str | None:
        """What a student of this curve was cut out of; with the common init, nothing."""
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
    """Of rows of 0 tokens, whatever their alpha: they are not trained."""
    found: dict[str, dict[int, float]] = {}
    for run in own_runs:
        if run.tokens == 0 and run.init == key.init and run.teacher is not None and run.metrics.get("kl", 0) > 0:
            found.setdefault(run.teacher.name, {})[run.seed] = run.metrics["kl"]
    if any(teacher.name not in found for teacher in teachers):
        return None
    return tuple(sum(found[one.name].values()) / len(found[one.name]) for one in teachers)


def _named(key: _Key, cell: _Cell, run: LawRun | None) -> str:
    """The run of a cell without a result, with the reason."""
    if run is not None:
        return f"{run.name}: {run.missing}"
    teacher, source, seed = cell
    alpha = key.alpha if teacher else 0
    init = key.init if source is None else f"{key.init} from {source}"
    who = f"{key.student}, {teacher or 'supervised'}, {key.budget}, alpha {alpha:g}, {init}, seed {seed}"
    return f"{who}: no row in the table"
