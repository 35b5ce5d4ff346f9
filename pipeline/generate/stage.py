"""The generate stage: a model of the run answers prompts, and its answers become a corpus, unit by unit.

The corpus has the usual form, so that a teacher scores it like any other. Its shards hold rows of whole answers, each
behind its prompt, under the context rule `document`, and the loss mask covers the answers alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from capgap.pipeline.generate.asking import Asking, require_same_ends, turn_ends
from capgap.pipeline.generate.declaration import WRITER
from capgap.pipeline.generate.prompts import Split, read_prompts, split_prompts
from capgap.pipeline.generate.unit import UNITS_FOLDER, TextJob, TextMaker, TextUnit
from capgap.pipeline.generate.unit_record import TextCounts, TextRecord
from capgap.pipeline.models.load import model_path
from capgap.pipeline.models.text import RunText, write_tokenizer
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.context import FINAL, Instance, StageContext, StageInput, StageResult
from capgap.pipeline.stage.folder import WORK_FOLDER, plan_units
from capgap.pipeline.stage.progress import progress
from capgap.pipeline.stage.rounds import rounds_of, writer_of
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.ranking import count_ids, write_counts
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import CorpusFacts, ModelFacts, SourceCounts, SplitFacts
from capgap.schemas.manifest import ShardEntry, ShardSet
from capgap.schemas.run_file import RunFile

_LOG = logging.getLogger("capgap")

_SPLITS: tuple[Split, ...] = ("student", "heldout")


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse prompts and writers that do not fit, as far as this can be found before a model is loaded.

    Raises:
        InputError: prompts cannot be read; or the writer has no chat template, one that cannot be used, or one that
            refuses a conversation.
        MismatchError: the writer's tokenizer is not the corpus's, or its chat template writes special tokens that the
            corpus's tokenizer does not have; or a student ends an answer with other tokens than the teacher.
        CorruptError: a file of the writer is missing or changed.
    """
    rounds, made = rounds_of(run), _writer(inputs)
    path, text = model_path(made), RunText(inputs["corpus"])
    fingerprint = ModelFacts.model_validate(made.manifest.facts).tokenizer.fingerprint
    if fingerprint != text.facts.tokenizer.fingerprint:
        raise MismatchError(
            "the writer's tokenizer is not the corpus's",
            where=made.location,
            found=fingerprint[:12],
            expected=text.facts.tokenizer.fingerprint[:12],
            fix="make both from one tokenizer",
        )
    prompts = read_prompts(rounds.prompts)
    chats = [prompt for prompt in prompts if prompt.messages]
    tokenizer = load_tokenizer(path, _trusts(run, instance))
    asking = Asking(tokenizer, path, rounds, text.facts.bos_ids, bool(chats))
    if chats:
        _require_known({one for chat in chats for one in asking.ids(chat)}, tokenizer, text, made)
        if writer_of(instance) == "student" and run.has_teacher_model:
            teacher = model_path(inputs["teacher"])
            own = load_tokenizer(teacher, run.teacher.trust_remote_code)
            require_same_ends(turn_ends(tokenizer, path), turn_ends(own, teacher), f"{made.location}, rounds.prompts")


def _require_known(ids: set[int], tokenizer: PreTrainedTokenizerBase, text: RunText, made: StageInput) -> None:
    """Raise MismatchError if the prompts hold ids that the corpus's tokenizer does not have: no shard can hold them."""
    unknown = sorted(one for one in ids if one >= text.facts.tokenizer.vocab_size)
    if unknown:
        raise MismatchError(
            "the writer's chat template writes special tokens that the corpus's tokenizer does not have",
            where=f"{made.location}, rounds.prompts",
            found=", ".join(map(ascii, tokenizer.convert_ids_to_tokens(unknown))),
            expected="special tokens of corpus.tokenizer",
            fix="set corpus.tokenizer to the writer's folder and make the corpus again",
        )


def run(context: StageContext) -> StageResult:
    """Write the shards and the answers beside them, the tokenizer, and how often each split holds each id.

    Raises:
        InputError, MismatchError: `check` refuses the inputs; or no answer is left, or a teacher ended none of its
            answers.
        MachineError: vLLM is not installed, or fails.
    """
    check(context.run, context.instance, context.inputs)
    job = prepare(context)
    maker = TextMaker(job)
    for unit in sorted(job.units.made()):
        maker.require_whole(unit)
    made = job.units.made()
    missing = [unit for unit in range(job.units.total) if unit not in made]
    total = job.num_prompts(range(job.units.total))
    with progress(f"{context.instance.name}", total, "prompts", job.num_prompts(made)) as meter:
        for record in _make(job, maker, missing, context):
            meter.advance(record.counts.num_prompts, record.counts.num_answer_tokens)
    return _finished(context, job)


