"""The corpus stage: text, tokenizer, splits, shards of packed sequences."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from capgap.pipeline.corpus.bad_records import BadRecords
from capgap.pipeline.corpus.chat import MarkedChat
from capgap.pipeline.corpus.conversations import ChatFormat
from capgap.pipeline.corpus.extend import extend_tokenizer
from capgap.pipeline.corpus.files import folders_in_words
from capgap.pipeline.corpus.pack import Encoded, Packed, pack
from capgap.pipeline.corpus.sources import Document, read_documents
from capgap.pipeline.corpus.split import SPLITS, Split, split_documents
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.corpus.whole import encode_whole, in_whole_rows
from capgap.pipeline.models.bos import document_bos
from capgap.pipeline.models.text import TOKENIZER_FOLDER
from capgap.pipeline.models.tokenizers import load_tokenizer, tokenizer_facts
from capgap.pipeline.stage.context import StageContext, StageResult
from capgap.pipeline.stage.folder import WORK_FOLDER, plan_units
from capgap.pipeline.stage.progress import progress
from capgap.pipeline.store import Block, ShardWriter, split_blocks
from capgap.pipeline.store.codec import SEQUENCES, Codec
from capgap.schemas.errors import BadRecordError, InputError
from capgap.schemas.facts import CorpusFacts, SplitFacts, TokenizerFacts
from capgap.schemas.manifest import ShardSet
from capgap.schemas.records import Sequences
from capgap.schemas.run_corpus import CorpusSettings

_LOG = logging.getLogger("capgap")

_ENCODE_DOCUMENTS = 64


def run(context: StageContext) -> StageResult:
    """Write the tokenizer and the shards of every split.

    Raises:
        InputError: the sources cannot be read, too many records cannot be used, or a split is left without a whole
            sequence or a label; or a chat template does not mark answers.
    """
    settings = context.run.corpus
    if settings.whole_conversations:
        ChatFormat(load_tokenizer(str(settings.tokenizer)), f"corpus.tokenizer: {settings.tokenizer}")
    elif settings.messages_field is not None:
        MarkedChat(load_tokenizer(str(settings.tokenizer)), f"corpus.tokenizer: {settings.tokenizer}")
    for line in folders_in_words(settings.sources):
        _LOG.info("corpus: %s", line)
    bad = BadRecords("corpus", settings.on_bad_record, settings.max_bad_fraction)
    documents, num_repeated = split_documents(
        read_documents(settings.sources, settings.text_field, settings.messages_field, bad),
        settings.teacher_fraction,
        settings.heldout_fraction,
    )
    if not any(documents.values()):
        bad.finish()
    _require_text(settings, documents)
    tokenizer = _tokenizer(settings, documents)
    facts = tokenizer_facts(tokenizer)
    bos_ids = document_bos(tokenizer, settings.tokenizer, settings.bos)
    turn_end_ids = _turn_end_ids(settings, tokenizer)
    _say_ends(tokenizer, facts, bos_ids, turn_end_ids)
    tokenizer.save_pretrained(context.folder / TOKENIZER_FOLDER)
    packed = {split: _pack(settings, tokenizer, facts, bos_ids, split, documents[split], bad) for split in SPLITS}
    bad.finish()
    shard_sets = _write(context, facts, packed)
    splits: dict[str, SplitFacts] = {split: _split_facts(packed[split]) for split in SPLITS}
    totals: dict[str, Any] = {
        f"num_{split}_tokens": shard_sets[split].num_tokens if split in shard_sets else 0 for split in SPLITS
    }
    if settings.messages_field is not None:
        totals |= {f"num_{split}_labels": int(packed[split].sequences.mask_BL1[:, 1:].sum()) for split in SPLITS}
    totals["num_repeated_documents"] = num_repeated
    totals["num_bad_records"] = bad.num_bad
    totals["num_dropped_documents"] = sum(p.num_dropped for p in packed.values())
    if settings.whole_conversations:
        totals["num_dropped_answers"] = sum(p.num_dropped_answers for p in packed.values())
    made = CorpusFacts(
        tokenizer=facts,
        context=settings.context,
        bos_ids=bos_ids,
        turn_end_ids=turn_end_ids,
        splits=splits,
        text_sources=tuple(settings.sources),
        whole_conversations=settings.whole_conversations,
    )
    return StageResult(
        facts=made.model_dump(mode="json"),
        totals=totals,
        shard_sets=shard_sets,
    )


def _tokenizer(settings: CorpusSettings, documents: dict[Split, list[Document]]) -> PreTrainedTokenizerBase:
    seen = (document.text for split in ("teacher", "student") for document in documents[split])
    extend = settings.extend_vocabulary
    if settings.tokenizer is not None and extend is None:
        return load_tokenizer(settings.tokenizer)
    if settings.tokenizer is not None and extend is not None:
        if extend.sources is not None:
            seen = (document.text for document in read_documents(extend.sources, settings.text_field))
        return extend_tokenizer(load_tokenizer(settings.tokenizer), seen, extend.num_pieces, extend.min_frequency)
    return train_tokenizer(seen, settings.trained_vocab_size)


def _require_text(settings: CorpusSettings, documents: dict[Split, list[Document]]) -> None:
    if not any(documents.values()):
        raise InputError(
            "the corpus is empty",
            where=f"corpus.sources: {', '.join(settings.sources)}",
            found="no document with text in it",
            expected="some text",
        )


def _pack(
    settings: CorpusSettings,
    tokenizer: PreTrainedTokenizerBase,
    facts: TokenizerFacts,
    bos_ids: tuple[int, ...],
    split: Split,
    documents: list[Document],
    bad: BadRecords,
) -> Packed:
    encode = _whole if settings.whole_conversations else _joined
    packed = encode(settings, tokenizer, facts, bos_ids, split, documents, bad)
    if not len(packed.sequences) and not (split == "teacher" and settings.teacher_fraction == 0):
        raise InputError(
            f"no whole sequence for the split {split}",
            where="corpus",
            found=f"{len(documents)} documents, {packed.num_text_tokens} tokens, {packed.num_dropped} too long",
            expected=f"at least {settings.seq_len + 1} tokens",
            fix=f"give more text, lower corpus.seq_len, or give {split} a larger share",
        )
    if len(packed.sequences) and not packed.sequences.mask_BL1[:, 1:].any():
        raise InputError(
            f"no token counts as a label in the split {split}",
            where="corpus",
            found=f"{len(documents)} documents without an answer of the assistant",
            expected="at least one",
            fix="give conversations with answers",
        )
    return packed


def _joined(
    settings: CorpusSettings,
    tokenizer: PreTrainedTokenizerBase,
    facts: TokenizerFacts,
    bos_ids: tuple[int, ...],
    split: Split,
    documents: list[Document],
    bad: BadRecords,
) -> Packed:
    encoded = _encoded(settings, tokenizer, split, documents, bad)
    if settings.bos == "always":
        encoded = (_begun(one, bos_ids) for one in encoded)
    return pack(encoded, settings.seq_len, facts.eos_id, settings.long_documents, bos_ids)


def _whole(
    settings: CorpusSettings,
    tokenizer: PreTrainedTokenizerBase,
    facts: TokenizerFacts,
    bos_ids: tuple[int, ...],
    split: Split,
    documents: list[Document],
    bad: BadRecords,
) -> Packed:
    chat = ChatFormat(tokenizer, f"corpus.tokenizer: {settings.tokenizer}")
    always = settings.bos == "always"
    room = settings.seq_len - (len(bos_ids) if always else 0)
    made = encode_whole(chat, documents, room, f"corpus: tokenize {split}", bad)
    rows = [_begun(row, bos_ids) for row in made.rows] if always else made.rows
    return Packed(
        in_whole_rows(rows, settings.seq_len, facts.eos_id),
        num_documents=made.num_conversations,
        num_dropped=made.num_dropped_conversations,
        num_text_bytes=sum(len(row.document.text.encode()) for row in made.rows),
        num_text_tokens=sum(len(row.ids) for row in made.rows),
        num_cut_tokens=0,
        num_dropped_answers=made.num_dropped_answers,
    )


def _encoded(
    settings: CorpusSettings,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    documents: list[Document],
    bad: BadRecords,
) -> Iterator[Encoded]:
    chat = None
    if settings.messages_field is not None:
        chat = MarkedChat(tokenizer, f"corpus.tokenizer: {settings.tokenizer}")
    with progress(f"corpus: tokenize {split}", len(documents), "documents") as meter:
        for start in range(0, len(documents), _ENCODE_DOCUMENTS):
            part = documents[start : start + _ENCODE_DOCUMENTS]
            texts = [document.text for document in part if document.messages is None]
            encoded: Iterator[list[int]] = iter(_ids(tokenizer, texts) if texts else ())
            for document in part:
                try:
                    is_chat = chat is not None and document.messages is not None
                    one = chat.encode(document) if chat and is_chat else Encoded(document, next(encoded))
                except BadRecordError as error:
                    bad.refuse(error)
                    continue
                meter.advance(tokens=len(one.ids))
                yield one


def _begun(encoded: Encoded, bos_ids: tuple[int, ...]) -> Encoded:
    """A conversation with what begins every document, if its template has not put that there; texts get it later."""
    if encoded.mask is None or tuple(encoded.ids[: len(bos_ids)]) == bos_ids:
        return encoded
    return encoded._replace(ids=[*bos_ids, *encoded.ids], mask=[False] * len(bos_ids) + encoded.mask)


def _turn_end_ids(settings: CorpusSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """With what the chat template ends an answer, if it is one that answers can be told from."""
    if settings.messages_field is None:
        return ()
    try:
        return ChatFormat(tokenizer, f"corpus.tokenizer: {settings.tokenizer}").end_ids
    except InputError:
        return ()


def _say_ends(
    tokenizer: PreTrainedTokenizerBase, facts: TokenizerFacts, bos_ids: tuple[int, ...], turn_end_ids: tuple[int, ...]
) -> None:
    """Which ids begin and end documents and turns is decided here, for all stages."""

    def said(ids: tuple[int, ...]) -> str:
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(one)!a} ({one})" for one in ids) or "nothing"

    turns = f"; the chat template ends an answer with {said(turn_end_ids)}" if turn_end_ids else ""
    _LOG.info("corpus: a document begins with %s and ends with %s%s", said(bos_ids), said((facts.eos_id,)), turns)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterable[list[int]]:
    ids: Iterable[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False, split_special_tokens=True)[
        "input_ids"
    ]
    return ids


def _write(context: StageContext, facts: TokenizerFacts, packed: dict[Split, Packed]) -> dict[str, ShardSet]:
    settings, sidecars = context.run.corpus, context.folder / WORK_FOLDER / "shards"
    size = settings.sequences_per_shard
    starts = {split: range(0, len(packed[split].sequences), size) for split in SPLITS}
    plan_units(context.folder / WORK_FOLDER, "shards", sum(map(len, starts.values())), "shards/*.json")
    sets: dict[str, ShardSet] = {}
    for split in SPLITS:
        if not starts[split]:
            continue
        writer = ShardWriter(context.folder, sidecars, split, Codec(SEQUENCES, settings.seq_len, facts.vocab_size))
        shards = [
            writer.write(index, [Block(part) for part in split_blocks(_slice(packed[split].sequences, start, size))])
            for index, start in enumerate(starts[split])
        ]
        sets[split] = writer.shard_set(shards)
    return sets


def _slice(sequences: Sequences, start: int, size: int) -> Sequences:
    part = slice(start, start + size)
    return Sequences(sequences.tokens_BL1[part], sequences.starts_BL1[part], sequences.mask_BL1[part])


def _split_facts(packed: Packed) -> SplitFacts:
    return SplitFacts(
        num_documents=packed.num_documents,
        num_text_bytes=packed.num_text_bytes,
        num_text_tokens=packed.num_text_tokens,
    )
