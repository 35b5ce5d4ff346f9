from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from capgap.pipeline.report import stage
from capgap.pipeline.report.gather import gather, read_curve
from capgap.pipeline.report.page import render_page
from capgap.pipeline.report.summary import Report
from capgap.pipeline.report.table import print_table, table_text
from capgap.schemas.errors import InputError

ONE_SEED = {"cross_entropy": [3.53], "distilled": [3.50]}
THREE_SEEDS = {"cross_entropy": [3.53, 3.56, 3.54], "distilled": [3.50, 3.52, 3.51]}


def _verdicts(context):
    return gather(context).table.verdicts


def test_a_gain_is_claimed_where_the_interval_excludes_zero(tmp_path, make_context):
    (sentence,) = _verdicts(make_context(tmp_path, ONE_SEED))
    assert re.fullmatch(
        r"distilled beats cross_entropy by 0\.0300 nats/token "
        r"\(95 % interval 0\.02\d\d to 0\.03\d\d over 512 held-out sequences, 1 seed\)",
        sentence,
    )


def test_a_loss_is_told_as_one(tmp_path, make_context):
    (sentence,) = _verdicts(make_context(tmp_path, {"cross_entropy": [3.50], "distilled": [3.53]}))
    assert re.match(
        r"distilled does not beat cross_entropy: its loss is higher by 0\.0300 nats/token "
        r"\(95 % interval 0\.02\d\d to 0\.03",
        sentence,
    )


@pytest.mark.parametrize(("distilled", "ahead"), [(3.4999, "distilled"), (3.5001, "cross_entropy")])
def test_a_tie_is_told_as_one(tmp_path, make_context, distilled, ahead):
    (sentence,) = _verdicts(make_context(tmp_path, {"distilled": [distilled], "cross_entropy": [3.5]}))
    assert re.match(
        rf"distilled and cross_entropy cannot be told apart: {ahead} is ahead by 0\.0001 nats/token "
        r"\(95 % interval -0\.00\d\d to 0\.00\d\d over 512",
        sentence,
    )


def test_several_seeds_are_judged_over_the_seeds(tmp_path, make_context):
    (sentence,) = _verdicts(make_context(tmp_path, THREE_SEEDS))
    # differences 0.03, 0.04, 0.03: half width 4.3027 x 0.005774 / sqrt(3) = 0.0143
    assert sentence == (
        "distilled beats cross_entropy by 0.0333 nats/token (95 % interval 0.0190 to 0.0477 over 3 seeds, "
        "512 held-out sequences each); distilled has the lower loss at 3 of 3 seeds "
        "(seed 0: +0.0300, seed 1: +0.0400, seed 2: +0.0300)"
    )


def test_seeds_that_disagree_settle_nothing(tmp_path, make_context):
    (sentence,) = _verdicts(make_context(tmp_path, {"cross_entropy": [3.53, 3.50], "distilled": [3.50, 3.51]}))
    assert "cannot be told apart: distilled is ahead by 0.0100" in sentence
    assert "at 1 of 2 seeds (seed 0: +0.0300, seed 1: -0.0100)" in sentence


def test_every_distilled_arm_is_compared_with_every_cross_entropy_arm(tmp_path, make_context):
    losses = {"a": [3.5], "b": [3.6], "cross_entropy": [3.7], "cross_entropy_2": [3.8]}
    starts = [sentence.split(" by ")[0] for sentence in _verdicts(make_context(tmp_path, losses))]
    assert starts == [f"{arm} beats cross_entropy{x}" for arm in "ab" for x in ("", "_2")]


def test_without_a_cross_entropy_arm_nothing_is_claimed(tmp_path, make_context):
    (sentence,) = _verdicts(make_context(tmp_path / "a", {"distilled": [3.5]}))
    assert sentence.startswith("no arm has alpha 0")
    (sentence,) = _verdicts(make_context(tmp_path / "b", {"cross_entropy": [3.5]}))
    assert sentence.startswith("no arm is distilled")


