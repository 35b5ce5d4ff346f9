from __future__ import annotations

import dataclasses
import gc
import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from capgap.pipeline.eval import at_hand, stage
from capgap.pipeline.models.load import load_model
from capgap.pipeline.stage.context import StageContext
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.results import EvalResults
from capgap.schemas.run_eval import SpeculativeSettings

ARMS: dict[str, Any] = {"cross_entropy": {"alpha": 0}, "distilled": {}}


@pytest.fixture(scope="module")
def context(tmp_path_factory, make_context) -> StageContext:
    """Two arms of two seeds, measured."""
    context = make_context(tmp_path_factory.mktemp("measured"), ARMS)
    stage.run(context)
    return context


@pytest.fixture(scope="module")
def found(context) -> EvalResults:
    return _found(context)


@pytest.fixture
def small(tmp_path, make_context) -> StageContext:
    """One student, and one that is the teacher; not measured yet."""
    return make_context(tmp_path, {"distilled": {}})


def _found(context: StageContext) -> EvalResults:
    return EvalResults.model_validate_json((context.folder / "results.json").read_bytes())


def _part(sequences: Any, start: int, stop: int) -> Any:
    return dataclasses.replace(sequences, **{name: values[start:stop] for name, values in vars(sequences).items()})


def _with(context: StageContext, **settings: Any) -> StageContext:
    changed = context.run.eval.model_copy(update=settings)
    return dataclasses.replace(context, run=context.run.model_copy(update={"eval": changed}))


def test_one_model_is_loaded_at_a_time_and_nothing_else_is_left(tmp_path, make_context, monkeypatch, make_sequences):
    alive: list[int] = []

    def load_and_count(*arguments: Any) -> LlamaForCausalLM:
        alive.append(sum(type(one) is LlamaForCausalLM for one in gc.get_objects()))
        return load_model(*arguments)

    context = make_context(tmp_path, {"distilled": {}})
    gc.collect()
    before = sum(type(one) is LlamaForCausalLM for one in gc.get_objects())
    monkeypatch.setattr(stage, "load_model", load_and_count)
    result = stage.run(context)
    assert alive == [before] * 3
    assert {path.name for path in context.folder.iterdir()} == {"logs", "results.json"}
    mask = make_sequences().mask_BL1[:, 1:]
    assert result.totals == {"models": 3, "sequences": 5, "labels": mask[:5].sum(), "full_sequences": 2}


def test_the_stage_measures_every_model(context, found, make_sequences):
    mask = make_sequences().mask_BL1[:, 1:]
    assert (found.num_labels, found.num_full_labels) == (mask[:5].sum(), mask[:2].sum())
    assert [model.name for model in found.models] == ["teacher", *(n for n in context.inputs if n.startswith("train"))]
    assert found.arms == ("cross_entropy", "distilled")
    for model in found.models:
        assert model.loss_interval.low < model.loss < model.loss_interval.high
        assert model.perplexity == pytest.approx(math.exp(model.loss))
        assert model.bits_per_byte == pytest.approx(model.loss * 144 / 480 / math.log(2))


def test_losses_and_differences_equal_a_direct_computation(found, make_model, make_sequences):
    sequences = _part(make_sequences(), 0, 5)
    tokens = torch.from_numpy(sequences.tokens_BL1).long()
    with torch.inference_mode():
        logprobs = make_model(0, rows=160)(input_ids=tokens[:, :-1]).logits[..., :128].double().log_softmax(-1)
    losses = -logprobs.gather(2, tokens[:, 1:, None]).squeeze(2).numpy()
    direct = losses[sequences.mask_BL1[:, 1:]].mean()
    assert found.teacher.loss == pytest.approx(direct, rel=1e-6)
    by_name = {model.name: model.loss for model in found.models}
    for one in found.paired:
        expected = by_name[f"train/{one.first}/seed-{one.seed}"] - by_name[f"train/{one.second}/seed-{one.seed}"]
        assert one.difference == pytest.approx(expected, abs=1e-12)
        assert one.interval.low < one.difference < one.interval.high
    (over,) = found.over_seeds
    assert over.difference == pytest.approx(np.mean([one.difference for one in found.paired]))
    assert over.seeds == (0, 1)


def test_a_student_that_is_the_teacher_is_recognised(found):
    twin, other = found.of_arm("distilled")
    assert found.teacher.against_teacher is None
    assert (twin.loss, twin.against_teacher.kl, twin.against_teacher.top1) == (found.teacher.loss, 0, 1)
    assert other.against_teacher.kl > 0.1


def test_another_tokenizer_is_refused(small):
    name = "train/distilled/seed-1"
    small.inputs[name].manifest.facts["tokenizer"]["fingerprint"] = "a" * 64
    with pytest.raises(MismatchError, match=f"{name}: the tokenizer is not the corpus's"):
        stage.run(small)


def test_a_broken_student_is_named_and_leaves_nothing(small, tmp_path, make_model, make_student):
    model = make_model(3)
    torch.nn.init.constant_(model.model.norm.weight, float("inf"))
    name = "train/distilled/seed-1"
    small.inputs[name] = make_student(tmp_path / "broken", name, model)
    with pytest.raises(InputError, match=f"{name}: the loss of held-out sequence 0"):
        stage.run(small)
    assert not list(small.folder.iterdir())


