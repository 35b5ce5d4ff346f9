"""Encodes documents, a batch at a time: texts by the tokenizer alone, conversations by its chat template.

A process that only encodes texts imports neither transformers nor torch: they would take more time and memory than all
the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer

from capgap.pipeline.corpus.bad_records import BadRecords
from capgap.pipeline.corpus.pack import Encoded
from capgap.pipeline.corpus.sources import Document
from capgap.pipeline.store.files import write_atomically
from capgap.schemas.errors import BadRecordError
from capgap.schemas.run_corpus import CorpusSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from capgap.pipeline.corpus.conversations import Turns


@dataclass(frozen=True)
class EncodedDocument:
    """A document in tokens.

    Attributes:
        rows: the document's tokens, usually in one row. A whole conversation has further rows for answers that need
            prompts of their own, and no row if no answer fits.
        num_dropped_answers: number of answers of a whole conversation that are left out, because they or an earlier
            answer do not end within one sequence.
    """

    rows: tuple[Encoded, ...]
    num_dropped_answers: int = 0


class Encoder:
    """Encodes the documents of a corpus.

    Args:
        settings: the settings of the corpus.
        folder: folder or id of the tokenizer.
        texts: the file that `write_text_tokenizer` wrote; None if it wrote none.
        bos_ids: ids with which every document begins.

    Raises:
        InputError: the corpus holds conversations, and answers cannot be told from the rest by the chat template.
    """

    def __init__(self, settings: CorpusSettings, folder: str, texts: Path | None, bos_ids: tuple[int, ...]) -> None:
        self._chat: _Chat | None = None
        if settings.messages_field is not None:
            self._chat = _chat(settings, folder)
        self._texts: _Texts = _SlowTexts(folder) if texts is None else _FastTexts(texts)
        self._only_chat = settings.whole_conversations
        self._begin = bos_ids if settings.bos == "always" else ()
        self._room = settings.seq_len + 1 - len(self._begin)

    def encode(self, documents: Sequence[Document], bad: BadRecords) -> Iterator[EncodedDocument | None]:
        """Yield each document in tokens, or None for a document that cannot be used.

        Raises:
            BadRecordError: a conversation cannot be used, and `bad` stops at such a record.
        """
        is_text = [not self._only_chat and document.messages is None for document in documents]
        plain = [document.text for document, one in zip(documents, is_text, strict=True) if one]
        ids = iter(self._texts.ids(plain) if plain else ())
        for document, one in zip(documents, is_text, strict=True):
            try:
                yield EncodedDocument((Encoded(document, next(ids)),)) if one else self._conversation(document)
            except BadRecordError as error:
                bad.refuse(error)
                yield None

    def _conversation(self, document: Document) -> EncodedDocument:
        assert self._chat is not None
        rows, num_dropped = self._chat.rows(document, self._room)
        return EncodedDocument(tuple(map(self._begun, rows)), num_dropped)

    def _begun(self, encoded: Encoded) -> Encoded:
        """Return a conversation with the ids that begin every document, unless its template wrote them already."""
        begin = self._begin
        if encoded.mask is None or tuple(encoded.ids[: len(begin)]) == begin:
            return encoded
        return encoded._replace(ids=[*begin, *encoded.ids], mask=[*([False] * len(begin)), *encoded.mask])


class _Chat(Protocol):
    def rows(self, document: Document, most: int) -> tuple[tuple[Encoded, ...], int]:
        """Return the rows of a conversation, and the number of answers that do not end within `most` tokens."""


def _chat(settings: CorpusSettings, folder: str) -> _Chat:
    # imported here: a corpus of texts does not need transformers
    from capgap.pipeline.corpus.chat import MarkedChat
    from capgap.pipeline.corpus.conversations import ChatFormat
    from capgap.pipeline.models.tokenizers import load_tokenizer

    tokenizer, where = load_tokenizer(folder), f"corpus.tokenizer: {settings.tokenizer}"

    class Whole:
        def __init__(self) -> None:
            self._format = ChatFormat(tokenizer, where)

        def rows(self, document: Document, most: int) -> tuple[tuple[Encoded, ...], int]:
            turns: Turns = self._format.encode(document, most)
            return turns.rows, turns.num_dropped

    class Marked:
        def __init__(self) -> None:
            self._chat = MarkedChat(tokenizer, where)

        def rows(self, document: Document, most: int) -> tuple[tuple[Encoded, ...], int]:
            return (self._chat.encode(document),), 0

    return Whole() if settings.whole_conversations else Marked()


def write_text_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> bool:
    """Write the part of a tokenizer that encodes texts without transformers.

    Return False, and write nothing, if only transformers can encode with this tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return False
    write_atomically(path, backend.to_str())
    return True


class _Texts(Protocol):
    def ids(self, texts: list[str]) -> Iterable[list[int]]:
        """Encode each text without special tokens: what looks like one is encoded as text."""


class _FastTexts:
    """A tokenizer without transformers around it, which would make four more lists for each text."""

    def __init__(self, path: Path) -> None:
        self._backend = Tokenizer.from_file(str(path))
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True

    def ids(self, texts: list[str]) -> Iterable[list[int]]:
        return [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


class _SlowTexts:
    """A tokenizer of transformers that is written in Python."""

    def __init__(self, folder: str) -> None:
        # imported here: only a tokenizer written in Python needs transformers
        from capgap.pipeline.models.tokenizers import load_tokenizer

        self._tokenizer = load_tokenizer(folder)

    def ids(self, texts: list[str]) -> Iterable[list[int]]:
        found: Iterable[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, verbose=False, split_special_tokens=True
        )["input_ids"]
        return found
