"""The page's tables of the judge's ratings and comparisons."""

from __future__ import annotations

from dataclasses import dataclass

from capgap.schemas.judge_results import JudgeResults, Mean, ModelRatings
from capgap.schemas.results import TEACHER


@dataclass(frozen=True)
class NumberTable:
    """A table of texts with its headings and the caption above it."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def judge_tables(judge: JudgeResults) -> tuple[NumberTable, ...]:
    """Return the tables of ratings, ratings by category and comparisons, as far as the judge made them."""
    found = []
    if judge.models:
        found += [_ratings(judge), _categories(judge)]
    if judge.pairs:
        found.append(_pairs(judge))
    return tuple(found)


def judge_line(judge: JudgeResults) -> str:
    """Return the text above the tables: the judge, and the numbers of questions and of unreadable verdicts."""
    invalid = f"{judge.num_invalid:,} of {judge.num_verdicts:,} verdicts could not be read and count in no figure"
    return (
        f"{judge.judge.model} judged the answers to {judge.num_questions} questions of two turns; {invalid}. "
        "Intervals are 95 %, over the choice of questions."
    )


def _ratings(judge: JudgeResults) -> NumberTable:
    rows = (
        (
            _name(one),
            _mean(one.turn_1),
            _mean(one.turn_2),
            _mean(one.average),
            str(one.num_invalid),
            str(one.num_cut),
        )
        for one in judge.models
    )
    headings = ("model", "turn 1", "turn 2", "average", "not read", "answers cut off")
    return NumberTable("Ratings from 1 to 10", headings, tuple(rows))


def _categories(judge: JudgeResults) -> NumberTable:
    names = tuple(dict.fromkeys(name for one in judge.models for name in one.by_category))
    rows = (
        (_name(one), *(f"{one.by_category[name]:.2f}" if name in one.by_category else "-" for name in names))
        for one in judge.models
    )
    return NumberTable("Ratings by category, mean of both turns", ("model", *names), tuple(rows))


def _pairs(judge: JudgeResults) -> NumberTable:
    rows = (
        (
            f"{_short(one.first)} on {_short(one.second)}",
            str(one.num_wins),
            str(one.num_ties),
            str(one.num_losses),
            _mean(one.win_rate, percent=True),
            "-" if one.consistency is None else f"{100 * one.consistency:.0f} %",
            str(one.num_invalid),
        )
        for one in judge.pairs
    )
    headings = ("pair", "wins", "ties", "losses", "win rate", "same in both orders", "not read")
    return NumberTable("Answers held against each other, in both orders", headings, tuple(rows))


def _name(one: ModelRatings) -> str:
    return _short(one.model)


def _short(instance: str) -> str:
    """Return the short name of an instance: `distilled, seed 0` for `train/distilled/seed-0`."""
    if instance == TEACHER:
        return TEACHER
    return ", ".join(instance.split("/")[1:]).replace("seed-", "seed ")


def _mean(mean: Mean | None, percent: bool = False) -> str:
    if mean is None:
        return "-"
    scale, digits, unit = (100, 0, " %") if percent else (1, 2, "")
    low, high = scale * mean.interval.low, scale * mean.interval.high
    return f"{scale * mean.value:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"
