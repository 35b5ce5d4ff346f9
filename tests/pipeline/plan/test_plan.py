"""The plan of a run that is not begun, of one whose corpus is made, and what it refuses to say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DEEPER, tiny_llama
from tiny_runs import save_teacher

from capgap.pipeline.plan import Stated, make_plan
from capgap.pipeline.plan.break_even import least_students
from capgap.pipeline.plan.plan import far_from_home
from capgap.pipeline.plan.published import scaling_best_teacher
from capgap.pipeline.plan.sizes import shape_parameters
from capgap.pipeline.plan.work import work_of
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import states
from capgap.schemas.plan import RunPlan, StagePlan
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_model import ModelShape

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


@pytest.fixture
def run(make_corpus_run: Callable[..., RunFile]) -> Callable[..., RunFile]:
    def make(**settings: Any) -> RunFile:
        base = make_corpus_run().model_dump(mode="json")
        base |= {"cache": {"engine": "transformers"}, "train": {}, "eval": {}}
        models = {"teacher": {"model": SHAPE}, "student": {"model": SHAPE}}
        return RunFile.model_validate(base | {"device": "cpu"} | models | settings)

    return make


def stages(plan: RunPlan) -> dict[str, StagePlan]:
    return {stage.instance: stage for stage in plan.stages}


def test_a_shape_is_counted_as_the_model_that_is_made_of_it() -> None:
    shape = ModelShape.model_validate(SHAPE)
    with torch.device("meta"):
        model = tiny_llama(
            vocab_size=1, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **DEEPER
        )
    assert shape_parameters(shape) + 32 == sum(parameter.numel() for parameter in model.parameters())


def test_a_pruned_student_is_counted_before_it_is_made(run: Callable[..., RunFile]) -> None:
    """Width 16, one layer of one group of two heads of 8, 24 neurons; embedding and head are one."""
    prune = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    pruned = run(student={"prune": prune})
    carry_out(pruned, Instance("corpus"))
    layer = (2 * 16 * 16 + 2 * 16 * 8) + 3 * 16 * 24 + 2 * 16
    assert make_plan(pruned, Stated()).student_parameters.value == 400 * 16 + layer + 16
    full = make_plan(run(student={"prune": {}}), Stated())
    assert full.student_parameters.value == full.teacher_parameters.value
    wider = make_plan(run(student={"prune": {"num_layers": 9}}), Stated())
    assert "found 9, expected at most the teacher's 2" in wider.student_parameters.source


def test_before_anything_is_made_tokens_are_estimated_and_after_the_corpus_counted(run: Callable[..., RunFile]) -> None:
    estimated = stages(make_plan(run(), Stated()))
    made = carry_out(run(), Instance("corpus"))
    counted = stages(make_plan(run(), Stated()))
    assert (
        "estimated: 60 .txt" in estimated["cache"].tokens.source
        and "measured at a vocabulary of 512" in estimated["cache"].tokens.source
    )
    assert counted["cache"].tokens.value == made.shard_sets["student"].num_tokens
    # the ratio of bytes to tokens is that of another text
    assert estimated["corpus"].tokens.value == pytest.approx(counted["corpus"].tokens.value, rel=0.5)
    assert (counted["corpus"].state, counted["corpus"].device_hours.value) == ("current", 0)


def test_a_stated_ratio_of_bytes_and_tokens_is_taken(run: Callable[..., RunFile], texts: Path) -> None:
    num_bytes = sum(path.stat().st_size for path in texts.iterdir())
    plan = stages(make_plan(run(), Stated(), text_bytes_per_token=4.0))
    assert plan["corpus"].tokens.value == pytest.approx(num_bytes / 4)
    assert plan["cache"].tokens.value == pytest.approx(num_bytes / 4 * 0.3), "what teacher and held-out leave"


def test_without_a_rate_no_hours_are_said_but_what_to_give(run: Callable[..., RunFile]) -> None:
    plan = make_plan(run(), Stated())
    for stage in ("teacher", "cache", "train/distilled/seed-0", "eval"):
        hours = stages(plan)[stage].device_hours
        assert hours.value is None and "--device-peak-tflops" in hours.source
    assert plan.device_hours.value is None and "teacher, cache, train" in plan.device_hours.source


def test_stated_rates_are_tokens_over_rate_and_flops_are_6_n_d_and_2_n_d(run: Callable[..., RunFile]) -> None:
    stated = Stated(teacher_tokens_per_s=100, train_tokens_per_s=50, device_peak_tflops=0.5, mfu=0.2)
    plan = make_plan(run(), stated)
    found = stages(plan)
    tokens = found["cache"].tokens.value
    size = plan.teacher_parameters.value
    assert tokens is not None and size is not None
    assert size == shape_parameters(ModelShape.model_validate(SHAPE)) + 400 * 32
    assert found["cache"].device_hours.value == pytest.approx(tokens / 100 / 3600)
    assert found["train/distilled/seed-0"].device_hours.value == pytest.approx(tokens / 50 / 3600)
    trained = found["teacher"].tokens.value
    assert found["teacher"].device_hours.value == pytest.approx(6 * size * trained / (0.5e12 * 0.2) / 3600)
    measured = found["eval"].tokens.value
    assert found["eval"].device_hours.value == pytest.approx(2 * size * measured / (0.5e12 * 0.2) / 3600)
    assert plan.device_hours.value == pytest.approx(sum(stage.device_hours.value for stage in plan.stages))


def test_an_earlier_run_of_the_same_stage_says_how_fast_it_goes_and_another_teacher_s_does_not(
    run: Callable[..., RunFile], tmp_path: Path
) -> None:
    for name in ("corpus", "teacher"):
        manifest = carry_out(run(), Instance(name))  # type: ignore[arg-type]
    rate = manifest.totals["num_tokens"] / manifest.wall_s
    other = run(out=str(tmp_path / "other"))
    like = Stated(like=(run().out,))
    found = stages(make_plan(other, like))["teacher"].tokens_per_s
    assert found.value == pytest.approx(rate) and "measured: " in found.source and "start included" in found.source
    assert not any("no rate of" in note for note in make_plan(other, like).notes)
    changed = run(out=str(tmp_path / "other"), teacher={"model": {**SHAPE, "num_layers": 1}})
    assert stages(make_plan(changed, like))["teacher"].tokens_per_s.value is None
    said = f"no rate of {run().out} can be used for this run (teacher: different teacher.model)"
    assert said in make_plan(changed, like).notes


def test_disk_is_compared_with_what_is_free_and_holds_every_seed(run: Callable[..., RunFile]) -> None:
    one, three = (make_plan(run(seeds=seeds), Stated()) for seeds in ([0], [0, 1, 2]))
    assert one.free_bytes > 0 and one.needed_bytes.value is not None and three.needed_bytes.value is not None
    size = one.student_parameters.value
    # a student and a trained student for each further seed, in float32
    assert three.needed_bytes.value - one.needed_bytes.value == pytest.approx(2 * 2 * 4 * size)


def test_what_is_reused_costs_nothing(run: Callable[..., RunFile], tmp_path: Path) -> None:
    carry_out(run(), Instance("corpus"))
    plan = make_plan(run(out=str(tmp_path / "other"), reuse={"corpus": f"{run().out}/corpus"}), Stated())
    corpus = stages(plan)["corpus"]
    assert (corpus.state, corpus.disk_bytes.value, corpus.device_hours.value) == ("reused", 0, 0)
    assert stages(plan)["cache"].tokens.source == "the corpus"


def test_an_evaluation_without_the_teacher_is_of_students_alone(run: Callable[..., RunFile]) -> None:
    whole, less = (stages(make_plan(run(**more), Stated()))["eval"] for more in ({}, {"eval": {"teacher": "cache"}}))
    # one arm of one seed
    assert whole.tokens.value is not None and less.tokens.value == whole.tokens.value / 2
    assert whole.scratch_bytes.value and less.scratch_bytes.value == 0


@pytest.mark.parametrize(
    ("once", "each", "least"), [(10, 10, 2), (10, 11, 1), (10, 4, 3), (10, 5, 3), (0, 1, 1), (1, 0, None)]
)
def test_a_cache_pays_from_the_first_number_of_students_that_costs_more_online(
    once: float, each: float, least: int | None
) -> None:
    assert least_students(once, each) == least
    if least is not None:
        assert once < least * each and once >= (least - 1) * each


def test_a_cache_beats_an_online_teacher_from_the_second_student_of_one_epoch_and_the_first_of_two(
    run: Callable[..., RunFile],
) -> None:
    stated = Stated(teacher_tokens_per_s=100)
    once = make_plan(run(), stated)
    assert [even.num_students for even in once.break_even] == [2, 2]
    twice = make_plan(run(train={"num_epochs": 2}), stated)
    assert [even.num_students for even in twice.break_even] == [1, 1]
    slow_beside_a_student = make_plan(run(), replace(stated, online_teacher_tokens_per_s=30))
    assert [even.num_students for even in slow_beside_a_student.break_even] == [2, 1]
    fast = make_plan(run(), replace(stated, online_teacher_tokens_per_s=250))
    assert [even.num_students for even in fast.break_even] == [2, 3]
    assert make_plan(run(), Stated()).break_even[1].num_students is None


def test_arms_without_the_cache_s_targets_are_no_students_of_the_cache(run: Callable[..., RunFile]) -> None:
    others = {"cross_entropy": {"alpha": 0}, "online": {"targets": "online"}, "as_it_is": {"max_tokens": 0}}
    made = run(seeds=[0, 1], arms={"distilled": {}} | others)
    assert make_plan(made, Stated()).num_students == 2
    shards = made.model_dump(mode="json", exclude_unset=True)
    for section in ("student", "train", "arms", "eval"):
        del shards[section]
    assert make_plan(RunFile.model_validate(shards), Stated()).num_students == 0


def test_a_plan_says_where_fewer_tokens_than_a_shard_has_are_asked_for(run: Callable[..., RunFile]) -> None:
    made = run()
    shard = made.corpus.sequences_per_shard * made.corpus.seq_len
    cached = stages(make_plan(run(cache={"engine": "transformers", "max_tokens": shard - 1}), Stated()))["cache"].tokens
    assert cached.value == shard and f"a shard is scored whole ({shard:,} tokens)" in cached.source
    whole = stages(make_plan(run(cache={"engine": "transformers", "max_tokens": shard}), Stated()))["cache"].tokens
    assert whole.value == shard and "scored whole" not in whole.source


def test_every_arm_is_planned_with_its_own_tokens_and_one_that_asks_the_teacher_with_its_passes(
    run: Callable[..., RunFile],
) -> None:
    arms = {"distilled": {}, "short": {"max_tokens": 640}, "none": {"max_tokens": 0}, "online": {"targets": "online"}}
    stated = Stated(device_peak_tflops=0.5, mfu=0.2)
    plan = make_plan(run(arms=arms), stated)
    found = {arm: stages(plan)[f"train/{arm}/seed-0"] for arm in arms}
    assert found["short"].tokens.value == 640 and found["none"].tokens.value == 0
    assert found["distilled"].tokens.value == found["online"].tokens.value == stages(plan)["cache"].tokens.value
    assert found["none"].device_hours.value == found["none"].scratch_bytes.value == 0
    # student and teacher are of one size: 6 N D, and 2 N D beside it
    ratio = found["online"].device_hours.value / found["distilled"].device_hours.value
    assert ratio == pytest.approx(8 / 6)
    both = make_plan(run(arms=arms), Stated(teacher_tokens_per_s=100, train_tokens_per_s=50))
    rate = stages(both)["train/online/seed-0"].tokens_per_s
    assert rate.value == pytest.approx(1 / (1 / 100 + 1 / 50)) and rate.source.endswith("at 100 (stated), in turn")
    faster = Stated(teacher_tokens_per_s=100, train_tokens_per_s=50, online_teacher_tokens_per_s=200)
    rate = stages(make_plan(run(arms=arms), faster))["train/online/seed-0"].tokens_per_s
    assert rate.value == pytest.approx(40), "a teacher that only scores is as fast as it is said to be"
    alone = make_plan(run(arms=arms), Stated(train_tokens_per_s=50))
    unknown = stages(alone)["train/online/seed-0"].tokens_per_s
    assert unknown.value is None and "--train-tokens-per-s and --teacher-tokens-per-s" in unknown.source


def test_an_earlier_training_beside_the_teacher_says_nothing_of_one_from_the_cache(
    run: Callable[..., RunFile], tmp_path: Path
) -> None:
    online = run(arms={"online": {"targets": "online"}})
    for instance in ("corpus", "teacher", "cache"):
        carry_out(online, Instance(instance))  # type: ignore[arg-type]
    carry_out(online, Instance("student", seed=0))
    manifest = carry_out(online, Instance("train", "online", 0))
    both = run(out=str(tmp_path / "other"), arms={"distilled": {}, "online": {"targets": "online"}})
    found = stages(make_plan(both, Stated(like=(online.out,))))
    rate = found["train/online/seed-0"].tokens_per_s
    assert rate.value == pytest.approx(manifest.totals["num_tokens"] / manifest.wall_s)
    assert found["train/distilled/seed-0"].tokens_per_s.value is None


def test_the_laws_are_marked_where_they_go_beyond_what_was_measured(run: Callable[..., RunFile]) -> None:
    laws = make_plan(run(), Stated()).laws
    assert all("(outside what it was measured on)" in law.sentence for law in laws)
    assert laws[0].best_size is None and "below the student's own size" in laws[0].summary


def test_the_laws_name_a_teacher_beside_the_chosen_one_within_their_range(run: Callable[..., RunFile]) -> None:
    student = {"hidden_size": 1024, "num_layers": 16, "num_heads": 16, "intermediate_size": 2816}
    teacher = {"hidden_size": 2048, "num_layers": 16, "num_heads": 16, "intermediate_size": 5632}
    plan = make_plan(run(student={"model": student}, teacher={"model": teacher}), Stated(), text_bytes_per_token=1e-6)
    gap, scaling = plan.laws
    size = plan.student_parameters.value
    tokens = stages(plan)["train/distilled/seed-0"].tokens.value
    assert size is not None and tokens is not None
    assert gap.best_size == pytest.approx(2.498 * size - 11.498e6)
    assert gap.within_validity and "nearest: the run's teacher, 4.0" in gap.summary
    inner = shape_parameters(ModelShape.model_validate(student))
    ratio = stages(plan)["teacher"].tokens.value / shape_parameters(ModelShape.model_validate(teacher))
    assert scaling.best_size == pytest.approx(inner * scaling_best_teacher(inner, tokens, ratio).ratio)
    assert scaling.within_validity and "the run's teacher, 4.0" in scaling.summary


def test_the_laws_know_nothing_of_the_training_of_a_teacher_that_is_only_adapted_here(
    run: Callable[..., RunFile], tmp_path: Path
) -> None:
    save_teacher(tmp_path / "given", ["a few words"] * 9, 0)
    adapted = {"path": str(tmp_path / "given"), "adapt": {"max_tokens": 4096}}
    _, scaling = make_plan(run(teacher=adapted), Stated()).laws
    assert "trained on 20 tokens a parameter (an assumption, none was given)" in scaling.summary
    _, trained = make_plan(run(), Stated()).laws
    assert "(the median given)" in trained.summary


def test_the_laws_are_left_out_where_the_student_cannot_be_counted(run: Callable[..., RunFile]) -> None:
    assert make_plan(run(student={"path": "nowhere"}), Stated()).laws == ()


def test_a_tokenizer_that_is_not_here_leaves_out_what_depends_on_it(
    run: Callable[..., RunFile], tmp_path: Path
) -> None:
    base = run().model_dump(mode="json")
    base["corpus"] |= {"tokenizer": "nobody/nowhere", "vocab_size": None}
    base["teacher"] = {"path": str(tmp_path / "absent")}
    plan = make_plan(RunFile.model_validate(base), Stated(teacher_tokens_per_s=100))
    found = stages(plan)
    assert found["cache"].tokens.value is None and "--text-bytes-per-token" in found["cache"].tokens.source
    assert found["cache"].device_hours.value is None and found["cache"].disk_bytes.value is None
    assert plan.teacher_parameters.value is None and "no model can be found" in plan.teacher_parameters.source
    assert plan.student_parameters.value is None and plan.needed_bytes.value is None
    assert any("not known" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("fraction", "changes", "said"),
    [
        (0.6, {}, r"keeps 60 % of the documents, [\d,]+ tokens, for a teacher that learns nothing here: set corpus\."),
        (0.6, {"adapt": {"max_tokens": 256}}, None),
        (0.0, {}, None),
    ],
)
def test_text_that_is_kept_for_a_teacher_that_learns_nothing_is_said(
    run: Callable[..., RunFile], tmp_path: Path, fraction: float, changes: dict[str, Any], said: str | None
) -> None:
    base = run().model_dump(mode="json")
    base["corpus"]["teacher_fraction"] = fraction
    base["teacher"] = {"path": str(tmp_path / "absent")} | changes
    notes = make_plan(RunFile.model_validate(base), Stated()).notes
    found = [note for note in notes if "corpus.teacher_fraction" in note]
    assert [re.search(said, note) is not None for note in found] == ([True] if said else [])


def test_a_teacher_far_from_home_is_told_to_be_adapted(run: Callable[..., RunFile]) -> None:
    made = run(teacher={"model": SHAPE, "training": {"max_tokens": 256}})
    for stage in ("corpus", "teacher", "cache"):
        carry_out(made, Instance(stage))
    loss = states(made)["cache"].manifest.facts["mean_label_loss"]  # type: ignore[union-attr]
    for home, said in ((loss - 0.3, True), (loss - 0.1, False), (loss + 1, False)):
        there = run(teacher={"model": SHAPE, "training": {"max_tokens": 256}, "home_loss": home})
        notes = make_plan(there, Stated()).notes
        assert any("0.300 above" in note and "teacher.adapt" in note for note in notes) == said
    assert not far_from_home(1.0, None), "nothing is known of a corpus that was not scored"


def test_a_cache_that_stands_for_the_corpus_says_how_much_text_there_is(run: Callable[..., RunFile]) -> None:
    made = run(teacher={"model": SHAPE, "training": {"max_tokens": 256}})
    for stage in ("corpus", "teacher", "cache"):
        carry_out(made, Instance(stage))
    known = states(made)
    corpus, cache = known["corpus"].manifest, known["cache"].manifest
    assert corpus is not None and cache is not None
    alone = run(reuse={"cache": str(known["cache"].folder)}, corpus=None, teacher=None)
    found = work_of(alone, {}, None)
    assert found.vocab_size == corpus.facts["tokenizer"]["vocab_size"]  # type: ignore[index, call-overload]
    assert found.split_tokens["student"].value == corpus.shard_sets["student"].num_tokens
    assert found.eval_sequences.value == cache.shard_sets["heldout-sampled"].num_sequences
    assert {figure.source for figure in found.split_tokens.values()} == {"the cache"}