def test_an_arm_that_learns_from_the_teacher_in_later_steps_only_is_a_distilled_one(tmp_path, make_context):
    arms = {"cross_entropy": {"alpha": 0}, "late": {"alpha": 0, "final_alpha": 1}}
    (sentence,) = _verdicts(make_context(tmp_path, {"cross_entropy": [3.6], "late": [3.5]}, arms=arms))
    assert sentence.startswith("late beats cross_entropy by 0.1")


def test_every_recording_of_the_cache_has_its_cost(tmp_path, make_context):
    report = gather(make_context(tmp_path, THREE_SEEDS, recordings={"sampled": 50, "topk": 64}))
    assert (
        "cache: 61.0 bytes per token (recording sampled, n = 50) and 122.1 bytes per token (recording topk, k = 64), "
        "1,048,576 tokens"
    ) in " ".join(table_text(report.table).split())
    page = render_page(report)
    assert "topk, 64 top-k tokens of each distribution, temperatures 1, 2.5" in page
    assert "sampled, 50 samples of each distribution, temperature 1" in page
    assert "192.0 MB in 2 shards" in page


def test_the_table_holds_teacher_and_arms(tmp_path, make_context):
    report = gather(make_context(tmp_path, THREE_SEEDS))
    assert [row.name for row in report.table.rows] == ["teacher", "cross_entropy", "distilled"]
    distilled = report.table.rows[2]
    assert (distilled.loss.mean, distilled.loss.sd) == pytest.approx((3.51, 0.01))
    assert report.table.rows[0].kl is None
    text = table_text(report.table)
    assert "| distilled (3 seeds) | 1.24M | 3.5100 +- 0.0100 |" in re.sub(" +", " ", text)
    assert "cache: 61.0 bytes per token (recording sampled, n = 50), 1,048,576 tokens" in text
    assert text.isascii()


def test_one_seed_shows_no_deviation_and_a_caveat(tmp_path, make_context):
    text = table_text(gather(make_context(tmp_path, ONE_SEED)).table)
    assert "+-" not in text
    assert "note: with one seed the interval covers the choice of held-out text alone" in text


def test_the_terminal_shows_the_table_of_a_finished_report(tmp_path, make_context):
    context = make_context(tmp_path, ONE_SEED)
    stage.run(context)
    buffer = io.StringIO()
    print_table(context.folder, Console(file=buffer, width=120))
    assert "distilled beats cross_entropy by 0.0300" in buffer.getvalue()
    assert "7.61M" in buffer.getvalue()
    text = (context.folder / "table.txt").read_text()
    assert text == table_text(Report.model_validate_json((context.folder / "report.json").read_bytes()).table)


def test_a_missing_or_damaged_report_is_named(tmp_path):
    with pytest.raises(InputError, match=r"report\.json: there is no report"):
        print_table(tmp_path, Console())
    (tmp_path / "report.json").write_text('{"name":')
    with pytest.raises(InputError, match=r"report\.json: cannot be read"):
        print_table(tmp_path, Console())


def test_a_narrow_terminal_shows_means_alone(tmp_path, make_context):
    context = make_context(tmp_path, THREE_SEEDS)
    stage.run(context)
    buffer = io.StringIO()
    print_table(context.folder, Console(file=buffer, width=80))
    table = buffer.getvalue().split("cache:")[0]
    assert "+-" not in table
    assert re.search(r"distilled +1\.24M +3\.5100 +1\.\d{4} +0\.7100 +61\.0 % +72\.0 %", table)


def test_sparse_metrics_become_a_curve(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("num_tokens,train_loss,validation_loss\n10,4.0,\n20,,3.5\n30,,nan\n40,,3.25\n")
    assert read_curve(path) == ((20, 40), (3.5, 3.25))
    path.write_text("step,train_loss\n10,4.0\n")
    assert read_curve(path) == ((), ())
