"""Encodes whole conversations so that each answer follows exactly the prompt with which a chat would ask for it.

    messages --template--> prompt of answer 1 | answer 1 | what follows, prompt of answer 2 | answer 2
                           not learnt           learnt     not learnt                         learnt

A prompt is what `apply_chat_template(messages so far, add_generation_prompt=True)` returns. An answer ends with a
special token, by which the model learns to stop. The next answer gets a row of its own, behind its own prompt, if the
template changes an earlier answer in it, for example by removing its reasoning, or if the tokenizer joins the end of a
prompt with the beginning of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from capgap.pipeline.corpus.chat import (
    TRIED,
    counts,
    marked_tokens,
    plain_conversation,
    require_results,
    require_shown,
    require_words,
    says_nothing,
    warn_of_tools,
)
from capgap.pipeline.corpus.pack import Encoded
from capgap.pipeline.corpus.plain_text import special_texts
from capgap.pipeline.corpus.records import Conversation
from capgap.pipeline.corpus.sources import Document
from capgap.pipeline.models.chat_template import ChatTemplate
from capgap.schemas.errors import BadRecordError, InputError


@dataclass(frozen=True)
class Turns:
    """A conversation in tokens.

    Attributes:
        rows: the tokens, and which of them are learnt; one row, or several if answers need prompts of their own.
        num_answers: number of answers in `rows`.
        num_dropped: number of answers left out because they, or an earlier answer, do not end within the longest row.
    """

    rows: tuple[Encoded, ...]
    num_answers: int
    num_dropped: int


class ChatFormat:
    """A tokenizer whose chat template a model can be trained with; the template is tried on a short conversation.

    Args:
        tokenizer: a tokenizer with a chat template.
        where: the template as the user knows it, for errors.

    Attributes:
        end_ids: ids of the special tokens with which the template ends answers.

    Raises:
        InputError: the tokenizer has no template, or one whose answers cannot be told from the rest or have no end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        self.tokenizer, self._where = tokenizer, where
        self._specials = special_texts(tokenizer)
        self._special_ids = set(tokenizer.convert_tokens_to_ids(self._specials)) - {tokenizer.unk_token_id}
        self._template = ChatTemplate(tokenizer, where)
        self._marks = tokenizer.is_fast and self._template.has_marks
        self.end_ids = self._try()

    def encode(self, document: Document, most: int | None = None) -> Turns:
        """Encode a conversation.

        Args:
            document: the conversation.
            most: the largest number of tokens per row; answers that do not end within it are left out.

        Raises:
            BadRecordError: the template refuses the conversation or leaves out a message, or an answer has no words.
        """
        talk = plain_conversation(conversation_of(document), self._specials)
        warn_of_tools(self._template, talk, document.name)
        places = [number for number, message in enumerate(talk.messages) if message["role"] == "assistant"]
        require_results(self._template, talk.messages[: places[-1] + 1], talk.tools, document.name)
        rows: list[tuple[list[int], list[bool]]] = []
        num_kept = 0
        for place in places:
            prompt, answer, learnt = self._turn(talk, place, document.name)
            if most is not None and len(prompt) + len(answer) > most:
                break
            goes_on = bool(rows) and prompt[: len(rows[-1][0])] == rows[-1][0]
            if not goes_on:
                rows.append(([], []))
            ids, mask = rows[-1]
            mask += [False] * (len(prompt) - len(ids)) + learnt
            ids[:] = [*prompt, *answer]
            num_kept += 1
        text = self.tokenizer.decode([one for ids, _ in rows for one in ids])
        encoded = tuple(Encoded(Document(document.name, text), ids, mask) for ids, mask in rows)
        return Turns(encoded, num_kept, len(places) - num_kept)

    def _turn(self, talk: Conversation, place: int, name: str) -> tuple[list[int], list[int], list[bool]]:
        """Return the ids of an answer's prompt, those of the answer with its end, and which tokens of it are learnt."""
        asked = self._asked(talk, place, name)
        told, spans = self._told(talk, place, name)
        if not told.startswith(asked):
            raise BadRecordError(
                "the turn of an answer does not begin with the prompt for it",
                where=name,
                found=ascii(asked[-40:]),
                expected=f"the beginning of {told[-80:]!a}, as {self._where} writes it",
                fix="use another template",
            )
        require_words(told[len(asked) :], self._specials, talk.messages[place], f"{name}, message {place + 1}")
        require_shown(told, talk.messages[:place], name)
        prompt, whole = self._ids(asked), self._ids(told)
        if whole[: len(prompt)] == prompt:
            answer = whole[len(prompt) :]
            learnt = (
                marked_tokens(self.tokenizer, told, spans)[1][len(prompt) :] if self._marks else [True] * len(answer)
            )
        else:
            answer = self._ids(told[len(asked) :])
            learnt = [True] * len(answer)
        stop = self._stop(answer, learnt, told[len(asked) :])
        return prompt, answer[:stop], [counts(talk.messages[place]) and one for one in learnt[:stop]]

    def _told(self, talk: Conversation, place: int, name: str) -> tuple[str, list[tuple[int, int]]]:
        said = talk.messages[: place + 1], talk.tools, name
        return self._template.render_marked(*said) if self._marks else (self._template.render(*said), [])

    def _asked(self, talk: Conversation, place: int, name: str) -> str:
        try:
            return self._template.render(talk.messages[:place], talk.tools, name, asks=True)
        except BadRecordError as error:
            if place:
                raise
            raise BadRecordError(
                "the assistant begins the conversation, which the chat template refuses",
                where=name,
                found=error.found,
                expected="a turn of the user before it",
                fix="remove the record, or set corpus.on_bad_record to skip",
            ) from None

    def _stop(self, answer: list[int], learnt: list[bool], text: str) -> int:
        """Return the number of tokens up to the answer's end; a line break that the template adds is not counted."""
        if self._marks:
            return max((number + 1 for number, one in enumerate(learnt) if one), default=0)
        ends = [number + 1 for number, one in enumerate(answer) if one in self._special_ids]
        behind = min(
            (text.rpartition(special)[2] for special in self._specials if special in text), key=len, default=""
        )
        return ends[-1] if ends and not behind.strip() else len(answer)

    def _try(self) -> tuple[int, ...]:
        ends = set()
        for place in (1, 3):
            content, name = TRIED[place]["content"], "a conversation to try it"
            _, answer, learnt = self._turn(Conversation(list(TRIED), []), place, name)
            asked = self._template.render(TRIED[:place], [], name, True)
            words = self._template.render(TRIED[: place + 1], [], name)[len(asked) :]
            before, found, _ = words.partition(content)
            if not found or not says_nothing(before):
                raise self._refusal(
                    "the chat template cannot say which tokens the assistant says",
                    f"{words[:80]!a} after the prompt for an answer",
                    f"{content!a} and a special token that ends it",
                    "let add_generation_prompt begin the assistant's turn",
                )
            if not learnt or not learnt[0] or not all(learnt[: len(answer)]) or answer[-1] not in self._special_ids:
                raise self._refusal(
                    "the answers of the chat template have no end, or none that is learnt",
                    f"{words!a} of which {self.tokenizer.decode(_only(answer, learnt))!a} is marked"
                    if self._marks
                    else ascii(words),
                    "a special token behind the answer" + (", within the marks" if self._marks else ""),
                )
            if content in asked:
                raise self._refusal("the chat template shows an answer before it is given", ascii(content), "none")
            ends.add(answer[-1])
        return tuple(sorted(ends))

    def _ids(self, text: str) -> list[int]:
        # without further special tokens, as `apply_chat_template` and vLLM encode a rendered template
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _refusal(self, what: str, found: str, expected: str, fix: str | None = None) -> InputError:
        return InputError(what, where=self._where, found=found, expected=expected, fix=fix or "use another template")


def conversation_of(document: Document) -> Conversation:
    """Return the conversation of a document.

    Raises:
        BadRecordError: the document is a text, or the assistant has no turn in it.
    """
    if document.messages is None:
        raise BadRecordError("is no conversation", where=document.name, found="text", expected="a file of records")
    conversation = Conversation.from_json(document.messages)
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise BadRecordError(
            "the conversation has no turn of the assistant",
            where=document.name,
            found=f"roles {', '.join(message['role'] for message in conversation.messages)}",
            expected="at least one answer to learn from",
            fix="remove the record, or set corpus.on_bad_record to skip",
        )
    return conversation


def _only(ids: list[int], mask: list[bool]) -> list[int]:
    return [one for one, wanted in zip(ids, mask, strict=True) if wanted]
