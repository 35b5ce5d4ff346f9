"""Compares all models of a run by compute and quality, and finds those that no other beats.

Held-out losses are comparable within one run only. Benchmark scores are comparable with published ones, but only where
the run was measured on the same six benchmarks, with the same numbers of few-shot examples, and on all their questions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capgap.pipeline.plan.costs import non_dominated, paper_flops, scoring_flops, training_flops
from capgap.pipeline.plan.published_models import SHOTS
from capgap.pipeline.stage.context import Instance, StageContext
from capgap.pipeline.stage.rounds import cache_of, rounds_of, text_of, writer_of
from capgap.pipeline.teacher.trained import training_tokens
from capgap.schemas.base import Record
from capgap.schemas.facts import CacheFacts
from capgap.schemas.results import TEACHER, EvalResults, ModelResult

STATED = (
    "Compute is 6 N D for a training and 2 N D for a forward pass, where N counts all parameters and D the tokens. A "
    "student's compute is that of its training and, where it is distilled, of the teacher's pass over the cached "
    "tokens (6 N_S D + 2 N_T D_C, as in the paper). In a run with rounds, tokens that the teacher wrote count as a "
    "pass for every arm that learned from them. The column with the teacher's training adds 6 N_T D_T for every "
    "student that learned from the teacher or was made from its weights. What was spent on given first weights, and "
    "the tuning of a student, are not counted."
)

_BENCHMARK_STAGE, _BENCHMARK_NAME = "benchmark", "benchmark.json"


class CostedModel(Record):
    """Compute and quality of the teacher, or of one arm as means over its seeds."""

    name: str
    """`teacher`, or the arm."""

    num_parameters: int
    """Number of parameters of one model."""

    tokens: int | None
    """Number of tokens that the model was trained on; None where it is not known."""

    flops: float | None
    """Floating-point operations by the paper's accounting (`STATED`); None where a part of them is not known."""

    flops_with_teacher: float | None
    """Floating-point operations with the teacher's training added; None where a part of them is not known."""

    unknown: str
    """Reason why a cost is missing; empty where both costs are known."""

    loss: float
    """Held-out loss, nats/token."""

    scores: tuple[float, ...] = ()
    """Scores in % on the paper's six benchmarks, in the order of `SHOTS`; empty unless all six were measured as in the
    paper."""

    @property
    def mean_score(self) -> float | None:
        """Mean of the six scores in %; None without scores."""
        return math.fsum(self.scores) / len(self.scores) if self.scores else None


class RunFrontier(Record):
    """All models of a run with their costs, and the models that no other beats."""

    models: tuple[CostedModel, ...]
    """The teacher, where it was measured, then the arms."""

    by_loss: tuple[str, ...]
    """Names of the models that no other beats in compute and held-out loss, by rising compute."""

    by_score: tuple[str, ...]
    """Names of the models that no other beats in compute and mean score, by rising compute; empty without scores."""


def run_frontier(context: StageContext, results: EvalResults) -> RunFrontier:
    """Return the cost and the quality of every model of the run."""
    teacher = () if results.teacher is None else (_teacher(context, results.teacher),)
    models = (*teacher, *(_arm(context, results, arm) for arm in results.arms))
    return RunFrontier(
        models=models,
        by_loss=_best([(m.name, m.flops, m.loss) for m in models]),
        by_score=_best([(m.name, m.flops, None if m.mean_score is None else -m.mean_score) for m in models]),
    )


def _best(models: Sequence[tuple[str, float | None, float | None]]) -> tuple[str, ...]:
    """Return the names of the models that no other beats; models of unknown cost or quality are left out.

    `models` are triples of name, cost and a quality of which less is better.
    """
    known = [(name, cost, worse) for name, cost, worse in models if cost is not None and worse is not None]
    undominated = non_dominated([cost for _, cost, _ in known], [worse for _, _, worse in known])
    best = [point for point, is_best in zip(known, undominated, strict=True) if is_best]
    return tuple(name for name, _, _ in sorted(best, key=lambda point: point[1]))


def _teacher(context: StageContext, measured: ModelResult) -> CostedModel:
    size = measured.num_parameters
    tokens = _teacher_tokens(context)
    cost = None if tokens is None else training_flops(size, tokens)
    return CostedModel(
        name=TEACHER,
        num_parameters=size,
        tokens=tokens,
        flops=cost,
        flops_with_teacher=cost,
        unknown="" if tokens else "a given model: on how many tokens it was trained is not known",
        loss=measured.loss,
        scores=_scores(context, [f"{_BENCHMARK_STAGE}/{TEACHER}"]),
    )


