"""Conversations as a tokenizer's chat template writes them, which is what transformers' `apply_chat_template` gives.

The template is a stranger's program. It runs as transformers runs it, in Jinja's sandbox with the same filters and
extensions, and besides within a bound on its work: see `bounded_jinja`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import pass_eval_context
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from capgap.pipeline.models.bounded_jinja import BoundedEnvironment, OverspentError, size_of
from capgap.schemas.errors import BadRecordError, InputError

NUM_STEPS = 10_000_000
"""Work that one rendering may do, in the units of `bounded_jinja`: turns of loops, calls, and characters made."""

NUM_STEPS_PER_CHARACTER = 100
"""What it may do besides for each character of the conversation."""

_EMPTY = ""
# what transformers looks for, too
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def default_template(tokenizer: PreTrainedTokenizerBase, where: str) -> ChatTemplate:
    """The chat template with which a tokenizer writes conversations without tools: of several that named `default`.

    Raises:
        InputError: none is, or as `ChatTemplate`.
    """
    known = tokenizer.chat_template
    if isinstance(known, dict) and "default" not in known:
        raise InputError(
            "none of the chat templates is the default",
            where=where,
            found=", ".join(map(ascii, sorted(known))),
            expected="one that is named default",
            fix="save the one that is meant as chat_template.jinja beside the tokenizer",
        )
    return ChatTemplate(tokenizer, where, known["default"] if isinstance(known, dict) else None)


class ChatTemplate:
    """The one chat template of a tokenizer, ready to write conversations.

    Args:
        tokenizer: which has one.
        where: the template as the user knows it, for errors.
        source: the template, where the tokenizer has several.

    Attributes:
        has_marks: whether it marks what the assistant says, with `{% generation %}`.
        knows_tools: whether it speaks of tools at all.
        has_warned: for whoever uses it, whether that was said.

    Raises:
        InputError: it is no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str, source: str | None = None) -> None:
        self._where, self._special = where, dict(tokenizer.special_tokens_map)
        source = source or tokenizer.chat_template
        if not isinstance(source, str):
            found = f"several: {', '.join(map(ascii, sorted(source)))}" if source else "no chat template"
            fix = "keep one, as chat_template.jinja beside the tokenizer" if source else None
            raise InputError("there is no one chat template", where=where, found=found, expected="one", fix=fix)
        self.has_marks = _GENERATION.search(source) is not None
        self.knows_tools, self.has_warned = "tools" in source, False
        # theirs is asked with an empty template: compiling works out what is constant
        self._environment = BoundedEnvironment.like(_compile_jinja_template(_EMPTY).environment)
        # transformers' extension for `{% generation %}` adds it
        self._tracked: Any = vars(self._environment)["activate_tracker"]
        self._marked = _marked_texts(self._environment)
        try:
            with self._environment.budget(NUM_STEPS):
                self._template = self._environment.from_string(source)
        except Exception as error:
            raise self._refusal("the chat template cannot be read", error, "a Jinja template") from None

    def render(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]], name: str, asks: bool = False
    ) -> str:
        """The text of a conversation.

        Args:
            messages: of the conversation.
            tools: which the assistant may call; empty where there are none.
            name: the conversation as the user knows it, for errors.
            asks: whether the prompt for an answer stands at the end.

        Raises:
            BadRecordError: the template refuses the conversation.
            InputError: it does not end within its bound.
        """
        return self._render(messages, tools, name, asks)[0]

    def render_marked(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]], name: str, asks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """As `render`, and where in the text the assistant speaks, as the template marks it.

        Raises:
            BadRecordError, InputError: as `render`.
            InputError: what is marked does not stand where transformers has it.
        """
        text, spans = self._render(messages, tools, name, asks)
        for (start, end), marked in zip(spans, self._marked, strict=True):
            if text[start:end] != marked:
                raise InputError(
                    "the chat template marks answers within a macro, a filter, a {% set %} block or the like",
                    where=self._where,
                    found=f"{text[start:end][:60]!a} where {marked[:60]!a} should stand, in {name}",
                    expected="{% generation %} where what is written goes straight into the text",
                    fix="move the marks out, or use another template",
                )
        return text, spans

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]], name: str, asks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the marked places as transformers has them."""
        self._marked.clear()
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        given = {"messages": list(messages), "tools": tools or None, "documents": None, "add_generation_prompt": asks}
        num_steps = NUM_STEPS + NUM_STEPS_PER_CHARACTER * size_of([given["messages"], tools])
        try:
            with self._environment.budget(num_steps), self._tracked(blocks, spans):
                for block in self._template.generate(**{**self._special, **given}):
                    blocks.append(block)
                return "".join(blocks), spans
        except OverspentError:
            raise self._refusal(
                "the chat template does not end", f"more than {num_steps:,} steps for {name}", "fewer"
            ) from None
        except RecursionError as error:
            raise self._refusal("the chat template does not end", error, "macros that end") from None
        except Exception as error:
            # whatever a stranger's program raises is how it refuses
            raise BadRecordError(
                "the chat template refuses the conversation",
                where=name,
                found=str(error).strip()[:200] or type(error).__name__,
                expected=f"roles and contents as {self._where} takes them",
            ) from None

    def _refusal(self, what: str, found: object, expected: str) -> InputError:
        said = str(found)[:200] or type(found).__name__
        return InputError(what, where=self._where, found=said, expected=expected, fix="use another template")


def _marked_texts(environment: BoundedEnvironment) -> list[str]:
    """What the marks of the latest rendering enclose, in the order of their places: the list fills up.

    Transformers counts what was written before a mark. What a macro, a filter or a block that is set writes is written
    when it ends, so that the place of a mark within is wrong, and nothing but the text tells.
    """
    texts: list[str] = []
    tracker: Any = next(one for one in environment.extensions.values() if "generation" in one.tags)
    support = tracker._generation_support

    @pass_eval_context
    def keeping(context: Any, caller: Any) -> str:
        text: str = support(context, caller)
        texts.append(text)
        return text

    tracker._generation_support = keeping
    return texts
