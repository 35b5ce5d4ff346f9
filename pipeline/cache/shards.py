"""Score the corpus's shard i as one submission and write the cache's shard i, in any process, any number of times.

    CacheJob (plain values) --ShardScorer--> finished(i)? --score(i)--> ScoredShard --write--> shard files, then facts

A shard counts as finished when its facts file, `work/scored/000000.json`, exists and every file has the digest that the
facts give. The facts file is removed before a file is touched, and written after all files are whole. So a kill at any
moment, or another process that makes the same shard, leaves either a finished shard or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from capgap.pipeline.cache.convert import join, to_requests, to_targets
from capgap.pipeline.cache.scoring import Engine, Recording, Request, Scored
from capgap.pipeline.stage.device import machine_kind
from capgap.pipeline.stage.unit_notes import UnitNotes
from capgap.pipeline.store import Block, Codec, ShardReader, ShardWriter, check_alignment, split_blocks
from capgap.pipeline.store.codec import SAMPLED, TOPK_CODECS
from capgap.pipeline.store.ranking import RANKING_NAME, read_ranking
from capgap.pipeline.store.sidecars import read_sidecar, write_sidecar
from capgap.schemas.facts import ShardFacts, heldout_set
from capgap.schemas.manifest import ShardEntry, ShardSet
from capgap.schemas.records import Sequences
from capgap.schemas.run_cache import CacheSettings, RecordingName
from capgap.schemas.run_corpus import ContextRule

SCORED_FOLDER = "scored"
SIDECARS_FOLDER = "shards"


@dataclass(frozen=True)
class CacheJob:
    """All that a process must know to make shards of one cache, as plain values that can be sent to any process.

    Attributes:
        settings: settings of the cache.
        corpus: folder of the corpus.
        source: the corpus's shards to be scored; shard i of the cache is made from shard i. The shards that students
            train on come first, then the held-out shards, whose files have their own names and numbers.
        num_training: number of shards that students train on.
        context: the corpus's context rule.
        teacher: the teacher's folder or id; empty where only a server's name for it is known.
        folder: folder of the cache, which holds the ranking of ids.
        work: the stage's work folder.
        vocab_size: size of the real vocabulary.
        ranking_sha256: digest of the ranking.
        device: `cpu` or `cuda:0`.
        trust_remote_code: whether to run code that comes with the teacher.
        served: the server's name for the teacher, for the engine `server`; None for the other engines.
    """

    settings: CacheSettings
    corpus: Path
    source: ShardSet
    num_training: int
    context: ContextRule
    teacher: str
    folder: Path
    work: Path
    vocab_size: int
    ranking_sha256: str
    device: str
    trust_remote_code: bool = False
    served: str | None = None

    @property
    def units(self) -> UnitNotes:
        """The notes of the finished shards."""
        return UnitNotes(self.folder, self.work, SCORED_FOLDER, len(self.source.shards))


@dataclass(frozen=True)
class FinishedShard:
    """The manifest entry of a finished shard in each recording, and the shard's facts."""

    entries: dict[RecordingName, ShardEntry]
    facts: ShardFacts


@dataclass(frozen=True)
class ScoredShard:
    """A scored shard in memory: its sequences, the rows of each, and the engine, dtype and machine that made them."""

    index: int
    sequences: Sequences
    scored: list[Scored]
    engine: str
    dtype: str
    machine: str


