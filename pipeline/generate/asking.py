"""A writer's way of being asked: prompts as its own token ids, and what ends its answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from capgap.pipeline.answers.chat import Generated, Prompt, require_template, stop_ids
from capgap.pipeline.corpus.chat import plain_conversation, require_shown, warn_of_tools
from capgap.pipeline.corpus.conversations import ChatFormat
from capgap.pipeline.corpus.plain_text import special_texts
from capgap.pipeline.corpus.records import Conversation
from capgap.pipeline.generate.prompts import PromptRecord
from capgap.pipeline.models.chat_template import ChatTemplate, default_template
from capgap.schemas.errors import BadRecordError, InputError, MismatchError
from capgap.schemas.run_rounds import RoundsSettings


@dataclass(frozen=True)
class SampledAnswer:
    """What became of a prompt.

    Attributes:
        ids: the very tokens that were sampled, with the one that ended them.
        logprobs: the writer's own of each, nats, at temperature 1 and over its whole vocabulary.
        ended: whether the writer ended the answer.
        text: without special tokens, and without the token that ended it.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool
    text: str


class Asking:
    """How prompts are put to one model.

    Args:
        tokenizer: the model's.
        where: the model's folder or id.
        settings: of the rounds.
        bos_ids: what a text begins with.
        chats: whether any prompt is a conversation.

    Attributes:
        stop_ids: tokens with which an answer ends.

    Raises:
        InputError: conversations are asked for, and the tokenizer has no chat template that can be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        where: str,
        settings: RoundsSettings,
        bos_ids: Sequence[int],
        chats: bool,
    ) -> None:
        self._tokenizer, self._where, self._settings, self._bos_ids = tokenizer, where, settings, list(bos_ids)
        self._template: ChatTemplate | None = None
        self._specials = special_texts(tokenizer)
        if chats:
            require_template(tokenizer.chat_template, where)
            self._template = default_template(tokenizer, where)
        self.stop_ids = tuple(sorted({*stop_ids(tokenizer, where), *(turn_ends(tokenizer, where) if chats else ())}))

    def ids(self, prompt: PromptRecord) -> list[int]:
        """A prompt up to where the model writes.

        Raises:
            InputError: the chat template refuses it.
        """
        # what a prompt says is text, and no special token, as everywhere in a corpus
        if not prompt.messages:
            return [*self._bos_ids, *self._encoded(prompt.text, split_special_tokens=True)]
        assert self._template is not None
        try:
            talk = plain_conversation(Conversation(list(prompt.messages), list(prompt.tools)), self._specials)
            warn_of_tools(self._template, talk, prompt.where)
            text = self._template.render(talk.messages, talk.tools, prompt.where, asks=True)
            require_shown(text, talk.messages, prompt.where)
            _require_calls(text, talk.messages, prompt.where)
        except BadRecordError as error:
            raise InputError(
                "the writer's chat template refuses a prompt",
                where=f"{prompt.where}, {self._where}",
                found=f"{error.what}: {error.found}",
                expected="roles and contents that it takes, for example a system message where it needs one",
                fix="change the prompts' messages, or remove the prompt",
            ) from None
        return self._encoded(text)

    def request(self, ids: Sequence[int], room: int, seed: str) -> Prompt:
        """What the engine is asked: an answer of at most `room` tokens, sampled with a seed of its own."""
        return Prompt(
            ids=tuple(ids),
            max_tokens=min(self._settings.max_new_tokens, room),
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            seed=int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big"),
        )

    def answer(self, made: Generated) -> SampledAnswer:
        """The answer, ended behind the first of the texts that stop it."""
        length = self._stopped(made.ids)
        said = made.ids[:length]
        ids = said if length is not None or made.end_id is None else (*said, made.end_id)
        ended = made.end_id is not None or length is not None
        return SampledAnswer(ids, made.logprobs[: len(ids)], ended, self._decoded(said))

    def num_text_bytes(self, ids: Sequence[int]) -> int:
        """UTF-8 bytes of what tokens say, special ones as they are written: so a corpus of conversations counts."""
        return len(str(self._tokenizer.decode(list(ids))).encode())

    def _stopped(self, ids: Sequence[int]) -> int | None:
        """Tokens with which the first stop text is whole; None where none stands there."""
        if not self._settings.stop or not self._has_stop(ids):
            return None
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._has_stop(ids[:middle]) else (middle + 1, high)
        return low

    def _has_stop(self, ids: Sequence[int]) -> bool:
        text = self._decoded(ids)
        return any(stop in text for stop in self._settings.stop)

    def _decoded(self, ids: Sequence[int]) -> str:
        known = [one for one in ids if one < len(self._tokenizer)]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def _encoded(self, text: str, split_special_tokens: bool = False) -> list[int]:
        found = self._tokenizer(
            text, add_special_tokens=False, verbose=False, split_special_tokens=split_special_tokens
        )
        return list(found["input_ids"])


def _require_calls(text: str, messages: Sequence[dict[str, Any]], where: str) -> None:
    """Raise BadRecordError where the template leaves out a call of a tool, as one that knows no tools does."""
    for number, message in enumerate(messages, start=1):
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise BadRecordError(
                    "a tool call is not written",
                    where=f"{where}, message {number}",
                    found=call["function"]["name"],
                    expected="a chat template that writes tool calls",
                )


def turn_ends(tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[int, ...]:
    """Special tokens with which a chat template ends an answer; none where it does not tell."""
    try:
        return ChatFormat(tokenizer, where).end_ids
    except (InputError, BadRecordError):
        return ()


def require_same_ends(writer: tuple[int, ...], teacher: tuple[int, ...], where: str) -> None:
    """Raise MismatchError where the student's template ends an answer in another way than the teacher's does.

    The teacher would call each end of an answer improbable, and teach the student never to stop.
    """
    if writer and teacher and not set(writer) & set(teacher):
        raise MismatchError(
            "the student ends an answer in another way than the teacher",
            where=where,
            found=f"tokens {', '.join(map(str, writer))} at the student's chat template",
            expected=f"{', '.join(map(str, teacher))}, as the teacher's has it",
            fix="give the student the teacher's chat template (chat_template.jinja in its folder)",
        )
