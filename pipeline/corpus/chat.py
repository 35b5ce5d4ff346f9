"""Encodes conversations by the tokenizer's own chat template; the tokens that the assistant says are the labels."""

from __future__ import annotations

import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from capgap.pipeline.corpus.pack import Encoded
from capgap.pipeline.corpus.plain_text import plain_messages, plain_value, special_texts
from capgap.pipeline.corpus.records import Conversation
from capgap.pipeline.corpus.sources import Document
from capgap.pipeline.corpus.turns import SKIP
from capgap.pipeline.models.chat_template import ChatTemplate
from capgap.schemas.errors import BadRecordError, InputError

TRIED = (
    {"role": "user", "content": "How many are 3 and 4?"},
    {"role": "assistant", "content": "They are 7."},
    {"role": "user", "content": "And 5 more?"},
    {"role": "assistant", "content": "Then they are 12."},
)
"""A conversation with which a chat template is tried before any record is read."""

_LOG = logging.getLogger("capgap")
# a template may write an empty reasoning block before the words of an answer
_NOTHING = re.compile(r"\s*(<think>\s*</think>\s*)?")


class MarkedChat:
    """A tokenizer whose chat template marks what the assistant says.

    Args:
        tokenizer: the tokenizer; its template has `{% generation %}` and `{% endgeneration %}` around each answer, as
            transformers' `apply_chat_template(..., return_assistant_tokens_mask=True)` requires.
        where: the tokenizer as the user knows it, for errors.

    Raises:
        InputError: the tokenizer has no such template, or the places of its marks in the text cannot be found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        template = tokenizer.chat_template
        if not tokenizer.is_fast:
            raise InputError(
                "conversations need a tokenizer that knows which characters a token is made of",
                where=where,
                found=type(tokenizer).__name__,
                expected="a fast tokenizer, of a tokenizer.json",
            )
        self._tokenizer, self._specials = tokenizer, special_texts(tokenizer)
        self._template = ChatTemplate(tokenizer, where) if isinstance(template, str) else None
        if self._template is None or not self._template.has_marks:
            raise InputError(
                "the chat template does not mark what the assistant says",
                where=where,
                found="no chat template" if not template else "no marks" if self._template else "several templates",
                expected="one with {% generation %} and {% endgeneration %} around each answer",
                fix="save one as chat_template.jinja beside the tokenizer",
            )
        # a template may refuse these messages, and still accept those of the corpus
        with suppress(BadRecordError):
            self._template.render_marked(TRIED, [], "a conversation to try it")

    def encode(self, document: Document) -> Encoded:
        """Encode a conversation; the assistant's tokens are its labels, and its text is what the template renders.

        Words of a message that look like a special token are encoded as text.

        Raises:
            BadRecordError: the template refuses the conversation or leaves out a message, or an answer has no words.
        """
        assert document.messages is not None and self._template is not None
        talk = plain_conversation(Conversation.from_json(document.messages), self._specials)
        warn_of_tools(self._template, talk, document.name)
        text, spans = self._template.render_marked(talk.messages, talk.tools, document.name)
        require_shown(text, talk.messages, document.name)
        require_results(self._template, talk.messages, talk.tools, document.name)
        answers = [message for message in talk.messages if message["role"] == "assistant"]
        for number, (start, end) in enumerate(spans):
            said = answers[number] if len(spans) == len(answers) else {}
            require_words(text[start:end], self._specials, said, f"{document.name}, answer {number + 1}")
        ids, learnt = marked_tokens(self._tokenizer, text, _counting(spans, answers, document.name))
        return Encoded(Document(document.name, text), ids, learnt)


def counts(answer: dict[str, Any]) -> bool:
    """Return whether an answer is learnt; an answer of weight 0 is only read."""
    return bool(answer.get("weight", 1))


def _counting(
    spans: Sequence[tuple[int, int]], answers: Sequence[dict[str, Any]], where: str
) -> Sequence[tuple[int, int]]:
    """Return the marked spans of the answers that are learnt, which leaves out answers of weight 0."""
    if all(map(counts, answers)):
        return spans
    if len(spans) != len(answers):
        raise BadRecordError(
            "the text of an answer that has weight 0 cannot be found",
            where=where,
            found=f"{len(spans)} marked places for {len(answers)} answers",
            expected="one marked place for each answer",
            fix=SKIP,
        )
    return [span for span, answer in zip(spans, answers, strict=True) if counts(answer)]


def plain_conversation(conversation: Conversation, specials: list[str]) -> Conversation:
    """Return the conversation without special tokens in any text of its messages and tools."""
    return Conversation(
        plain_messages(conversation.messages, specials), [plain_value(tool, specials) for tool in conversation.tools]
    )


def marked_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Encode a text, and return its token ids and which tokens hold a character, or a part of one, within the spans.

    Args:
        tokenizer: a fast tokenizer.
        text: the text.
        spans: start and end of each span, in characters.
    """
    made = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids = list(made["input_ids"])
    starts, ends = zip(*made["offset_mapping"], strict=True) if ids else ((), ())
    learnt = [False] * len(ids)
    for start, end in spans:
        # the tokens of one character all have its offsets, so starts and ends never fall and can be searched
        first, stop = bisect_right(ends, start), bisect_left(starts, end)
        learnt[first:stop] = [True] * (stop - first)
    return ids, learnt


