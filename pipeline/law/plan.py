"""Estimates what the runs of a grid that are not current will take, with the work and rates of `capgap plan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from capgap.pipeline.law.grid import curves
from capgap.pipeline.law.grid_work import GridWork, sum_of
from capgap.pipeline.law.power import powers
from capgap.pipeline.law.pruned import require_cuts
from capgap.pipeline.law.steps import require_steps
from capgap.pipeline.law.verdict import MIN_DELTA
from capgap.pipeline.plan import Stated
from capgap.pipeline.stage.manifests import each_manifest_once
from capgap.schemas.errors import SettingError
from capgap.schemas.law import LawRun
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.law_plan import LawPlan, PhasePlan
from capgap.schemas.plan import Figure


def plan_grid(
    grid: LawGrid,
    stated: Stated,
    num_workers: int | None,
    start_s: float | None = None,
    pilot: Sequence[LawRun] = (),
    difference: float = MIN_DELTA,
) -> LawPlan:
    """Plan the work that is left in a grid.

    Args:
        grid: The grid.
        stated: Speeds that the user states.
        num_workers: Number of parallel processes; None if it is not known.
        start_s: Seconds that each stage needs to start, if the user states it. Measured rates include most of it.
        pilot: Rows of a table from which the noise is taken, to say which differences the grid will show.
        difference: Difference between two teachers that the grid should show, nats/token.

    Raises:
        InputError: A source of the corpus, a given model or something reused cannot be read.
        SettingError: A teacher cannot give the shape of a pruned student, or a training stops before its first step.
    """
    require_cuts(grid)
    with each_manifest_once():
        require_steps(grid)
        work = GridWork(grid, stated)
        phases = (
            work.corpus(),
            work.teachers("teachers", "teacher"),
            work.teachers("caches", "cache"),
            *([work.prunings()] if "pruned" in grid.inits else []),
            work.trainings(),
            work.measurements(),
        )
    hours = sum_of((phase.phase, phase.device_hours) for phase in phases)
    notes = []
    if start_s is None:
        notes.append(
            f"{work.num_processes} processes are started; measured rates include the time of their starts, other "
            "rates do not: give --start-s for those"
        )
    elif hours.value is not None:
        more = work.num_processes * start_s / 3600
        hours = Figure(value=hours.value + more, source=f"{hours.source}; {start_s:g} s for the start of each process")
    wall = Figure(value=None, source=hours.source if hours.value is None else "the number of workers is not known")
    if hours.value is not None and num_workers:
        wall = Figure(value=hours.value / num_workers, source=f"{num_workers} workers that are never idle")
    return LawPlan(
        name=grid.name,
        num_teachers=len(grid.teachers),
        num_students=len(grid.students),
        num_rows=work.num_arms,
        num_processes=work.num_processes,
        num_workers=num_workers,
        phases=phases,
        flops=sum_of((phase.phase, phase.flops) for phase in phases),
        disk_bytes=_disk(phases, work.largest_scratch(), num_workers or 1),
        device_hours=hours,
        hours=wall,
        powers=powers(grid, work.sizes, curves(pilot), difference),
        notes=tuple(notes),
    )


def require_limits(grid: LawGrid, plan: LawPlan) -> tuple[str, ...]:
    """Refuse a grid whose plan exceeds its limits, and return a sentence for each limit that cannot be checked.

    Raises:
        SettingError: The plan exceeds `max_hours` or `max_disk_gb`.
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
            unknown.append(f"{limit} cannot be checked: {figure.source}")
        elif figure.value / scale > most:
            raise SettingError(
                "the plan of the grid exceeds the limit",
                where=limit,
                found=f"{figure.value / scale:.3g} {unit} ({_shares(plan, limit, scale)})",
                expected=f"at most {most:g}",
                fix="take fewer teachers, students, seeds or tokens, or raise the limit",
            )
    return tuple(unknown)


def _shares(plan: LawPlan, limit: str, scale: float) -> str:
    """Return the figure of each phase for the limit, as one text."""
    figures = [(p.phase, p.device_hours if limit == "max_hours" else p.disk_bytes) for p in plan.phases]
    unit = "device hours" if limit == "max_hours" else "GB"
    return f"{unit}: " + ", ".join(f"{name} {(figure.value or 0) / scale:.3g}" for name, figure in figures)


def _disk(phases: Iterable[PhasePlan], scratch: float, num_workers: int) -> Figure:
    kept = sum_of((phase.phase, phase.disk_bytes) for phase in phases)
    if kept.value is None or not kept.value:
        return kept
    return Figure(
        value=kept.value + scratch * num_workers, source=f"{kept.source}; and the scratch of {num_workers} workers"
    )
