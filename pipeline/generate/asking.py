"""Turns prompts into token ids for the model that writes, and finds where its answers end."""

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
    """One answer to a prompt.

    Attributes:
        ids: the sampled token ids, including the token that ended the answer.
        logprobs: the writer's logprob of each token, nats, at temperature 1 and over its whole vocabulary.
        ended: whether the writer ended the answer; False if it was cut off.
        text: the answer without special tokens and without the token that ended it.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool
    text: str


class Asking:
    """How prompts are put to one model.

    Args:
        tokenizer: the model's tokenizer.
        where: folder or id of the model.
        settings: the settings of the rounds.
        bos_ids: ids with which a text begins.
        chats: whether any prompt is a conversation.

    Attributes:
        stop_ids: ids of the tokens that end an answer.

    Raises:
        InputError: a prompt is a conversation, and the tokenizer has no chat template that can be used.
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
        """Return the token ids of a prompt, up to the place where the model begins to write.

        Raises:
            InputError: the chat template refuses the prompt, or leaves out a part of it.
        """
        # as everywhere in a corpus, words of a prompt that look like a special token are encoded as text
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
                expected="roles and contents that the template accepts, for example a system message if it needs one",
                fix="change the prompts' messages, or remove the prompt",
            ) from None
        return self._encoded(text)

    def request(self, ids: Sequence[int], room: int, seed: str) -> Prompt:
        """Return the request to the engine for one answer.

        Args:
            ids: token ids of the prompt.
            room: the largest number of tokens that the answer may have.
            seed: a text from which the seed of the sampling is derived.
        """
        return Prompt(
            ids=tuple(ids),
            max_tokens=min(self._settings.max_new_tokens, room),
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            seed=int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big"),
        )

    def answer(self, made: Generated) -> SampledAnswer:
        """Return the answer that the engine made, cut behind the first of the texts in `rounds.stop`."""
        length = self._stopped(made.ids)
        said = made.ids[:length]
        ids = said if length is not None or made.end_id is None else (*said, made.end_id)
        ended = made.end_id is not None or length is not None
        return SampledAnswer(ids, made.logprobs[: len(ids)], ended, self._decoded(said))

    def num_text_bytes(self, ids: Sequence[int]) -> int:
        """Return the UTF-8 bytes of decoded tokens with special tokens, as the corpus stage counts conversations."""
        return len(str(self._tokenizer.decode(list(ids))).encode())

    def _stopped(self, ids: Sequence[int]) -> int | None:
        """Return the number of tokens up to the end of the first stop text; None if there is no stop text."""
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
    """Raise BadRecordError if the template leaves out a tool call, as a template without support for tools does."""
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
    """Return the ids of the special tokens with which a chat template ends an answer; none if they cannot be found."""
    try:
        return ChatFormat(tokenizer, where).end_ids
    except (InputError, BadRecordError):
        return ()


def require_same_ends(writer: tuple[int, ...], teacher: tuple[int, ...], where: str) -> None:
    """Raise MismatchError if the student's chat template ends an answer with other tokens than the teacher's.

    The teacher would find every end of an answer improbable, and so teach the student never to stop.

    Args:
        writer: ids of the tokens with which the student's template ends an answer; empty if they are not known.
        teacher: ids of the tokens with which the teacher's template ends an answer; empty if they are not known.
        where: the student and the prompts, for the error.
    """
    if writer and teacher and not set(writer) & set(teacher):
        raise MismatchError(
            "the student ends an answer in another way than the teacher",
            where=where,
            found=f"tokens {', '.join(map(str, writer))} in the student's chat template",
            expected=f"{', '.join(map(str, teacher))}, as in the teacher's",
            fix="give the student the teacher's chat template (chat_template.jinja in its folder)",
        )
