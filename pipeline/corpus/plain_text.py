"""Keeps what people write as text: only special tokens of one character can arise from the words of a message."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that the tokenizer reads as special tokens wherever they stand, longest first; none is blank."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    known = {text for text in (*added, *tokenizer.all_special_tokens) if text.strip()}
    return sorted(known, key=lambda text: (-len(text), text))


def plain(text: str, specials: list[str]) -> str:
    """Return the text with a space behind the first character of everything that would be a special token.

    `<|user|>` becomes `< |user|>`. A special token of a single character cannot be split: it stays, and has the id that
    the tokenizer gives it, as it has where the model is served. Nothing is removed from the text.
    """
    parted = {special: apart(special) for special in specials}
    while found := [special for special in specials if parted[special] != special and special in text]:
        for special in found:
            text = text.replace(special, parted[special])
    return text


def apart(special: str) -> str:
    """Return a special token's text with a space behind its first character; unchanged if it has only one character."""
    if len(special.strip()) < 2:
        return special
    # count from the first character that is not blank: a space behind a leading blank would not split the token
    first = len(special) - len(special.lstrip()) + 1
    return f"{special[:first]} {special[first:]}"


def plain_messages(messages: list[dict[str, Any]], specials: list[str]) -> list[dict[str, Any]]:
    """Return the messages without special tokens in any text; roles stay unchanged, because templates compare them."""
    return [
        {name: value if name == "role" else plain_value(value, specials) for name, value in message.items()}
        for message in messages
    ]


def plain_value(value: Any, specials: list[str]) -> Any:
    """Return the value without special tokens in any text within it; the names of fields stay."""
    if isinstance(value, str):
        return plain(value, specials)
    if isinstance(value, list):
        return [plain_value(one, specials) for one in value]
    if isinstance(value, dict):
        return {name: plain_value(one, specials) for name, one in value.items()}
    return value
