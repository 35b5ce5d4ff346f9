"""Counts the work of all runs of a grid that are not current, phase by phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from capgap.pipeline.law.expand import Cell, cells, corpus_folder, corpus_run, teacher_run
from capgap.pipeline.law.outcome import made_stages, stages_left
from capgap.pipeline.law.sizes import sizes_of, tokens_by_student, vocab_size_of_grid
from capgap.pipeline.plan import Stated
from capgap.pipeline.plan.rates import rate_of
from capgap.pipeline.plan.scoring import scoring_hours, scoring_of
from capgap.pipeline.plan.work import RunWork, work_of
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import is_url
from capgap.pipeline.workflow.state import states
from capgap.schemas.law import Init
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.law_plan import PhasePlan
from capgap.schemas.plan import Figure
from capgap.schemas.run_file import RunFile

# Number of sources that are named in a sum; a grid can have one for each size of model.
_SHOWN = 3

_OF_A_TEACHER = ("teacher", "cache")


class GridWork:
    """The work of every run of the grid; of runs that take equal work, only one is examined."""

    def __init__(self, grid: LawGrid, stated: Stated) -> None:
        self._grid, self._stated = grid, stated
        self.corpus_run = corpus_run(grid)
        corpus = read_manifest(Path(corpus_folder(grid)))
        self._splits: dict[str, Figure] | None = None
        self.corpus_made = corpus is not None and bool(made_stages(self.corpus_run, ["corpus"]))
        self.sizes = sizes_of(grid, vocab_size_of_grid(grid))
        every = list(cells(grid, tokens_by_student(grid, self.sizes)))
        self._every = every
        self._left = {one.name: stages_left(one) for one in every}
        self.num_arms = sum(len(one.arms) for one in every)
        made = {
            name: made_stages(teacher_run(grid, name), _OF_A_TEACHER) if self.corpus_made else ()
            for name in grid.teachers
        }
        self._pending = {stage: [name for name in made if stage not in made[name]] for stage in _OF_A_TEACHER}
        self._scratch: list[float] = []

    @property
    def num_processes(self) -> int:
        """Number of stages that are left to make."""
        in_cells = sum(map(len, self._left.values()))
        return (0 if self.corpus_made else 1) + sum(map(len, self._pending.values())) + in_cells

    def corpus(self) -> PhasePlan:
        """Return the work of the corpus."""
        return self._phase("corpus", "corpus", [] if self.corpus_made else [(self.corpus_run, 1)], 1)

    def teachers(self, phase: str, stage: str) -> PhasePlan:
        """Return the work of the stage `teacher` or `cache`, over all teachers."""
        runs = [(self._plannable(teacher_run(self._grid, name)), 1) for name in self._pending[stage]]
        return self._phase(phase, stage, runs, len(self._grid.teachers))

    def prunings(self) -> PhasePlan:
        """Return the work of the passes that score which parts of a teacher can be pruned, one for each pruned cell.

        They are equal for all seeds.
        """
        pruned = sum(one.init == "pruned" for one in self._every)
        return self._phase("prunings", "student", self._alike(self._left_cells("student", "pruned")), pruned)

    def trainings(self) -> PhasePlan:
        """Return the work of all students' trainings, which is equal for all teachers and seeds."""
        each = (
            ((one.student, one.init, arm.budget), _with_one_arm(one, arm.name))
            for one in self._every
            for arm in one.arms
            if one.trained(arm).name in self._left[one.name]
        )
        return self._phase("students", "train", self._alike(each), self.num_arms)

    def measurements(self) -> PhasePlan:
        """Return the work of the eval stages, one for each cell, which is equal for all seeds."""
        return self._phase("measurements", "eval", self._alike(self._left_cells("eval")), len(self._every))

    def _left_cells(self, stage: str, init: Init | None = None) -> Iterator[tuple[object, RunFile]]:
        """Yield a key of equal work and the run of each cell in which the stage, of one instance, is left to make."""
        for one in self._every:
            left = any(name.split("/")[0] == stage for name in self._left[one.name])
            if left and init in (None, one.init):
                yield (one.student, one.teacher, one.init), one.run

    def _alike(self, runs: Iterable[tuple[object, RunFile]]) -> list[tuple[RunFile, int]]:
        """Return the first run of each key with the number of runs that have the key."""
        times: Counter[object] = Counter()
        examples: dict[object, RunFile] = {}
        for key, run in runs:
            times[key] += 1
            examples.setdefault(key, run)
        return [(self._plannable(run), times[key]) for key, run in examples.items()]

    def _phase(self, phase: str, stage: str, runs: list[tuple[RunFile, int]], num_runs: int) -> PhasePlan:
        """Sum the work of a stage over runs, each multiplied by the number beside it."""
        tokens, flops, disk, hours = [], [], [], []
        for run, count in runs:
            work = self._look_at(run)
            each, operations = self._to_do(stage, work)
            tokens.append((run.name, _times(each, count)))
            flops.append((run.name, _times(_operations(stage, each, operations), count)))
            disk.append((run.name, _times(work.disk_bytes(stage), count)))
            hours.append((run.name, _times(self._hours(stage, work), count)))
            self._scratch.append(work.scratch_bytes(stage).value or 0)
        return PhasePlan(
            phase=phase,
            num_runs=num_runs,
            num_left=sum(count for _, count in runs),
            tokens=sum_of(tokens),
            flops=sum_of(flops),
            disk_bytes=sum_of(disk),
            device_hours=sum_of(hours),
        )

    def largest_scratch(self) -> float:
        """Return the largest extra disk space in bytes that one stage needs while it works."""
        return max(self._scratch, default=0)

    def _to_do(self, stage: str, work: RunWork) -> tuple[Figure, float | None]:
        """Return the tokens and the floating-point operations of one stage."""
        return scoring_of(work) if stage == "student" else (work.tokens(stage), work.operations(stage))

    def _hours(self, stage: str, work: RunWork) -> Figure:
        tokens, operations = self._to_do(stage, work)
        if stage == "corpus" or tokens.value == 0:
            return Figure(value=0, source="no model is run")
        stated = Stated(**{**vars(self._stated), "like": (*self._stated.like, *self._measured())})
        if stage == "student":
            return scoring_hours(work.run, operations, stated)
        rate = rate_of(stage, work, stated)
        if rate.value is None or tokens.value is None:
            return Figure(value=None, source=rate.source if rate.value is None else tokens.source)
        hours = tokens.value / rate.value / 3600
        return Figure(value=hours * work.num_devices(stage), source=rate.source)

    def _measured(self) -> Iterable[str]:
        """Return the folders of the grid's own runs; rates can be read from the finished ones."""
        out = Path(self._grid.out)
        cells = (*sorted(out.glob("students/*/*/seed-*")), *sorted(out.glob("students/*/*/pruned/seed-*")))
        return [str(path) for path in (*out.glob("teachers/*"), *cells)]

    def _plannable(self, run: RunFile) -> RunFile:
        """Return the run without the reused stages that are not made yet, so that they are planned instead."""
        there = {stage: folder for stage, folder in run.reuse.items() if is_url(folder) or _is_there(folder)}
        return run.model_copy(update={"reuse": there})

    def _look_at(self, run: RunFile) -> RunWork:
        work = work_of(run, states(run), None, self._splits)
        self._splits = work.split_tokens
        return work


