from __future__ import annotations

from typing import Any

import pytest

from capgap.pipeline.report.gather import gather
from capgap.pipeline.report.nearness import difference_rows, nearness_lines
from capgap.pipeline.report.page import render_page
from capgap.pipeline.report.table import table_text
from capgap.schemas.results import (
    AgainstCache,
    Drafted,
    EvalResults,
    HeldoutCache,
    Interval,
    PairedDifference,
    SeedsDifference,
)

AROUND = Interval(low=-0.1, high=0.3)


@pytest.fixture
def report(tmp_path, make_context) -> Any:
    return gather(make_context(tmp_path, {"cross_entropy": [3.5], "distilled": [3.4]}))


def _with_students(results: EvalResults, **fields: Any) -> EvalResults:
    models = (results.models[0], *(model.model_copy(update=fields) for model in results.models[1:]))
    return results.model_copy(update={"models": models})


def test_results_from_before_any_of_it_say_nothing_of_it(report) -> None:
    assert nearness_lines(report.results) == () and difference_rows(report.results) == ()
    assert "Nearness to the teacher, arm against arm" not in render_page(report)
    assert all(row.ece is None for row in report.table.rows)


@pytest.mark.parametrize(
    ("recording", "line"),
    [
        ("topk", "KL to its top-k tokens and their tail, a lower bound, nats/token: cross_entropy, seed 0 0.2500"),
        ("sampled", "cross-entropy with its samples, nats/token: cross_entropy, seed 0 3.1000"),
    ],
)
def test_the_cached_sequences_have_a_line(report, recording, line) -> None:
    topk = recording == "topk"
    near = AgainstCache(
        loss=3.5, kl=0.25 if topk else None, teacher_ce=None if topk else 3.1, top1=0.5, interval=AROUND,
        top1_interval=AROUND,
    )  # fmt: skip
    cached = HeldoutCache(recording=recording, temperature=1.0, num_sequences=64, num_labels=640, teacher_loss=2.75)
    results = _with_students(report.results, against_cache=near).model_copy(update={"cached": cached})
    (said,) = nearness_lines(results)
    assert said.startswith(f"on the cache's 64 held-out sequences (recording {recording}, temperature 1), {line}")
    assert said.endswith("; the teacher's loss there 2.7500")


def test_a_teacher_that_was_not_at_hand_is_missing_from_the_table_and_said(report) -> None:
    results = report.results.model_copy(
        update={"models": report.results.models[1:], "teacher_missing": "eval.teacher is cache"}
    )
    (said,) = nearness_lines(results)
    assert said == "note: the teacher was not measured (eval.teacher is cache): no KL, top-1 and acceptance"
    assert results.teacher is None


def test_drafts_have_a_line_each(report) -> None:
    found = Drafted(num_speculative_tokens=3, num_drafts=100, num_accepted_by_place=(70, 40, 10), engine="vllm 1.2")
    lines = nearness_lines(_with_students(report.results, drafted=found))
    assert lines[1] == (
        "drafts for the teacher in vllm 1.2: distilled, seed 0 has 70.0 % of first tokens accepted (predicted "
        "from held-out text: 72.0 %), 2.20 tokens for each pass of the teacher at 3 drafted"
    )


def test_differences_are_told_arm_against_arm(report) -> None:
    paired = PairedDifference(first="a", second="b", seed=1, difference=0.1, interval=AROUND, quantity="kl")
    over = SeedsDifference(first="a", second="b", seeds=(0, 1), difference=0.2, interval=AROUND, quantity="cached_kl")
    results = report.results.model_copy(update={"paired_nearness": (paired,), "nearness_over_seeds": (over,)})
    assert difference_rows(results) == (
        ("a - b, seed 1", "KL to the teacher", "+0.1000", "-0.1000", "+0.3000"),
        ("a - b, mean", "KL to the cache", "+0.2000", "-0.1000", "+0.3000"),
    )
    page = render_page(report.model_copy(update={"results": results}))
    assert "Nearness to the teacher, arm against arm" in page and "a - b, mean" in page


def test_calibration_has_a_column(tmp_path, make_context) -> None:
    context = make_context(tmp_path, {"cross_entropy": [3.5], "distilled": [3.4]})
    path = context.input("eval").path / "results.json"
    results = EvalResults.model_validate_json(path.read_bytes())
    path.write_text(_with_students(results, ece=0.0123).model_dump_json())
    text = " ".join(table_text(gather(context).table).split())
    assert "| acceptance | ECE |" in text and "72.0 % | 1.2 % |" in text


def test_a_cache_whose_shards_are_gone_costs_the_report_a_line(tmp_path, make_context, caplog) -> None:
    assert gather(make_context(tmp_path, {"distilled": [3.4]})).fidelity is None
    assert "the fidelity of the cache is left out" in caplog.text
