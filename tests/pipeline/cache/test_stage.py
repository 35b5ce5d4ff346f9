"""The whole stage on a corpus of a few pages and a given teacher; the engine is transformers, which starts at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.store import ShardReader, check_alignment, rank_ids, read_blocks
from capgap.pipeline.store.codec import SAMPLED, TOPK_CODECS
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.context import Instance
from capgap.schemas.errors import MismatchError, SettingError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

SEQ_LEN = 32
CORPUS, TEACHER, CACHE = Instance("corpus"), Instance("teacher"), Instance("cache")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Any]:
    """A run with its corpus (ten student shards of at most 8 sequences) and teacher made."""
    folder = tmp_path_factory.mktemp("run")
    texts = [f"line {i} says {i * i} and then {' '.join(str(i * k) for k in range(40))}\n" for i in range(60)]
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text)
    tokenizer = train_tokenizer(texts, 300)
    run = {
        "name": "tiny",
        "out": str(folder / "out"),
        "device": "cpu",
        "corpus": {
            "sources": [str(folder / "*.txt")],
            "tokenizer": _teacher(folder / "teacher", tokenizer),
            "seq_len": SEQ_LEN,
            "teacher_fraction": 0.0,
            "heldout_fraction": 0.2,
            "shard_sequences": 8,
        },
        "teacher": {"path": str(folder / "teacher")},
        "student": {"model": {}},
        "cache": {"engine": "transformers", "num_draws": 20, "chunk_rows": 100, "batch_tokens": 200},
    }
    carry_out(RunFile.model_validate(run), CORPUS)
    carry_out(RunFile.model_validate(run), TEACHER)
    return run


def _teacher(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=SEQ_LEN,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(inputs, tmp_path) -> Any:
    """A run of its own over the same corpus and teacher; takes settings of the cache."""
    shutil.copytree(inputs["out"], tmp_path / "out")

    def make(**cache: Any) -> RunFile:
        return RunFile.model_validate(inputs | {"out": str(tmp_path / "out"), "cache": inputs["cache"] | cache})

    return make


def _reader(run: RunFile, manifest: Manifest) -> ShardReader:
    return ShardReader(Path(run.out) / "cache", manifest.shard_sets["targets"])


def _digests(manifest: Manifest) -> list[str]:
    return [shard.file.sha256 for shard in manifest.shard_sets["targets"].shards]


TOPK = {"recording": "topk", "num_draws": None, "num_kept": 12}
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
    assert (facts.context, facts.padded_vocab_size, facts.dtype) == ("packed", 320, "float32")
    assert facts.engine.startswith("transformers ")
    assert (facts.recording, facts.num_ids) == (tiny.cache.recording, tiny.cache.num_ids)
    profile = settings.get("profile", "near-lossless") if settings.get("recording") else None
    assert facts.profile == profile
    assert manifest.shard_sets["targets"].codec == (TOPK_CODECS[profile] if profile else SAMPLED)
    assert facts.temperature == settings.get("temperature", 1.0)
    student, targets = corpus.shard_sets["student"], manifest.shard_sets["targets"]
    assert len(student.shards) > 2
    assert [s.num_sequences for s in targets.shards] == [s.num_sequences for s in student.shards]
    assert manifest.totals["num_tokens"] == student.num_tokens
    assert manifest.totals["num_bytes"] == sum(s.file.num_bytes for s in targets.shards)
    source, reader = ShardReader(Path(tiny.out) / "corpus", student), _reader(tiny, manifest)
    labels = []
    for index in range(len(reader.members)):
        sequences, found = reader.read(index)
        expected, _ = source.read(index)
        for name in ("tokens_BL1", "starts_BL1", "mask_BL1"):
            assert (getattr(sequences, name) == getattr(expected, name)).all(), name
        check_alignment(sequences, found, facts.num_ids, "here", reader.codec.error)
        labels.append(found.label_logprobs_BL.ravel())
        _require_the_teachers(inputs["teacher"]["path"], facts.temperature, sequences.tokens_BL1, found)
    assert facts.mean_label_loss == pytest.approx(-np.concatenate(labels).mean(dtype=np.float64), rel=1e-9)


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
    assert listed.sha256 == manifest.shard_sets["targets"].codec_settings["ranking_sha256"]
    ids_V = _reader(tiny, manifest).codec.ranking.ids_V
    assert (ids_V == rank_ids(blocks, 300).ids_V).all()
    counts_V = np.bincount(np.concatenate([b.tokens_BL1.ravel() for b in blocks]), minlength=300)
    assert (np.diff(counts_V[ids_V]) <= 0).all() and sorted(ids_V) == list(range(300))
    # whatever part of the corpus is scored
    assert _reader(tiny, carry_out(run(max_tokens=1), CACHE)).codec.ranking.sha256 == listed.sha256


def test_max_tokens_stops_at_the_shard_that_reaches_it(run) -> None:
    shards = carry_out(run(max_tokens=8 * SEQ_LEN), CACHE).shard_sets["targets"].shards
    assert [s.num_sequences for s in shards] == [8]
    shards = carry_out(run(max_tokens=8 * SEQ_LEN + 1), CACHE, force=True).shard_sets["targets"].shards
    assert [s.num_sequences for s in shards] == [8, 8]


def test_after_a_kill_only_unfinished_shards_are_written_again(run) -> None:
    tiny = run()
    first = carry_out(tiny, CACHE, force=True)
    folder = Path(tiny.out) / "cache"
    paths = [folder / shard.file.path for shard in first.shard_sets["targets"].shards]
    # what a kill leaves while the third shard is written: sidecars of the others, and no manifest
    _unfinish(folder, first, missing=2)
    before = [path.stat().st_mtime_ns for path in paths]
    second = carry_out(tiny, CACHE)
    written = [path.stat().st_mtime_ns != then for path, then in zip(paths, before, strict=True)]
    assert written == [i == 2 for i in range(len(paths))]
    assert _digests(second) == _digests(first)
    assert (second.content, second.facts) == (first.content, first.facts)


def test_a_finished_shard_that_was_damaged_is_written_again(run) -> None:
    tiny = run(**TOPK)
    first = carry_out(tiny, CACHE)
    folder = Path(tiny.out) / "cache"
    _unfinish(folder, first, missing=None)
    damaged = folder / first.shard_sets["targets"].shards[1].file.path
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert _digests(carry_out(tiny, CACHE)) == _digests(first)


def _unfinish(folder: Path, manifest: Manifest, missing: int | None) -> None:
    sidecars = folder / "work" / "shards"
    sidecars.mkdir(parents=True)
    for index, shard in enumerate(manifest.shard_sets["targets"].shards):
        if index != missing:
            (sidecars / f"targets-{index:06d}.json").write_text(shard.model_dump_json())
    (folder / "manifest.json").unlink()


def test_a_teacher_of_another_tokenizer_is_refused(run, inputs, tmp_path) -> None:
    other = train_tokenizer(["an altogether other text, of other words " * 9], 300)
    path = _teacher(tmp_path / "other", other)
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
    with pytest.raises(SettingError, match=r"cache.num_kept: more ids .* found 301, expected at most 300"):
        carry_out(run(recording="topk", num_draws=None, num_kept=301), CACHE)


def test_the_whole_vocabulary_can_be_kept(run) -> None:
    tiny = run(recording="topk", num_draws=None, num_kept=300, max_tokens=1)
    _, targets = _reader(tiny, carry_out(tiny, CACHE)).read(0)
    assert (np.sort(targets.ids_BLK, axis=2) == np.arange(300)).all()
    assert (targets.tail_BL == 0).all()
