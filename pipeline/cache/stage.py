"""The cache stage: score the student's part of the corpus with the teacher, shard by shard.

teacher's thread:  score shard i, score shard i + 1, ...
other threads:                    encode and write shard i, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from capgap.pipeline.cache.cross_check import CheckedShardScorer, read_cross_check
from capgap.pipeline.cache.held import WRITING_THREADS, held_shards, require_room
from capgap.pipeline.cache.label_loss import require_as_measured, say_if_it_knows_nothing
from capgap.pipeline.cache.overlap import overlap
from capgap.pipeline.cache.reopen import reopen
from capgap.pipeline.cache.request_checks import require_kept, require_storable
from capgap.pipeline.cache.shard_lines import ShardLines, shard_lines
from capgap.pipeline.cache.shards import SCORED_FOLDER, CacheJob, FinishedShard, ScoredShard, ShardScorer, codecs_of
from capgap.pipeline.models.load import served_path
from capgap.pipeline.models.text import write_tokenizer
from capgap.pipeline.stage.context import Instance, StageContext, StageInput, StageResult
from capgap.pipeline.stage.folder import WORK_FOLDER, plan_units
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.store.ranking import RANKING_NAME, rank_counts, read_counts
from capgap.schemas.errors import MismatchError
from capgap.schemas.facts import (
    CacheFacts,
    CorpusFacts,
    ModelFacts,
    RecordingFacts,
    ServedFacts,
    heldout_set,
    teacher_facts,
)
from capgap.schemas.manifest import Manifest, Members, ShardEntry, ShardSet
from capgap.schemas.run_cache import CacheSettings, RecordingName
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_rounds import RoundsSettings

__all__ = ["check", "prepare", "reopen", "run"]


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse a teacher, a corpus and settings that do not fit together.

    Raises:
        MismatchError: teacher and corpus have different tokenizers, or the teacher is served and `cache.engine` is not
            `server`, or the reverse.
        SettingError: `cache.top_k` is larger than the vocabulary, or than what a member of a shard can hold.
        CorruptError: a file of the teacher has changed since its stage finished.
    """
    corpus = inputs["corpus"].manifest
    teacher = teacher_facts(inputs["teacher"].manifest.facts)
    _require_fit(CorpusFacts.model_validate(corpus.facts), corpus.shard_sets["student"].seq_len, teacher, run.cache)
    served_path(inputs["teacher"])  # called here so that a damaged teacher is found before a finished cache is replaced


def run(context: StageContext) -> StageResult:
    """Write the target shards, and the tokenizer next to them.

    Raises:
        MismatchError, SettingError: as `check`; or the teacher's loss is far from what its stage measured.
        MachineError, InputError: as the engine.
    """
    check(context.run, context.instance, context.inputs)
    settings = context.run.cache
    corpus_facts = CorpusFacts.model_validate(context.input("corpus").manifest.facts)
    teacher = teacher_facts(context.input("teacher").manifest.facts)
    scorer = CheckedShardScorer(prepare(context))
    made = _make(scorer, context)
    shards, heldout = made[: scorer.job.num_training], made[scorer.job.num_training :]
    sets = {str(name): scorer.shard_set(name, shards) for name in settings.recordings}
    num_targets = sum(shard.facts.num_targets for shard in shards)
    num_labels = sum(shard.facts.num_labels for shard in shards)
    facts = CacheFacts(
        **corpus_facts.model_dump(),
        temperature=settings.temperature,
        recordings=_recordings(settings),
        padded_vocab_size=getattr(teacher, "padded_vocab_size", corpus_facts.tokenizer.vocab_size),
        num_teacher_parameters=getattr(teacher, "num_parameters", None),
        served=scorer.job.served,
        engines=tuple(sorted({shard.facts.engine for shard in shards})),
        dtypes=tuple(sorted({shard.facts.dtype for shard in shards})),
        mean_label_loss=sum(shard.facts.label_loss for shard in shards) / num_labels if num_labels else None,
        cross_check=read_cross_check(scorer.job.work),
        scored=tuple(shard.facts for shard in made),
    )
    num_bytes = sum(shard_set.num_bytes for shard_set in sets.values())
    totals: dict[str, Any] = {
        "num_tokens": num_targets,
        "num_bytes": num_bytes,
        "bytes_per_token": round(num_bytes / num_targets, 3),
        "num_heldout_tokens": sum(shard.facts.num_targets for shard in heldout),
    }
    if heldout:
        sets |= {heldout_set(name): scorer.shard_set(name, heldout) for name in settings.recordings}
    if context.instance.round is not None:
        totals |= _nearness_to_writer(context.input("corpus").manifest, facts, num_labels)
    elif settings.temperature == 1:
        scored = sets.get(heldout_set(settings.recordings[0]))
        reader = None if scored is None else ShardReader(context.folder, scored)
        require_as_measured(context.input("teacher").manifest, reader, str(context.folder))
        say_if_it_knows_nothing(facts.mean_label_loss or 0.0, facts.tokenizer.vocab_size)
    return StageResult(facts=facts.model_dump(mode="json"), totals=totals, shard_sets=sets)


