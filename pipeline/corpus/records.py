"""One record, whatever its form, into text or into a conversation as chat templates expect it.

    {"messages": [{"role": ..., "content": ...}], "tools": [...]}        OpenAI's form, with text parts and tool calls
    {"conversations": [{"from": "human", "value": ...}]}                 ShareGPT's
    {"instruction": ..., "input": ..., "output": ...}                    Alpaca's, Dolly's, and others of question and
                                                                         answer, with `context` and `history`
    [{"role": ...}], ["question", "answer"], [{"User": ..., "Assistant": ...}]      a list, alone or in a field

A list may also be given as the JSON that says it. Whatever cannot be used is named with its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capgap.pipeline.corpus.turns import MAX_DEPTH, ROLES, SKIP, in_turns, is_deep, loaded
from capgap.schemas.errors import BadRecordError

AUTO = "auto"
"""As `messages_field`: the record's own keys say where its conversation is."""

CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
ASKED_FIELDS = ("prompt", "instruction", "question", "query")
ANSWERED_FIELDS = ("completion", "output", "response", "answer", "chosen")
FURTHER_FIELDS = ("context", "input")
BESIDE_FIELDS = (*FURTHER_FIELDS, "history", "system", "system_prompt", "tools", "functions")

_ASKS = ("user", "assistant")

_A_LIST = 'a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates expect them, and the tools that the assistant may call.

    Attributes:
        messages: each with `role` (one of `ROLES`) and `content`, a string; `tool_calls` with arguments as objects.
        tools: definitions, which the chat template is given beside the messages; empty where there are none.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]

    def to_json(self) -> str:
        """The same text for the same conversation: the messages, or an object of both where there are tools.

        What a template writes as it is, definitions and arguments, keeps its order.
        """
        messages = [dict(sorted(message.items())) for message in self.messages]
        value = {"messages": messages, "tools": self.tools} if self.tools else messages
        return json.dumps(value, ensure_ascii=False, default=str)

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """The conversation of `to_json`."""
        value = json.loads(text)
        return cls(value, []) if isinstance(value, list) else cls(value["messages"], value["tools"])


def read_record(where: str, record: object, text_field: str, messages_field: str | None) -> str | Conversation:
    """The text of a record, or its conversation where `messages_field` is given.

    Args:
        where: file and record, for errors.
        record: as a file holds it.
        text_field: the field of its text.
        messages_field: the field of its conversation, or `auto`.

    Raises:
        BadRecordError: it has neither, or one that cannot be used.
    """
    if messages_field is None:
        return _text(where, record, text_field)
    _require_shallow(where, record, messages_field)
    found, fields = _find(record, messages_field)
    messages = in_turns(where, found)
    if messages is None:
        raise BadRecordError(
            "no conversation" if messages_field == AUTO else f"no messages in field {messages_field!r}",
            where=where,
            found=_found(record) if found is None else ascii(found)[:80],
            expected=_A_LIST,
            fix="set corpus.messages_field, or leave it out for plain text",
        )
    system = next((fields[name] for name in ("system", "system_prompt") if fields.get(name)), None)
    if isinstance(system, str) and system.strip() and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    tools = _tools(where, next((fields[name] for name in ("tools", "functions") if fields.get(name)), None))
    conversation = Conversation(messages, tools)
    _require_roles(where, conversation)
    _require_text(where, conversation.to_json())
    return conversation


def fields_read(text_field: str, messages_field: str | None) -> tuple[str, ...]:
    """The names that `read_record` looks for: of a table, the columns that are needed."""
    if messages_field is None:
        return (text_field,)
    if messages_field == AUTO:
        return (*CONVERSATION_FIELDS, *ASKED_FIELDS, *ANSWERED_FIELDS, *BESIDE_FIELDS)
    return (messages_field, *BESIDE_FIELDS)


def _find(record: object, field: str) -> tuple[object, Mapping[str, Any]]:
    """What holds the conversation, and the fields that stand beside it."""
    if not isinstance(record, dict):
        return record, {}
    value = next((record[name] for name in CONVERSATION_FIELDS if record.get(name) is not None), None)
    if field != AUTO:
        value = record.get(field)
    value = loaded(value)
    if isinstance(value, dict):  # a whole request, as servers log them
        return _find(value, AUTO)
    if field != AUTO or value is not None:
        return value, record
    return _pair(record), record


