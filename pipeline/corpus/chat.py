"""Conversations into tokens, by the tokenizer's own chat template; what the assistant says counts as labels."""

from __future__ import annotations

import json
import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from capgap.pipeline.corpus.pack import Encoded
from capgap.pipeline.corpus.plain_text import plain_messages, special_texts
from capgap.pipeline.corpus.sources import Document
from capgap.schemas.errors import InputError

# what transformers looks for, too
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def require_marks(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise InputError unless the tokenizer's chat template marks what the assistant says.

    Args:
        tokenizer: its template stands between `{% generation %}` and `{% endgeneration %}` where an answer begins and
            ends, as transformers' `apply_chat_template(..., return_assistant_tokens_mask=True)` wants it.
        where: the tokenizer as the user knows it.
    """
    template = tokenizer.chat_template
    if not tokenizer.is_fast:
        raise InputError(
            "conversations need a tokenizer that knows which characters a token is made of",
            where=where,
            found=type(tokenizer).__name__,
            expected="a fast tokenizer, of a tokenizer.json",
        )
    if not has_marks(tokenizer):
        raise InputError(
            "the chat template does not say what the assistant says",
            where=where,
            found="no chat template" if not template else "several" if not isinstance(template, str) else "no marks",
            expected="one with {% generation %} and {% endgeneration %} around each answer",
            fix="save one as chat_template.jinja beside the tokenizer",
        )


def has_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template marks what the assistant says."""
    template = tokenizer.chat_template
    return isinstance(template, str) and _GENERATION.search(template) is not None


def encode_chat(tokenizer: PreTrainedTokenizerBase, document: Document) -> Encoded:
    """Tokens of a conversation, which of them the assistant says, and its text as the template renders it.

    What would be a special token in a message is none: see `plain_text`.

    Raises:
        InputError: the template refuses the conversation.
    """
    assert document.messages is not None
    messages: list[dict[str, Any]] = plain_messages(json.loads(document.messages), special_texts(tokenizer))
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            "the chat template refuses the conversation",
            where=f"corpus.sources: {document.name}",
            found=str(error).strip() or type(error).__name__,
            expected="roles and contents as the tokenizer's template takes them",
        ) from None
    return Encoded(Document(document.name, text), list(made["input_ids"]), [bool(m) for m in made["assistant_masks"]])
