"""Extends an existing BPE tokenizer with new pieces: the training of its merges is continued on new text.

text --tokenizer's words--> counts --old merges--> pieces --further merges--> new pieces, whose ids follow the old ones

A merge that comes after all old ones does not change how text is cut into old pieces: it joins two of them where they
stand side by side. So every new piece can be reached, old ids keep their meaning, and each new piece can be spelled in
old ones (Purason et al., arXiv 2512.03989). A tokenizer without bytes for every character also gets the characters that
its vocabulary lacks: the most frequent ones, up to 0.9995 of the text, which is SentencePiece's coverage.
"""

from __future__ import annotations

import heapq
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.schemas.errors import InputError

_COVERAGE = 0.9995
_WORD_MARK = "\u2581"  # stands for a blank in SentencePiece, at the beginning of a piece
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_TOKENIZER_FILE = "tokenizer.json"

Pair = tuple[str, str]


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], num_pieces: int, min_frequency: int
) -> PreTrainedTokenizerBase:
    """Return the tokenizer with at most `num_pieces` new entries behind its own, which keep their ids.

    The result depends on nothing but the arguments.

    Args:
        tokenizer: a BPE tokenizer with a `tokenizer.json`.
        texts: the text from which new pieces are learnt.
        num_pieces: the largest number of new entries.
        min_frequency: how often two pieces must stand side by side at least, to be merged into a new one.

    Raises:
        InputError: it is no BPE tokenizer, or transformers reads the extended tokenizer with other ids.
    """
    backend = _bpe_of(tokenizer)
    words = _words(backend, texts)
    content: dict[str, Any] = json.loads(backend.to_str())
    vocab: dict[str, int] = content["model"]["vocab"]
    # added tokens are put into the model's own vocabulary at their ids: otherwise they would get new ids behind it
    for added in content["added_tokens"]:
        vocab.setdefault(added["content"], added["id"])
    before = dict(tokenizer.get_vocab())
    first = max(before.values()) + 1
    characters = _missing_characters(vocab, words, num_pieces, min_frequency)
    for number, character in enumerate(characters):
        vocab[character] = first + number
    merges = _further_merges(content, words, num_pieces - len(characters), min_frequency)
    first += len(characters)
    for left, right in merges:
        if left + right not in vocab:
            vocab[left + right] = first
            first += 1
    old_merges = content["model"]["merges"]
    as_text = bool(old_merges) and isinstance(old_merges[0], str)
    content["model"]["merges"] = [*old_merges, *(" ".join(pair) if as_text else list(pair) for pair in merges)]
    extended = _read_again(tokenizer, content)
    if extended.get_vocab() != before | {piece: vocab[piece] for piece in vocab.keys() - before.keys()}:
        raise _refusal(tokenizer, "one whose entries transformers numbers in another way")
    return extended


