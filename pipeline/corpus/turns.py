"""Turns a list of turns, in any of the known forms, into messages with a role and a text."""

from __future__ import annotations

import json
from itertools import cycle
from typing import Any

from capgap.schemas.errors import BadRecordError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

MAX_DEPTH = 64
"""How many lists and objects may lie within one another in messages and tools; deeper ones are refused."""

SKIP = "remove the record, or set corpus.on_bad_record to skip"
"""The advice for a record that cannot be used."""

_ALSO_CALLED = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")
_CONTENTS = ("content", "value", "text")
_TEXT_PARTS = ("text", "input_text", "output_text")


def in_turns(where: str, value: object) -> list[dict[str, Any]] | None:
    """Return the messages of a list of turns; None if the value is no such list.

    Known forms are: texts in turn, the user's first; a question and an answer in each turn, as MiniChat's data has
    them; ShareGPT's `from` and `value`; OpenAI's `role` and `content`.

    Raises:
        BadRecordError: a turn holds something other than text, or a tool call that cannot be read.
    """
    value = loaded(value)
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(turn, str) for turn in value):
        value = [
            {"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), value, strict=False)
        ]
    if not all(isinstance(turn, dict) for turn in value):
        return None
    if all(turn.keys() == {"User", "Assistant"} for turn in value):
        value = [{"role": role.lower(), "content": turn[role]} for turn in value for role in ("User", "Assistant")]
    messages = []
    for number, turn in enumerate(value, start=1):
        role = role_of(turn)
        if role is None:
            return None
        messages.append(_message(f"{where}, message {number}", turn, role))
    return messages


def role_of(turn: dict[str, Any]) -> str | None:
    """Return the role of a turn, as `ROLES` names it if it is a known one; None if the turn names no role."""
    # in a table, a field that a turn does not use is null
    said = turn.get("from") if turn.get("role") is None else turn["role"]
    if not isinstance(said, str):
        return None
    role = said.lower()
    if role in _CALLS:
        return "assistant"
    role = _ALSO_CALLED.get(role, role)
    return role if role in ROLES else said


def are_turns(value: object) -> bool:
    """Return whether the value is certainly a list of turns: each has a known role, and content or tool calls."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return False
    says = (*_CONTENTS, "tool_calls", "function_call")
    return all(role_of(turn) in ROLES and any(turn.get(name) is not None for name in says) for turn in value)


def _message(where: str, turn: dict[str, Any], role: str) -> dict[str, Any]:
    # in a table, a field that a message does not use is null
    parts = {name: part for name, part in turn.items() if part is not None}
    said = parts.pop("role" if "role" in parts else "from")
    named = next((name for name in _CONTENTS if name in parts), None)
    content = None if named is None else parts.pop(named)
    if said.lower() in _CALLS:
        return {**parts, "role": role, "content": "", "tool_calls": _calls(where, content)}
    message = {"role": role, "content": content_of(where, content), **parts}
    if role == "user" and not message["content"].strip():
        raise BadRecordError(
            "a message of the user has no text",
            where=where,
            found=f"fields {', '.join(map(str, turn))}"[:200] if named is None else ascii(content)[:80],
            expected=f"a text in one of {', '.join(_CONTENTS)}",
            fix=SKIP,
        )
    if not _is_learnt(where, message):
        message["weight"] = 0
    older = message.pop("function_call", None)
    calls = loaded(message.pop("tool_calls", None)) or ([] if older is None else [older])
    if calls:
        message["tool_calls"] = _calls(where, calls)
    return message


def _is_learnt(where: str, message: dict[str, Any]) -> bool:
    """Return whether an answer is learnt, by OpenAI's field `weight` and Axolotl's `train`, and remove both fields."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1) or train not in (True, False):
        raise BadRecordError(
            "a message's weight is neither 0 nor 1",
            where=where,
            found=f"weight {weight}, train {train}",
            expected="0 or 1",
            fix=SKIP,
        )
    return bool(weight and train)


def content_of(where: str, value: object) -> str:
    """Return the text of a message: text parts are joined by a line break, as servers join them; null is empty.

    Raises:
        BadRecordError: a part is no text.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type", "object") if isinstance(part, dict) else type(part).__name__
            raise BadRecordError(
                "a message holds something other than text",
                where=where,
                found=f"a part of type {kind}",
                expected="text alone",
                fix=SKIP,
            )
    return "\n".join(texts)


def _calls(where: str, value: object) -> list[dict[str, Any]]:
    """Return one or more tool calls with their arguments as objects, which is how chat templates expect them."""
    found = loaded(value)
    calls = []
    for call in found if isinstance(found, list) and found else [found]:
        called = {name: part for name, part in call.items() if part is not None} if isinstance(call, dict) else {}
        function = called.get("function", called)
        arguments = _arguments(function.get("arguments")) if isinstance(function, dict) else None
        if arguments is None or not isinstance(function.get("name"), str):
            raise BadRecordError(
                "a tool call cannot be read",
                where=where,
                found=ascii(call)[:80],
                expected='an object such as {"type": "function", "function": {"name": "...", "arguments": {...}}}',
                fix=SKIP,
            )
        function = {name: part for name, part in function.items() if part is not None and name not in ("id", "type")}
        function["arguments"] = arguments
        around = {name: called[name] for name in ("id", "type") if name in called}
        calls.append({"type": "function", **around, "function": function})
    return calls


def _arguments(value: object) -> dict[str, Any] | None:
    """Return the arguments of a tool call; an empty text stands for none, as in vLLM. None if they are no object."""
    found = loaded(value)
    if found is None or (isinstance(found, str) and found.strip() in ("", "null")):
        return {}
    return found if isinstance(found, dict) else None


def loaded(value: object) -> Any:
    """Return the object or list that a string of JSON holds; other values and too deep JSON are returned unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, (dict, list)) and not is_deep(found) else value


def is_deep(value: object) -> bool:
    """Return whether more than `MAX_DEPTH` lists and objects lie within one another."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return any(isinstance(one, (dict, list)) for one in level)
