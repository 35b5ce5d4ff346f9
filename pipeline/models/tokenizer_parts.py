"""The parts of a tokenizer that decide which ids a text gets, and the first difference between two tokenizers.

    vocabulary, merges and the model's other settings     which ids a word is made of
    normaliser, pre-tokenizer                             how a text is split into words
    added tokens that are not special                     which pieces are never split
    post-processor                                        the ids that it puts before and after a text

Other parts decide no id of a text: the choice of special tokens for ends of documents or padding, the decoder, or a
post-processor that only moves offsets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

Difference = tuple[str, str, str]
"""The name of the entry that differs, its value in the expected tokenizer, and its value in the other one."""

_PROBE = "a"


@dataclass(frozen=True)
class TokenizerParts:
    """The parts of a tokenizer that decide the ids of a text.

    Attributes:
        vocab: the id of every token.
        merges: merges of a BPE model in order; empty for other models.
        settings: the model's other settings, normaliser, pre-tokenizer, added tokens, and the ids around a text.
    """

    vocab: dict[str, int]
    merges: list[list[str]]
    settings: dict[str, Any]

    def text(self) -> str:
        """Return a text of all parts for a digest; equal parts give equal texts."""
        return json.dumps([self.vocab, self.merges, self.settings], sort_keys=True, ensure_ascii=True)

    def lacking(self, tokens: set[str]) -> TokenizerParts:
        """Return the same parts without the given tokens."""
        vocab = {token: number for token, number in self.vocab.items() if token not in tokens}
        return TokenizerParts(vocab, self.merges, self.settings)

    def within(self, larger: TokenizerParts) -> TokenizerParts:
        """Return the entries of `larger` that this vocabulary has too, and as many of its first merges as here."""
        vocab = {token: number for token, number in larger.vocab.items() if token in self.vocab}
        return TokenizerParts(vocab, larger.merges[: len(self.merges)], larger.settings)


def parts_of(tokenizer: PreTrainedTokenizerBase) -> TokenizerParts:
    """Return the parts of a loaded tokenizer that decide ids."""
    settings: dict[str, Any] = {"post-processor": ids_around(tokenizer)}
    merges: list[list[str]] = []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        content = json.loads(backend.to_str())
        model = content["model"]
        merges = [one.split(" ") if isinstance(one, str) else one for one in model.pop("merges", None) or ()]
        scores = model.pop("vocab", None)
        if isinstance(scores, list):
            model["scores"] = scores
        settings |= {f"model.{name}": value for name, value in model.items()}
        settings |= {"normaliser": content["normalizer"], "pre-tokenizer": content["pre_tokenizer"]}
        settings |= {
            f"added token {one['content']!r}": {name: one[name] for name in ("lstrip", "rstrip", "single_word")}
            for one in content["added_tokens"]
            if not one["special"]
        }
    else:
        settings["class"] = type(tokenizer).__name__
    return TokenizerParts(dict(tokenizer.get_vocab()), merges, settings)


def ids_around(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids that the post-processor puts before a text, and those that it puts after the text."""
    bare = list(tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer(_PROBE, add_special_tokens=True, verbose=False)["input_ids"])
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return [whole[:place], whole[place + len(bare) :]]
    return [whole, []]


def first_difference(expected: TokenizerParts, found: TokenizerParts) -> Difference | None:
    """Return the first entry that differs, first by ids, then by merges, then by the settings' names; None if equal."""
    if expected.vocab != found.vocab:
        # in the order of the expected ids, which is the order of the file
        either = found.vocab | expected.vocab
        for token in sorted(either, key=either.__getitem__):
            here, there = expected.vocab.get(token), found.vocab.get(token)
            if here != there:
                return f"id of {token!r}", _said(here), _said(there)
    for number, (own, other) in enumerate(zip_longest(expected.merges, found.merges)):
        if own != other:
            return f"merge {number}", _said(own), _said(other)
    for name in sorted(expected.settings.keys() | found.settings.keys()):
        one, two = expected.settings.get(name), found.settings.get(name)
        if one != two:
            return name, _said(one), _said(two)
    return None


def _said(value: object) -> str:
    if value is None:
        return "none"
    text = ascii(value) if isinstance(value, str) else ascii(value).replace('"', "'")
    return text if len(text) <= 120 else f"{text[:117]}..."