def prepare(context: StageContext) -> CacheJob:
    """Write the tokenizer, the ranking of ids and the plan of the shards, and return the job that makes the shards.

    Every call for the same run, in any process, returns the same job.

    Raises:
        CorruptError, InputError: as `write_tokenizer`, before anything is scored.
    """
    corpus, settings, teacher = context.input("corpus"), context.run.cache, served_path(context.input("teacher"))
    write_tokenizer(corpus, teacher, context.folder)
    facts = CorpusFacts.model_validate(corpus.manifest.facts)
    student = corpus.manifest.shard_sets["student"]
    vocab_size = facts.tokenizer.vocab_size
    ranking = rank_counts(read_counts(corpus.path, corpus.manifest.files, "student", vocab_size))
    write_atomically(context.folder / RANKING_NAME, ranking.data)
    work = context.folder / WORK_FOLDER
    training = student.first_shards(settings.max_tokens)
    heldout = _first_blocks(corpus.manifest.shard_sets.get("heldout"), settings.num_heldout_sequences)
    source = student.model_copy(update={"shards": (*training, *heldout)})
    plan_units(work, "shards", len(source.shards), f"{SCORED_FOLDER}/*.json")
    return CacheJob(
        settings=settings,
        corpus=corpus.path,
        source=source,
        num_training=len(training),
        context=facts.context,
        teacher=teacher,
        folder=context.folder,
        work=work,
        vocab_size=vocab_size,
        ranking_sha256=ranking.sha256,
        device="cpu" if settings.engine == "server" else context.device,
        trust_remote_code=context.run.teacher.trust_remote_code,
        served=teacher_facts(context.input("teacher").manifest.facts).served if settings.engine == "server" else None,
    )


def _nearness_to_writer(text: Manifest, facts: CacheFacts, num_labels: int) -> dict[str, Any]:
    """Return KL(writer || teacher) on the text that the writer sampled, in nats/token, as `writer_kl` for the totals.

    Its unbiased estimate is the mean, over the sampled tokens, of the writer's logprob minus the teacher's. This holds
    only if both have temperature 1 and no token was left out; otherwise the result is empty.
    """
    sampled = RoundsSettings.model_validate(text.resolved["rounds"])
    own, num_written = text.totals.get("mean_logprob"), text.totals.get("answer_tokens")
    if not isinstance(own, float) or num_written != num_labels or facts.mean_label_loss is None:
        return {}
    if (sampled.temperature, sampled.top_p, facts.temperature) != (1, 1, 1):
        return {}
    return {"writer_kl": own + facts.mean_label_loss}


