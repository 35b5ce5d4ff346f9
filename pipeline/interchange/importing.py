"""Import: captures of another program become a corpus and a cache that a run file can reuse.

    captures --tokens--> corpus/       tokenizer, shards `student` and `heldout`
                           |
                           +--ranking of ids--+
    captures --targets, proven aligned--------+--> cache/    shards `topk` and `heldout-topk`, of the same sequences

The captures are read twice, some rows at a time. A killed import is continued by the same command: sequences are packed
again, and finished shards stay.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capgap.pipeline.interchange.captures import begins_with
from capgap.pipeline.interchange.folders import entry_of, make_folder, order_for
from capgap.pipeline.interchange.pack import Sequence, pack, to_sequences, to_topk
from capgap.pipeline.interchange.plan import SPLITS, Plan, plan
from capgap.pipeline.interchange.widths import MOST_CUT, Cuts, choose_top_k
from capgap.pipeline.models.checks import check_given_model
from capgap.pipeline.models.text import TOKENIZER_FOLDER, write_tokenizer
from capgap.pipeline.stage.context import StageInput, StageResult
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.folder import WORK_FOLDER
from capgap.pipeline.stage.manifests import record_sources
from capgap.pipeline.stage.progress import progress
from capgap.pipeline.stage.sources import model_files
from capgap.pipeline.store import (
    Block,
    Codec,
    ShardReader,
    ShardWriter,
    check_alignment,
    read_blocks,
    split_blocks,
)
from capgap.pipeline.store.codec import SEQUENCES, TOPK_CODECS
from capgap.pipeline.store.files import whole_folder, write_atomically
from capgap.pipeline.store.ranking import RANKING_NAME, count_ids, rank_counts, read_counts, write_counts
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import CacheFacts, CorpusFacts, ModelFacts, RecordingFacts, SplitFacts, heldout_set
from capgap.schemas.interchange import ImportSettings
from capgap.schemas.manifest import InputEntry, ShardEntry, ShardSet
from capgap.schemas.records import ChunkTargets, Sequences
from capgap.schemas.run_model import TeacherSettings

# Values of engine and dtype, which the captures do not say.
ENGINE, DTYPE = "imported", "unknown"

_SET_NAMES = {"student": "topk", "heldout": heldout_set("topk")}


@dataclass(frozen=True)
class Imported:
    """The finished folders; `teacher` is None unless the teacher is a folder of this machine."""

    corpus: StageInput
    teacher: StageInput | None
    cache: StageInput


def import_captures(settings: ImportSettings, force: bool = False) -> Imported:
    """Make the folders `corpus`, `teacher` and `cache` below `settings.out`.

    Raises:
        InputError: Captures, tokenizer or teacher cannot be used.
        MismatchError: Targets and tokens do not belong together, the teacher has another tokenizer, or a folder holds
            something else.
        CapgapError: A shard cannot be written or read.
    """
    planned = plan(settings)
    out = Path(settings.out)
    order = order_for("corpus", planned.corpus_settings, {})
    resolved = {"import": settings.model_dump(mode="json"), "corpus": {"sources": list(settings.sources)}}
    corpus = make_folder(
        out / "corpus", order, planned.sources, resolved, lambda folder: _make_corpus(planned, folder), force
    )
    teacher, teacher_entry = _teacher(settings, corpus, out / "teacher", force)
    inputs = {"corpus": entry_of(out / "corpus", corpus.manifest), "teacher": teacher_entry}
    order = order_for("cache", planned.cache_settings, inputs)
    resolved = {"import": settings.model_dump(mode="json"), "teacher": {"path": settings.teacher}}
    facts = None if teacher is None else ModelFacts.model_validate(teacher.manifest.facts)
    cache = make_folder(
        out / "cache",
        order,
        planned.sources,
        resolved,
        lambda folder: _make_cache(planned, corpus, facts, folder),
        force,
    )
    return Imported(corpus, teacher, cache)


def _make_corpus(planned: Plan, folder: Path) -> StageResult:
    with whole_folder(folder / TOKENIZER_FOLDER) as whole:
        planned.tokenizer.save_pretrained(whole)
    codec = Codec(SEQUENCES, planned.seq_len, planned.facts.vocab_size)
    sets: dict[str, ShardSet] = {}
    splits = {"teacher": SplitFacts(num_documents=0, num_text_bytes=0, num_text_tokens=0)}
    totals: dict[str, Any] = {}
    ids: dict[str, npt.NDArray[np.int64]] = {}
    num_documents = num_begun = 0
    for split in SPLITS:
        writer = ShardWriter(folder, folder / WORK_FOLDER / "shards", split, codec)
        counts = _Counts(planned)
        shards: list[ShardEntry] = []
        for number, packed in enumerate(_shards(planned, split, with_targets=False)):
            sequences = to_sequences(packed, planned.seq_len, planned.facts.eos_id)
            counts.add(packed, int(sequences.mask_BL1[:, 1:].sum()))
            blocks = (Block(part) for part in split_blocks(sequences))
            shards.append(writer.finished(number) or writer.write(number, blocks))
        counts.require_some(split)
        sets[split], splits[split] = writer.shard_set(shards), counts.facts
        blocks_of_split = (block for block, _ in read_blocks(folder, sets[split]))
        ids[split] = count_ids(blocks_of_split, planned.facts.vocab_size)
        totals |= {f"num_{split}_tokens": sets[split].num_tokens, f"num_{split}_labels": counts.num_labels}
        num_documents += counts.facts.num_documents
        num_begun += counts.num_begun
    write_counts(folder, ids)
    bos_ids = planned.bos_ids if num_begun == num_documents else ()
    _say_beginnings(planned, num_begun, num_documents)
    facts = CorpusFacts(
        tokenizer=planned.facts,
        context=planned.context,
        bos_ids=bos_ids,
        splits=splits,
        text_sources=tuple(planned.settings.sources),
        whole_conversations=False,
    )
    return StageResult(facts=facts.model_dump(mode="json"), totals=totals, shard_sets=sets)


def _say_beginnings(planned: Plan, num_begun: int, num_documents: int) -> None:
    """Log what the documents begin with; the teacher saw that when it was captured, and it cannot be changed now."""
    is_usual = bool(planned.usual_bos_ids)
    name = ascii(planned.tokenizer.decode(planned.bos_ids)) if planned.bos_ids else "nothing"
    text, level = f"import: a document begins with {name if num_begun else 'nothing'}", logging.INFO
    if 0 < num_begun < num_documents or (is_usual and not num_begun):
        level = logging.WARNING
        text = f"import: {f'{num_begun:,}' if num_begun else 'none'} of {num_documents:,} documents begin with {name}"
        if is_usual:
            text += ", as the tokenizer would have it: the teacher may predict the others less well"
    event("import_beginnings", text, level, num_begun=num_begun, num_documents=num_documents)


class _Counts:
    """Counts of a split; `num_begun` is the number of documents that begin with the plan's `bos_ids`."""

    def __init__(self, planned: Plan) -> None:
        self._planned = planned
        self._num_documents = self._num_bytes = self._num_tokens = self.num_labels = self.num_begun = 0

    def add(self, packed: list[Sequence], num_labels: int) -> None:
        """Count the documents, bytes, tokens and labels of some sequences."""
        rows = [row for one in packed for row in one.rows]
        texts = self._planned.tokenizer.batch_decode([row.tokens_M.tolist() for row in rows], skip_special_tokens=True)
        self._num_documents += sum(max(int(row.starts_M.sum()), 1) for row in rows)
        self._num_bytes += sum(len(text.encode(errors="replace")) for text in texts)
        bos_ids = self._planned.bos_ids
        for row in rows:
            places_D = np.flatnonzero(row.starts_M) if row.starts_M.any() else np.zeros(1, np.int64)
            num_begun = int(begins_with(row.tokens_M, places_D, bos_ids).sum())
            self.num_begun += num_begun
            self._num_tokens += len(row) - num_begun * len(bos_ids)
        self.num_labels += num_labels

    @property
    def facts(self) -> SplitFacts:
        """The facts of the rows; padding does not count as text."""
        return SplitFacts(
            num_documents=self._num_documents, num_text_bytes=self._num_bytes, num_text_tokens=self._num_tokens
        )

    def require_some(self, split: str) -> None:
        """Raise InputError if the split has no labels or no text, so that nothing can be trained on or measured."""
        if self.num_labels and self._num_bytes:
            return
        settings = self._planned.settings
        raise InputError(
            f"no row with labels for the split {split}",
            where=", ".join(settings.heldout if split == "heldout" and settings.heldout else settings.sources),
            found=f"{self._num_documents} documents, {self.num_labels} labels, {self._num_bytes} bytes of text",
            expected="at least one label",
            fix="raise --heldout_fraction, or name rows with --heldout" if split == "heldout" else "give more rows",
        )


