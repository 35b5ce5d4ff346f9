"""What people write stays text: nothing in a message becomes a special token of the tokenizer but single characters."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer takes for special tokens wherever they stand, longest first; blank ones are none."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    known = {text for text in (*added, *tokenizer.all_special_tokens) if text.strip()}
    return sorted(known, key=lambda text: (-len(text), text))


def plain(text: str, specials: list[str]) -> str:
    """The text with a space behind the first character of everything that would be a special token.

    `<|user|>` becomes `< |user|>`. One of a single character cannot be set apart: it stays, and has the id that the
    tokenizer gives it, as where the model is served. Nothing is taken out of a text.
    """
    parted = {special: apart(special) for special in specials}
    while found := [special for special in specials if parted[special] != special and special in text]:
        for special in found:
            text = text.replace(special, parted[special])
    return text


def apart(special: str) -> str:
    """What stands in the place of a special token's text; the text itself where it has but one character."""
    if len(special.strip()) < 2:
        return special
    # behind a blank that it begins with, a space would leave it whole
    first = len(special) - len(special.lstrip()) + 1
    return f"{special[:first]} {special[first:]}"


def plain_messages(messages: list[dict[str, Any]], specials: list[str]) -> list[dict[str, Any]]:
    """The messages, every text in them plain but the roles, which templates compare."""
    return [
        {name: value if name == "role" else plain_value(value, specials) for name, value in message.items()}
        for message in messages
    ]


def plain_value(value: Any, specials: list[str]) -> Any:
    """The value with every text in it plain; names of fields stay."""
    if isinstance(value, str):
        return plain(value, specials)
    if isinstance(value, list):
        return [plain_value(one, specials) for one in value]
    if isinstance(value, dict):
        return {name: plain_value(one, specials) for name, one in value.items()}
    return value
