"""The corpus stage: it writes the tokenizer and the shards of every split, unit by unit, in bounded memory."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from capgap.pipeline.corpus.conversations import ChatFormat
from capgap.pipeline.corpus.making import ANY, make_here, make_slice, unit_meter
from capgap.pipeline.corpus.prepare import empty_corpus, prepare
from capgap.pipeline.corpus.split import SPLITS, Split, kept_for_nobody
from capgap.pipeline.corpus.totals import Totals
from capgap.pipeline.corpus.unit import CorpusJob, UnitMaker
from capgap.pipeline.corpus.whole import say_left_out
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.context import StageContext, StageResult
from capgap.pipeline.stage.ray_cluster import joins_cluster
from capgap.pipeline.stage.workers import run_in_processes
from capgap.pipeline.store.ranking import write_counts
from capgap.schemas.errors import InputError
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.manifest import ShardSet
from capgap.schemas.run_corpus import CorpusSettings

_LOG = logging.getLogger("capgap")


def run(context: StageContext) -> StageResult:
    """Write the tokenizer, the shards of every split, and how often each split holds each id.

    Raises:
        InputError: the sources cannot be read, too many records cannot be used, or a split is left without a whole
            sequence or a label; or a chat template does not mark answers.
        MismatchError: the sources changed since the unfinished corpus was begun.
    """
    job = prepare(context)
    tokenizer = load_tokenizer(job.tokenizer)
    turn_end_ids = _turn_end_ids(job.settings, tokenizer)
    _say_ends(tokenizer, job, turn_end_ids)
    make(job)
    result = _finished(job, turn_end_ids)
    kept = kept_for_nobody(context.run, result.totals["num_teacher_tokens"])
    if kept is not None:
        _LOG.warning("corpus: %s", kept)
    return result


def make(job: CorpusJob) -> None:
    """Make every unit that is not whole, in up to `corpus.workers` processes.

    Raises:
        CapgapError, OSError: a unit cannot be made, for the reasons that `UnitMaker.make` names.
    """
    maker = UnitMaker(job)
    num_missing = job.units.total - sum(maker.require_whole(unit) for unit in sorted(job.units.made()))
    num_workers = min(job.settings.workers, num_missing)
    if num_workers > 1:
        with unit_meter(job, "corpus", list(range(job.units.total))) as meter:
            if joins_cluster():
                # imported here: Ray is an extra
                from capgap.pipeline.corpus.on_ray import make_on_ray

                make_on_ray(job, num_workers, meter.look)
            else:
                run_in_processes(make_here, (job,), num_workers, meter.look, "corpus.workers")
    elif num_missing:
        make_slice(job, ANY)


def _finished(job: CorpusJob, turn_end_ids: tuple[int, ...]) -> StageResult:
    """Sum up the units, all of which are made, into what the manifest says of the corpus."""
    settings = job.settings
    totals = Totals(job)
    for unit in range(job.units.total):
        record = job.record(unit)
        assert record is not None, "made and looked at above"
        totals.add(unit, record)
    totals.bad.finish()
    try:
        for split in SPLITS:
            _require_some(job, split, totals)
    except InputError:
        # every remedy, such as more text, changes what the units hold, so their records must go
        for unit in range(job.units.total):
            job.units.path(unit).unlink(missing_ok=True)
        raise
    _remove_unwanted(job, totals)
    write_counts(job.folder, dict(zip(SPLITS, totals.ids_SV, strict=True)))
    sets: dict[str, ShardSet] = {
        split: job.shard_set(split, shards) for split, shards in totals.shards.items() if shards
    }
    counted: dict[str, Any] = {
        f"num_{split}_tokens": sets[split].num_tokens if split in sets else 0 for split in SPLITS
    }
    if settings.messages_field is not None:
        counted |= {f"num_{split}_labels": totals.inside[split].num_labels for split in SPLITS}
    counted["num_repeated_documents"] = totals.num_repeated
    counted["num_bad_records"] = totals.bad.num_bad
    counted["num_dropped_documents"] = sum(one.num_dropped for one in totals.counts.values())
    if settings.whole_conversations:
        counted["num_dropped_answers"] = sum(one.num_dropped_answers for one in totals.counts.values())
    counted["num_damaged_files"] = len(totals.damaged)
    facts = CorpusFacts(
        tokenizer=job.facts,
        context=settings.context,
        bos_ids=job.bos_ids,
        turn_end_ids=turn_end_ids,
        splits={split: totals.split_facts(split) for split in SPLITS},
        text_sources=settings.paths,
        whole_conversations=settings.whole_conversations,
        has_conversations=settings.messages_field is not None,
    )
    _say_what_is_left_out(job, totals)
    return StageResult(facts=facts.model_dump(mode="json"), totals=counted, shard_sets=sets)


def _require_some(job: CorpusJob, split: Split, totals: Totals) -> None:
    """Raise InputError if there is no text at all, or if the split has no sequence or no label."""
    settings, counts = job.settings, totals.counts[split]
    if totals.num_documents() == 0:
        raise empty_corpus(settings)
    num_documents = totals.num_documents(split)
    if not totals.shards[split] and not (split == "teacher" and settings.teacher_fraction == 0):
        raise InputError(
            f"no whole sequence for the split {split}",
            where="corpus",
            found=f"{num_documents} documents, {counts.num_tokens} tokens, {counts.num_dropped} too long",
            expected=f"at least {settings.seq_len + 1} tokens",
            fix=f"give more text, lower corpus.seq_len, or give {split} a larger share",
        )
    if totals.shards[split] and not totals.inside[split].num_labels:
        raise InputError(
            f"no token counts as a label in the split {split}",
            where="corpus",
            found=f"{num_documents} documents without an answer of the assistant",
            expected="at least one",
            fix="give conversations with answers",
        )


def _remove_unwanted(job: CorpusJob, totals: Totals) -> None:
    """Delete the shards that no limit leaves room for, and those that killed processes left behind."""
    wanted = {shard.file.path for shards in totals.shards.values() for shard in shards}
    for path in job.folder.glob("*.tar"):
        if path.name not in wanted:
            path.unlink()


def _say_what_is_left_out(job: CorpusJob, totals: Totals) -> None:
    for said in totals.damaged:
        _LOG.warning("corpus: left out the rest of a file: %s", said)
    for split in SPLITS if job.settings.whole_conversations else ():
        counts = totals.counts[split]
        say_left_out(f"corpus: {split}", counts.num_dropped_answers, counts.num_dropped, job.settings.seq_len)


def _turn_end_ids(settings: CorpusSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids with which the chat template ends an answer; none if answers cannot be told from the rest."""
    if settings.messages_field is None:
        return ()
    try:
        return ChatFormat(tokenizer, f"corpus.tokenizer: {settings.tokenizer}").end_ids
    except InputError:
        return ()


def _say_ends(tokenizer: PreTrainedTokenizerBase, job: CorpusJob, turn_end_ids: tuple[int, ...]) -> None:
    """Log which ids begin and end documents and turns, because the corpus decides this for all later stages."""

    def said(ids: tuple[int, ...]) -> str:
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(one)!a} ({one})" for one in ids) or "nothing"

    turns = f"; the chat template ends an answer with {said(turn_end_ids)}" if turn_end_ids else ""
    _LOG.info(
        "corpus: a document begins with %s and ends with %s%s", said(job.bos_ids), said((job.facts.eos_id,)), turns
    )
