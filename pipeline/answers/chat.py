"""Conversations as token ids, by the chat template of a model's own tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from capgap.pipeline.corpus.plain_text import plain_messages, special_texts
from capgap.pipeline.models.chat_template import default_template
from capgap.schemas.errors import BadRecordError, InputError
from capgap.schemas.judge_results import NUM_TURNS, Question, Reply
from capgap.schemas.run_judge import AnswerSettings

# What a conversation may grow by beyond its questions and its answers: an answer that is decoded and encoded again, as
# it stands before the second question, may take more tokens than were generated.
_GROWTH = 3


@dataclass(frozen=True)
class Prompt:
    """What a model is to continue.

    Attributes:
        ids: of the conversation, up to where the model speaks.
        max_tokens: longest answer.
        temperature: 0 takes the top-1 token.
        top_p: answers are sampled from the most probable tokens that together hold it.
        seed: of the samples.
    """

    ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Generated:
    """What a prompt was continued with.

    Attributes:
        ids: without the one that ended it.
        finish: `stop` if the model ended it.
        end_id: the one that ended it; None where none did.
        logprobs: the model's own of each of them, the one that ended it included, at temperature 1 and over the whole
            vocabulary; empty where nobody wanted to know them.
    """

    ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    end_id: int | None = None
    logprobs: tuple[float, ...] = ()


class Chat:
    """One model's way of writing conversations.

    Args:
        tokenizer: the model's.
        where: the model, for errors.
        settings: how it answers.
        max_positions: of the model; None where nothing bounds it.
        questions: all that it is asked.

    Attributes:
        length: tokens of the longest conversation that is possible.
        stop_ids: at which an answer ends.

    Raises:
        InputError: the tokenizer has no chat template, or one that cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        where: str,
        settings: AnswerSettings,
        max_positions: int | None,
        questions: Sequence[Question],
    ) -> None:
        self._tokenizer, self._where, self._settings = tokenizer, where, settings
        require_template(tokenizer.chat_template, where)
        self._template = default_template(tokenizer, where)
        self._specials = special_texts(tokenizer)
        self.stop_ids = stop_ids(tokenizer, where)
        longest = max(len(self._ids(question, ("",) * (NUM_TURNS - 1))) for question in questions)
        wanted = longest + _GROWTH * settings.max_tokens
        self.length = wanted if max_positions is None else min(wanted, max_positions)

    def prompt(self, question: Question, answers: Sequence[str]) -> Prompt | None:
        """The conversation up to the answer that comes next; None where it leaves no room for one."""
        ids = self._ids(question, answers)
        room = self.length - len(ids)
        if room < 1:
            return None
        settings, turn = self._settings, len(answers) + 1
        return Prompt(
            ids=tuple(ids),
            max_tokens=min(settings.max_tokens, room),
            temperature=self.temperature_of(question),
            top_p=settings.top_p,
            seed=_seed(settings.seed, question.question_id, turn),
        )

    def reply(self, made: Generated) -> Reply:
        """What an answer says, without special tokens, and without ids that are only there to pad the vocabulary."""
        known = [one for one in made.ids if one < len(self._tokenizer)]
        text = str(self._tokenizer.decode(known, skip_special_tokens=True)).strip()
        return Reply(text=text, num_tokens=len(made.ids), finish=made.finish)

    def temperature_of(self, question: Question) -> float:
        """The temperature at which a question is answered."""
        return self._settings.temperature_of(question.category)

    def _ids(self, question: Question, answers: Sequence[str]) -> list[int]:
        messages = []
        for i in range(len(answers) + 1):
            messages.append({"role": "user", "content": question.turns[i]})
            if i < len(answers):
                messages.append({"role": "assistant", "content": answers[i]})
        try:
            # what people and models say is text, and no special token, as everywhere in a corpus
            plain = plain_messages(messages, self._specials)
            text = self._template.render(plain, [], f"question {question.question_id}", asks=True)
        except BadRecordError as error:
            raise InputError(
                "the chat template cannot be used",
                where=self._where,
                found=error.found,
                expected="one that takes the roles user and assistant",
            ) from None
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def require_template(template: object, where: str) -> None:
    """Raise InputError where a model has no chat template."""
    if not template:
        raise InputError(
            "the tokenizer has no chat template",
            where=where,
            expected="one, to write conversations with",
            fix="use a tokenizer with a chat template in corpus.tokenizer, or leave judge out",
        )


def stop_ids(tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[int, ...]:
    """The end of text, and what the model says beside it: chat models end a turn in another way.

    Raises:
        InputError: the model's generation_config.json cannot be used.
    """
    found = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    # of a folder or of an id; many models have none
    path = cached_file(where, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    if path is not None:
        try:
            said = json.loads(Path(path).read_bytes()).get("eos_token_id")
            found |= {int(one) for one in (said if isinstance(said, list) else [said]) if one is not None}
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{GENERATION_CONFIG_NAME} cannot be used",
                where=where,
                found=str(error)[:200],
                expected="an object whose eos_token_id is a token's id or several",
                fix="download that file again",
            ) from None
    return tuple(sorted(found))


def _seed(seed: int, question_id: int | str, turn: int) -> int:
    """A seed of 32 bits, independent of which other questions are asked."""
    return int.from_bytes(hashlib.sha256(f"{seed} {question_id} {turn}".encode()).digest()[:4], "big")
