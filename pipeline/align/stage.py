"""The align stage: it makes a cache of chunks from a finished cache and another tokenizer.

It needs no model and no device, because the cache already holds the text and the logprobs that are summed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from capgap.pipeline.align.shard import ShardCounts
from capgap.pipeline.align.token_bytes import TextTokenizer
from capgap.pipeline.align.units import ALIGNED_FOLDER, CHUNKS_SET, AlignJob, ChunkAligner, make_units
from capgap.pipeline.models.bos import document_bos
from capgap.pipeline.models.checks import named
from capgap.pipeline.models.text import TOKENIZER_FOLDER, RunText
from capgap.pipeline.models.tokenizers import load_tokenizer, tokenizer_facts
from capgap.pipeline.stage.context import Instance, Slice, StageContext, StageInput, StageResult
from capgap.pipeline.stage.folder import WORK_FOLDER, plan_units
from capgap.pipeline.store.files import whole_folder
from capgap.schemas.errors import InputError, MismatchError, SettingError
from capgap.schemas.facts import AlignedFacts, CacheFacts, RecordingFacts, SplitFacts, heldout_set
from capgap.schemas.run_align import AlignSettings
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_file import RunFile

_LOG = logging.getLogger("capgap")


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse a cache that cannot be aligned.

    Raises:
        MismatchError: the cache holds conversations, has another temperature than 1, or is aligned already.
        SettingError: the cache does not have the recording of `align.recording`.
        InputError: the tokenizer of the cache is not reversible, or puts several ids before each document.
    """
    assert run.align is not None
    cache = inputs["cache"]
    facts = CacheFacts.model_validate(cache.manifest.facts)
    _require_alignable(facts, cache)
    _recording(run.align, facts)
    where = f"the tokenizer of {cache.location}"
    with named(where):
        TextTokenizer.of(RunText(cache).tokenizer(), facts.tokenizer.vocab_size, where)


def run(context: StageContext) -> StageResult:
    """Write the shards, and the student's tokenizer beside them.

    Raises:
        MismatchError, SettingError, InputError: `check` refuses the cache, or the text of a document is lost or changed
            by a tokenizer.
        CorruptError: a shard of the cache is damaged.
    """
    check(context.run, context.instance, context.inputs)
    job = prepare(context)
    make_units(job, Slice(None))
    maker = ChunkAligner(job)
    # units that other processes made are verified here, and made again if they are not whole
    made = [maker.make(unit) for unit in range(job.units.total)]
    parts = {CHUNKS_SET: made[: job.num_training], heldout_set(CHUNKS_SET): made[job.num_training :]}
    sets = {name: maker.shard_set([entry for entry, _ in part]) for name, part in parts.items() if part}
    training, heldout = ([record.counts for _, record in part] for part in parts.values())
    facts = _facts(job, context.input("cache"), training, heldout)
    aligned = facts.aligned
    assert aligned is not None
    shards = sets[CHUNKS_SET]
    _LOG.info(
        "align: %s chunks, %.1f %% of them kept, %.1f %% beside unreliable borders; %.2f bytes of text per chunk",
        f"{aligned.num_chunks:,}",
        100 * aligned.num_kept_chunks / aligned.num_chunks,
        100 * aligned.num_unreliable_chunks / aligned.num_chunks,
        facts.splits["student"].num_text_bytes / aligned.num_chunks,
    )
    if job.projected_top_k:
        _LOG.info("align: %s", aligned.projected_sentence(shards.num_tokens))
    totals = {
        "num_tokens": shards.num_tokens,
        "num_bytes": shards.num_bytes,
        "bytes_per_token": round(shards.num_bytes / shards.num_tokens, 3),
        "num_chunks": aligned.num_chunks,
        "num_kept_chunks": aligned.num_kept_chunks,
        "num_projected": aligned.num_projected,
    }
    return StageResult(facts=facts.model_dump(mode="json"), totals=totals, shard_sets=sets)