def says_nothing(words: str) -> bool:
    """Return whether an answer holds no words; an empty reasoning block counts as none."""
    return _NOTHING.fullmatch(words) is not None


def require_words(words: str, specials: list[str], message: dict[str, Any], where: str) -> None:
    """Raise BadRecordError if an answer has no words, because the model would then learn its end token alone.

    Args:
        words: the text that the template writes for the answer.
        specials: the texts of the tokenizer's special tokens.
        message: the message of the answer; empty if it is not known.
        where: place of the answer, for errors.
    """
    content = message.get("content")
    # a special token of one character counts as a word if the message itself holds it
    if isinstance(content, str) and not says_nothing(content) and content.strip() in words:
        return
    for special in specials:
        words = words.replace(special, "")
    if says_nothing(words):
        found = "tool calls that the chat template does not write" if message.get("tool_calls") else "none"
        raise BadRecordError("the answer leaves no text", where=where, found=found, expected="some words", fix=SKIP)


def require_shown(text: str, messages: Sequence[dict[str, Any]], where: str) -> None:
    """Raise BadRecordError if the template leaves out a system or developer message, as many do with unknown roles."""
    for number, message in enumerate(messages, start=1):
        content = message.get("content")
        if message["role"] in ("system", "developer") and isinstance(content, str) and content.strip() not in text:
            raise _left_out(message, f"{where}, message {number}")


def require_results(
    template: ChatTemplate, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]], where: str
) -> None:
    """Raise BadRecordError if the template leaves out the result of a tool, on which the next answer depends.

    A template may reformat or shorten a result, and the words of a short result may occur elsewhere. So the template is
    tried with a unique word in the place of each result.
    """
    words = {
        number: f"result{number}shown"
        for number, message in enumerate(messages)
        if message["role"] in ("tool", "function") and str(message.get("content") or "").strip()
    }
    if not words:
        return
    tried = [
        {**message, "content": words[number]} if number in words else message for number, message in enumerate(messages)
    ]
    text = template.render(tried, tools, where).lower()
    for number, word in words.items():
        if word not in text:
            raise _left_out(messages[number], f"{where}, message {number + 1}")


def _left_out(message: dict[str, Any], where: str) -> BadRecordError:
    return BadRecordError(
        f"the chat template leaves out the message of the role {message['role']}",
        where=where,
        found=ascii(message["content"].strip())[:60],
        expected="a role that it writes",
        fix=SKIP,
    )


def warn_of_tools(template: ChatTemplate, conversation: Conversation, name: str) -> None:
    """Log once that the template ignores the tools which a conversation defines."""
    if conversation.tools and not template.knows_tools and not template.has_warned:
        template.has_warned = True
        _LOG.warning("%s and others define tools, which the chat template does not write", name)
