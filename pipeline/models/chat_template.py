"""Write conversations with a tokenizer's chat template, with the same result as transformers' `apply_chat_template`.

The template is a program that a stranger wrote. It runs as in transformers, in Jinja's sandbox with the same filters
and extensions, and in addition within a bound on its work (`bounded_jinja`).
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
"""Work that one rendering may do, in the units of `bounded_jinja`: loop iterations, calls, and characters made."""

NUM_STEPS_PER_CHARACTER = 100
"""Further work that a rendering may do for each character of the conversation, in the units of `bounded_jinja`."""

_EMPTY = ""
# the same expression that transformers searches for
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def default_template(tokenizer: PreTrainedTokenizerBase, where: str) -> ChatTemplate:
    """Return the chat template of a tokenizer for conversations without tools.

    Of several templates it is the one that is named `default`.

    Raises:
        InputError: none of several templates is named `default`, or as `ChatTemplate`.
    """
    known = tokenizer.chat_template
    if isinstance(known, dict) and "default" not in known:
        raise InputError(
            "none of the chat templates is the default",
            where=where,
            found=", ".join(map(ascii, sorted(known))),
            expected="one that is named default",
            fix="save the intended template as chat_template.jinja next to the tokenizer",
        )
    return ChatTemplate(tokenizer, where, known["default"] if isinstance(known, dict) else None)


class ChatTemplate:
    """A compiled chat template that writes conversations.

    Args:
        tokenizer: the tokenizer, which gives the special tokens, and the template where `source` is None.
        where: name of the template in errors.
        source: text of the template, where the tokenizer has several.

    Attributes:
        has_marks: whether the template marks the assistant's messages with `{% generation %}`.
        knows_tools: whether the word `tools` occurs in the template.
        has_warned: whether the user of this object has already warned about the template; set by that user.

    Raises:
        InputError: the tokenizer has no template or several, or the text is not a Jinja template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str, source: str | None = None) -> None:
        self._where, self._special = where, dict(tokenizer.special_tokens_map)
        source = source or tokenizer.chat_template
        if not isinstance(source, str):
            found = f"several: {', '.join(map(ascii, sorted(source)))}" if source else "no chat template"
            fix = "keep one, as chat_template.jinja beside the tokenizer" if source else None
            raise InputError("there is no single chat template", where=where, found=found, expected="one", fix=fix)
        self.has_marks = _GENERATION.search(source) is not None
        self.knows_tools, self.has_warned = "tools" in source, False
        # transformers' environment is taken from an empty template, as compiling evaluates constant expressions
        self._environment = BoundedEnvironment.like(_compile_jinja_template(_EMPTY).environment)
        # added by transformers' extension for `{% generation %}`
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
        """Return the text of a conversation.

        Args:
            messages: messages of the conversation, in order.
            tools: tools that the assistant may call; may be empty.
            name: name of the conversation in errors.
            asks: whether to end the text with the prompt for an answer.

        Raises:
            BadRecordError: the template refuses the conversation.
            InputError: the template does not end within its bound on work.
        """
        return self._render(messages, tools, name, asks)[0]

    def render_marked(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]], name: str, asks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and the spans of the assistant's messages that the template marks.

        A span is the pair of its first character and the character after its last one. The arguments are those of
        `render`.

        Raises:
            BadRecordError: the template refuses the conversation.
            InputError: the template does not end within its bound, or a mark does not give the place of its text.
        """
        text, spans = self._render(messages, tools, name, asks)
        for (start, end), marked in zip(spans, self._marked, strict=True):
            if text[start:end] != marked:
                raise InputError(
                    "the chat template marks answers within a macro, a filter, a {% set %} block or the like",
                    where=self._where,
                    found=f"{text[start:end][:60]!a} in the place of {marked[:60]!a}, in {name}",
                    expected="{% generation %} only where the template's output goes directly into the text",
                    fix="move the marks out of the macro, filter or block, or use another template",
                )
        return text, spans

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]], name: str, asks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the marked spans as transformers gives them."""
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
            # a template refuses a conversation by raising any exception
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
    """Return a list that every rendering fills with the texts that its marks enclose, in order.

    transformers gets the place of a mark by counting the text written before it. The output of a macro, a filter or a
    `set` block is written only when that ends, so the place of a mark within it is wrong. Only the text itself tells.
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
