"""Builds and prints the final table, which the page, `table.txt` and the terminal show."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from capgap.pipeline.pages.numbers import human_count
from capgap.pipeline.report.benchmarks import benchmark_cells, benchmark_headings
from capgap.pipeline.report.summary import REPORT_NAME, CacheSummary, Measure, Report, Row, Table
from capgap.schemas.errors import InputError
from capgap.schemas.results import TEACHER, AgainstTeacher, EvalResults, ModelResult
from capgap.schemas.run_cache import RecordingName

HEADINGS = ("model", "parameters", "loss, nats/token", "bits/byte", "KL to teacher", "top-1", "acceptance", "ECE")
_NARROW_HEADINGS = ("model", "params", "loss", "bits/byte", "KL", "top-1", "acceptance")

_TEXT_WIDTH = 400


def print_table(results_folder: Path, console: Console) -> None:
    """Print the table of a finished report stage.

    Where the console is too narrow, calibration errors and standard deviations are left out.

    Args:
        results_folder: Folder of the report stage, which holds `report.json`.
        console: Console to print to.

    Raises:
        InputError: The folder holds no report, or the report cannot be read.
    """
    path = results_folder / REPORT_NAME
    try:
        report = Report.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError("there is no report", where=path, fix="run the report stage") from None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise InputError("cannot be read", where=path, found=reason, fix="run the report stage again") from None
    _print(report.table, console, box.SIMPLE)


def table_text(table: Table) -> str:
    """Format the table as plain text that is also valid Markdown."""
    buffer = io.StringIO()
    _print(table, Console(file=buffer, width=_TEXT_WIDTH, color_system=None, force_terminal=False), box.MARKDOWN)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n") + "\n"


def build_rows(results: EvalResults) -> tuple[Row, ...]:
    """Return the teacher's row, if it was measured, and one row for every arm with the means over its seeds."""
    teacher = () if results.teacher is None else (_row(TEACHER, (results.teacher,)),)
    return *teacher, *(_row(arm, results.of_arm(arm)) for arm in results.arms)


_NUMBERS: dict[RecordingName, str] = {"sampled": ", n = {}", "topk": ", k = {}", "chunks": ""}


def cache_line(cache: CacheSummary) -> str:
    """Return the line on the size of the cache: bytes for each token by recording, and the number of tokens."""
    costs = (
        f"{cache.bytes_per_token(name):.1f} bytes per token (recording {name}{_NUMBERS[name].format(facts.num_ids)})"
        for name, facts in sorted(cache.facts.recordings.items())
    )
    return f"cache: {' and '.join(costs)}, {cache.num_tokens:,} tokens"


def cells(row: Row) -> tuple[str, ...]:
    """Format a row as one text for each of `HEADINGS`."""
    return (
        row.name if row.num_seeds == 1 else f"{row.name} ({row.num_seeds} seeds)",
        human_count(row.num_parameters),
        _number(row.loss),
        _number(row.bits_per_byte),
        _number(row.kl),
        _percent(row.top1),
        _percent(row.acceptance),
        _percent(row.ece),
    )


def _row(name: str, models: tuple[ModelResult, ...]) -> Row:
    nearness = [model.against_teacher for model in models if model.against_teacher is not None]

    def near(value: Callable[[AgainstTeacher], float]) -> Measure | None:
        return _measure(value(one) for one in nearness) if nearness else None

    return Row(
        name=name,
        num_seeds=len(models),
        num_parameters=models[0].num_parameters,
        loss=_measure(model.loss for model in models),
        bits_per_byte=_measure(model.bits_per_byte for model in models),
        kl=near(lambda one: one.kl),
        top1=near(lambda one: one.top1),
        acceptance=near(lambda one: one.acceptance),
        ece=_measure(errors) if (errors := [one.ece for one in models if one.ece is not None]) else None,
    )


def _measure(numbers: Iterable[float]) -> Measure:
    values = list(numbers)
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Measure(mean=mean, sd=None)
    return Measure(mean=mean, sd=math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)))


def _number(measure: Measure | None) -> str:
    if measure is None:
        return "-"
    return f"{measure.mean:.4f}" if measure.sd is None else f"{measure.mean:.4f} +- {measure.sd:.4f}"


def _percent(measure: Measure | None) -> str:
    if measure is None:
        return "-"
    percent = f"{100 * measure.mean:.1f}"
    return f"{percent} %" if measure.sd is None else f"{percent} +- {100 * measure.sd:.1f} %"


def _print(table: Table, console: Console, style: box.Box) -> None:
    shown = _rich_table(HEADINGS, [cells(row) for row in table.rows], style)
    if _is_too_wide(shown, console):
        narrow = [cells(_without_seeds(row))[: len(_NARROW_HEADINGS)] for row in table.rows]
        shown = _rich_table(_NARROW_HEADINGS, narrow, style)
    console.print(shown)
    for line in (*table.lines, *table.verdicts):
        console.print(Text(line), soft_wrap=True)
    if table.benchmarks is not None:
        console.print()
        headings = benchmark_headings(table.benchmarks)
        shown = _rich_table(headings, benchmark_cells(table.benchmarks), style)
        if _is_too_wide(shown, console):
            shown = _rich_table(headings, benchmark_cells(table.benchmarks, errors=False), style)
        console.print(shown)
        for note in table.benchmarks.notes:
            console.print(Text(note), soft_wrap=True)


def _is_too_wide(shown: RichTable, console: Console) -> bool:
    return Measurement.get(console, console.options.update(width=_TEXT_WIDTH), shown).maximum > console.width


def _rich_table(headings: Iterable[str], rows: Iterable[Iterable[str]], style: box.Box) -> RichTable:
    shown = RichTable(box=style)
    for i, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if i else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def _without_seeds(row: Row) -> Row:
    """Return the row for a narrow terminal, with means only."""
    measures = ("loss", "bits_per_byte", "kl", "top1", "acceptance")
    means = {name: value.model_copy(update={"sd": None}) for name in measures if (value := getattr(row, name))}
    return row.model_copy(update={"num_seeds": 1, **means})
