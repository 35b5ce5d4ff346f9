"""The rows that a model is tuned on, made from files of conversations as shards in the stage's folder.

Rank 0 makes them once and writes `work/rows.json` last, so where that file exists all shards are complete, even if an
earlier process was killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field

from capgap.pipeline.corpus.bad_records import NUM_NAMED, BadRecords
from capgap.pipeline.corpus.conversations import ChatFormat, conversation_of
from capgap.pipeline.corpus.sources import Document, read_documents
from capgap.pipeline.corpus.split import Split, split_documents
from capgap.pipeline.corpus.whole import encode_whole, in_whole_rows
from capgap.pipeline.stage.context import StageContext
from capgap.pipeline.stage.folder import WORK_FOLDER
from capgap.pipeline.store import Block, ShardWriter, split_blocks
from capgap.pipeline.store.codec import SEQUENCES, Codec
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.tune.files import chat_files
from capgap.schemas.base import Record
from capgap.schemas.errors import BadRecordError, InputError
from capgap.schemas.facts import TokenizerFacts
from capgap.schemas.manifest import ShardSet
from capgap.schemas.records import Sequences
from capgap.schemas.run_tune import TuneSettings

_ROWS_NAME = "rows.json"
_SHARD_ROWS = 1024
_SPLITS: dict[str, Split] = {"train": "student", "heldout": "heldout"}


class ChatRows(Record):
    """The shards of the conversations, and counts of what was kept and left out."""

    shard_sets: dict[str, ShardSet]
    """The shard sets `train` and `heldout`."""

    totals: dict[str, int] = Field(default_factory=dict)
    """Counts of conversations, answers, rows and labels, for the manifest and the model card."""


def chat_rows(context: StageContext, chat: ChatFormat, facts: TokenizerFacts) -> ChatRows:
    """Return the rows of the conversations that the settings name; rank 0 makes them if they do not exist.

    With several ranks, every rank must call it.

    Args:
        context: The context of the tune stage.
        chat: The tokenizer with its chat template.
        facts: The facts about that tokenizer.

    Raises:
        InputError: Conversations cannot be read, or none is left to learn from or to measure.
    """
    path = context.folder / WORK_FOLDER / _ROWS_NAME
    if context.ranks.is_first and not path.is_file():
        made = _make(context, chat, facts)
        write_atomically(path, made.model_dump_json())
    if context.ranks.world_size > 1:
        torch.distributed.barrier()
    return ChatRows.model_validate_json(path.read_bytes())


def bad_records(settings: TuneSettings, num_named: int = NUM_NAMED) -> BadRecords:
    """Return the handler for records that cannot be used, which stops at them or skips and counts them.

    Args:
        settings: The settings of the tune stage.
        num_named: Number of skipped records that are named in the log.
    """
    return BadRecords("tune", settings.on_bad_record, settings.max_bad_fraction, num_named)


def conversations(settings: TuneSettings, bad: BadRecords) -> Iterator[Document]:
    """Yield every conversation, after checking that it has an answer.

    Raises:
        BadRecordError: A record is not such a conversation, and `on_bad_record` is `stop`.
    """
    chat_files(settings)
    for document in read_documents(settings.sources, "", settings.messages_field, bad, "tune"):
        try:
            conversation_of(document)
        except BadRecordError as error:
            bad.refuse(error)
            continue
        yield document


def _make(context: StageContext, chat: ChatFormat, facts: TokenizerFacts) -> ChatRows:
    settings = context.run.tune
    assert settings is not None
    bad = bad_records(settings)
    documents, num_repeated = split_documents(conversations(settings, bad), 0.0, settings.heldout_fraction)
    sidecars = context.folder / WORK_FOLDER / "shards"
    sets, totals = {}, {"num_repeated_conversations": num_repeated}
    for name, split in _SPLITS.items():
        made = encode_whole(chat, documents[split], settings.max_len, f"tune: tokenize {name}", bad)
        counts = {what.removeprefix("num_"): number for what, number in vars(made).items() if what != "rows"}
        totals |= {f"num_{name}_{what}": number for what, number in counts.items()}
        rows = in_whole_rows(made.rows, settings.max_len, facts.eos_id, settings.packing)
        _require_labels(settings, name, rows, made.num_dropped_conversations)
        totals |= {f"num_{name}_rows": len(rows), f"num_{name}_labels": int(rows.mask_BL1.sum())}
        writer = ShardWriter(context.folder, sidecars, name, Codec(SEQUENCES, settings.max_len, facts.vocab_size))
        starts = range(0, len(rows), _SHARD_ROWS)
        sets[name] = writer.shard_set(
            [
                writer.write(
                    index, [Block(part) for part in split_blocks(rows.part(slice(start, start + _SHARD_ROWS)))]
                )
                for index, start in enumerate(starts)
            ]
        )
    bad.finish()
    return ChatRows(shard_sets=sets, totals=totals | {"num_bad_records": bad.num_bad})


def _require_labels(settings: TuneSettings, name: str, rows: Sequences, num_dropped: int) -> None:
    if not len(rows):
        raise InputError(
            "no conversation is left to learn from" if name == "train" else "no conversation is held out",
            where=f"tune.sources: {', '.join(settings.sources)}",
            found=f"{num_dropped} without an answer that ends within {settings.max_len} tokens"
            if num_dropped
            else "none",
            expected="at least one",
            fix="raise tune.max_len" if num_dropped else "change tune.heldout_fraction",
        )
    if not rows.mask_BL1[:, 1:].any():
        raise InputError(
            "no answer is left to learn from" if name == "train" else "no answer that counts is held out",
            where=f"tune.sources: {', '.join(settings.sources)}",
            found="only answers of weight 0",
            expected="at least one answer with another weight",
            fix="give answers another weight, or change tune.heldout_fraction",
        )


def row_facts(rows: ChatRows) -> dict[str, Any]:
    """Return the counts for the manifest, without the counts of dropped and bad records that are 0."""
    return {name: number for name, number in rows.totals.items() if number or not ("dropped" in name or "bad" in name)}
