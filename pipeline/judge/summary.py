"""Compute figures from verdicts: means over questions, wins, and intervals by resampling questions.

Legend: Q questions, R resamples, T turns.

Verdicts that could not be read are left out of all means, and are counted as invalid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from capgap.pipeline.eval.intervals import COVERAGE, Float64Array, Int64Array, resample_weights
from capgap.pipeline.judge.items import Answers, Model, pairs
from capgap.schemas.judge_results import (
    JudgeIdentity,
    JudgeResults,
    Mean,
    ModelRatings,
    PairResult,
    Verdict,
    Winner,
)
from capgap.schemas.results import Interval

_TURNS = (1, 2)
_OTHER: Mapping[Winner, Winner] = {"first": "second", "second": "first", "tie": "tie"}

# Ratings and winners by question and turn; None for a verdict that could not be read.
_Ratings = Mapping[tuple[str, int], float | None]
_Winners = Mapping[tuple[str, int], Winner | None]


def summarise(judge: JudgeIdentity, answers: Answers, verdicts: Sequence[Verdict], num_bootstrap: int) -> JudgeResults:
    """Compute the results of a stage from all its verdicts, with `num_bootstrap` resamples."""
    questions = [str(one.question.question_id) for one in next(iter(answers.values()))]
    weights_RQ = resample_weights(len(questions), num_bootstrap)
    kinds = {verdict.item.kind for verdict in verdicts}
    by_models: dict[tuple[str, ...], dict[tuple[str, int], Verdict]] = {}
    for verdict in verdicts:
        item = verdict.item
        by_models.setdefault(item.models, {})[str(item.question_id), item.turn] = verdict
    rated = [
        _model(model, answers, {at: v.rating for at, v in by_models[model.name,].items()}, questions, weights_RQ)
        for model in (answers if "single" in kinds else ())
    ]
    held = [
        _pair(first.name, second.name, by_models, questions, weights_RQ)
        for first, second in (pairs(list(answers)) if "pairwise" in kinds else ())
    ]
    return JudgeResults(
        judge=judge,
        answered_by=dict(
            sorted(Counter(ask.answered_by for v in verdicts for ask in v.asks if ask.answered_by).items())
        ),
        num_questions=len(questions),
        num_bootstrap=num_bootstrap,
        models=tuple(rated),
        pairs=tuple(held),
        num_verdicts=len(verdicts),
        num_invalid=sum(bool(verdict.invalid) for verdict in verdicts),
    )


def _model(
    model: Model, answers: Answers, ratings: _Ratings, questions: Sequence[str], weights_RQ: Int64Array
) -> ModelRatings:
    turn_1, turn_2 = (np.array([_number(ratings[name, turn]) for name in questions]) for turn in _TURNS)
    categories = [one.question.category for one in answers[model]]
    by_category = {
        category: average
        for category in dict.fromkeys(categories)
        if (average := _average(turn_1, turn_2, np.array([one == category for one in categories]))) is not None
    }
    return ModelRatings(
        model=model.name,
        arm=model.arm,
        seed=model.seed,
        turn_1=_mean([turn_1], weights_RQ),
        turn_2=_mean([turn_2], weights_RQ),
        average=_mean([turn_1, turn_2], weights_RQ),
        by_category=by_category,
        num_invalid=sum(rating is None for rating in ratings.values()),
        num_cut=sum(reply.finish != "stop" for one in answers[model] for reply in one.replies),
    )


def _number(rating: float | None) -> float:
    return np.nan if rating is None else rating


def _average(turn_1: Float64Array, turn_2: Float64Array, chosen: np.ndarray) -> float | None:
    means = [
        float(np.mean(one[chosen & ~np.isnan(one)])) for one in (turn_1, turn_2) if (chosen & ~np.isnan(one)).any()
    ]
    return sum(means) / 2 if len(means) == 2 else None


def _mean(turns: Sequence[Float64Array], weights_RQ: Int64Array) -> Mean | None:
    """Return the mean of the turns' means, with its interval; None where a turn has no number at all.

    A turn's mean is over the questions that have a number in that turn [Q].
    """
    if any(np.isnan(turn_Q).all() for turn_Q in turns):
        return None
    resampled_R = np.mean([_means(turn_Q, weights_RQ) for turn_Q in turns], axis=0)
    # a resample is NaN if none of its questions has a number
    low, high = np.nanquantile(resampled_R, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    value = float(np.mean([np.nanmean(turn_Q) for turn_Q in turns]))
    return Mean(value=value, interval=Interval(low=float(low), high=float(high)))


def _means(turn_Q: Float64Array, weights_RQ: Int64Array) -> Float64Array:
    known_Q = ~np.isnan(turn_Q)
    weight_R = weights_RQ @ known_Q
    total_R = weights_RQ @ np.where(known_Q, turn_Q, 0.0)
    means_R: Float64Array = np.divide(total_R, weight_R, out=np.full(len(weight_R), np.nan), where=weight_R > 0)
    return means_R


def _pair(
    first: str,
    second: str,
    by_models: Mapping[tuple[str, ...], Mapping[tuple[str, int], Verdict]],
    questions: Sequence[str],
    weights_RQ: Int64Array,
) -> PairResult:
    as_asked: _Winners = {at: verdict.winner for at, verdict in by_models[first, second].items()}
    swapped: _Winners = {at: verdict.winner for at, verdict in by_models[second, first].items()}
    counts: Counter[str] = Counter()
    points = np.full((len(_TURNS), len(questions)), np.nan)
    for place, name in enumerate(questions):
        for turn in _TURNS:
            one, other = as_asked[name, turn], swapped[name, turn]
            if one is None or other is None:
                counts["invalid"] += 1
                continue
            winner = one if one == _OTHER[other] else "tie"
            counts[winner] += 1
            counts["consistent"] += one == _OTHER[other]
            if one == other != "tie":
                counts[f"{one} place"] += 1
            points[turn - 1, place] = {"first": 1.0, "tie": 0.5, "second": 0.0}[winner]
    num_valid = counts["first"] + counts["tie"] + counts["second"]
    return PairResult(
        first=first,
        second=second,
        num_wins=counts["first"],
        num_ties=counts["tie"],
        num_losses=counts["second"],
        num_invalid=counts["invalid"],
        win_rate=_pooled(points, weights_RQ),
        consistency=counts["consistent"] / num_valid if num_valid else None,
        num_first_place=counts["first place"],
        num_second_place=counts["second place"],
    )


def _pooled(points_TQ: Float64Array, weights_RQ: Int64Array) -> Mean | None:
    """Return the mean over all points that are numbers; both turns of a question are resampled together."""
    known_TQ = ~np.isnan(points_TQ)
    if not known_TQ.any():
        return None
    weight_R = weights_RQ @ known_TQ.sum(axis=0)
    total_R = weights_RQ @ np.where(known_TQ, points_TQ, 0.0).sum(axis=0)
    means_R = np.divide(total_R, weight_R, out=np.full(len(weight_R), np.nan), where=weight_R > 0)
    low, high = np.nanquantile(means_R, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Mean(value=float(np.nanmean(points_TQ)), interval=Interval(low=float(low), high=float(high)))
