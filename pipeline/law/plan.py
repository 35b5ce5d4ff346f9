"""What a grid will take: work, rates and sizes of `capgap plan`, over all runs of the grid that are not current."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from capgap.pipeline.law.expand import (
    Cell,
    cells,
    corpus_folder,
    corpus_run,
    teacher_run,
)
from capgap.pipeline.law.gather import is_finished, is_made, sizes_of, vocab_size_of_grid
from capgap.pipeline.law.pruned import require_cuts
from capgap.pipeline.law.run import tokens_by_student
from capgap.pipeline.plan import Stated
from capgap.pipeline.plan.rates import rate_of
from capgap.pipeline.plan.scoring import scoring_hours, scoring_of
from capgap.pipeline.plan.work import RunWork, work_of
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import is_url
from capgap.pipeline.workflow.state import states
from capgap.schemas.errors import SettingError
from capgap.schemas.law import Init
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.law_plan import LawPlan, PhasePlan
from capgap.schemas.plan import Figure
from capgap.schemas.run_file import RunFile


def plan_grid(grid: LawGrid, stated: Stated, num_workers: int | None, start_s: float | None = None) -> LawPlan:
    """What is left to do.

    Args:
        grid: the grid.
        stated: what the user says of speed.
        num_workers: processes side by side, if that is known.
        start_s: that a stage takes before it begins, if the user says so; measured rates hold most of it.

    Raises:
        InputError: a source of the corpus, a given model or something reused cannot be read.
        SettingError: as `require_cuts` and `pruned_sizes`.
    """
    require_cuts(grid)
    works = _Works(grid, stated)
    phases = (
        works.phase("corpus", "corpus", [works.corpus_run] if not works.corpus_made else [], 1, lambda run: 1),
        works.teachers("teachers", "teacher"),
        works.teachers("caches", "cache"),
        *([works.prunings()] if "pruned" in grid.inits else []),
        works.trainings(),
        works.measurements(),
    )
    hours = _sum((phase.phase, phase.device_hours) for phase in phases)
    notes = []
    if start_s is None:
        notes.append(
            f"{works.num_processes} processes are started; what that takes is in rates that were measured, and "
            "not in others: give --start-s for those"
        )
    elif hours.value is not None:
        more = works.num_processes * start_s / 3600
        hours = Figure(value=hours.value + more, source=f"{hours.source}; {start_s:g} s for the start of each process")
    wall = Figure(value=None, source=hours.source if hours.value is None else "the number of workers is not known")
    if hours.value is not None and num_workers:
        wall = Figure(value=hours.value / num_workers, source=f"{num_workers} workers, never idle")
    return LawPlan(
        name=grid.name,
        num_teachers=len(grid.teachers),
        num_students=len(grid.students),
        num_rows=works.num_arms,
        num_processes=works.num_processes,
        num_workers=num_workers,
        phases=phases,
        flops=_sum((phase.phase, phase.flops) for phase in phases),
        disk_bytes=_disk(phases, works.largest_scratch(), num_workers or 1),
        device_hours=hours,
        hours=wall,
        notes=tuple(notes),
    )


def require_limits(grid: LawGrid, plan: LawPlan) -> tuple[str, ...]:
    """Refuse a grid that is planned to take more than its limits; what cannot be held against one is said.

    Raises:
        SettingError: it takes more.
    """
    unknown = []
    for limit, figure, scale, unit in (
        ("max_hours", plan.hours, 1.0, "hours"),
        ("max_disk_gb", plan.disk_bytes, 1e9, "GB"),
    ):
        most: float | None = getattr(grid, limit)
        if most is None:
            continue
        if figure.value is None:
            unknown.append(f"{limit} cannot be held against the grid: {figure.source}")
        elif figure.value / scale > most:
            raise SettingError(
                "the grid is planned to take more",
                where=limit,
                found=f"{figure.value / scale:.3g} {unit} ({_shares(plan, limit, scale)})",
                expected=f"at most {most:g}",
                fix="take fewer teachers, students, seeds or tokens, or raise the limit",
            )
    return tuple(unknown)


def _shares(plan: LawPlan, limit: str, scale: float) -> str:
    """The phases' own figures."""
    figures = [(p.phase, p.device_hours if limit == "max_hours" else p.disk_bytes) for p in plan.phases]
    unit = "device hours" if limit == "max_hours" else "GB"
    return f"{unit}: " + ", ".join(f"{name} {(figure.value or 0) / scale:.3g}" for name, figure in figures)


