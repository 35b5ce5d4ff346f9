"""Documents into tokens, a batch at a time: texts by the tokenizer alone, conversations by its chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from capgap.pipeline.corpus.bad_records import BadRecords
from capgap.pipeline.corpus.chat import MarkedChat
from capgap.pipeline.corpus.conversations import ChatFormat
from capgap.pipeline.corpus.pack import Encoded
from capgap.pipeline.corpus.sources import Document
from capgap.schemas.errors import BadRecordError
from capgap.schemas.run_corpus import CorpusSettings


@dataclass(frozen=True)
class EncodedDocument:
    """What became of a document.

    Attributes:
        rows: its tokens; of a whole conversation one for each answer that needs a prompt of its own, or none.
        num_dropped_answers: of a whole conversation, those that do not end within a sequence.
    """

    rows: tuple[Encoded, ...]
    num_dropped_answers: int = 0


class Encoder:
    """Turns the documents of a corpus into tokens.

    Args:
        settings: of the corpus.
        tokenizer: its own.
        bos_ids: what every document begins with.

    Raises:
        InputError: the chat template does not mark answers.
    """

    def __init__(self, settings: CorpusSettings, tokenizer: PreTrainedTokenizerBase, bos_ids: tuple[int, ...]) -> None:
        where = f"corpus.tokenizer: {settings.tokenizer}"
        self._whole = ChatFormat(tokenizer, where) if settings.whole_conversations else None
        is_marked = settings.messages_field is not None and self._whole is None
        self._marked = MarkedChat(tokenizer, where) if is_marked else None
        self._texts = TextEncoder(tokenizer)
        self._begin = bos_ids if settings.bos == "always" else ()
        self._room = settings.seq_len + 1 - len(self._begin)

    def encode(self, documents: Sequence[Document], bad: BadRecords) -> Iterator[EncodedDocument | None]:
        """For each document what became of it, or None where it cannot be used.

        Raises:
            BadRecordError: a conversation cannot be used, and stops the corpus.
        """
        is_text = [self._whole is None and document.messages is None for document in documents]
        texts = iter(self._texts.ids([one.text for one, plain in zip(documents, is_text, strict=True) if plain]))
        for document, plain in zip(documents, is_text, strict=True):
            try:
                yield EncodedDocument((Encoded(document, next(texts)),)) if plain else self._conversation(document)
            except BadRecordError as error:
                bad.refuse(error)
                yield None

    def _conversation(self, document: Document) -> EncodedDocument:
        if self._whole is not None:
            turns = self._whole.encode(document, self._room)
            return EncodedDocument(tuple(map(self._begun, turns.rows)), turns.num_dropped)
        assert self._marked is not None
        return EncodedDocument((self._begun(self._marked.encode(document)),))

    def _begun(self, encoded: Encoded) -> Encoded:
        """A conversation with what begins every document, if its template has not put that there."""
        begin = self._begin
        if encoded.mask is None or tuple(encoded.ids[: len(begin)]) == begin:
            return encoded
        return encoded._replace(ids=[*begin, *encoded.ids], mask=[*([False] * len(begin)), *encoded.mask])


class TextEncoder:
    """The ids of plain text, in which nothing is a special token.

    A fast tokenizer is asked directly: transformers would make lists of four more things for each text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = Tokenizer.from_str(backend.to_str()) if isinstance(backend, Tokenizer) else None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True

    def ids(self, texts: list[str]) -> Iterable[list[int]]:
        """Of each text."""
        if not texts:
            return []
        if self._backend is not None:
            return [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        found: Iterable[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, verbose=False, split_special_tokens=True
        )["input_ids"]
        return found
