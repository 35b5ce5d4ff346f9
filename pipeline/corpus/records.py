"""Turns one record, in any of the known forms, into text or into a conversation as chat templates expect it.

    {"messages": [{"role": ..., "content": ...}], "tools": [...]}        OpenAI's form, with text parts and tool calls
    {"conversations": [{"from": "human", "value": ...}]}                 ShareGPT's form
    {"instruction": ..., "input": ..., "output": ...}                    forms of question and answer, as Alpaca's and
                                                                         Dolly's, with `context` and `history`
    [{"role": ...}], ["question", "answer"], [{"User": ..., "Assistant": ...}]      a list, alone or in a field

A list may also be given as a string of JSON. A record that cannot be used raises an error that names its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capgap.pipeline.corpus.pairs import ANSWERED_FIELDS, ASKED_FIELDS, FURTHER_FIELDS, HISTORY_FIELD, pair_of
from capgap.pipeline.corpus.turns import MAX_DEPTH, ROLES, SKIP, content_of, in_turns, is_deep, loaded
from capgap.schemas.errors import BadRecordError

AUTO = "auto"
"""Value of `messages_field` with which the record's own keys say where its conversation is."""

CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
SYSTEM_FIELDS = ("system", "system_prompt")
BESIDE_FIELDS = (*FURTHER_FIELDS, HISTORY_FIELD, *SYSTEM_FIELDS, "tools", "functions")

THOUGHTS = ("reasoning", "reasoning_content", "thinking")
"""Fields of a message that hold the model's reasoning before its answer."""

_SAID = tuple(sorted(("role", "content", "name", *THOUGHTS)))
"""Fields of a message by which, beside its tool calls, two conversations are compared."""

_A_LIST = 'a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates expect them, and the tools that the assistant may call.

    Attributes:
        messages: the messages, each with a `role` (one of `ROLES`) and a string as `content`; the arguments of its
            `tool_calls` are objects.
        tools: definitions of tools, which the chat template is given beside the messages; empty if there are none.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]

    def to_json(self) -> str:
        """Return the whole conversation as JSON: a list of messages, or an object of messages and tools."""
        return self._written([dict(sorted(message.items())) for message in self.messages])

    @property
    def said(self) -> str:
        """The JSON of what is said: equal for equal conversations, whatever ids, times and weights stand beside it.

        Definitions and arguments keep their order, because a template writes them in this order.
        """
        return self._written([_said(message) for message in self.messages])

    @property
    def words(self) -> str:
        """The text of all messages, including reasoning, without the JSON around it."""
        texts = (message[name] for message in self.messages for name in (*THOUGHTS, "content") if name in message)
        return "\n\n".join(text for text in texts if isinstance(text, str) and text)

    def _written(self, messages: list[dict[str, Any]]) -> str:
        value = {"messages": messages, "tools": self.tools} if self.tools else messages
        return json.dumps(value, ensure_ascii=False, default=str)

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """Return the conversation that `to_json` wrote."""
        value = json.loads(text)
        return cls(value, []) if isinstance(value, list) else cls(value["messages"], value["tools"])


def _said(message: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a message that say something, sorted by name; tool calls lose their ids, which vary."""
    said = {name: message[name] for name in _SAID if name in message}
    if "tool_calls" in message:
        functions = (call["function"] for call in message["tool_calls"])
        said["tool_calls"] = [{"name": one["name"], "arguments": one["arguments"]} for one in functions]
    return said


def read_record(where: str, record: object, text_field: str, messages_field: str | None) -> str | Conversation:
    """Return the text of a record, or its conversation if `messages_field` is given.

    Args:
        where: file and place of the record, for errors.
        record: the record as the file holds it.
        text_field: the field that holds the text.
        messages_field: the field that holds the conversation, or `auto`; None for a text.

    Raises:
        BadRecordError: the text or the conversation is missing, or cannot be used.
    """
    if messages_field is None:
        return _text(where, record, text_field)
    _require_shallow(where, record, messages_field)
    found, fields = _find(where, record, messages_field)
    messages = in_turns(where, found)
    if messages is None:
        raise BadRecordError(
            "no conversation" if messages_field == AUTO else f"no messages in field {messages_field!r}",
            where=where,
            found=_found(record) if found is None else ascii(found)[:80],
            expected=_A_LIST,
            fix="set corpus.messages_field, or leave it out for plain text",
        )
    systems = [content_of(f"{where}, field {name!r}", fields.get(name)) for name in SYSTEM_FIELDS]
    system = next((text for text in systems if text.strip()), None)
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    tools = _tools(where, next((fields[name] for name in ("tools", "functions") if fields.get(name)), None))
    conversation = Conversation(messages, tools)
    _require_roles(where, conversation)
    _require_text(where, conversation.to_json())
    return conversation


def fields_read(text_field: str, messages_field: str | None) -> tuple[str, ...]:
    """Return the names of all fields that `read_record` may use, which are the columns to read from a table."""
    if messages_field is None:
        return (text_field,)
    if messages_field == AUTO:
        return (*CONVERSATION_FIELDS, *ASKED_FIELDS, *ANSWERED_FIELDS, *BESIDE_FIELDS)
    return (messages_field, *BESIDE_FIELDS)


def _find(where: str, record: object, field: str) -> tuple[object, Mapping[str, Any]]:
    """Return the value that holds the conversation, and the record whose other fields belong to it."""
    if not isinstance(record, dict):
        return record, {}
    value = next((record[name] for name in CONVERSATION_FIELDS if record.get(name) is not None), None)
    if field != AUTO:
        value = record.get(field)
    value = loaded(value)
    if isinstance(value, dict):  # the field holds a whole request, as servers log it
        return _find(where, value, AUTO)
    if field != AUTO or value is not None:
        return value, record
    return pair_of(where, record), record


def _tools(where: str, value: object) -> list[dict[str, Any]]:
    tools = loaded(value)
    if tools is None or (isinstance(tools, str) and tools.strip() in ("", "null")):
        return []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecordError(
            "the tools cannot be read",
            where=where,
            found=ascii(value)[:80],
            expected='a list of definitions such as [{"type": "function", "function": {"name": "..."}}]',
        )
    # OpenAI's older `functions` are definitions without the object around them
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
        return "give a file that is one list the suffix .json"
    return "set corpus.text_field" if isinstance(record, dict) else None


def _kind(value: object) -> str:
    """Name the type of a value that is no text, in the words of JSON."""
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
            expected="at most that many",
        )


def _require_text(where: str, value: str) -> None:
    # JSON may hold one half of a surrogate pair; the parser joins the halves only where both are there
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(
            "the text holds half of a surrogate pair, which UTF-8 cannot encode",
            where=where,
            found=ascii(value[error.start]),
            expected="text",
            fix="repair or remove the record",
        ) from None
