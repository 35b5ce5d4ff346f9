"""The whole stage on a corpus of a few pages and a given teacher; the engine is transformers, which starts at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from capgap.pipeline.cache import stage
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.stage.context import Instance, StageContext, StageInput
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader, check_alignment, rank_ids, read_blocks
from capgap.pipeline.store.codec import SAMPLED, TOPK_CODECS
from capgap.pipeline.store.sidecars import write_sidecar
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import MismatchError, SettingError
from capgap.schemas.facts import CacheFacts, ShardFacts
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

SEQ_LEN = 32
CORPUS, TEACHER, CACHE = Instance("corpus"), Instance("teacher"), Instance("cache")


def _reader(run: RunFile, manifest: Manifest, recording: str = "sampled") -> ShardReader:
    return ShardReader(Path(run.out) / "cache", manifest.shard_sets[recording])


def _digests(manifest: Manifest, recording: str = "sampled") -> list[str]:
    return [shard.file.sha256 for shard in manifest.shard_sets[recording].shards]


TOPK = {"recording": "topk", "num_samples": None, "top_k": 12}
PROFILES = [TOPK | {"profile": profile} for profile in TOPK_CODECS]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 2.0}, TOPK, *PROFILES], ids=["sampled", "warm", "topk", *TOPK_CODECS]
)
def test_the_cache_holds_the_students_sequences_with_their_targets(run, inputs, settings) -> None:
    tiny = run(**settings)
    manifest = carry_out(tiny, CACHE)
    corpus = carry_out(tiny, CORPUS)
    facts = CacheFacts.model_validate(manifest.facts)
    assert facts.tokenizer.fingerprint == corpus.facts["tokenizer"]["fingerprint"]
    assert (facts.context, facts.padded_vocab_size, facts.dtypes) == ("packed", 320, ("float32",))
    assert facts.engines == (f"transformers {transformers.__version__}",)
    recording = tiny.cache.recording
    (kept,) = facts.recordings.values()
    profile = settings.get("profile", "near-lossless") if settings.get("recording") else None
    assert (list(facts.recordings), kept.num_ids, kept.profile) == ([recording], 12 if profile else 20, profile)
    assert list(manifest.shard_sets) == [recording]
    assert manifest.shard_sets[recording].codec == (TOPK_CODECS[profile] if profile else SAMPLED)
    assert (facts.temperature, kept.temperatures) == (settings.get("temperature", 1.0), (facts.temperature,))
    student, targets = corpus.shard_sets["student"], manifest.shard_sets[recording]
    assert len(student.shards) > 2
    assert [s.num_sequences for s in targets.shards] == [s.num_sequences for s in student.shards]
    assert manifest.totals["num_tokens"] == student.num_tokens
    assert manifest.totals["num_bytes"] == sum(s.file.num_bytes for s in targets.shards)
    source, reader = ShardReader(Path(tiny.out) / "corpus", student), _reader(tiny, manifest, recording)
    labels = []
    for index in range(reader.shard_set.num_members):
        sequences, found = reader.read(index)
        expected, _ = source.read(index)
        for name in ("tokens_BL1", "starts_BL1", "mask_BL1"):
            assert (getattr(sequences, name) == getattr(expected, name)).all(), name
        check_alignment(sequences, found, kept.num_ids, "here", reader.codec.error)
        labels.append(found.label_logprobs_BL.ravel())
        _require_the_teachers(inputs["teacher"]["path"], facts.temperature, sequences.tokens_BL1, found)
    # the sum is of labels as they were before they were stored, to 1/128 nat each
    stored = -np.concatenate(labels).mean(dtype=np.float64)
    assert facts.mean_label_loss == pytest.approx(stored, abs=1e-3)
    if profile == "lossless":
        assert facts.mean_label_loss == pytest.approx(stored, rel=1e-9)


def _require_the_teachers(path: str, temperature: float, tokens_BL1: np.ndarray, targets: Any) -> None:
    tokens = torch.from_numpy(tokens_BL1).long()
    with torch.inference_mode():
        logits = LlamaForCausalLM.from_pretrained(path)(input_ids=tokens[:, :-1]).logits[..., :300].double()
    labels = torch.log_softmax(logits / temperature, -1).gather(2, tokens[:, 1:, None])[..., 0]
    # float32 products in other batches, and the codec's 1/128 nat
    assert np.abs(targets.label_logprobs_BL - labels.numpy()).max() < 1 / 128 + 1e-4


def test_ids_are_ranked_by_their_frequency_in_the_corpus_and_the_ranking_is_part_of_the_result(run) -> None:
    tiny = run()
    manifest, corpus = carry_out(tiny, CACHE), carry_out(tiny, CORPUS)
    student = corpus.shard_sets["student"]
    blocks = [block for block, _ in read_blocks(Path(tiny.out) / "corpus", student)]
    (listed,) = [file for file in manifest.files if file.path == "ids-by-frequency.u32"]
    assert listed.sha256 == manifest.shard_sets["sampled"].codec_settings["ranking_sha256"]
    ids_V = _reader(tiny, manifest).codec.ranking.ids_V
    assert (ids_V == rank_ids(blocks, 300).ids_V).all()
    counts_V = np.bincount(np.concatenate([b.tokens_BL1.ravel() for b in blocks]), minlength=300)
    assert (np.diff(counts_V[ids_V]) <= 0).all() and sorted(ids_V) == list(range(300))
    # whatever part of the corpus is scored
    assert _reader(tiny, carry_out(run(max_tokens=1), CACHE, remake=True)).codec.ranking.sha256 == listed.sha256


def test_max_tokens_stops_at_the_shard_that_reaches_it(run) -> None:
    shards = carry_out(run(max_tokens=8 * SEQ_LEN), CACHE).shard_sets["sampled"].shards
    assert [s.num_sequences for s in shards] == [8]
    shards = carry_out(run(max_tokens=8 * SEQ_LEN + 1), CACHE, remake=True).shard_sets["sampled"].shards
    assert [s.num_sequences for s in shards] == [8, 8]


def test_after_a_kill_only_unfinished_shards_are_written_again(run) -> None:
    tiny = run()
    first = carry_out(tiny, CACHE, remake=True)
    folder = Path(tiny.out) / "cache"
    paths = [folder / shard.file.path for shard in first.shard_sets["sampled"].shards]
    # what a kill leaves while the third shard is written: sidecars of the others, and no manifest
    _unfinish(folder, first, missing=2)
    before = [path.stat().st_mtime_ns for path in paths]
    second = carry_out(tiny, CACHE)
    written = [path.stat().st_mtime_ns != then for path, then in zip(paths, before, strict=True)]
    assert written == [i == 2 for i in range(len(paths))]
    assert _digests(second) == _digests(first)
    assert second.content == first.content
    # the means of all shards were put together from those of finished ones
    losses = [manifest.facts.pop("mean_label_loss") for manifest in (first, second)]
    scored = [manifest.facts.pop("scored") for manifest in (first, second)]
    assert [shard["sha256"] for shard in scored[0]] == [shard["sha256"] for shard in scored[1]]
    assert second.facts == first.facts and losses[0] == pytest.approx(losses[1], abs=0.2)


def test_a_finished_shard_that_was_damaged_is_written_again(run) -> None:
    tiny = run(**TOPK)
    first = carry_out(tiny, CACHE)
    folder = Path(tiny.out) / "cache"
    _unfinish(folder, first, missing=None)
    damaged = folder / first.shard_sets["topk"].shards[1].file.path
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert _digests(carry_out(tiny, CACHE), "topk") == _digests(first, "topk")


def _unfinish(folder: Path, manifest: Manifest, missing: int | None, engine: str | None = None) -> None:
    """Put back what stood in the work folder before the manifest; of the shard `missing` only the files."""
    sidecars, scored = folder / "work" / "shards", folder / "work" / "scored"
    for path in (sidecars, scored):
        path.mkdir(parents=True)
    some = next(iter(manifest.shard_sets.values()))
    for index, shard in enumerate(some.shards):
        files = {}
        for name, shard_set in manifest.shard_sets.items():
            write_sidecar(sidecars / f"{name}-{index:06d}.json", shard_set.shards[index])
            files[name] = shard_set.shards[index].file.sha256
        num_targets = shard.num_sequences * SEQ_LEN
        facts = ShardFacts(
            sha256=files,
            engine=engine or manifest.facts["engines"][0],
            dtype="float32",
            num_targets=num_targets,
            num_labels=num_targets,
            label_loss=manifest.facts["mean_label_loss"] * num_targets,
        )
        if index != missing:
            write_sidecar(scored / f"{index:06d}.json", facts)
    (folder / "manifest.json").unlink()


def test_a_teacher_of_another_tokenizer_is_refused(run, inputs, save_teacher, tmp_path) -> None:
    other = train_tokenizer(["an altogether other text, of other words " * 9], 300)
    path = save_teacher(tmp_path / "other", other)
    corpus = inputs["corpus"] | {"tokenizer": path}
    elsewhere = RunFile.model_validate(
        inputs | {"out": str(tmp_path / "b"), "corpus": corpus, "teacher": {"path": path}}
    )
    for instance in (CORPUS, TEACHER):
        carry_out(elsewhere, instance)
    mixed = run().model_copy(update={"reuse": {"teacher": str(tmp_path / "b" / "teacher")}})
    with pytest.raises(MismatchError, match="teacher and corpus have different tokenizers; found fingerprint"):
        carry_out(mixed, CACHE)


def test_more_ids_than_the_vocabulary_has_are_refused(run) -> None:
    with pytest.raises(SettingError, match=r"cache.top_k: more ids .* found 301, expected at most 300"):
        carry_out(run(recording="topk", num_samples=None, top_k=301), CACHE)


def test_sequences_whose_targets_no_member_can_hold_are_refused_before_they_are_scored(run, context_of) -> None:
    context = context_of(run(recording="topk", num_samples=None, top_k=300, profile="lossless"))
    corpus = context.inputs["corpus"]
    student = corpus.manifest.shard_sets["student"].model_copy(update={"seq_len": 1 << 20})
    manifest = corpus.manifest.model_copy(update={"shard_sets": {"student": student}})
    long = {**context.inputs, "corpus": StageInput(corpus.path, manifest)}
    with pytest.raises(SettingError, match=r"cache\.top_k: .* found 300 a target, up to 1\.9 GB for 1048576 targets"):
        stage.check(context.run, CACHE, long)
    stage.check(context.run, CACHE, context.inputs)


def test_the_whole_vocabulary_can_be_kept(run) -> None:
    tiny = run(recording="topk", num_samples=None, top_k=300, max_tokens=1)
    _, targets = _reader(tiny, carry_out(tiny, CACHE), "topk").read(0)
    assert (np.sort(targets.ids_BLK, axis=2) == np.arange(300)).all()
    assert (targets.tail_BL == 0).all()


BOTH = {"recording": "both", "top_k": 12, "extra_temperatures": [2.0, 0.5]}


def test_both_recordings_lie_side_by_side_each_as_if_it_were_alone(run) -> None:
    both = carry_out(run(**BOTH), CACHE)
    assert sorted(both.shard_sets) == ["sampled", "topk"]
    assert both.totals["num_bytes"] == sum(s.num_bytes for s in both.shard_sets.values())
    sampled = carry_out(run(), CACHE, remake=True)
    topk = carry_out(run(**TOPK, extra_temperatures=[0.5, 2.0]), CACHE, remake=True)
    assert _digests(both) == _digests(sampled) != _digests(both, "topk") == _digests(topk, "topk")
    assert both.facts["mean_label_loss"] == sampled.facts["mean_label_loss"] == topk.facts["mean_label_loss"]
    recordings = CacheFacts.model_validate(both.facts).recordings
    assert recordings["sampled"].temperatures == (1.0,)
    assert recordings["topk"].temperatures == (0.5, 1.0, 2.0)


@pytest.mark.parametrize("lost", ["sampled-000001.tar", "topk-000001.tar", "work/scored/000001.json"])
def test_of_both_recordings_a_shard_is_finished_when_both_are(run, lost: str) -> None:
    tiny = run(**BOTH)
    first = carry_out(tiny, CACHE)
    folder = Path(tiny.out) / "cache"
    _unfinish(folder, first, missing=None)
    (folder / lost).unlink()
    second = carry_out(tiny, CACHE)
    assert [_digests(second, name) for name in BOTH_NAMES] == [_digests(first, name) for name in BOTH_NAMES]


BOTH_NAMES = ("sampled", "topk")


def test_where_every_shard_is_finished_no_engine_is_started(run, inputs) -> None:
    tiny = run()
    first = carry_out(tiny, CACHE)
    _unfinish(Path(tiny.out) / "cache", first, missing=None, engine="vllm 0.1")
    weights = Path(inputs["teacher"]["path"]) / "model.safetensors"
    hidden = weights.rename(weights.with_suffix(".hidden"))
    try:
        result = stage.run(_context(tiny))
    finally:
        hidden.rename(weights)
    assert result.facts["engines"] == ["vllm 0.1"]
    assert result.shard_sets == first.shard_sets


def test_the_tokenizer_is_there_before_anything_is_scored(run) -> None:
    tiny = run()
    stage.prepare(_context(tiny))
    folder = Path(tiny.out) / "cache"
    assert (folder / "tokenizer" / "tokenizer.json").is_file() and not list(folder.glob("*.tar"))


def test_every_engine_that_scored_a_shard_is_named(run) -> None:
    tiny = run()
    _unfinish(Path(tiny.out) / "cache", carry_out(tiny, CACHE), missing=0, engine="vllm 0.1")
    assert carry_out(tiny, CACHE).facts["engines"] == [f"transformers {transformers.__version__}", "vllm 0.1"]


def _context(tiny: RunFile) -> StageContext:
    folder = Path(tiny.out) / "cache"
    (folder / "work").mkdir(parents=True, exist_ok=True)
    inputs = {}
    for name in ("corpus", "teacher"):
        manifest = read_manifest(Path(tiny.out) / name)
        assert manifest is not None
        inputs[name] = StageInput(Path(tiny.out) / name, manifest)
    return StageContext(tiny, CACHE, folder, inputs, "cpu")