def prepare(context: StageContext) -> AlignJob:
    """Write the student's tokenizer and the plan, and return the job that all processes share.

    Every call for the same run returns the same job.

    Raises:
        SettingError: the cache does not have the recording of `align.recording`.
        InputError: the student's tokenizer cannot be loaded, or puts several ids before each document.
    """
    settings, cache = context.run.align, context.input("cache")
    assert settings is not None
    facts = CacheFacts.model_validate(cache.manifest.facts)
    recording = _recording(settings, facts)
    with named(f"align.tokenizer: {settings.tokenizer}"):
        tokenizer = load_tokenizer(settings.tokenizer)
    bos_ids = document_bos(tokenizer, settings.tokenizer, settings.bos)
    _require_one("align.tokenizer", bos_ids)
    folder, work = context.folder / TOKENIZER_FOLDER, context.folder / WORK_FOLDER
    if not folder.is_dir():
        with whole_folder(folder) as whole:
            tokenizer.save_pretrained(whole)
    sets = cache.manifest.shard_sets
    training, heldout = sets[recording], sets.get(heldout_set(recording))
    shards = (*training.shards, *(heldout.shards if heldout is not None else ()))
    plan_units(work, "shards", len(shards), f"{ALIGNED_FOLDER}/*.json")
    return AlignJob(
        location=cache.location,
        source=training.model_copy(update={"shards": shards}),
        num_training=len(training.shards),
        recording=recording,
        facts=facts,
        teacher=RunText(cache).tokenizer_folder,
        folder=context.folder,
        work=work,
        tokenizer=tokenizer_facts(tokenizer),
        bos_ids=bos_ids,
        seq_len=settings.seq_len or training.seq_len,
        min_border_probability=settings.min_border_probability,
        projected_top_k=settings.projected_top_k,
    )


def _facts(job: AlignJob, cache: StageInput, training: list[ShardCounts], heldout: list[ShardCounts]) -> CacheFacts:
    """Return the facts of the aligned cache: those of the given cache, with what belongs to the student's tokenizer."""
    splits = {"student": _split(training)} | ({"heldout": _split(heldout)} if heldout else {})
    given, made = cache.manifest.resolved.get("teacher", {}).get("path"), cache.manifest.inputs.get("teacher")
    scored = job.source.model_copy(update={"shards": job.source.shards[: job.num_training]})
    aligned = AlignedFacts(
        teacher=given or job.facts.served or (made.path if made is not None else "not known"),
        num_teacher_tokens=scored.num_tokens,
        tokenizer=job.facts.tokenizer,
        recording=job.recording,
        num_chunks=sum(one.num_chunks for one in training),
        num_kept_chunks=sum(one.num_kept_chunks for one in training),
        num_unreliable_chunks=sum(one.num_unreliable_chunks for one in training),
        num_projected=sum(one.num_projected for one in training),
        projected_mass=sum(one.projected_mass for one in training),
        heldout_nats=sum(one.known_nats for one in heldout),
        heldout_bytes=sum(one.known_bytes for one in heldout),
    )
    return job.facts.model_copy(
        update={
            "tokenizer": job.tokenizer,
            "bos_ids": job.bos_ids,
            "turn_end_ids": (),
            "splits": splits,
            "recordings": {CHUNKS_SET: RecordingFacts(num_ids=job.projected_top_k, temperatures=(1.0,))},
            "padded_vocab_size": job.tokenizer.vocab_size,
            "mean_label_loss": None,
            "cross_check": None,
            "scored": (),
            "aligned": aligned,
        }
    )


def _split(records: list[ShardCounts]) -> SplitFacts:
    return SplitFacts(
        num_documents=sum(one.num_documents for one in records),
        num_text_bytes=sum(one.num_text_bytes for one in records),
        num_text_tokens=sum(one.num_text_tokens for one in records),
    )


def _recording(settings: AlignSettings, facts: CacheFacts) -> RecordingName:
    wanted = settings.recording or ("topk" if "topk" in facts.recordings else "sampled")
    if wanted not in facts.recordings:
        raise SettingError(
            "the cache has no such recording",
            where="align.recording",
            found=wanted,
            expected=", ".join(sorted(facts.recordings)),
        )
    if settings.projected_top_k and wanted != "topk":
        raise SettingError(
            "only the top-k tokens can be projected",
            where="align.projected_top_k",
            found=f"{settings.projected_top_k} with a {wanted} recording",
            expected="a topk recording",
            fix="leave align.projected_top_k out, or make the cache with cache.recording topk",
        )
    return wanted


def _require_alignable(facts: CacheFacts, cache: StageInput) -> None:
    fault: tuple[str, str] | None = None
    if facts.aligned is not None:
        fault = "a cache that was aligned already", "the cache that it was made of"
    elif facts.has_conversations:
        fault = "conversations, whose special tokens have none in another tokenizer", "a cache of texts"
    elif facts.temperature != 1:
        fault = f"temperature {facts.temperature:g}", "1, at which chunks of text have a likelihood"
    if fault is not None:
        raise MismatchError(
            "this cache cannot be aligned",
            where=cache.location,
            found=fault[0],
            expected=fault[1],
            fix="make a cache of texts at temperature 1, and align that",
        )
    _require_one(f"the tokenizer of {cache.location}", facts.bos_ids)


def _require_one(where: str, bos_ids: tuple[int, ...]) -> None:
    if len(bos_ids) > 1:
        raise InputError(
            "several ids stand before each document",
            where=where,
            found=list(bos_ids),
            expected="at most one id, which begins a text",
        )