def _arm(context: StageContext, results: EvalResults, arm: str) -> CostedModel:
    models = results.of_arm(arm)
    trained = [Instance("train", model.arm, model.seed) for model in models]
    size, tokens = models[0].num_parameters, _trained_tokens(context, trained[0])
    scored, unknown = _scored_tokens(context, arm, tokens)
    if tokens is None:
        unknown = "its manifest has no number of training tokens"
    teacher = _teacher_parameters(context, results)
    if scored and teacher is None:
        scored, unknown = None, "its teacher was not measured, and its size is not known"
    flops = with_teacher = None
    if tokens is not None and scored is not None:
        flops = paper_flops(size, tokens) + scoring_flops(teacher or 0, scored)
        taught = _teacher_tokens(context)
        if scored == 0 and not _made_from_teacher(context, models[0]):
            with_teacher = flops
        elif taught is not None and teacher is not None:
            with_teacher = flops + training_flops(teacher, taught)
        else:
            unknown = "on how many tokens its teacher was trained is not known"
    return CostedModel(
        name=arm,
        num_parameters=size,
        tokens=tokens,
        flops=flops,
        flops_with_teacher=with_teacher,
        unknown=unknown,
        loss=math.fsum(model.loss for model in models) / len(models),
        scores=_scores(context, [f"{_BENCHMARK_STAGE}/{model.arm}/seed-{model.seed}" for model in models]),
    )


def _teacher_tokens(context: StageContext) -> int | None:
    made = context.inputs.get(TEACHER)
    return None if made is None else training_tokens(made.manifest)


def _trained_tokens(context: StageContext, instance: Instance) -> int | None:
    """Return the number of training tokens in the manifest, summed over all rounds of a training in rounds."""
    found = [
        made.manifest.totals.get("num_tokens")
        for made in context.inputs.values()
        if made.manifest.instance == instance.name or made.manifest.instance.startswith(f"{instance.name}/round-")
    ]
    counts = [count for count in found if isinstance(count, int)]
    return sum(counts) if counts and len(counts) == len(found) else None


def _scored_tokens(context: StageContext, arm: str, tokens: int | None) -> tuple[int | None, str]:
    """Return the tokens that the teacher scored or wrote for an arm, or None and the reason why they are not known.

    They are 0 for an arm that learns without a teacher.
    """
    settings = context.run.train_settings(arm)
    if settings.largest_alpha == 0:
        return (0 if context.run.rounds is None else _tokens_of_rounds(context, arm, scored=False)), ""
    if settings.needs_teacher:
        return tokens, ""
    if settings.caches:
        return None, "it learns from further caches, whose teachers' sizes are not known"
    if context.run.rounds is not None:
        return _tokens_of_rounds(context, arm, scored=True), ""
    cache = context.input("cache").manifest
    facts = CacheFacts.model_validate(cache.facts)
    if facts.aligned is not None:
        return facts.aligned.num_teacher_tokens, ""
    recording = next(iter(facts.recordings))
    return cache.shard_sets[recording].num_tokens, ""


def _tokens_of_rounds(context: StageContext, arm: str, scored: bool) -> int:
    """Return the number of tokens that the teacher wrote for an arm in all rounds of the first seed.

    Those that it scored are added where `scored` says so, which an arm without a KL to the teacher does not need.
    """
    run, totals = context.run, {made.manifest.instance: made.manifest.totals for made in context.inputs.values()}
    texts = [text_of(run, arm, run.seeds[0], number) for number in range(rounds_of(run).num)]
    counts = [totals[cache_of(text).name]["num_tokens"] for text in texts] if scored else []
    counts += [totals[text.name]["answer_tokens"] for text in texts if writer_of(text) == TEACHER]
    return sum(count for count in counts if isinstance(count, int))


def _teacher_parameters(context: StageContext, results: EvalResults) -> int | None:
    """Return the teacher's number of parameters as measured, or from the cache where it was not measured."""
    if results.teacher is not None:
        return results.teacher.num_parameters
    return CacheFacts.model_validate(context.input("cache").manifest.facts).num_teacher_parameters


def _made_from_teacher(context: StageContext, model: ModelResult) -> bool:
    """Return whether the student's first weights were made from the teacher's."""
    student = context.inputs.get(Instance("student", seed=model.seed).name)
    return student is not None and TEACHER in student.manifest.inputs


def _scores(context: StageContext, names: Sequence[str]) -> tuple[float, ...]:
    """Return the models' mean scores in %; empty unless each was measured on all six benchmarks as in the paper."""
    each = [_scores_of(context, name) for name in names]
    found = [scores for scores in each if scores is not None]
    if not found or len(found) < len(names):
        return ()
    return tuple(100 * math.fsum(scores[name] for scores in found) / len(found) for name in SHOTS)


def _scores_of(context: StageContext, name: str) -> Mapping[str, float] | None:
    made = context.inputs.get(name)
    path = None if made is None else Path(made.path) / _BENCHMARK_NAME
    if path is None or not path.is_file():
        return None
    measured: dict[str, Any] = json.loads(path.read_bytes())
    scores = {
        row["asked"]: float(row["value"])
        for row in measured["rows"]
        if row["main"] and row["asked"] in SHOTS and row["num_fewshot"] in (SHOTS[row["asked"]], None)
    }
    return scores if measured["limit"] is None and scores.keys() == SHOTS.keys() else None
