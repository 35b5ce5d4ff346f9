"""Finds the bytes of text that each token of a tokenizer stands for, from the tokenizer's decoder.

    added tokens that are special    no bytes; the facts of the corpus say which of them begin and end documents
    other added tokens               their own text
    a byte-level decoder             each character of a token is one byte
    Replace, ByteFallback, Fuse      the steps of a SentencePiece decoder: texts are replaced, `<0x0A>` is one byte
    Metaspace                        its mark is a blank

Other decoders, such as WordPiece's, do not restore the text: their tokenizers are refused. A tokenizer that changes a
text is refused too, because each encoded text is compared with the bytes of its tokens.

Legend: V ids, T tokens, S bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from capgap.pipeline.models.tokenizer_files import PROBES
from capgap.schemas.errors import InputError

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

NO_TEXT = -1
"""The length of an id that stands for no text: a special token, or an id without a token."""

_PASSING_STEPS = {"Fuse", "Strip"}
# how the tokenizers library writes a single byte; read as a byte only if the decoder has the step ByteFallback
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of every token of a vocabulary.

    Attributes:
        data_S: the bytes of all ids, one after the other [S], uint8.
        offset_V: place in `data_S` of the first byte of each id [V], int64.
        length_V: number of bytes of each id [V], int64; `NO_TEXT` for an id that stands for no text.
        tokens: the token of each id as the tokenizer writes it, for messages.
    """

    data_S: Bytes
    offset_V: Ints
    length_V: Ints
    tokens: dict[int, str]

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of one id, which are none if it stands for no text."""
        start = int(self.offset_V[token])
        return self.data_S[start : start + max(0, int(self.length_V[token]))].tobytes()

    def join(self, ids_T: npt.NDArray[Any], skip_T: Ints | None = None) -> Bytes:
        """Return the bytes of many ids [S], one after the other, each without its first `skip_T` bytes."""
        offset_T, length_T = self.offset_V[ids_T], np.maximum(self.length_V[ids_T], 0)
        if skip_T is not None:
            offset_T, length_T = offset_T + skip_T, length_T - skip_T
        ends_T = np.cumsum(length_T)
        place_S = np.repeat(offset_T - (ends_T - length_T), length_T)
        place_S += np.arange(len(place_S))
        joined: Bytes = self.data_S[place_S]
        return joined

    @cached_property
    def order(self) -> TokenOrder:
        """The tokens in the order of their bytes, by which the tokens that begin with another token are found."""
        texts = [self.bytes_of(token) for token in range(len(self.length_V))]
        ids_V = sorted(range(len(texts)), key=texts.__getitem__)
        sorted_texts = [texts[token] for token in ids_V]
        # 32 bits instead of 64, because millions of ranks are looked up
        rank_V, stop_V = np.empty(len(texts), np.int32), np.empty(len(texts), np.int32)
        rank_V[ids_V] = np.arange(len(texts))
        # the tokens that begin with a token follow it in this order, up to the first that does not
        open_ones: list[int] = []
        for place, text in enumerate(sorted_texts):
            while open_ones and not text.startswith(sorted_texts[open_ones[-1]]):
                stop_V[ids_V[open_ones.pop()]] = place
            open_ones.append(place)
        for place in open_ones:
            stop_V[ids_V[place]] = len(texts)
        return TokenOrder(rank_V, stop_V)

    @cached_property
    def texts(self) -> frozenset[bytes]:
        """The set of the bytes of all ids that stand for text."""
        return frozenset(self.bytes_of(int(token)) for token in np.flatnonzero(self.length_V >= 0))


@dataclass(frozen=True)
class TokenOrder:
    """Tokens in the order of their bytes: the tokens that begin with a given token stand from its rank up to its stop.

    Attributes:
        rank_V: place of each id in this order [V], int32.
        stop_V: the place behind the last id that begins with the bytes of each id [V], int32.
    """

    rank_V: npt.NDArray[np.int32]
    stop_V: npt.NDArray[np.int32]


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer together with the bytes of its tokens.

    Attributes:
        backend: encodes text; it reads nothing in a text as a special token.
        table: the bytes of the tokens.
        puts_blank: whether the tokenizer puts a blank before a text.
        where: the tokenizer as the user knows it, for errors.
    """

    backend: Tokenizer
    table: TokenBytes
    puts_blank: bool
    where: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> TextTokenizer:
        """Find the bytes of the tokens of a loaded tokenizer, and check them on a few texts.

        Args:
            tokenizer: a loaded tokenizer.
            vocab_size: number of ids.
            where: the tokenizer as the user knows it, for errors.

        Raises:
            InputError: the tokenizer is not reversible: its tokens do not spell the text.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise _refusal(where, f"a tokenizer in Python, {type(tokenizer).__name__}", "one with a tokenizer.json")
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        table = _table(json.loads(backend.to_str()), backend, vocab_size, where)
        first = table.join(np.array(backend.encode("a", add_special_tokens=False).ids, np.int64)).tobytes()
        found = cls(backend, table, first == b" a", where)
        for text in PROBES:
            found.require_bytes(found.encode([text])[0], text)
        return found

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode each text into its token ids, without special tokens."""
        return [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def require_bytes(self, ids: list[int], text: str) -> None:
        """Raise InputError unless the ids spell the text; a blank that the tokenizer puts before it is allowed."""
        spelt = self.table.join(np.array(ids, np.int64)).tobytes()
        if spelt == text.encode() or (self.puts_blank and spelt == b" " + text.encode()):
            return
        raise _refusal(self.where, ascii(spelt.decode(errors="replace")[:60]), ascii(text[:60]))


def _refusal(where: str, found: str, expected: str) -> InputError:
    return InputError(
        "the tokenizer is not reversible: its tokens do not spell the text",
        where=where,
        found=found,
        expected=expected,
        fix="use a tokenizer that is byte-level or has byte fallback, and whose normaliser changes nothing",
    )


def _table(description: dict[str, Any], backend: Tokenizer, vocab_size: int, where: str) -> TokenBytes:
    spell = _spelling(description, where)
    added = {int(one["id"]): one for one in description["added_tokens"]}
    tokens = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    unknown = (description["model"] or {}).get("unk_token")
    parts: list[bytes] = []
    length_V = np.full(vocab_size, NO_TEXT, np.int64)
    for number in range(vocab_size):
        token = tokens.get(number)
        one = added.get(number)
        # special tokens and the token for unknown text spell no text
        if token is None or (one is not None and one["special"]) or token == unknown:
            parts.append(b"")
            continue
        text = spell(token) if one is None else spell(token) if _is_spelt(description) else token.encode()
        parts.append(text)
        length_V[number] = len(text)
    sizes_V = np.array([len(part) for part in parts], np.int64)
    return TokenBytes(np.frombuffer(b"".join(parts), np.uint8), np.cumsum(sizes_V) - sizes_V, length_V, tokens)


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for one in part["decoders"]:
            yield from _steps(one)
    else:
        yield part


def _is_spelt(description: dict[str, Any]) -> bool:
    """Return whether added tokens are decoded like other tokens, as they are by all but byte-level decoders."""
    return not any(step["type"] == "ByteLevel" for step in _steps(description["decoder"]))


def _spelling(description: dict[str, Any], where: str) -> Callable[[str], bytes]:
    """Return a function that turns a token into its bytes, as the decoder of the tokenizer does."""
    steps = list(_steps(description["decoder"]))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        if kinds - _PASSING_STEPS != {"ByteLevel"}:
            raise _refusal(where, f"a decoder of {', '.join(sorted(kinds))}", "ByteLevel alone")
        byte_of = _byte_alphabet()
        # a character outside the alphabet stands for its own UTF-8 bytes
        return lambda token: b"".join(byte_of.get(one) or one.encode() for one in token)
    known = {"Replace", "ByteFallback", "Metaspace"} | _PASSING_STEPS
    if kinds - known or not kinds & {"Replace", "Metaspace"}:
        found = f"a decoder of {', '.join(sorted(kinds))}" if kinds else "no decoder"
        raise _refusal(where, found, "ByteLevel, Metaspace, or Replace and ByteFallback")
    replaced = [_replacement(step, where) for step in steps if step["type"] in ("Replace", "Metaspace")]
    has_bytes = "ByteFallback" in kinds and bool(description["model"].get("byte_fallback"))

    def spell(token: str) -> bytes:
        piece = _BYTE_PIECE.fullmatch(token) if has_bytes else None
        if piece is not None:
            return bytes([int(piece[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return spell


def _replacement(step: dict[str, Any], where: str) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    pattern = step["pattern"].get("String")
    if pattern is None:
        raise _refusal(where, f"a decoder that replaces {step['pattern']}", "one that replaces a text")
    return pattern, step["content"]


def _byte_alphabet() -> dict[str, bytes]:
    """Return the byte of each character of the byte-level alphabet, in which printable bytes stand for themselves.

    The assertion compares the characters with the library's; their order is checked by encoding the probe texts.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    found = {chr(byte): bytes([byte]) for byte in own}
    found |= {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}
    assert found.keys() == set(ByteLevel.alphabet())
    return found
