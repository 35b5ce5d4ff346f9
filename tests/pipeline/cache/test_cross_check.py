"""vLLM is held against transformers once a cache, before its first shard; another engine stands in its place here."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from capgap.pipeline.cache import cross_check
from capgap.pipeline.cache.cross_check import CROSS_CHECK_NAME, compared, read_cross_check, start_cross_checked
from capgap.pipeline.cache.scoring import Engine
from capgap.pipeline.cache.shards import CacheJob, ShardScorer, recording_of
from capgap.pipeline.cache.stage import prepare
from capgap.pipeline.cache.transformers_engine import TransformersEngine
from capgap.pipeline.cache_lines import describe
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.verify.verify import verify
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.facts import CacheFacts

Start = Callable[[], Engine]


@pytest.fixture
def job(run, context_of) -> CacheJob:
    """A cache that is to be made by vLLM."""
    job = prepare(context_of(run(engine="vllm")))
    (job.work / "scored").mkdir(exist_ok=True)
    return job


def _engine_of(job: CacheJob, teacher: str, dtype: str = "float32") -> Start:
    return lambda: TransformersEngine(teacher, recording_of(job), dtype, 200, "cpu")


def _check(job: CacheJob, start: Start) -> Engine:
    scorer = ShardScorer(job)
    return start_cross_checked(job, start, scorer.first_requests)


def test_an_engine_that_agrees_is_within_rounding_and_is_asked_once(job, caplog) -> None:
    caplog.set_level(logging.INFO, "capgap")
    _check(job, _engine_of(job, job.teacher)).close()
    found = read_cross_check(job.work)
    assert found.skipped is None and not found.differs
    assert found.num_labels == 4 * job.source.seq_len and found.dtype == "float32" and found.own_rms_nats == 0
    assert found.rms_nats < 1e-5 and found.allowed_nats == cross_check.FLOOR_NATS
    assert [r.levelno for r in caplog.records if "transformers in float32" in r.message] == [logging.INFO]
    caplog.clear()
    _check(job, _engine_of(job, job.teacher)).close()
    assert not [r for r in caplog.records if "transformers in float32" in r.message]


def test_an_engine_that_computes_another_model_is_a_warning_and_no_refusal(job, tmp_path, caplog) -> None:
    model = LlamaForCausalLM.from_pretrained(job.teacher)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight *= 1.05
    model.save_pretrained(tmp_path / "other")
    _check(job, _engine_of(job, str(tmp_path / "other"))).close()
    found = read_cross_check(job.work)
    assert found.differs and found.rms_nats > found.allowed_nats
    assert "eval and pruning look at another model than the cache does" in caplog.text


def test_rounding_of_a_narrow_dtype_is_measured_and_allowed_for(job) -> None:
    narrow = dataclasses.replace(job, settings=job.settings.model_copy(update={"dtype": "bfloat16"}))
    _check(narrow, _engine_of(narrow, job.teacher, "bfloat16")).close()
    found = read_cross_check(job.work)
    # bfloat16 has 8 bits: thousands of times what float32 does
    assert found.dtype == "bfloat16" and found.own_rms_nats > 1e-3 and not found.differs
    # the same engine in the same dtype, in other batches
    assert found.rms_nats == pytest.approx(found.own_rms_nats, rel=0.2)


@pytest.mark.parametrize("cause", ["memory", "never", "broken"])
def test_where_it_cannot_be_done_the_cache_is_made_all_the_same(job, cause, monkeypatch, tmp_path) -> None:
    start = _engine_of(job, job.teacher)
    if cause == "memory":
        monkeypatch.setattr(cross_check, "free_bytes", lambda device: 1000)
    if cause == "never":
        job = dataclasses.replace(job, settings=job.settings.model_copy(update={"cross_check": "never"}))
    if cause == "broken":
        job = dataclasses.replace(job, teacher=str(tmp_path / "gone"))
    _check(job, start).close()
    found = read_cross_check(job.work)
    if cause == "never":
        assert found is None
        return
    assert not found.differs
    expected = r"takes .* GiB in float32, and .* GiB are free" if cause == "memory" else "transformers failed: "
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(found.sentence)


def test_not_a_number_is_a_difference() -> None:
    exact, found = np.array([-1.0, -2.0]), np.array([-1.0, np.nan])
    assert compared("float32", exact, exact, found).differs


def test_what_was_found_stands_in_the_manifest_whoever_found_it_and_whatever_is_made_again(run, job, caplog) -> None:
    """The finding is in the work folder when the stage begins, as it is where a slice has made the first shards."""
    record = compared("float32", np.zeros(3), np.zeros(3), np.full(3, 0.1))
    cross_check.write_sidecar(job.work / CROSS_CHECK_NAME, record)
    tiny = run()
    manifest = carry_out(tiny, Instance("cache"))
    facts = CacheFacts.model_validate(manifest.facts)
    assert facts.cross_check == record
    folder = Path(tiny.out) / "cache"
    assert record.sentence in describe(folder, manifest, facts)
    assert f"  {record.sentence}" in list(verify(folder))
    # a shard that is lost is made again by itself, and what is known of the engines stays
    shard = manifest.shard_sets["sampled"].shards[0].file.path
    (folder / shard).unlink()
    again = carry_out(tiny, Instance("cache"))
    assert CacheFacts.model_validate(again.facts).cross_check == record and again.content == manifest.content


@pytest.mark.slow
def test_vllm_is_held_against_transformers_and_its_shards_are_those_it_would_have_made(run, tmp_path) -> None:
    pytest.importorskip("vllm")
    made = {}
    for setting in ("auto", "never"):
        tiny = run(engine="vllm", cross_check=setting, max_tokens=32 * 16)
        tiny = tiny.model_copy(update={"reuse": {n: str(Path(tiny.out) / n) for n in ("corpus", "teacher")}})
        made[setting] = carry_out(tiny.model_copy(update={"out": str(tmp_path / setting)}), Instance("cache"))
    assert made["auto"].content == made["never"].content
    found = CacheFacts.model_validate(made["auto"].facts).cross_check
    assert found.skipped is None and found.rms_nats < 1e-4 and not found.differs
    assert made["never"].facts["cross_check"] is None