class _Works:
    """The work of every run of the grid; runs that differ in nothing that counts are looked at once."""

    def __init__(self, grid: LawGrid, stated: Stated) -> None:
        self._grid, self._stated = grid, stated
        self.corpus_run = corpus_run(grid)
        corpus = read_manifest(Path(corpus_folder(grid)))
        self._splits: dict[str, Figure] | None = None
        self.corpus_made = corpus is not None and is_made(self.corpus_run, ["corpus"])
        self._tokens = tokens_by_student(grid, sizes_of(grid, vocab_size_of_grid(grid)))
        every = list(cells(grid, self._tokens))
        self.left = [one for one in every if not is_finished(one)]
        self._every = every
        self.num_arms = sum(len(one.arms) for one in every)
        self._pending = {stage: [t for t in grid.teachers if not self._is_made(t, stage)] for stage in _OF_A_TEACHER}
        self._scratch: list[float] = []

    @property
    def num_processes(self) -> int:
        """Stages that are left."""
        of_cells = sum(2 + len(one.arms) for one in self.left)
        return (0 if self.corpus_made else 1) + sum(map(len, self._pending.values())) + of_cells

    def teachers(self, phase: str, stage: str) -> PhasePlan:
        """The stages teacher or cache."""
        runs = [self._plannable(teacher_run(self._grid, name)) for name in self._pending[stage]]
        return self.phase(phase, stage, runs, len(self._grid.teachers), lambda run: 1)

    def trainings(self) -> PhasePlan:
        """All students' trainings: alike for all teachers and seeds, as many times as there are such."""
        times: dict[tuple[str, Init, str], int] = {}
        examples: dict[tuple[str, Init, str], RunFile] = {}
        for one in self.left:
            for arm in one.arms:
                key = (one.student, one.init, arm.budget)
                times[key] = times.get(key, 0) + 1
                examples.setdefault(key, _with_one_arm(one, arm.name))
        runs = {key: self._plannable(run) for key, run in examples.items()}
        counts = {id(run): times[key] for key, run in runs.items()}
        return self.phase("students", "train", list(runs.values()), self.num_arms, lambda run: counts[id(run)])

    def prunings(self) -> PhasePlan:
        """The passes that score what a teacher can do without: one a pruned cell, alike for all seeds."""
        return self._of_cells("prunings", "student", lambda one: one.init == "pruned")

    def measurements(self) -> PhasePlan:
        """The eval stages: one a cell, alike for all seeds."""
        return self._of_cells("measurements", "eval", lambda one: True)

    def _of_cells(self, phase: str, stage: str, has: Callable[[Cell], bool]) -> PhasePlan:
        times: dict[tuple[str, str | None, Init], int] = {}
        examples: dict[tuple[str, str | None, Init], RunFile] = {}
        for one in filter(has, self.left):
            key = (one.student, one.teacher, one.init)
            times[key] = times.get(key, 0) + 1
            examples.setdefault(key, one.run)
        runs = {key: self._plannable(run) for key, run in examples.items()}
        counts = {id(run): times[key] for key, run in runs.items()}
        num_runs = sum(map(has, self._every))
        return self.phase(phase, stage, list(runs.values()), num_runs, lambda run: counts[id(run)])

    def phase(
        self, phase: str, stage: str, runs: list[RunFile], num_runs: int, times: Callable[[RunFile], int]
    ) -> PhasePlan:
        """One kind of stage over runs, each as often as `times` says."""
        tokens, flops, disk, hours = [], [], [], []
        for run in runs:
            work, count = self._look_at(run), times(run)
            each, counted = self._to_do(stage, work)
            tokens.append((run.name, _times(each, count)))
            unknown = Figure(value=None, source="model or text cannot be counted")
            free = Figure(value=0, source="no model is run")
            operations = free if stage == "corpus" or each.value == 0 else unknown
            flops.append((run.name, _times(Figure(value=counted, source="counted"), count) if counted else operations))
            disk.append((run.name, _times(work.disk_bytes(stage), count)))
            hours.append((run.name, _times(self._hours(stage, work), count)))
            self._scratch.append(work.scratch_bytes(stage).value or 0)
        return PhasePlan(
            phase=phase,
            num_runs=num_runs,
            num_left=sum(times(run) for run in runs),
            tokens=_sum(tokens),
            flops=_sum(flops),
            disk_bytes=_sum(disk),
            device_hours=_sum(hours),
        )

    def largest_scratch(self) -> float:
        """More disk that one stage takes while it works."""
        return max(self._scratch, default=0)

    def _to_do(self, stage: str, work: RunWork) -> tuple[Figure, float | None]:
        """Tokens and operations of one stage."""
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
        devices = work.run.cache.num_devices if stage == "cache" else 1
        return Figure(value=tokens.value / rate.value * devices / 3600, source=rate.source)

    def _measured(self) -> Iterable[str]:
        """Folders of the grid's own runs: those that are finished have measured a rate."""
        out = Path(self._grid.out)
        cells = (*sorted(out.glob("students/*/*/seed-*")), *sorted(out.glob("students/*/*/pruned/seed-*")))
        return [str(path) for path in (*out.glob("teachers/*"), *cells)]

    def _is_made(self, teacher: str, stage: str) -> bool:
        return self.corpus_made and is_made(teacher_run(self._grid, teacher), [stage])

    def _plannable(self, run: RunFile) -> RunFile:
        """The run with what is there reused, and what is not planned in its place."""
        there = {stage: folder for stage, folder in run.reuse.items() if is_url(folder) or _is_there(folder)}
        return run.model_copy(update={"reuse": there})

    def _look_at(self, run: RunFile) -> RunWork:
        work = work_of(run, states(run), None, self._splits)
        self._splits = work.split_tokens
        return work