def _pair(record: Mapping[str, Any]) -> object:
    """A question and its answer as messages; None where the record has no such fields."""
    asked = next((name for name in ASKED_FIELDS if record.get(name) is not None), None)
    answered = next((name for name in ANSWERED_FIELDS if record.get(name) is not None), None)
    if answered is None:
        return None
    answer = _messages_in(record[answered])
    if isinstance(answer, list) and not _are_messages(answer):
        return None
    if isinstance(answer, list):
        # a preferred answer often repeats what was asked
        if asked is None or answer[0].get("role", answer[0].get("from")) not in ("assistant", "gpt", "model"):
            return answer
    elif asked is None:
        return None
    question = _messages_in(record[asked])
    for further in (record.get(name) for name in FURTHER_FIELDS if asked != "prompt"):
        if isinstance(question, str) and isinstance(further, str) and further.strip():
            question = f"{question}\n\n{further}"
    messages = question if isinstance(question, list) else [{"role": "user", "content": question}]
    earlier = _earlier(record.get("history"))
    answers = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return None if earlier is None else [*earlier, *messages, *answers]


def _earlier(history: object) -> list[dict[str, Any]] | None:
    """The turns before a question, as pairs of question and answer; None for what is none such."""
    pairs = loaded(history) or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return None
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(_ASKS, pair, strict=True)]


def _messages_in(value: object) -> object:
    """A list of messages, also out of the JSON that says it; anything else as it is, JSON that is an answer too."""
    found = loaded(value)
    return found if _are_messages(found) else value


def _are_messages(value: object) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        return False
    return all("role" in one or "from" in one for one in value)


def _tools(where: str, value: object) -> list[dict[str, Any]]:
    tools = loaded(value)
    if tools is None or tools == "":
        return []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecordError(
            "the tools cannot be read",
            where=where,
            found=ascii(value)[:80],
            expected='a list of definitions such as [{"type": "function", "function": {"name": "..."}}]',
        )
    # OpenAI's older `functions` are bare
    return [tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in tools]


def _require_roles(where: str, conversation: Conversation) -> None:
    """Raise BadRecordError for an unknown role."""
    for number, message in enumerate(conversation.messages, start=1):
        if message["role"] not in ROLES:
            raise BadRecordError(
                "unknown role",
                where=f"{where}, message {number}",
                found=ascii(message["role"])[:80],
                expected=f"one of {', '.join(ROLES)}, or ShareGPT's human, gpt, function_call and observation",
            )


def _text(where: str, record: object, field: str) -> str:
    value = record.get(field) if isinstance(record, dict) else None
    if isinstance(value, str):
        _require_text(where, value)
        return value
    is_there = isinstance(record, dict) and field in record
    raise BadRecordError(
        f"no text in field {field!r}",
        where=where,
        found=_kind(value) if is_there else _found(record),
        expected=f"{'' if isinstance(record, dict) else 'an object with '}a string in {field!r}",
        fix=_text_fix(record, is_there),
    )


def _text_fix(record: object, is_there: bool) -> str | None:
    if is_there:
        return SKIP
    if isinstance(record, list) and record and isinstance(record[0], dict):
        return "call a file that is one list .json"
    return "set corpus.text_field" if isinstance(record, dict) else None


def _kind(value: object) -> str:
    """A value that is no text, in the words of files."""
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return f"{len(value)} bytes of binary"
    kinds: dict[type, str] = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def _found(record: object) -> str:
    if isinstance(record, dict):
        return f"fields {', '.join(sorted(map(str, record)))}"[:200]
    return f"{_kind(record)} in place of a record" if not isinstance(record, str) else "a string in place of a record"


def _require_shallow(where: str, record: object, messages_field: str) -> None:
    read = fields_read("", messages_field)
    parts = [record[name] for name in read if name in record] if isinstance(record, dict) else record
    if is_deep(parts):
        raise BadRecordError(
            "messages or tools are nested too deeply",
            where=where,
            found=f"more than {MAX_DEPTH} lists and objects within one another",
            expected="no more",
        )


def _require_text(where: str, value: str) -> None:
    # JSON may hold half of a pair; the parser joins whole ones
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(
            "the text holds half of a surrogate pair, which UTF-8 cannot say",
            where=where,
            found=ascii(value[error.start]),
            expected="text",
            fix="repair or remove the record",
        ) from None