def _teacher(
    settings: ImportSettings, corpus: StageInput, folder: Path, force: bool
) -> tuple[StageInput | None, InputEntry]:
    """Return the finished folder of a teacher on this machine, else None, and the cache's entry for the teacher.

    The identity in the entry is the one that the stage `teacher` of a run file gives to `teacher.path`.
    """
    decisive = {"teacher": TeacherSettings(path=settings.teacher).decisive()}
    order = order_for("teacher", decisive, {"corpus": entry_of(corpus.path, corpus.manifest)})
    if not Path(settings.teacher).is_dir():
        return None, InputEntry(path=str(folder), identity=order.identity, content="")

    def check(_: Path) -> StageResult:
        model = check_given_model(settings.teacher, corpus, "--teacher", False)[1]
        return StageResult(facts=model.model_dump(mode="json"), totals={"num_parameters": model.num_parameters})

    sources = record_sources(model_files(settings.teacher))
    resolved = {"import": settings.model_dump(mode="json"), "teacher": {"path": settings.teacher}}
    made = make_folder(folder, order, sources, resolved, check, force)
    return made, entry_of(folder, made.manifest)


def _make_cache(planned: Plan, corpus: StageInput, teacher: ModelFacts | None, folder: Path) -> StageResult:
    settings, vocab_size = planned.settings, planned.facts.vocab_size
    ranking = rank_counts(read_counts(corpus.path, corpus.manifest.files, "student", vocab_size))
    write_atomically(folder / RANKING_NAME, ranking.data)
    write_tokenizer(corpus, settings.teacher, folder)
    is_ragged = settings.profile == "small"
    has_ragged = any(of is not None and of.facts.profile == "small" for of in planned.exports.values())
    # targets of an export, which are of several widths, are not cut unless that is asked for
    most_cut = 0 if has_ragged else MOST_CUT
    top_k = min(settings.top_k or _top_k(planned, is_ragged, most_cut), vocab_size)
    cuts = Cuts(top_k, most_cut if settings.top_k is None else 1)
    name = TOPK_CODECS[settings.profile]
    # of logprobs that `small` has cut already, a second cut to 99 % would keep less than 99 % of the teacher's own
    was_cut = all(of is not None and of.facts.profile == "small" for of in planned.exports.values())
    codec = Codec(name, planned.seq_len, vocab_size, top_k, ranking, unknown_labels=True, was_cut=was_cut)
    counts = _CacheCounts()
    sets: dict[str, ShardSet] = {}
    for split in SPLITS:
        writer = ShardWriter(folder, folder / WORK_FOLDER / "shards", _SET_NAMES[split], codec)
        source = corpus.manifest.shard_sets[split]
        shards = []
        with progress(f"import: {split}", len(source.shards), "shards") as meter:
            for number, packed in enumerate(_shards(planned, split, with_targets=True)):
                cuts.add(row for one in packed for row in one.rows)
                blocks = list(_blocks(planned, corpus, source, number, packed, codec))
                if split == "student":
                    counts.add(blocks)
                shards.append(writer.finished(number) or writer.write(number, blocks))
                meter.advance(tokens=shards[-1].num_sequences * planned.seq_len)
        sets[_SET_NAMES[split]] = writer.shard_set(shards)
    if settings.top_k is None:
        cuts.finish()
    recording = RecordingFacts(num_ids=top_k, profile=settings.profile, temperatures=(settings.temperature,))
    facts = CacheFacts(
        **CorpusFacts.model_validate(corpus.manifest.facts).model_dump(),
        temperature=settings.temperature,
        recordings={"topk": recording},
        padded_vocab_size=vocab_size if teacher is None else teacher.padded_vocab_size,
        num_teacher_parameters=None if teacher is None else teacher.num_parameters,
        engines=(ENGINE,),
        dtypes=(DTYPE,),
        mean_label_loss=counts.mean_label_loss,
    )
    own = sets["topk"]
    totals = {
        "num_tokens": own.num_tokens,
        "num_bytes": own.num_bytes,
        "bytes_per_token": round(own.num_bytes / own.num_tokens, 3),
        "num_heldout_tokens": sets[heldout_set("topk")].num_tokens,
    } | counts.totals
    return StageResult(facts=facts.model_dump(mode="json"), totals=totals, shard_sets=sets)


