"""The cache stage: score the student's part of the corpus with the teacher, shard by shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np

from capgap.pipeline.cache.convert import to_targets
from capgap.pipeline.cache.scoring import Engine, Recording, Request, Scored
from capgap.pipeline.models import model_path
from capgap.pipeline.progress import Meter, progress
from capgap.pipeline.store import Block, ShardReader, ShardWriter, check_alignment, rank_ids, read_blocks, split_blocks
from capgap.pipeline.store.codec import SAMPLED, TOPK_CODECS, Codec
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.store.ranking import RANKING_NAME
from capgap.pipeline.workflow.context import StageContext, StageResult
from capgap.pipeline.workflow.folder import WORK_FOLDER, plan_units
from capgap.schemas.errors import MismatchError, SettingError
from capgap.schemas.facts import CacheFacts, CorpusFacts, ModelFacts
from capgap.schemas.manifest import ShardEntry, ShardSet
from capgap.schemas.records import Sequences

TARGETS = "targets"


def run(context: StageContext) -> StageResult:
    """Write the target shards.

    Raises:
        MismatchError: teacher and corpus do not share a tokenizer.
        SettingError: more ids are asked for than the vocabulary has.
        MachineError, InputError: as the engine.
    """
    settings = context.run.cache
    corpus, teacher = context.input("corpus"), context.input("teacher")
    corpus_facts = CorpusFacts.model_validate(corpus.manifest.facts)
    teacher_facts = ModelFacts.model_validate(teacher.manifest.facts)
    _require_fit(corpus_facts, teacher_facts, settings.recording, settings.num_ids)
    source = ShardReader(corpus.path, corpus.manifest.shard_sets["student"])
    vocab_size = corpus_facts.tokenizer.vocab_size
    profile = settings.stored_profile
    ranking = rank_ids((block for block, _ in read_blocks(corpus.path, source.shard_set)), vocab_size)
    write_atomically(context.folder / RANKING_NAME, ranking.data)
    codec = Codec(
        SAMPLED if profile is None else TOPK_CODECS[profile],
        source.shard_set.seq_len,
        vocab_size,
        settings.num_ids,
        ranking,
    )
    writer = ShardWriter(context.folder, context.folder / WORK_FOLDER / "shards", TARGETS, codec)
    recording = Recording(
        settings.recording, settings.num_ids, settings.temperature, settings.seed, vocab_size, settings.chunk_rows
    )
    worker = _Worker(context, source, writer, recording, model_path(teacher))
    shards = worker.run(_num_shards(source.shard_set, settings.max_tokens))
    shard_set = writer.shard_set(shards)
    facts = CacheFacts(
        tokenizer=corpus_facts.tokenizer,
        context=corpus_facts.context,
        recording=settings.recording,
        num_ids=settings.num_ids,
        profile=profile,
        temperature=settings.temperature,
        padded_vocab_size=teacher_facts.padded_vocab_size,
        engine=worker.engine_name,
        dtype=worker.engine_dtype,
        mean_label_loss=_mean_label_loss(context.folder, shard_set),
    )
    totals = {
        "num_tokens": shard_set.num_tokens,
        "num_bytes": shard_set.num_bytes,
        "bytes_per_token": round(shard_set.num_bytes / shard_set.num_tokens, 3),
    }
    return StageResult(facts=facts.model_dump(mode="json"), totals=totals, shard_sets={TARGETS: shard_set})


class _Worker:
    """Scores the shards that are not finished; the engine is started in any case, to name it in the manifest."""

    def __init__(
        self, context: StageContext, source: ShardReader, writer: ShardWriter, recording: Recording, path: str
    ) -> None:
        self._context, self._source, self._writer = context, source, writer
        self._recording, self._path = recording, path
        self._first_member = list(accumulate((len(s.members) for s in source.shard_set.shards), initial=0))
        self.engine_name, self.engine_dtype = "", ""

    def run(self, num_shards: int) -> list[ShardEntry]:
        plan_units(self._context.folder / WORK_FOLDER, "shards", num_shards, "shards/*.json")
        finished = {index: self._writer.finished(index) for index in range(num_shards)}
        done = {index: entry for index, entry in finished.items() if entry is not None}
        sizes = [shard.num_sequences for shard in self._source.shard_set.shards[:num_shards]]
        finished_sequences = sum(sizes[index] for index in done)
        with _engine(self._context, self._recording, self._path, self._source.shard_set.seq_len) as engine:
            self.engine_name, self.engine_dtype = engine.name, engine.dtype
            with progress("cache: score", sum(sizes), "sequences", finished_sequences) as meter:
                for index in range(num_shards):
                    if index not in done:
                        done[index] = self._writer.write(index, self._blocks(engine, index, meter))
        return [done[index] for index in range(num_shards)]

    def _blocks(self, engine: Engine, index: int, meter: Meter) -> Iterable[Block]:
        first, last = self._first_member[index], self._first_member[index + 1]
        sequences = _joined([self._source.read(member)[0] for member in range(first, last)])
        scored = engine.score([Request(tokens_L1) for tokens_L1 in sequences.tokens_BL1])
        where = f"shard {index}"
        start = 0
        for part in split_blocks(sequences):
            block = Block(part, to_targets(scored[start : start + len(part)]))
            assert block.targets is not None
            check_alignment(part, block.targets, self._recording.num_ids, where)
            start += len(part)
            yield block
        meter.advance(len(sequences), tokens=_num_rows(scored))


@contextmanager
def _engine(context: StageContext, recording: Recording, path: str, seq_len: int) -> Iterator[Engine]:
    engine = _start(context, recording, path, seq_len)
    try:
        yield engine
    finally:
        engine.close()


def _start(context: StageContext, recording: Recording, path: str, seq_len: int) -> Engine:
    settings = context.run.cache
    if settings.engine == "transformers":
        from capgap.pipeline.cache.transformers_engine import TransformersEngine

        return TransformersEngine(path, recording, settings.dtype, settings.batch_tokens, context.device)
    from capgap.pipeline.cache.vllm_engine import VllmEngine

    return VllmEngine(
        path,
        recording,
        seq_len,
        settings.dtype,
        settings.batch_tokens,
        settings.gpu_memory_fraction,
        context.device,
        settings.tensor_parallel,
        settings.capture,
    )


def _require_fit(corpus: CorpusFacts, teacher: ModelFacts, recording: str, num_ids: int) -> None:
    if corpus.tokenizer.fingerprint != teacher.tokenizer.fingerprint:
        raise MismatchError(
            "teacher and corpus have different tokenizers",
            where="cache",
            found=f"fingerprint {teacher.tokenizer.fingerprint[:12]} at the teacher",
            expected=f"{corpus.tokenizer.fingerprint[:12]}, the corpus's",
            fix="set corpus.tokenizer to the teacher's folder",
        )
    if recording == "topk" and num_ids > corpus.tokenizer.vocab_size:
        raise SettingError(
            "more ids than the vocabulary has",
            where="cache.num_kept",
            found=num_ids,
            expected=f"at most {corpus.tokenizer.vocab_size}",
        )


def _num_shards(shard_set: ShardSet, max_tokens: int | None) -> int:
    """All of them, or the fewest that hold `max_tokens` targets."""
    total = 0
    for number, shard in enumerate(shard_set.shards, start=1):
        total += shard.num_sequences * shard_set.seq_len
        if max_tokens is not None and total >= max_tokens:
            return number
    return len(shard_set.shards)


def _joined(blocks: list[Sequences]) -> Sequences:
    return Sequences(
        np.concatenate([b.tokens_BL1 for b in blocks]),
        np.concatenate([b.starts_BL1 for b in blocks]),
        np.concatenate([b.mask_BL1 for b in blocks]),
    )


def _num_rows(scored: list[Scored]) -> int:
    return sum(len(s.label_logprobs_L) for s in scored)


def _mean_label_loss(folder: Path, shard_set: ShardSet) -> float:
    total, count = 0.0, 0
    reader = ShardReader(folder, shard_set)
    for index in range(len(reader.members)):
        _, targets = reader.read(index)
        assert targets is not None
        total -= float(targets.label_logprobs_BL.sum(dtype=np.float64))
        count += targets.label_logprobs_BL.size
    return total / max(count, 1)