def _make(job: TextJob, maker: TextMaker, missing: list[int], context: StageContext) -> Iterator[TextRecord]:
    """Make the missing units, and yield the record of each as soon as it is finished."""
    if missing and job.settings.replicas > 1:
        # imported here: Ray is an extra
        from capgap.pipeline.generate.replicas import make_by_replicas

        yield from make_by_replicas(job, missing, context)
        return
    try:
        yield from map(maker.make, missing)
    finally:
        maker.close()


def prepare(context: StageContext) -> TextJob:
    """Read the prompts, write the tokenizer and the plan, and return the job that all processes share.

    Every call for the same run returns the same job.

    Raises:
        InputError: the prompts cannot be read, or none is left to learn from or held out.
    """
    run, instance, made = context.run, context.instance, _writer(context.inputs)
    rounds, text, writer = rounds_of(run), RunText(context.input("corpus")), model_path(made)
    assert instance.round is not None
    prompts = read_prompts(rounds.prompts)
    chosen = split_prompts(prompts, rounds, instance.round)
    if instance.round == FINAL:
        # no student learns from the text of the final students, so they answer only held-out prompts
        chosen["student"] = []
    elif len(chosen["student"]) < (rounds.prompts_per_round or 0):
        _LOG.warning(
            "%s: rounds.prompts_per_round is %d, but only %d prompts are left to learn from; each is answered once",
            instance.name,
            rounds.prompts_per_round,
            len(chosen["student"]),
        )
    units = []
    for split in _SPLITS:
        each = [chosen[split][i : i + rounds.unit_prompts] for i in range(0, len(chosen[split]), rounds.unit_prompts)]
        units += [TextUnit(split, number, tuple(part)) for number, part in enumerate(each)]
    work = context.folder / WORK_FOLDER
    plan_units(work, "units", len(units), f"{UNITS_FOLDER}/*.json")
    write_tokenizer(context.input("corpus"), writer, context.folder)
    positions = ModelFacts.model_validate(made.manifest.facts).max_positions
    return TextJob(
        settings=rounds,
        prompts=tuple(prompts),
        each_unit=tuple(units),
        writer=writer,
        seeds=f"{rounds.seed} {instance.seed} {instance.round}",
        folder=context.folder,
        work=work,
        seq_len=text.seq_len,
        room=text.seq_len if positions is None else min(text.seq_len, positions),
        tokenizer=text.facts.tokenizer,
        bos_ids=text.facts.bos_ids,
        device=context.device,
        num_devices=rounds.tensor_parallel if writer_of(instance) == "teacher" else 1,
        trust_remote_code=_trusts(run, instance),
    )


def _finished(context: StageContext, job: TextJob) -> StageResult:
    records = [job.record(unit) for unit in range(job.units.total)]
    parts: dict[Split, list[TextRecord]] = {split: [] for split in _SPLITS}
    for unit, record in zip(job.each_unit, records, strict=True):
        assert record is not None, "made and looked at above"
        parts[unit.split].append(record)
    counts = {split: _sum(parts[split]) for split in _SPLITS}
    wanted = [split for split in _SPLITS if parts[split]]
    for split in wanted:
        _require_some(context, job, split, counts[split])
    sets: dict[str, ShardSet] = {}
    for split in wanted:
        shards: list[ShardEntry] = [record.shard for record in parts[split] if record.shard is not None]
        sets[split] = job.shard_set(split, shards)
    write_counts(context.folder, {str(split): _count(job, sets.get(split)) for split in _SPLITS})
    source = f"written by {_writer(context.inputs).manifest.instance}"
    facts = CorpusFacts(
        tokenizer=job.tokenizer,
        context="document",
        bos_ids=job.bos_ids,
        turn_end_ids=RunText(context.input("corpus")).facts.turn_end_ids,
        splits={"teacher": _split_facts(TextCounts(), source)}
        | {split: _split_facts(counts[split], source) for split in _SPLITS},
        text_sources=(source,),
        whole_conversations=True,
        has_conversations=True,
    )
    _say(context.instance, counts)
    return StageResult(facts=facts.model_dump(mode="json"), totals=_totals(counts, sets), shard_sets=sets)


