"""Turns a record with a question and an answer in fields, as Alpaca, Dolly and preference pairs have, into messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from capgap.pipeline.corpus.turns import SKIP, are_turns, content_of, loaded, role_of
from capgap.schemas.errors import BadRecordError

ASKED_FIELDS = ("prompt", "instruction", "question", "query")
ANSWERED_FIELDS = ("completion", "output", "response", "answer", "chosen")
FURTHER_FIELDS = ("context", "input")
HISTORY_FIELD = "history"

_ASKS = ("user", "assistant")


def pair_of(where: str, record: Mapping[str, Any]) -> object:
    """Return the messages of a record with a question and an answer; None if the record has no such fields.

    Raises:
        BadRecordError: a field that belongs to the question cannot be read.
    """
    asked = next((name for name in ASKED_FIELDS if record.get(name) is not None), None)
    answered = next((name for name in ANSWERED_FIELDS if record.get(name) is not None), None)
    if answered is None:
        return None
    answer = _answer_in(record[answered])
    if isinstance(answer, list) and not _are_messages(answer):
        return None
    if isinstance(answer, list):
        # in preference pairs, the answer often holds the whole conversation, question included
        if asked is None or role_of(answer[0]) != "assistant":
            return answer
    elif asked is None:
        return None
    messages = _question(where, record, asked)
    earlier = _earlier(record.get(HISTORY_FIELD))
    answers = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return None if earlier is None else [*earlier, *messages, *answers]


def _question(where: str, record: Mapping[str, Any], asked: str) -> list[Any]:
    """Return the messages of a question, together with the further fields (`context`, `input`) that belong to it."""
    question = _messages_in(record[asked])
    further = {name: content_of(f"{where}, field {name!r}", record.get(name)) for name in FURTHER_FIELDS}
    if asked == "prompt" and isinstance(question, str):
        # many prompts are already written out with the further fields in them
        further = {name: text for name, text in further.items() if text.strip() not in question}
    further = {name: text for name, text in further.items() if text.strip()}
    if not isinstance(question, list):
        texts = [content_of(f"{where}, field {asked!r}", question), *further.values()]
        return [{"role": "user", "content": "\n\n".join(text for text in texts if text.strip())}]
    if further:
        raise BadRecordError(
            "a text stands beside a question that is a list of messages, and where it belongs is not known",
            where=f"{where}, field {next(iter(further))!r}",
            found=ascii(next(iter(further.values())))[:80],
            expected="a question that is a text, or no further text beside its messages",
            fix=SKIP,
        )
    return question


def _earlier(history: object) -> list[dict[str, Any]] | None:
    """Return the messages of a history of questions and answers in pairs; None if it is no list of pairs."""
    pairs = loaded(history) or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return None
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(_ASKS, pair, strict=True)]


def _messages_in(value: object) -> object:
    """Return the list of messages that a string of JSON holds; any other value is returned unchanged."""
    found = loaded(value)
    return found if isinstance(value, str) and are_turns(found) else value


def _answer_in(value: object) -> object:
    """Return the list of messages that an answer holds as JSON, if the assistant has the last turn; else the value.

    JSON in which somebody else has the last turn is itself the text of the answer.
    """
    found = _messages_in(value)
    return found if not isinstance(found, list) or found is value or role_of(found[-1]) == "assistant" else value


def _are_messages(value: object) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        return False
    return all("role" in one or "from" in one for one in value)