class _CacheCounts:
    """Counts of the labels of the training sequences."""

    def __init__(self) -> None:
        self._num_labels = self._num_known = 0
        self._loss = self._tail = 0.0

    def add(self, blocks: list[Block]) -> None:
        """Count the targets whose next token counts as a label."""
        for block in blocks:
            assert block.targets is not None and not isinstance(block.targets, ChunkTargets)
            counts_BL = block.sequences.mask_BL1[:, 1:]
            logprobs_N = block.targets.label_logprobs_BL[counts_BL].astype(np.float64)
            known_N = logprobs_N[~np.isnan(logprobs_N)]
            self._num_labels += len(logprobs_N)
            self._num_known += len(known_N)
            self._loss -= float(known_N.sum())
            self._tail += float(block.targets.tail_BL[counts_BL].sum(dtype=np.float64))  # type: ignore[union-attr]

    @property
    def mean_label_loss(self) -> float | None:
        """Mean of minus the labels' logprobs, in nats; None if one is unknown, since unknown ones are improbable."""
        return self._loss / self._num_labels if self._num_known == self._num_labels else None

    @property
    def totals(self) -> dict[str, Any]:
        """The counts for the manifest's totals, which are for people."""
        return {
            "num_labels": self._num_labels,
            "num_unknown_labels": self._num_labels - self._num_known,
            "mean_tail": round(self._tail / self._num_labels, 6),
        }


