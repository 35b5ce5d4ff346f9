"""`capgap law plan`, `run`, `table` and `submit`: the commands that read a grid file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capgap.jobs.arguments import Parser, integer, number, parse_settings
from capgap.jobs.faults import INCOMPLETE
from capgap.jobs.logs import log, log_format
from capgap.jobs.plan import add_speed_flags, count_text, positive, size_text, stated_speed
from capgap.schemas.errors import SettingError
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.law_plan import LawPlan
from capgap.schemas.plan import Figure


def grid_plan_parser() -> Parser:
    """Return the parser of `capgap law plan`."""
    parser = _with_speed(_grid_parser("plan", "Estimate what a grid will take, before anything is made."))
    parser.add_argument(
        "--pilot",
        type=str,
        default=None,
        help="Table of runs from whose noise follows which differences between teachers the grid will show. Left out, "
        "the grid's own table, if it has one.",
    )
    parser.add_argument(
        "--difference",
        type=number,
        default=0.005,
        help="Difference in nats/token that the grid should show; the plan says how many seeds that needs.",
    )
    parser.add_argument("--json", action="store_true", help="Print the plan as one JSON object.")
    return parser


def grid_run_parser() -> Parser:
    """Return the parser of `capgap law run`."""
    parser = _with_speed(_grid_parser("run", "Make every run of a grid current, then table, fit and page."))
    parser.add_argument("--no-wait", action="store_true", help="Stop if another run holds the device.")
    parser.add_argument(
        "--replace", action="store_true", help="Replace finished teachers, caches and trainings that are not current."
    )
    return parser


def grid_table_parser() -> Parser:
    """Return the parser of `capgap law table`."""
    return _grid_parser("table", "Write the table of a grid's results so far, and run nothing.")


def grid_submit_parser() -> Parser:
    """Return the parser of `capgap law submit`."""
    parser = _grid_parser("submit", "Write a grid's results so far into one file, which others can add to theirs.")
    parser.add_argument(
        "--to", type=str, default=None, help="The file to write. Left out, submission.json in the grid's folder."
    )
    return parser


def _grid_parser(name: str, description: str) -> Parser:
    return Parser(f"capgap law {name}", description, LawGrid, "GRID", ("grid",))


def _with_speed(parser: Parser) -> Parser:
    parser.add_argument(
        "--workers",
        type=integer,
        default=None,
        help="Processes that work at the same time. Left out, one per core or GPU.",
    )
    parser.add_argument("--start-s", type=number, default=None, help="Seconds that a stage takes to start.")
    add_speed_flags(parser)
    return parser


def grid_plan_command(argv: Sequence[str]) -> int:
    """Run `capgap law plan`: print a table, or JSON. A grid beyond `max_hours` or `max_disk_gb` is an error."""
    from capgap.pipeline.law.plan import require_limits
    from capgap.pipeline.law.progress import TABLE_NAME
    from capgap.pipeline.law.table import read_table

    grid, flags, _ = parse_settings(grid_plan_parser(), argv, LawGrid)
    pilot = Path(flags["pilot"]) if flags["pilot"] else Path(grid.out) / TABLE_NAME
    plan = _plan_of(
        grid,
        flags,
        pilot=read_table(pilot) if flags["pilot"] or pilot.is_file() else (),
        difference=_difference(flags),
    )
    if flags["json"]:
        print(plan.model_dump_json(indent=2))
    elif log_format() == "json":
        log("law_plan", f"plan of {grid.name}", **plan.model_dump(mode="json"))
    else:
        _show_plan(plan)
    for note in require_limits(grid, plan):
        log("law_limit", f"note: {note}")
    return 0


def _difference(flags: dict[str, Any]) -> float:
    wished: float = flags["difference"]
    if not 0 < wished < float("inf"):
        raise SettingError("not a difference", where="--difference", found=wished, expected="nats above 0")
    return wished


def _plan_of(grid: LawGrid, flags: dict[str, Any], **more: Any) -> LawPlan:
    from capgap.pipeline.law.devices import num_workers_of
    from capgap.pipeline.law.plan import plan_grid

    workers = num_workers_of(grid, flags["workers"])
    return plan_grid(grid, stated_speed(flags), workers, positive(flags, "start_s"), **more)


def _show_plan(plan: LawPlan) -> None:
    from rich.table import Table

    from capgap.jobs.tables import print_wide
    from capgap.pipeline.law.summary import power_lines

    table = Table(box=None, pad_edge=False)
    for title in ("phase", "runs", "left", "tokens", "FLOPs", "disk", "device hours"):
        table.add_column(title, justify="left" if title == "phase" else "right")
    for phase in plan.phases:
        table.add_row(
            phase.phase,
            str(phase.num_runs),
            str(phase.num_left),
            count_text(phase.tokens),
            _scientific(phase.flops),
            size_text(phase.disk_bytes),
            _hours(phase.device_hours),
        )
    print_wide(table)
    print(f"{plan.num_teachers} teachers, {plan.num_students} students, {plan.num_rows} rows")
    print(f"processes to start: {plan.num_processes}; side by side: {plan.num_workers or '?'}")
    print(f"operations: {_scientific(plan.flops)}")
    print(f"disk: {size_text(plan.disk_bytes)} ({plan.disk_bytes.source})")
    print(f"device hours: {_hours(plan.device_hours)} ({plan.device_hours.source})")
    print(f"hours: {_hours(plan.hours)} ({plan.hours.source})")
    for line in power_lines(plan):
        print(line)
    for note in plan.notes:
        print(f"note: {note}")


def _scientific(figure: Figure) -> str:
    return "?" if figure.value is None else f"{figure.value:.2e}" if figure.value else "-"


def _hours(figure: Figure) -> str:
    return "?" if figure.value is None else f"{figure.value:,.3f}"


def grid_run_command(argv: Sequence[str]) -> int:
    """Run `capgap law run`: make all runs. Return 0, or 5 if some runs have no result."""
    grid, flags, _ = parse_settings(grid_run_parser(), argv, LawGrid)
    from capgap.jobs.cli import main
    from capgap.pipeline.law import forks
    from capgap.pipeline.law.plan import require_limits
    from capgap.pipeline.law.pool import Starter
    from capgap.pipeline.law.run import run_grid

    started = time.monotonic()
    if grid.max_hours is not None or grid.max_disk_gb is not None:
        for note in require_limits(grid, _plan_of(grid, flags)):
            log("law_limit", f"note: {note}")
    done = run_grid(
        grid,
        flags["workers"],
        wait=not flags["no_wait"],
        replace=flags["replace"],
        on_cpu=Starter(forks.prepare, forks.starter(main)),
    )
    wall_s = round(time.monotonic() - started, 1)
    num_results = done.num_runs - len(done.missing)
    if done.made:
        text = f"made {len(done.made)} in {wall_s} s: {', '.join(done.made)}"
    else:
        text = f"nothing to do: {num_results} of {done.num_runs} runs have their result ({wall_s} s)"
    log("law_run_done", text, made=list(done.made), num_runs=done.num_runs, num_results=num_results, wall_s=wall_s)
    log("law_table", f"table: {done.table}", path=str(done.table))
    for name, why in done.missing.items():
        log("law_missing", f"missing: {name}: {why}", run=name, why=why)
    if num_results:
        _fit_and_report(done.table)
    return INCOMPLETE if done.missing else 0


def grid_table_command(argv: Sequence[str]) -> int:
    """Run `capgap law table`: write the table of the grid's results."""
    grid = parse_settings(grid_table_parser(), argv, LawGrid).settings
    from capgap.pipeline.law.run import gather

    path = gather(grid)
    log("law_table", f"table: {path}", path=str(path))
    return 0


def grid_submit_command(argv: Sequence[str]) -> int:
    """Run `capgap law submit`: write the grid's results into one file."""
    grid, flags, _ = parse_settings(grid_submit_parser(), argv, LawGrid)
    from capgap.pipeline.law.run import gather
    from capgap.pipeline.law.shared import write_submission

    path = Path(flags["to"]) if flags["to"] else Path(grid.out) / "submission.json"
    done = write_submission(grid, gather(grid), path)
    text = f"submission: {path}, {len(done.rows)} rows, {len(done.manifests)} manifests"
    log("law_submission", text, path=str(path), num_rows=len(done.rows))
    return 0


def _fit_and_report(table: Path) -> None:
    from capgap.pipeline.law.fit import fit_table, write_fit
    from capgap.pipeline.law.page import write_page
    from capgap.pipeline.law.summary import lines

    law = fit_table(table)
    path = write_fit(table.parent, law)
    page = write_page(table.parent, law)
    for line in lines(law):
        log("law_summary", line)
    log("law_fit", f"fit: {path}", path=str(path))
    log("report", f"report: {page}", page=str(page))