def test_every_model_is_calibrated_and_every_comparison_has_an_interval(found):
    for model in found.models:
        assert model.ece is not None and 0 < model.ece < 1 and model.ece_interval.low < model.ece_interval.high
    twin, other = found.of_arm("distilled")
    assert twin.ece == found.teacher.ece
    near = other.against_teacher
    for quantity in ("kl", "top1", "top5", "acceptance"):
        interval = getattr(near, f"{quantity}_interval")
        assert interval.low <= getattr(near, quantity) <= interval.high, quantity


def test_arms_differ_in_kl_as_their_kls_do(found):
    models = {model.name: model for model in found.models}
    assert [one.quantity for one in found.paired_nearness] == ["kl", "kl", "cached_kl", "cached_kl"]
    for one in found.paired_nearness:
        first, second = (models[f"train/{arm}/seed-{one.seed}"] for arm in (one.first, one.second))
        if one.quantity == "kl":
            expected = first.against_teacher.kl - second.against_teacher.kl
        else:
            expected = first.against_cache.kl - second.against_cache.kl
        assert one.difference == pytest.approx(expected, abs=1e-6)  # a KL below 0 by rounding is told as 0
        assert one.interval.low <= one.difference <= one.interval.high
    assert [one.quantity for one in found.nearness_over_seeds] == ["kl", "cached_kl"]
    assert all(one.quantity == "loss" for one in (*found.paired, *found.over_seeds))


def test_students_are_held_against_the_caches_held_out_sequences(found, make_sequences):
    # the sixth lies in the second block, and the first of all has no label
    labels = int(make_sequences().mask_BL1[1:6, 1:].sum())
    assert (found.cached.recording, found.cached.num_sequences, found.cached.num_labels) == ("topk", 5, labels)
    twin, other = found.of_arm("distilled")
    # the twin's own loss, rounded otherwise
    assert found.cached.teacher_loss == pytest.approx(twin.against_cache.loss, rel=1e-5)
    assert twin.against_cache.kl == pytest.approx(0, abs=1e-6)
    assert (twin.against_cache.top1, twin.against_cache.teacher_ce) == (1, None)
    assert other.against_cache.kl > 0.1 and other.against_cache.top1 < 1
    assert other.against_cache.interval.low < other.against_cache.kl < other.against_cache.interval.high
    assert found.teacher.against_cache is None


def test_without_the_teacher_losses_and_the_cache_remain(context, found, tmp_path, caplog):
    alone = dataclasses.replace(_with(context, teacher="cache"), folder=tmp_path, inputs=dict(context.inputs))
    del alone.inputs["teacher"]
    stage.run(alone)
    less = _found(alone)
    assert less.teacher is None and less.num_full_sequences == less.num_full_labels == 0
    for here, there in zip(less.models, found.models[1:], strict=True):
        assert here == there.model_copy(update={"against_teacher": None})
    assert less.cached == found.cached and {one.quantity for one in less.paired_nearness} == {"cached_kl"}
    assert less.paired == found.paired
    assert less.teacher_missing == "eval.teacher is cache"
    assert "eval.teacher is cache; the cache's held-out sequences stand for it" in caplog.text


def test_a_teacher_that_is_gone_or_too_large_is_left_out_unless_it_must_be_there(small, monkeypatch):
    assert at_hand.why_missing(small) is None
    with monkeypatch.context() as patch:
        patch.setattr(at_hand, "free_bytes", lambda device: 1000)
        assert "its weights take" in str(at_hand.why_missing(small))
        assert at_hand.why_missing(_with(small, teacher="live")) is None
    folder = small.inputs["teacher"].path / "model"
    (folder / "model.safetensors").unlink()
    assert "no weights as safetensors" in str(at_hand.why_missing(small))
    shutil.rmtree(folder)
    assert "its model cannot be found" in str(at_hand.why_missing(small))
    with pytest.raises(InputError, match="no model can be found"):
        stage.run(_with(small, teacher="live"))
    # drafts are for the teacher itself
    assert at_hand.why_missing(_with(small, speculative=SpeculativeSettings())) is None


def test_a_teacher_that_is_gone_is_told_in_the_results(tmp_path, make_context):
    context = make_context(tmp_path, {"distilled": {}}, num_seeds=1)
    shutil.rmtree(context.inputs["teacher"].path / "model")
    stage.run(context)
    (model,) = _found(context).models
    assert model.against_teacher is None and model.against_cache is not None
    assert "its model cannot be found" in _found(context).teacher_missing


def test_neither_teacher_nor_cached_sequences_is_refused_where_it_was_asked_for(
    tmp_path, make_context, make_eval_cache, make_model, make_sequences
):
    context = make_context(tmp_path, {"distilled": {}}, num_seeds=1)
    context.inputs["cache"] = make_eval_cache(tmp_path / "bare", make_sequences(), make_model(0), {}, 1.0)
    with pytest.raises(InputError, match=r"no held-out sequences .* set eval.teacher to live"):
        stage.run(_with(context, teacher="cache"))
    # and where it was not, text and teacher remain
    stage.run(context)
    found = _found(context)
    assert found.cached is None and found.teacher is not None
    assert all(model.against_cache is None for model in found.models)
