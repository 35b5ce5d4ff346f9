"""Fill the tables of docs/results/law-cpu.md from the fit in docs/results/law-cpu.

python benchmarks/law_page.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from page_tables import Row, with_tables

from capgap.pipeline.law.fit import read_fit
from capgap.pipeline.law.global_law import MIN_STUDENTS
from capgap.pipeline.law.summary import regret_cells
from capgap.pipeline.law.table import read_table
from capgap.schemas.law_curve import Best, CurveFit, TeacherPoint
from capgap.schemas.law_fit import Estimate, GlobalLaw
from capgap.schemas.law_regret import RegretTable
from capgap.schemas.results import Interval

PAGE = Path(__file__).parents[1] / "docs" / "results" / "law-cpu.md"
FOLDER = PAGE.with_suffix("")
# budget and alpha of the runs that all students have, and that the law is fitted to
MAIN = ("600k-tokens", 1.0)
_NONE = f"none: {MIN_STUDENTS} students with an interior best are needed"


def main() -> None:
    """Write the page with its tables filled in."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str) -> str:
    """Return the page with its tables made from the fit."""
    law = read_fit(FOLDER)
    curves = [curve for curve in law.curves if (curve.budget, curve.alpha) == MAIN]
    [regrets] = [one for one in law.regrets if (one.budget, one.alpha) == MAIN]
    [main_law] = [one for one in law.laws if (one.budget, one.alpha) == MAIN]
    names = {curve.student for curve in law.curves if (curve.budget, curve.alpha) != MAIN}
    tables = {
        "teachers": _teachers(),
        "means": _means(curves, [curve.student for curve in curves]),
        "verdicts": _verdicts(curves),
        "laws": _laws(main_law),
        "regrets": _regrets(regrets),
        "axes": _axes([curve for curve in law.curves if curve.student in names]),
    }
    return with_tables(page, "law_page.py", tables)


def _teachers() -> list[Row]:
    """Return one row per teacher, by size."""
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
    """Return one row per teacher: the loss of each curve's student, and in brackets its distance from the best loss."""
    rows: list[Row] = [("teacher", *heads), ("---", *["---:"] * len(curves))]
    rows.append(("none", *(f"{curve.supervised_loss:.4f}" for curve in curves)))
    for number, point in enumerate(curves[0].points):
        rows.append((point.name, *(_cell(curve.points[number]) for curve in curves)))
    return rows


def _cell(point: TeacherPoint) -> str:
    return f"**{point.loss:.4f}**" if point.above_best == 0 else f"{point.loss:.4f} (+{point.above_best:.4f})"


def _verdicts(curves: Sequence[CurveFit]) -> list[Row]:
    """Return one row per student: what its curve shows of its best teacher, over size and over the teacher's loss."""
    head = ("student", "parameters", "verdict by size", "best teacher", "times its size", "verdict by loss")
    rows: list[Row] = [(*head, "best teacher's loss", "gain over no teacher", "noise of a run")]
    rows.append(("---", "---:", "---", "---:", "---:", "---", "---:", "---:", "---:"))
    for curve in curves:
        point = min(curve.points, key=lambda point: point.loss)
        size, loss = curve.axis("size"), curve.axis("cross_entropy")
        assert size is not None and loss is not None
        bests = (_estimate(size.best, ",.0f"), _estimate(size.best, ".1f", curve.student_size))
        gain = f"{point.gain:.3f} ({_range(point.gain_interval, '.3f')})"
        cells = (size.verdict, *bests, loss.verdict, _estimate(loss.best, ".3f"), gain, f"{curve.noise:.4f}")
        rows.append((curve.student, f"{curve.student_size:,}", *cells))
    return rows


def _laws(law: GlobalLaw) -> list[Row]:
    """Return one row per value that is fitted over students, with its interval, or why there is none."""
    rows: list[Row] = [("law", "students", "value (95 % interval)"), ("---", "---", "---:")]
    named = {
        "best teacher = k x student: k": law.proportional,
        "best teacher = c x student^q: q": law.exponent,
    }
    rows += [(name, ", ".join(law.students), _estimate(one, ".3g") or _NONE) for name, one in named.items()]
    for axis in law.axes:
        for what, one in (("one value", axis.constant), ("when the student doubles", axis.per_doubling)):
            name = f"{axis.measure} at the best teacher: {what}"
            rows.append((name, ", ".join(axis.students), _estimate(one, ".3g") or _NONE))
    return rows


def _estimate(found: Estimate | Best | None, form: str, unit: float = 1) -> str:
    """Return a value with its interval, divided by `unit`; an empty text where there is none."""
    return "" if found is None else f"{found.value / unit:{form}} ({_range(found.interval, form, unit)})"


def _range(interval: Interval, form: str, unit: float = 1) -> str:
    return f"{interval.low / unit:{form}} to {interval.high / unit:{form}}"


def _regrets(table: RegretTable) -> list[Row]:
    """Return one row per rule, by rising regret."""
    rows: list[Row] = [("rule", "regret (95 % interval)", "more than the first", "chooses")]
    rows.append(("---", "---:", "---:", "---"))
    for rule in table.rules:
        regret, behind, chosen, _ = regret_cells(rule)
        name = f"{rule.name}, outside its range" if rule.outside else rule.name
        teachers = ", ".join(one.teacher for one in rule.choices) or chosen
        rows.append((name, regret, behind.removesuffix(" against the first"), teachers))
    return rows


def _axes(curves: Sequence[CurveFit]) -> list[Row]:
    """Return the table of the student with several budgets and alphas, one column for each."""
    ordered = sorted(curves, key=lambda curve: (-curve.tokens, -curve.alpha))
    rows = _means(ordered, [f"{curve.tokens // 1000}k tokens, alpha {curve.alpha:g}" for curve in ordered])
    verdicts = [axis.verdict if (axis := curve.axis("size")) is not None else "" for curve in ordered]
    return [*rows, ("verdict by size", *verdicts)]


if __name__ == "__main__":
    main()
