"""Fills the tables of docs/results/law-cpu.md with the fit that lies beside it.

python benchmarks/law_page.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# found beside this file also where Python is told not to look there: -P, PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).parent))

from page_tables import Row, with_tables

from capgap.pipeline.law.fit import read_fit
from capgap.pipeline.law.global_law import MIN_STUDENTS
from capgap.pipeline.law.table import read_table
from capgap.schemas.law_curve import CurveFit, TeacherPoint
from capgap.schemas.law_fit import GlobalLaw, LawFit
from capgap.schemas.law_regret import RegretTable

PAGE = Path(__file__).parents[1] / "docs" / "results" / "law-cpu.md"
FOLDER = PAGE.with_suffix("")
# the budget and alpha that all students have, and over which there is a law
MAIN = ("600k-tokens", 1.0)
_NONE = f"none: {MIN_STUDENTS} students with an interior best are needed"


def main() -> None:
    """Write the page anew."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str) -> str:
    """The page with its tables made anew."""
    law = read_fit(FOLDER)
    curves = [curve for curve in law.curves if (curve.budget, curve.alpha) == MAIN]
    [regrets] = [one for one in law.regrets if (one.budget, one.alpha) == MAIN]
    [main_law] = [one for one in law.laws if (one.budget, one.alpha) == MAIN]
    names = {curve.student for curve in law.curves if (curve.budget, curve.alpha) != MAIN}
    tables = {
        "teachers": _teachers(law),
        "means": _means(curves, [curve.student for curve in curves]),
        "verdicts": _verdicts(curves),
        "laws": _laws(main_law),
        "regrets": _regrets(regrets),
        "axes": _axes([curve for curve in law.curves if curve.student in names]),
    }
    return with_tables(page, "law_page.py", tables)


def _teachers(law: LawFit) -> list[Row]:
    """What the teachers are, by size."""
    found = {run.teacher.name: run.teacher for run in read_table(FOLDER / "runs.jsonl") if run.teacher is not None}
    rows: list[Row] = [("teacher", "parameters", "without embedding", "tokens", "tokens a parameter", "loss")]
    rows.append(("---", *["---:"] * 5))
    for name, one in sorted(found.items(), key=lambda pair: pair[1].num_parameters):
        assert one.loss is not None and one.train_tokens is not None
        sizes = (f"{one.num_parameters:,}", f"{one.num_non_embedding_parameters:,}")
        each = f"{one.train_tokens / one.num_parameters:.1f}"
        rows.append((name, *sizes, f"{one.train_tokens:,}", each, f"{one.loss:.3f}"))
    return rows


def _means(curves: Sequence[CurveFit], heads: Sequence[str]) -> list[Row]:
    """A row a teacher: the loss of each curve's student, and above the best in brackets."""
    rows: list[Row] = [("teacher", *heads), ("---", *["---:"] * len(curves))]
    rows.append(("none", *(f"{curve.supervised_loss:.4f}" for curve in curves)))
    for number, point in enumerate(curves[0].points):
        rows.append((point.name, *(_cell(curve.points[number]) for curve in curves)))
    return rows


def _cell(point: TeacherPoint) -> str:
    return f"**{point.loss:.4f}**" if point.above_best == 0 else f"{point.loss:.4f} (+{point.above_best:.4f})"


def _verdicts(curves: Sequence[CurveFit]) -> list[Row]:
    """A row a student: what is shown of its best teacher, over size and over the teacher's loss."""
    head = ("student", "parameters", "verdict by size", "best teacher", "times its size", "verdict by loss")
    rows: list[Row] = [(*head, "best teacher's loss", "gain over no teacher", "noise of a run")]
    rows.append(("---", "---:", "---", "---:", "---:", "---", "---:", "---:", "---:"))
    for curve in curves:
        best = min(curve.points, key=lambda point: point.loss)
        cells = [curve.student, f"{curve.student_size:,}"]
        for name in ("size", "cross_entropy"):
            axis = curve.axis(name)  # type: ignore[arg-type]
            assert axis is not None
            cells.append(axis.verdict)
            found = axis.best
            scales = ((1.0, ",.0f"), (curve.student_size, ".1f")) if name == "size" else ((1.0, ".3f"),)
            for scale, form in scales:
                if found is None:
                    cells.append("")
                    continue
                low, value, high = (x / scale for x in (found.interval.low, found.value, found.interval.high))
                cells.append(f"{value:{form}} ({low:{form}} to {high:{form}})")
        gain = best.gain_interval
        cells += [f"{best.gain:.3f} ({gain.low:.3f} to {gain.high:.3f})", f"{curve.noise:.4f}"]
        rows.append(tuple(cells))
    return rows


def _laws(law: GlobalLaw) -> list[Row]:
    """What is fitted over students, with its interval; or why there is none."""
    rows: list[Row] = [("law", "students", "value (95 % interval)"), ("---", "---", "---:")]
    named = {
        "best teacher = k x student: k": law.proportional,
        "best teacher = c x student^q: q": law.exponent,
    }
    for name, estimate in named.items():
        value = _NONE
        if estimate is not None:
            value = f"{estimate.value:.3g} ({estimate.interval.low:.3g} to {estimate.interval.high:.3g})"
        rows.append((name, ", ".join(law.students), value))
    for axis in law.axes:
        for what, estimate in (("one value", axis.constant), ("when the student doubles", axis.per_doubling)):
            if estimate is not None:
                value = f"{estimate.value:.3g} ({estimate.interval.low:.3g} to {estimate.interval.high:.3g})"
                rows.append((f"{axis.measure} at the best teacher: {what}", ", ".join(axis.students), value))
        if axis.refused is not None:
            rows.append((f"{axis.measure} at the best teacher", ", ".join(axis.students), _NONE))
    return rows


def _regrets(table: RegretTable) -> list[Row]:
    """A row a rule, the one that loses least first."""
    rows: list[Row] = [("rule", "regret (95 % interval)", "more than the first", "chooses")]
    rows.append(("---", "---:", "---:", "---"))
    for rule in table.rules:
        if rule.regret is None or rule.interval is None:
            rows.append((rule.name, "", "", f"not followed: {rule.refused}"))
            continue
        regret = f"{rule.regret:.4f} ({rule.interval.low:.4f} to {rule.interval.high:.4f})"
        behind = "" if rule.behind is None else f"{rule.behind.low:.4f} to {rule.behind.high:.4f}"
        name = f"{rule.name}, outside its range" if rule.outside else rule.name
        rows.append((name, regret, behind, ", ".join(one.teacher for one in rule.choices)))
    return rows


def _axes(curves: Sequence[CurveFit]) -> list[Row]:
    """The student that was trained in other ways too: a column a way."""
    ordered = sorted(curves, key=lambda curve: (-curve.tokens, -curve.alpha))
    rows = _means(ordered, [f"{curve.tokens // 1000}k tokens, alpha {curve.alpha:g}" for curve in ordered])
    verdicts = [axis.verdict if (axis := curve.axis("size")) is not None else "" for curve in ordered]
    return [*rows, ("verdict by size", *verdicts)]


if __name__ == "__main__":
    main()