# Sources of a sum that are named: there is one for each size of model.
_SHOWN = 3

_OF_A_TEACHER = ("teacher", "cache")


def _with_one_arm(one: Cell, arm: str) -> RunFile:
    return one.run.model_copy(update={"arms": {arm: one.run.arms[arm]}})


def _is_there(folder: str) -> bool:
    return read_manifest(Path(folder)) is not None


def _times(figure: Figure, count: int) -> Figure:
    return figure.model_copy(update={"value": None if figure.value is None else figure.value * count})


def _sum(figures: Iterable[tuple[str, Figure]]) -> Figure:
    """The sum, with the sources behind it; none where one is not known."""
    found = list(figures)
    unknown: Mapping[str, str] = {name: figure.source for name, figure in found if figure.value is None}
    if unknown:
        return Figure(value=None, source=f"not known for {', '.join(unknown)}: {next(iter(unknown.values()))}")
    sources = list(dict.fromkeys(figure.source for _, figure in found if figure.value))
    more = f"; and {len(sources) - _SHOWN} more" if len(sources) > _SHOWN else ""
    total = sum(figure.value or 0 for _, figure in found)
    return Figure(value=total, source=("; ".join(sources[:_SHOWN]) or "nothing is left to do") + more)


def _disk(phases: Iterable[PhasePlan], scratch: float, num_workers: int) -> Figure:
    kept = _sum((phase.phase, phase.disk_bytes) for phase in phases)
    if kept.value is None or not kept.value:
        return kept
    return Figure(value=kept.value + scratch * num_workers, source=f"{kept.source}; and the scratch of {num_workers}")