def _bpe_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise _refusal(tokenizer, f"a {type(tokenizer).__name__} without tokenizer.json")
    model = json.loads(backend.to_str())["model"]
    if model["type"] != "BPE":
        raise _refusal(tokenizer, f"a model of type {model['type']}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refusal(tokenizer, "pieces with a mark inside or at the end of a word")
    return backend


def _words(backend: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """Count the words into which the tokenizer cuts text before it applies merges; no piece crosses their borders."""
    words: Counter[str] = Counter()
    for text in texts:
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        parts = [normal]
        if backend.pre_tokenizer is not None:
            parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]
        for part in parts:
            words.update(re.split(f"(?<!{_WORD_MARK})(?={_WORD_MARK})", part) if _WORD_MARK in part else [part])
    del words[""]
    return words


def _missing_characters(vocab: dict[str, int], words: Counter[str], most: int, min_frequency: int) -> list[str]:
    """Return the characters that the vocabulary lacks, the most frequent first."""
    counts: Counter[str] = Counter()
    for word, number in words.items():
        for character in word:
            counts[character] += number
    missing: list[str] = []
    total, seen = sum(counts.values()), 0
    for character, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if seen > _COVERAGE * total or len(missing) == most or number < min_frequency:
            break
        seen += number
        if character not in vocab:
            missing.append(character)
    return missing


def _further_merges(content: dict[str, Any], words: Counter[str], most: int, min_frequency: int) -> list[Pair]:
    """Return the new merges in the order in which they are learnt, until they make `most` new pieces."""
    known = set(content["model"]["vocab"])
    never = {added["content"] for added in content["added_tokens"]} | {content["model"].get("unk_token")}
    learning = _Learning(_spelt(content, words), never)
    merges: list[Pair] = []
    while most > 0:
        best = learning.best()
        if best is None or best[1] < min_frequency:
            break
        pair = best[0]
        if pair[0] + pair[1] not in known:
            known.add(pair[0] + pair[1])
            most -= 1
        merges.append(pair)
        learning.merge(pair)
    return merges


def _spelt(content: dict[str, Any], words: Counter[str]) -> Iterator[tuple[list[str], int]]:
    """Yield each word as a list of existing pieces, and how often it occurs."""
    model = Tokenizer.from_str(json.dumps(content)).model
    for word in sorted(words):
        yield [token.value for token in model.tokenize(word)], words[word]


class _Learning:
    """The state of BPE training: all words in pieces, and how often each pair of pieces stands side by side."""

    def __init__(self, spelt: Iterable[tuple[list[str], int]], never: set[str | None]) -> None:
        self._words: list[tuple[list[str], int]] = []
        self._never = never
        self._counts: Counter[Pair] = Counter()
        self._places: defaultdict[Pair, set[int]] = defaultdict(set)
        for number, (pieces, count) in enumerate(spelt):
            self._words.append((pieces, count))
            for pair in pairwise(pieces):
                self._counts[pair] += count
                self._places[pair].add(number)
        self._queue = [(-count, pair) for pair, count in self._counts.items()]
        heapq.heapify(self._queue)

    def best(self) -> tuple[Pair, int] | None:
        """Return the most frequent pair that can be merged, and its count; among equals, the first in sorted order."""
        while self._queue:
            negative, pair = heapq.heappop(self._queue)
            # a count in the queue may be out of date; the current count of the pair was pushed later
            if self._counts[pair] == -negative > 0 and self._can_be_one(pair):
                return pair, -negative
        return None

    def merge(self, pair: Pair) -> None:
        """Merge the pair into one piece wherever it occurs."""
        changed: set[Pair] = set()
        for number in self._places.pop(pair, ()):
            pieces, count = self._words[number]
            before, after = list(pairwise(pieces)), _joined(pieces, pair)
            self._words[number] = (after, count)
            for one in before:
                self._counts[one] -= count
                changed.add(one)
            for one in pairwise(after):
                self._counts[one] += count
                self._places[one].add(number)
                changed.add(one)
        for one in changed:
            if self._counts[one] > 0:
                heapq.heappush(self._queue, (-self._counts[one], one))

    def _can_be_one(self, pair: Pair) -> bool:
        return not any(piece in self._never or _BYTE.fullmatch(piece) for piece in (*pair, "".join(pair)))


def _joined(pieces: list[str], pair: Pair) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _read_again(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer with another `tokenizer.json`; its settings, special tokens and chat template stay."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        (Path(name) / _TOKENIZER_FILE).write_text(json.dumps(content, ensure_ascii=False))
        return load_tokenizer(name)


def _refusal(tokenizer: PreTrainedTokenizerBase, found: str) -> InputError:
    return InputError(
        "this tokenizer cannot be extended",
        where=f"corpus.tokenizer: {tokenizer.name_or_path}",
        found=found,
        expected="a BPE tokenizer with a tokenizer.json, byte-level or like Llama's",
        fix="leave corpus.extend_vocabulary out",
    )
