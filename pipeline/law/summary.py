"""Formats fits, plans and advice as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from capgap.pipeline.law.advise import Advice
from capgap.pipeline.law.global_law import describe
from capgap.pipeline.law.headline import headline
from capgap.pipeline.law.law_axes import axis_sentences
from capgap.pipeline.pages.numbers import human_count
from capgap.schemas.law_curve import AxisFit, CurveFit
from capgap.schemas.law_fit import LawFit
from capgap.schemas.law_plan import LawPlan
from capgap.schemas.law_regret import RegretTable, RuleScore


def lines(law: LawFit) -> Iterator[str]:
    """Yield the lines of a fit: one sentence, the verdicts, the laws, the regrets and the missing runs."""
    yield headline(law)
    for curve in law.curves:
        yield f"{curve.title}:"
        for sentence in sentences(curve):
            yield f"  {sentence}"
    for one in law.laws:
        yield f"{one.budget}, alpha {one.alpha:g}, {one.init} init: {describe(one)}"
        for remark in (*one.remarks, *axis_sentences(one)):
            yield f"  {remark}"
    for table in law.regrets:
        yield from regret_lines(table)
    if law.published:
        yield f"{len(law.published)} students of papers, and the share of them whose best teacher a rule misses:"
        for rule in law.published_rules:
            yield f"  {': '.join(published_cells(rule))}"
    if law.missing:
        yield f"missing runs ({len(law.missing)}), left out of all means:"
        for name in law.missing:
            yield f"  {name}"


def regret_lines(table: RegretTable) -> Iterator[str]:
    """Yield the lines of a table of regrets, one for each rule; the rule that loses least comes first."""
    lose = f"{', '.join(table.students)} lose{'' if len(table.students) > 1 else 's'}"
    yield (
        f"{table.title}: what {lose} by each rule, which has not seen the student's own losses, nats/token, over "
        f"{table.num_seeds} seeds; noise alone costs {table.floor:.4f}"
    )
    for rule in table.rules:
        yield f"  {rule.name}: {', '.join(part for part in regret_cells(rule) if part)}"


def regret_cells(rule: RuleScore) -> tuple[str, str, str, str]:
    """Return a rule's texts: regret with interval, difference to the first rule, choices, and students out of range."""
    if rule.regret is None or rule.interval is None:
        return "-", "", f"not followed: {rule.refused}", ""
    behind = "" if rule.behind is None else f"{rule.behind.low:+.4f} to {rule.behind.high:+.4f} against the first"
    chosen = "; ".join(f"{one.student} {one.teacher} {one.regret:.4f}" for one in rule.choices)
    outside = f"outside its range for {', '.join(rule.outside)}" if rule.outside else ""
    return f"{rule.regret:.4f} ({rule.interval.low:.4f} to {rule.interval.high:.4f})", behind, chosen, outside


def published_cells(rule: RuleScore) -> tuple[str, str]:
    """Return a rule's name, and the share of published students whose best teacher it misses, with its choices."""
    chosen = "; ".join(f"{one.student} {one.teacher}{' (missed)' if one.regret else ''}" for one in rule.choices)
    outside = f", outside its range for {', '.join(rule.outside)}" if rule.outside else ""
    return rule.name, f"{rule.regret:.0%}, {chosen}{outside}"


def sentences(curve: CurveFit) -> Iterator[str]:
    """Yield the sentences on a curve: verdicts, equally good teachers, gain, notes and predictions."""
    if curve.refused is not None:
        yield f"not judged: {curve.refused}"
    for axis in curve.axes:
        yield f"over {axis.over}: {axis.verdict}. {axis.reason}{_best(axis)}"
    if curve.axes and curve.delta is not None:
        good = ", ".join(point.name for point in curve.points if point.within_delta)
        yield f"within {curve.delta:.4f} nats of the best: {good}"
        best = min(curve.points, key=lambda point: point.loss)
        interval = best.gain_interval
        yield (
            f"gain of {best.name} over training without a teacher: {best.gain:.4f} nats "
            f"({interval.low:.4f} to {interval.high:.4f})"
        )
    for note in curve.notes:
        yield f"note: {note}"
    for one in curve.predictions:
        yield f"{one.sentence}; {one.disagreement}"


def power_lines(plan: LawPlan) -> Iterator[str]:
    """Yield a line for each student on the differences between teachers that the grid will show."""
    for one in plan.powers:
        if one.smallest is None:
            yield f"{one.student}: one seed or one teacher shows no difference"
            continue
        yield (
            f"{one.student}: shows a difference between teachers of {one.smallest:.4f} nats 4 times in 5 "
            f"({one.smallest_cautious:.4f} at the upper limit of the noise); seeds that show {one.wished:g}: "
            f"{one.seeds_needed or 'more than 500'} ({one.seeds_needed_cautious or 'more than 500'}); the noise "
            f"{one.noise:.4f} is from {one.pilot}, whose student has {1 / one.size_ratio:.3g} x the parameters"
        )


def advice_lines(advice: Advice) -> Iterator[str]:
    """Yield the lines of each answer, of the disagreement and of a warning."""
    yield f"student of {human_count(advice.student)}, {human_count(advice.tokens)} tokens: {advice.verdict}"
    for answer in advice.answers:
        yield ""
        yield answer.source
        yield f"  {answer.summary}"
        yield f"  {'inside' if answer.within_validity else 'OUTSIDE'} what it measured: {answer.validity}"
        for sentence in answer.outside:
            yield f"  {sentence}"
    yield ""
    yield f"disagreement: {advice.disagreement}"
    if advice.warning is not None:
        yield f"warning: {advice.warning}"


def _best(axis: AxisFit) -> str:
    if axis.best is None:
        return ""
    value, low, high = axis.best.value, axis.best.interval.low, axis.best.interval.high
    if axis.axis == "size":
        return f". Best at {human_count(value)} ({human_count(low)} to {human_count(high)})"
    return f". Best at {value:.3f} nats ({low:.3f} to {high:.3f})"
