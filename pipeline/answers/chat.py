"""Turn conversations into token ids with the chat template of a model's own tokenizer."""

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

# Room for the answers, in multiples of `max_tokens`. There are two answers; the third is a reserve, as the first answer
# is decoded and encoded again before the second question, and may then take more tokens than were generated.
_GROWTH = 3


@dataclass(frozen=True)
class Prompt:
    """Token ids for a model to continue, and how to sample the continuation.

    Attributes:
        ids: ids of the conversation, up to the place of the model's answer.
        max_tokens: largest number of tokens of the answer.
        temperature: sampling temperature; 0 always takes the most probable token.
        top_p: each token is sampled from the most probable tokens whose probabilities sum to at least `top_p`.
        seed: seed of the sampling.
    """

    ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Generated:
    """The continuation of a prompt.

    Attributes:
        ids: generated ids, without the id that ended the continuation.
        finish: `stop` if the model ended the continuation, `length` if it reached `max_tokens`.
        end_id: the id that ended the continuation; None for `length`.
        logprobs: the model's logprob of each generated id, `end_id` included, at temperature 1 and over the whole
            vocabulary; empty unless they were asked for.
    """

    ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    end_id: int | None = None
    logprobs: tuple[float, ...] = ()


class Chat:
    """Writes the prompts of one model and reads its answers.

    Args:
        tokenizer: the model's tokenizer.
        where: folder or id of the model, also for errors.
        settings: settings of the answers.
        max_positions: longest sequence that the model takes, in tokens; None for no limit.
        questions: all questions that the model is asked.

    Attributes:
        length: number of tokens of the longest possible conversation.
        stop_ids: ids that end an answer.

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
        """Return the prompt for the next answer of a conversation; None where there is no room for an answer."""
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
        """Return the text of an answer, without special tokens and without ids of the vocabulary's padding."""
        known = [one for one in made.ids if one < len(self._tokenizer)]
        text = str(self._tokenizer.decode(known, skip_special_tokens=True)).strip()
        return Reply(text=text, num_tokens=len(made.ids), finish=made.finish)

    def temperature_of(self, question: Question) -> float:
        """Return the temperature at which a question is answered."""
        return self._settings.temperature_of(question.category)

    def _ids(self, question: Question, answers: Sequence[str]) -> list[int]:
        messages = []
        for i in range(len(answers) + 1):
            messages.append({"role": "user", "content": question.turns[i]})
            if i < len(answers):
                messages.append({"role": "assistant", "content": answers[i]})
        try:
            # text that looks like a special token stays text, as everywhere in a corpus
            plain = plain_messages(messages, self._specials)
            text = self._template.render(plain, [], f"question {question.question_id}", asks=True)
        except BadRecordError as error:
            raise InputError(
                "the chat template cannot be used",
                where=self._where,
                found=error.found,
                expected="a template for the roles user and assistant",
            ) from None
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def require_template(template: object, where: str) -> None:
    """Raise InputError where a model has no chat template."""
    if not template:
        raise InputError(
            "the tokenizer has no chat template",
            where=where,
            expected="a chat template, to write conversations",
            fix="use a tokenizer with a chat template in corpus.tokenizer, or leave judge out",
        )


def stop_ids(tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[int, ...]:
    """Return the ids that end an answer: the tokenizer's end-of-sequence token and those of generation_config.json.

    Chat models often end a turn with another token than a text.

    Raises:
        InputError: the model's generation_config.json cannot be used.
    """
    found = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    # None for the many models without this file
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
                expected="an object whose eos_token_id is one token id or a list of them",
                fix="download that file again",
            ) from None
    return tuple(sorted(found))


def _seed(seed: int, question_id: int | str, turn: int) -> int:
    """Return a seed of 32 bits that does not depend on the other questions."""
    return int.from_bytes(hashlib.sha256(f"{seed} {question_id} {turn}".encode()).digest()[:4], "big")