def sum_of(figures: Iterable[tuple[str, Figure]]) -> Figure:
    """Return the sum of named figures with its sources; its value is None where one figure is not known."""
    found = list(figures)
    unknown: Mapping[str, str] = {name: figure.source for name, figure in found if figure.value is None}
    if unknown:
        return Figure(value=None, source=f"not known for {', '.join(unknown)}: {next(iter(unknown.values()))}")
    sources = list(dict.fromkeys(figure.source for _, figure in found if figure.value))
    more = f"; and {len(sources) - _SHOWN} more" if len(sources) > _SHOWN else ""
    total = sum(figure.value or 0 for _, figure in found)
    return Figure(value=total, source=("; ".join(sources[:_SHOWN]) or "nothing is left to do") + more)


def _operations(stage: str, tokens: Figure, counted: float | None) -> Figure:
    if counted:
        return Figure(value=counted, source="counted")
    if stage == "corpus" or tokens.value == 0:
        return Figure(value=0, source="no model is run")
    return Figure(value=None, source="model or text cannot be counted")


def _with_one_arm(one: Cell, arm: str) -> RunFile:
    return one.run.model_copy(update={"arms": {arm: one.run.arms[arm]}})


def _is_there(folder: str) -> bool:
    return read_manifest(Path(folder)) is not None


def _times(figure: Figure, count: int) -> Figure:
    return figure.model_copy(update={"value": None if figure.value is None else figure.value * count})