class ShardScorer:
    """Makes the shards of a job. The teacher starts with the first shard that has to be scored, and otherwise never.

    `score` must always be called from the same thread; `write` may run in other threads, for other shards.
    """

    def __init__(self, job: CacheJob) -> None:
        self.job = job
        self._engine: Engine | None = None
        self._first_member = list(accumulate((len(s.members) for s in job.source.shards), initial=0))
        (job.work / SCORED_FOLDER).mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Start the teacher now, rather than with the first shard; raises the engine's errors."""
        self._started()

    def finished(self, index: int) -> FinishedShard | None:
        """Return shard `index` if it is finished, or None; its files are read and their digests compared."""
        facts = read_sidecar(self.job.units.path(index), ShardFacts)
        if facts is None:
            return None
        found = {name: writer.finished(number) for name, writer, number in self._writers_of(index)}
        entries = {name: entry for name, entry in found.items() if entry is not None}
        if {name: entry.file.sha256 for name, entry in entries.items()} != facts.sha256:
            return None
        return FinishedShard(entries, facts)

    def score(self, index: int) -> ScoredShard:
        """Read the corpus's shard `index` and score it with the teacher, as one submission.

        Raises:
            CorruptError, InputError: the corpus's shard is damaged or missing.
            MachineError, InputError: as the engine.
        """
        sequences = self._read(index)
        engine = self._started()
        requests = [
            to_requests(tokens_L1, starts_L1, self.job.context)
            for tokens_L1, starts_L1 in zip(sequences.tokens_BL1, sequences.starts_BL1, strict=True)
        ]
        answers = iter(engine.score([request for of in requests for request in of]))
        scored = [join([next(answers) for _ in of]) for of in requests]
        return ScoredShard(index, sequences, scored, engine.name, engine.dtype, self._machine())

    def write(self, shard: ScoredShard) -> FinishedShard:
        """Encode and write a scored shard, replacing any file of the same name.

        Raises:
            CorruptError: a target contradicts the token that follows it.
            OSError: the disk is full, or the folder is not writable.
        """
        self.job.units.path(shard.index).unlink(missing_ok=True)
        entries = {
            name: writer.write(number, self._blocks(shard, name))
            for name, writer, number in self._writers_of(shard.index)
        }
        counts_BL = shard.sequences.mask_BL1[:, 1:]
        labels = zip(shard.scored, counts_BL, strict=True)
        facts = ShardFacts(
            sha256={name: entry.file.sha256 for name, entry in entries.items()},
            engine=shard.engine,
            dtype=shard.dtype,
            machine=shard.machine,
            num_targets=sum(len(s.label_logprobs_L) for s in shard.scored),
            num_labels=int(counts_BL.sum()),
            label_loss=-sum(float(one.label_logprobs_L[counts_L].sum(dtype=np.float64)) for one, counts_L in labels),
        )
        write_sidecar(self.job.units.path(shard.index), facts)
        return FinishedShard(entries, facts)

    def make(self, index: int) -> FinishedShard:
        """Score and write shard `index`, unless it is finished already."""
        return self.finished(index) or self.write(self.score(index))

    def first_requests(self, num_sequences: int) -> list[Request]:
        """Return the requests for the first sequences of the cache, at most those of its first block."""
        sequences = self._source.read(0)[0]
        rows = zip(sequences.tokens_BL1[:num_sequences], sequences.starts_BL1, strict=False)
        return [one for tokens_L1, starts_L1 in rows for one in to_requests(tokens_L1, starts_L1, self.job.context)]

    def shard_set(self, name: RecordingName, shards: list[FinishedShard]) -> ShardSet:
        """Return the manifest's description of the shards in one recording."""
        return self._writers[name].shard_set([shard.entries[name] for shard in shards])

    def _writers_of(self, index: int) -> Iterator[tuple[RecordingName, ShardWriter, int]]:
        """Yield each recording, its writer of shard `index`, and the shard's number among that writer's files."""
        number = index - self.job.num_training
        for name in self.job.settings.recordings:
            if number < 0:
                yield name, self._writers[name], index
            else:
                yield name, self._writers[heldout_set(name)], number

    def close(self) -> None:
        """Close the engine, which frees the device's memory."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @cached_property
    def _source(self) -> ShardReader:
        return ShardReader(self.job.corpus, self.job.source)

    @cached_property
    def _writers(self) -> dict[str, ShardWriter]:
        """One writer per shard set, by the set's name."""
        job, settings = self.job, self.job.settings
        data = (job.folder / RANKING_NAME).read_bytes()
        ranking = read_ranking(data, job.ranking_sha256, job.vocab_size, str(job.folder / RANKING_NAME))
        writers: dict[str, ShardWriter] = {}
        for name in settings.recordings:
            codec = Codec(
                SAMPLED if name == "sampled" else TOPK_CODECS[settings.stored_profile or ""],
                job.source.seq_len,
                job.vocab_size,
                settings.num_ids(name),
                ranking,
                settings.temperature,
                settings.sorted_temperatures if name == "topk" else (),
            )
            for set_name in (name, heldout_set(name)):
                writers[set_name] = ShardWriter(job.folder, job.work / SIDECARS_FOLDER, set_name, codec)
        return writers

    def _read(self, index: int) -> Sequences:
        first, last = self._first_member[index], self._first_member[index + 1]
        blocks = [self._source.read(member)[0] for member in range(first, last)]
        return Sequences(
            np.concatenate([b.tokens_BL1 for b in blocks]),
            np.concatenate([b.starts_BL1 for b in blocks]),
            np.concatenate([b.mask_BL1 for b in blocks]),
        )

    def _blocks(self, shard: ScoredShard, name: RecordingName) -> Iterator[Block]:
        start = 0
        for part in split_blocks(shard.sequences):
            targets = to_targets(shard.scored[start : start + len(part)], name)
            check_alignment(part, targets, self.job.settings.num_ids(name), f"{name}, shard {shard.index}")
            start += len(part)
            yield Block(part, targets)

    def _started(self) -> Engine:
        if self._engine is None:
            self._engine = self._start()
        return self._engine

    def _start(self) -> Engine:
        return start_engine(self.job)

    def _machine(self) -> str:
        """Return the kind of machine that computes the sums; empty for a server, whose machine is not known."""
        return "" if self.job.settings.engine == "server" else machine_kind(self.job.device)