def _make(scorer: ShardScorer, context: StageContext) -> list[FinishedShard]:
    """Return every shard in order, after making those that are not finished."""
    source = scorer.job.source
    found = {index: scorer.finished(index) for index in range(len(source.shards))}
    done = {index: shard for index, shard in found.items() if shard is not None}
    missing = [index for index in found if index not in done]
    if missing:
        largest = max(source.shards[index].num_sequences for index in missing)
        num_shards = held_shards(scorer.job.settings, len(missing))
        require_room(scorer.job.settings, largest * source.seq_len, source.seq_len, num_shards)
    by_replicas = bool(missing) and context.run.cache.replicas > 1
    # each replica has its own device, which this process does not know
    device = "" if by_replicas else scorer.job.device
    try:
        with shard_lines(scorer.job, "cache", list(found), set(done), device) as lines:
            if by_replicas:
                done |= _make_by_replicas(scorer.job, missing, context, lines)
            else:
                done |= dict(overlap(missing, scorer.score, lambda s: _write(scorer, s, lines), WRITING_THREADS))
    finally:
        scorer.close()
    return [done[index] for index in range(len(source.shards))]


def _make_by_replicas(
    job: CacheJob, missing: list[int], context: StageContext, lines: ShardLines
) -> dict[int, FinishedShard]:
    # imported here because Ray is an optional dependency
    from capgap.pipeline.cache.replicas import make_by_replicas

    made = {}
    for index, shard in make_by_replicas(job, missing, context):
        made[index] = shard
        lines.finished(index, shard)
    return made


def _write(scorer: ShardScorer, shard: ScoredShard, lines: ShardLines) -> tuple[int, FinishedShard]:
    written = scorer.write(shard)
    lines.finished(shard.index, written)
    return shard.index, written


def _recordings(settings: CacheSettings) -> dict[RecordingName, RecordingFacts]:
    found: dict[RecordingName, RecordingFacts] = {}
    for name in settings.recordings:
        extra = settings.extra_temperatures if name == "topk" else ()
        found[name] = RecordingFacts(
            num_ids=settings.num_ids(name),
            profile=settings.stored_profile if name == "topk" else None,
            temperatures=tuple(sorted((settings.temperature, *extra))),
        )
    return found


def _require_fit(corpus: CorpusFacts, seq_len: int, teacher: ModelFacts | ServedFacts, settings: CacheSettings) -> None:
    if (settings.engine == "server") != (teacher.served is not None):
        raise MismatchError(
            "a served teacher is scored by its server, and no other teacher is",
            where="cache.engine",
            found=f"{settings.engine}, and a teacher that is {'not served' if teacher.served is None else 'served'}",
            fix="set teacher.served and cache.engine to server, or neither",
        )
    if corpus.tokenizer.fingerprint != teacher.tokenizer.fingerprint:
        raise MismatchError(
            "teacher and corpus have different tokenizers",
            where="cache",
            found=f"fingerprint {teacher.tokenizer.fingerprint[:12]} at the teacher",
            expected=f"{corpus.tokenizer.fingerprint[:12]}, the corpus's",
            fix="set corpus.tokenizer to the teacher's folder",
        )
    require_kept(settings.num_ids("topk"), corpus.tokenizer.vocab_size)
    for codec in codecs_of(settings, seq_len, corpus.tokenizer.vocab_size).values():
        require_storable(codec)


def _first_blocks(heldout: ShardSet | None, num_sequences: int) -> tuple[ShardEntry, ...]:
    """Return the first held-out shards, the last of which is cut after the block that reaches `num_sequences`."""
    chosen: list[ShardEntry] = []
    for shard in () if heldout is None else heldout.shards:
        missing = num_sequences - sum(one.num_sequences for one in chosen)
        if missing <= 0:
            break
        of = shard.members
        ends = accumulate(of.num_sequences)
        count = 1 + sum(1 for end in ends if end < missing)
        members = Members(
            offset=of.offset[:count],
            num_bytes=of.num_bytes[:count],
            num_sequences=of.num_sequences[:count],
            crc32=of.crc32[:count],
        )
        cut = {"members": members, "num_sequences": sum(members.num_sequences)}
        chosen.append(shard.model_copy(update=cut))
    return tuple(chosen)
