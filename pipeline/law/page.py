"""Renders the page of a fit, one file without scripts that loads nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.law.charts import curve_charts, frontier_chart, law_chart
from capgap.pipeline.law.global_law import describe
from capgap.pipeline.law.headline import headline
from capgap.pipeline.law.law_axes import axis_sentences
from capgap.pipeline.law.summary import published_cells, regret_cells, sentences
from capgap.pipeline.pages.templates import page_template
from capgap.pipeline.plan.published import CAPACITY_GAP, DISTILLATION_SCALING
from capgap.pipeline.store.files import write_atomically
from capgap.schemas.law_curve import CurveFit
from capgap.schemas.law_fit import LawFit
from capgap.schemas.law_regret import RuleScore

PAGE_NAME = "law.html"

_TEMPLATE = Path(__file__).parent / "law.html.j2"


def write_page(folder: Path, law: LawFit) -> Path:
    """Write `law.html` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PAGE_NAME, render_page(law))
    return folder / PAGE_NAME


def render_page(law: LawFit) -> str:
    """Render the page of a fit; all texts of the table are escaped."""
    return page_template(_TEMPLATE).render(
        law=law,
        headline=headline(law),
        verdicts=[_verdict_row(curve) for curve in law.curves],
        curves=[(curve, list(sentences(curve)), curve_charts(i, curve)) for i, curve in enumerate(law.curves)],
        forms_of=_form_rows,
        papers=[(one, f"{one.teachers[one.best].size / one.student_size:.3g}") for one in law.published],
        published_rules=[published_cells(rule) for rule in law.published_rules],
        regrets=[(table, [_regret_row(rule) for rule in table.rules]) for table in law.regrets],
        axis_sentences=axis_sentences,
        laws=[(one, describe(one), law_chart(i, one, law)) for i, one in enumerate(law.laws)],
        frontiers=[frontier_chart(one) for one in law.frontiers],
        published=(CAPACITY_GAP, DISTILLATION_SCALING),
    )


def _verdict_row(curve: CurveFit) -> tuple[str, ...]:
    size, quality = curve.axis("size"), curve.axis("cross_entropy")
    good = ", ".join(point.name for point in curve.points if point.within_delta)
    return (
        curve.title,
        size.verdict if size else "not judged",
        quality.verdict if quality else "not judged",
        good if size else "-",
        str(len(curve.seeds)),
        f"{curve.noise:.4f}" if curve.noise is not None else "-",
    )


def _regret_row(rule: RuleScore) -> tuple[str, ...]:
    regret, behind, chosen, outside = regret_cells(rule)
    return rule.name, rule.formula, regret, behind.removesuffix(" against the first") or "-", chosen, outside or "-"


def _form_rows(curve: CurveFit) -> list[tuple[str, ...]]:
    """Return a row for every form on every axis of the curve, with its leave-one-out error."""
    rows: list[tuple[str, ...]] = []
    for axis in curve.axes:
        for form in axis.forms:
            error = f"{form.leave_one_out:.5f}" if form.leave_one_out is not None else "too few teachers"
            rows.append((form.name, axis.over, form.formula, error, "chosen" if form.name == axis.chosen else ""))
    return rows