def _require_some(context: StageContext, job: TextJob, split: Split, counts: TextCounts) -> None:
    """Raise InputError if a split has no answer, or if a teacher wrote it and ended none of its answers."""
    where = f"{context.instance.name}, the prompts {'to learn from' if split == 'student' else 'held out'}"
    if not counts.num_answers:
        raise InputError(
            "no answer is left",
            where=where,
            found=f"{counts.num_prompts} prompts, of which {counts.num_too_long} leave no room for an answer; "
            f"{counts.num_empty} answers are empty, {counts.num_unknown} hold ids that are no tokens",
            expected="at least one answer",
            fix=f"raise corpus.seq_len above the prompts' lengths (a prompt and its answer have {job.room} tokens), or "
            "see whether the writer answers such prompts at all",
        )
    if writer_of(context.instance) == "teacher" and counts.num_cut == counts.num_answers:
        raise InputError(
            "the teacher ended none of its answers",
            where=where,
            found=f"{counts.num_cut} answers that were cut off, of {counts.num_answer_tokens} tokens in all",
            expected="some that end",
            fix="raise rounds.max_new_tokens, or say with rounds.stop where an answer ends",
        )


def _sum(records: list[TextRecord]) -> TextCounts:
    total = TextCounts()
    for record in records:
        total = total.plus(record.counts)
    return total


def _count(job: TextJob, shards: ShardSet | None) -> npt.NDArray[np.int64]:
    """Count how often the shards hold each token id [V]."""
    reader = None if shards is None else ShardReader(job.folder, shards)
    members = range(0 if reader is None else reader.shard_set.num_members)
    blocks = (reader.read(member)[0] for member in members if reader is not None)
    return count_ids(blocks, job.tokenizer.vocab_size)


def _split_facts(counts: TextCounts, source: str) -> SplitFacts:
    by_source = SourceCounts(
        num_documents=counts.num_answers,
        num_text_bytes=counts.num_text_bytes,
        num_text_tokens=counts.num_prompt_tokens + counts.num_answer_tokens,
        num_labels=counts.num_answer_tokens,
    )
    return SplitFacts(
        num_documents=by_source.num_documents,
        num_text_bytes=by_source.num_text_bytes,
        num_text_tokens=by_source.num_text_tokens,
        by_source={source: by_source} if counts.num_answers else {},
    )


def _totals(counts: Mapping[Split, TextCounts], sets: Mapping[str, ShardSet]) -> dict[str, Any]:
    """Return the totals of the manifest: figures of the answers to learn from, and of the held-out answers."""
    found: dict[str, Any] = {}
    for split in _SPLITS:
        one, begin = counts[split], "" if split == "student" else "heldout_"
        if split not in sets:
            continue
        found |= {
            f"{begin}prompts": one.num_prompts,
            f"{begin}too_long": one.num_too_long,
            f"{begin}answers": one.num_answers,
            f"{begin}empty": one.num_empty,
            f"{begin}unknown_ids": one.num_unknown,
            f"{begin}cut_off": one.num_cut,
            f"{begin}answer_tokens": one.num_answer_tokens,
            f"{begin}mean_logprob": one.logprob / one.num_answer_tokens,
            f"{begin}repetition": one.repetition / one.num_answers,
        }
        if one.num_graded:
            found |= {f"{begin}graded": one.num_graded, f"{begin}right": one.num_right}
    found["num_tokens"] = sum(one.num_tokens for one in sets.values())
    return found


def _say(instance: Instance, counts: Mapping[Split, TextCounts]) -> None:
    for split, one in counts.items():
        left_out = one.num_too_long + one.num_empty + one.num_unknown
        if left_out or one.num_cut:
            _LOG.warning(
                "%s: %s: %d prompts leave no room for an answer, %d answers are empty and %d hold ids that are no "
                "tokens, all left out; %d of %d answers were cut off",
                instance.name,
                "to learn from" if split == "student" else "held out",
                one.num_too_long,
                one.num_empty,
                one.num_unknown,
                one.num_cut,
                one.num_answers,
            )


def _writer(inputs: Mapping[str, StageInput]) -> StageInput:
    """Return the model that writes: a student if one is an input, else the teacher."""
    return inputs[WRITER] if WRITER in inputs else inputs["teacher"]


def _trusts(run: RunFile, instance: Instance) -> bool:
    made_from = run.teacher if writer_of(instance) == "teacher" else run.student
    return made_from.trust_remote_code
