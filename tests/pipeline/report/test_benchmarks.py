"""Benchmarks in the report: a line for each task, a column for each model."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from capgap.pipeline.report.gather import gather
from capgap.pipeline.report.page import render_page
from capgap.pipeline.report.table import print_table, table_text
from capgap.pipeline.stage.context import StageContext, StageInput
from capgap.schemas.benchmark import BENCHMARK_NAME, BenchmarkMean, BenchmarkResults, BenchmarkRow


def _row(asked: str, value: float, stderr: float | None = 0.01, **more: Any) -> BenchmarkRow:
    values = {"asked": asked, "task": asked, "metric": "acc", "filter": "none", "chance": 0.25, "num_fewshot": 5}
    values |= {"higher_is_better": True, "num_samples": 10, "num_all_samples": 10, "version": "1.0", "main": True}
    return BenchmarkRow.model_validate({**values, "value": value, "stderr": stderr, **more})


def _with(context: StageContext, scores: dict[str, float], limit: int | None = None) -> StageContext:
    """The context with finished benchmark stages, each model's scores made from one number."""
    inputs = dict(context.inputs)
    for name, value in scores.items():
        folder = context.folder.parent / "benchmark" / name
        folder.mkdir(parents=True)
        found = BenchmarkResults(
            model=name,
            backend="hf",
            dtype="float32",
            context_tokens=64,
            limit=limit,
            versions={"lm-eval": "0.4.13"},
            rows=(
                _row("mmlu", value),
                _row("mmlu", value, task="mmlu_anatomy", main=False),
                _row("gsm8k", value / 2, None, metric="exact_match", filter="strict-match", chance=None),
            ),
            means=(BenchmarkMean(preset="paper", tasks=("mmlu", "gsm8k"), value=value * 0.75, stderr=None),),
        )
        (folder / BENCHMARK_NAME).write_text(found.model_dump_json())
        manifest = context.inputs["eval"].manifest.model_copy(update={"stage": "benchmark"})
        inputs[f"benchmark/{name}"] = StageInput(folder, manifest)
    return dataclasses.replace(context, inputs=inputs)


@pytest.fixture
def context(make_context, tmp_path: Path) -> StageContext:
    plain = make_context(tmp_path, {"distilled": [4.0, 4.1], "cross_entropy": [4.2, 4.3]})
    scores = {"teacher": 0.5, "distilled/seed-0": 0.4, "distilled/seed-1": 0.44}
    return _with(plain, scores | {"cross_entropy/seed-0": 0.3, "cross_entropy/seed-1": 0.3})


def test_a_run_without_benchmarks_has_no_table_of_them(make_context, tmp_path: Path) -> None:
    report = gather(make_context(tmp_path, {"distilled": [4.0]}))
    assert report.table.benchmarks is None
    assert "Benchmarks" not in render_page(report) and "shots" not in table_text(report.table)


def test_a_given_model_that_is_tuned_has_a_column_of_its_own(make_context, tmp_path: Path) -> None:
    plain = make_context(tmp_path, {"distilled": [4.0]})
    found = gather(_with(plain, {"seed-0": 0.4, "seed-1": 0.44})).table.benchmarks
    assert found is not None
    assert list(found.lines[0].scores) == ["tuned"]
    assert found.lines[0].scores["tuned"].mean == pytest.approx(0.42)


def test_models_are_columns_with_errors_over_seeds_or_examples(context) -> None:
    found = gather(context).table.benchmarks
    assert found is not None
    mmlu, gsm8k, paper = found.lines
    assert list(mmlu.scores) == ["teacher", "distilled", "cross_entropy"]
    assert (mmlu.scores["teacher"].mean, mmlu.scores["teacher"].error) == (0.5, 0.01)
    # the deviation of two numbers is their distance over the root of two
    assert mmlu.scores["distilled"].mean == pytest.approx(0.42)
    assert mmlu.scores["distilled"].error == pytest.approx(0.04 / 2**0.5)
    assert (gsm8k.metric, gsm8k.chance, gsm8k.scores["teacher"].error) == ("exact_match, strict-match", None, None)
    assert (paper.task, paper.metric, paper.scores["teacher"].mean) == ("paper", "mean of 2", 0.375)


def test_the_table_and_the_page_show_them_with_chance_and_shots(context) -> None:
    report = gather(context)
    text, page = table_text(report.table), render_page(report)
    (line,) = [line for line in text.splitlines() if line.startswith("| mmlu ")]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "mmlu",
        "acc",
        "5",
        "0.2500",
        "0.5000 +- 0.0100",
        "0.4200 +- 0.0283",
        "0.3000 +- 0.0000",
    ]
    assert "benchmarks: lm-eval 0.4.13 through hf, float32; +- is" in text and "limited" not in text
    assert "Benchmarks</h2>" in page and "0.4200 \u00b1 0.0283" in page


def test_a_narrow_terminal_gets_the_scores_without_errors(context) -> None:
    folder, page = context.folder, io.StringIO()
    (folder / "report.json").write_text(gather(context).model_dump_json())
    print_table(folder, Console(file=page, width=90, force_terminal=False))
    (line,) = [line for line in page.getvalue().splitlines() if line.strip().startswith("gsm8k")]
    assert line.split()[-3:] == ["0.2500", "0.2100", "0.1500"]


def test_a_trial_is_called_limited(make_context, tmp_path: Path) -> None:
    limited = _with(make_context(tmp_path, {"distilled": [4.0]}), {"distilled/seed-0": 0.4}, limit=7)
    report = gather(limited)
    for text in (table_text(report.table), render_page(report)):
        assert "limited: the first 7 examples of each task only" in text