def _blocks(
    planned: Plan,
    corpus: StageInput,
    source: ShardSet,
    number: int,
    packed: list[Sequence],
    codec: Codec,
) -> Iterator[Block]:
    """Yield the members of a shard: the corpus's sequences, each with its targets."""
    sequences = to_sequences(packed, planned.seq_len, planned.facts.eos_id)
    reader, shard, top_k = ShardReader(corpus.path, source), source.shards[number], codec.num_ids
    theirs = Sequences.joined([reader.read_member(number, member)[0] for member in range(len(shard.members))])
    if any(not np.array_equal(own, getattr(theirs, name)) for name, own in vars(sequences).items()):
        raise MismatchError(
            "the captures changed while they were imported", where=corpus.path, fix="run the same command again"
        )
    start, is_ragged = 0, planned.settings.profile == "small"
    for member, part in enumerate(split_blocks(sequences, codec)):
        targets = to_topk(packed[start : start + len(part)], part, top_k, codec.vocab_size, is_ragged)
        check_alignment(part, targets, top_k, f"{shard.file.path}, member {member}")
        start += len(part)
        yield Block(part, targets)


def _shards(planned: Plan, split: str, with_targets: bool) -> Iterator[list[Sequence]]:
    """Yield the sequences of each shard."""
    sequences = pack(planned.rows(split, with_targets), planned.seq_len, planned.context)
    while shard := list(islice(sequences, planned.settings.shard_sequences)):
        yield shard


def _top_k(planned: Plan, is_ragged: bool, most_cut: float) -> int:
    """Return the number of ids to keep of each target."""
    exported = max((0 if of is None else of.facts.num_ids for of in planned.exports.values()), default=0)
    return choose_top_k(planned.rows("student", with_targets=True), is_ragged, exported, most_cut)