def start_engine(job: CacheJob) -> Engine:
    """Start the job's teacher on its device.

    Raises:
        MachineError, InputError: as the engine.
    """
    return _ENGINES[job.settings.engine](job, recording_of(job))


def recording_of(job: CacheJob) -> Recording:
    """Return what the engine keeps of each row of logits, by the job's settings."""
    settings = job.settings
    return Recording(
        num_samples=settings.num_ids("sampled"),
        top_k=settings.num_ids("topk"),
        temperature=settings.temperature,
        seed=settings.seed,
        vocab_size=job.vocab_size,
        chunk_rows=settings.chunk_rows,
        extra_temperatures=settings.sorted_temperatures,
    )


def _start_transformers(job: CacheJob, recording: Recording) -> Engine:
    from capgap.pipeline.cache.transformers_engine import TransformersEngine

    settings = job.settings
    return TransformersEngine(
        job.teacher, recording, settings.dtype, settings.batch_tokens, job.device, job.trust_remote_code
    )


def _start_vllm(job: CacheJob, recording: Recording) -> Engine:
    from capgap.pipeline.cache.vllm_engine import VllmEngine

    settings = job.settings
    return VllmEngine(
        job.teacher,
        recording,
        job.source.seq_len,
        settings.dtype,
        settings.batch_tokens,
        settings.gpu_memory_fraction,
        job.device,
        settings.tensor_parallel,
        settings.capture,
        trust_remote_code=job.trust_remote_code,
        engine_args=settings.engine_args,
    )


def _start_server(job: CacheJob, recording: Recording) -> Engine:
    from capgap.pipeline.cache.served import start_served

    assert job.served is not None
    scored = job.work / SCORED_FOLDER
    return start_served(job.settings.server, job.served, recording, job.corpus, job.source, scored)


_ENGINES: dict[str, Callable[[CacheJob, Recording], Engine]] = {
    "server": _start_server,
    "transformers": _start_transformers,
    "vllm": _start_vllm,
}
