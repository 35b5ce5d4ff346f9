"""Collects the results of all other stages into one `Report`."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import TypeVar

from capgap.pipeline.fidelity.fidelity import fidelity_of
from capgap.pipeline.fidelity.sample import Sampling
from capgap.pipeline.report.benchmarks import benchmarks
from capgap.pipeline.report.frontier import run_frontier
from capgap.pipeline.report.low_bit import low_bit, low_bit_lines
from capgap.pipeline.report.nearness import nearness_lines
from capgap.pipeline.report.rounds import round_lines
from capgap.pipeline.report.stages import stage_line
from capgap.pipeline.report.summary import CacheSummary, Gain, Report, Series, Table, TrainingCurve
from capgap.pipeline.report.table import build_rows, cache_line
from capgap.pipeline.report.training_charts import MEASURES
from capgap.pipeline.report.verdict import gains, no_verdict, verdict
from capgap.pipeline.stage.context import Instance, StageContext, StageInput
from capgap.pipeline.workflow.remake import last_command
from capgap.schemas.errors import CapgapError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.fidelity import Fidelity
from capgap.schemas.judge_results import JUDGE_NAME, JudgeResults
from capgap.schemas.results import RESULTS_NAME, EvalResults

_T = TypeVar("_T")

_METRICS_NAME = "metrics.csv"
_MOST_POINTS = 200
# One shard only, because it may have to be fetched from a URL; `capgap fidelity` reads more.
_SAMPLE = Sampling(num_sequences=64, num_shards=1)

_LOG = logging.getLogger("capgap")


def gather(context: StageContext) -> Report:
    """Collect everything that the report shows."""
    results = EvalResults.model_validate_json((context.input("eval").path / RESULTS_NAME).read_bytes())
    cache = _cache(context.input("cache"))
    alphas = {arm: context.run.train_settings(arm).largest_alpha for arm in context.run.arms}
    found = gains(results, alphas)
    facts, few = cache.facts, low_bit(context, results)
    return Report(
        name=context.run.name,
        machine=", ".join(sorted({one.machine for one in facts.scored if one.machine})),
        finished=context.input("eval").manifest.started.replace("T", " ").removesuffix("+00:00"),
        command=started.command if (started := last_command(Path(context.run.out))) else (),
        teacher_parameters=results.teacher.num_parameters if results.teacher else facts.num_teacher_parameters,
        table=Table(
            rows=build_rows(results),
            lines=(
                cache_line(cache),
                *_warnings(cache.facts),
                *low_bit_lines(few),
                *nearness_lines(results),
                *_caveats(found),
            ),
            verdicts=tuple(verdict(gain, results.num_sequences) for gain in found) or (no_verdict(results, alphas),),
            benchmarks=benchmarks(context),
        ),
        gains=found,
        results=results,
        frontier=run_frontier(context, results),
        judge=_judged(context),
        cache=cache,
        fidelity=_fidelity(context.input("cache")),
        curves=_curves(context),
        low_bit=few,
        rounds=round_lines(context),
        stages=tuple(stage_line(stage, context.run) for stage in context.inputs.values()),
        settings=context.run.decisive(),
    )


def read_measures(path: Path) -> dict[str, Series]:
    """Read the columns of a `metrics.csv` that have a chart, without empty and non-finite values.

    A column with fewer than two values is left out. Long columns are thinned to about 200 values; the last one is kept.
    """
    found: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in MEASURES}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, (tokens, values) in found.items():
                num_tokens, value = row.get("num_tokens"), row.get(name)
                if num_tokens and value and math.isfinite(float(value)):
                    tokens.append(int(num_tokens))
                    values.append(float(value))
    return {
        name: Series(tokens=_thinned(tokens), values=_thinned(values))
        for name, (tokens, values) in found.items()
        if len(values) > 1
    }


def _thinned(values: list[_T]) -> tuple[_T, ...]:
    step = -(-len(values) // _MOST_POINTS)
    return (*values[:-1:step], values[-1])


def read_curve(path: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Read training tokens and validation losses from a `metrics.csv`, without rows that lack a finite loss."""
    tokens, losses = [], []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            num_tokens, loss = row.get("num_tokens"), row.get("validation_loss")
            if num_tokens and loss and math.isfinite(float(loss)):
                tokens.append(int(num_tokens))
                losses.append(float(loss))
    return tuple(tokens), tuple(losses)


def _judged(context: StageContext) -> JudgeResults | None:
    judge = context.inputs.get("judge")
    return None if judge is None else JudgeResults.model_validate_json((judge.path / JUDGE_NAME).read_bytes())


def _cache(cache: StageInput) -> CacheSummary:
    facts, sets = CacheFacts.model_validate(cache.manifest.facts), cache.manifest.shard_sets
    any_set = next(iter(sets.values()))
    return CacheSummary(
        facts=facts,
        num_bytes={name: sets[name].num_bytes for name in sorted(facts.recordings)},
        num_tokens=any_set.num_tokens,
        num_shards=len(any_set.shards),
    )


def _fidelity(cache: StageInput) -> Fidelity | None:
    """Measure the cache's fidelity on a small sample; None where the shards cannot be read or hold chunks."""
    if CacheFacts.model_validate(cache.manifest.facts).aligned is not None:
        return None
    try:
        return fidelity_of(cache, _SAMPLE)
    except CapgapError as error:
        _LOG.warning("report: the fidelity of the cache is left out: %s", error)
        return None


def _warnings(facts: CacheFacts) -> tuple[str, ...]:
    check = facts.cross_check
    return () if check is None or not check.differs else (f"warning: {check.sentence}",)


def _caveats(found: tuple[Gain, ...]) -> tuple[str, ...]:
    if any(len(gain.seeds) == 1 for gain in found):
        return (
            "note: with one seed the interval covers the choice of held-out text alone; other seeds may differ more",
        )
    return ()


def _curves(context: StageContext) -> tuple[TrainingCurve, ...]:
    run = context.run
    trained = [Instance("teacher"), *(Instance("train", arm, seed) for arm in run.arms for seed in run.seeds)]
    curves = []
    for instance in trained:
        made = context.inputs.get(instance.name)
        if made is None or not (made.path / _METRICS_NAME).is_file():
            continue
        tokens, losses = read_curve(made.path / _METRICS_NAME)
        if losses:
            curve = TrainingCurve(
                name=instance.name,
                arm=instance.arm,
                seed=instance.seed,
                tokens=tokens,
                losses=losses,
                measures=read_measures(made.path / _METRICS_NAME),
            )
            curves.append(curve)
    return tuple(curves)
