"""The figures at the top of the page: the main results of the run, and where and how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from capgap.pipeline.pages.numbers import human_count
from capgap.pipeline.report.summary import Report, Row


@dataclass(frozen=True)
class OpeningFigure:
    """One figure at the top of the page.

    Attributes:
        value: The number with its unit.
        name: What the number says.
        remark: Explanation that is shown beside it.
    """

    value: str
    name: str
    remark: str = ""


def opening_figures(report: Report) -> tuple[OpeningFigure, ...]:
    """Return the figures for which the run has numbers."""
    return tuple(_figures(report))


def origin(report: Report) -> tuple[tuple[str, str], ...]:
    """Return the machine, the time and the command of the run as pairs of name and value, as far as they are known."""
    found = [("machine", report.machine), ("finished", report.finished), ("command", shlex.join(report.command))]
    return tuple((name, value) for name, value in found if value)


def _figures(report: Report) -> Iterator[OpeningFigure]:
    rows = {row.name: row for row in report.table.rows}
    teacher, best = rows.get("teacher"), _best(report, rows)
    if best is not None:
        smaller = None if report.teacher_parameters is None else report.teacher_parameters / best.num_parameters
        if smaller is not None and smaller > 1:
            sizes = f"{human_count(report.teacher_parameters or 0)} to {human_count(best.num_parameters)} parameters"
            yield OpeningFigure(f"{smaller:.3g} x", "smaller than the teacher", sizes)
        gain = next((one for one in report.gains if one.arm == best.name), None)
        if gain is not None and teacher is not None:
            gap = rows[gain.baseline].loss.mean - teacher.loss.mean
            if gap > 0:
                share = (rows[gain.baseline].loss.mean - best.loss.mean) / gap
                yield OpeningFigure(
                    f"{100 * share:.0f} %", "of the gap to the teacher closed", f"{best.name} on {gain.baseline}"
                )
        if best.kl is not None:
            yield OpeningFigure(f"{best.kl.mean:.3g}", "nats/token, KL to the teacher", best.name)
    for name in sorted(report.cache.facts.recordings):
        yield OpeningFigure(
            f"{report.cache.bytes_per_token(name):.3g}",
            "bytes a token in the cache",
            f"{name}: {report.cache.num_bytes[name] / 1e6:,.1f} MB",
        )
    # in a run with rounds, each arm has caches of its own; the table of rounds counts their tokens
    if not report.rounds:
        tokens = human_count(report.cache.num_tokens)
        yield OpeningFigure(tokens, "tokens read by the teacher", "once, for all students")


def _best(report: Report, rows: dict[str, Row]) -> Row | None:
    """Return the distilled arm with the lowest loss, or the arm with the lowest loss where none is distilled."""
    distilled = {gain.arm for gain in report.gains} or set(report.results.arms)
    return min((rows[name] for name in sorted(distilled) if name in rows), key=lambda row: row.loss.mean, default=None)
