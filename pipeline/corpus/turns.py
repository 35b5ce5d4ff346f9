"""A list of turns, in whichever of the known forms, into messages with a role and text."""

from __future__ import annotations

import json
from itertools import cycle
from typing import Any

from capgap.schemas.errors import BadRecordError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

MAX_DEPTH = 64
"""Lists and objects within one another, in messages and tools; what is deeper is refused."""

SKIP = "remove the record, or set corpus.on_bad_record to skip"
"""What can be done about a record that cannot be used."""

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
    """The messages; None where it is no list of turns.

    Texts in turn, the user's first; question and answer of each turn, as MiniChat's data has them; ShareGPT's `from`
    and `value`; OpenAI's `role` and `content`.

    Raises:
        BadRecordError: a turn holds what is no text, or a call that cannot be read.
    """
    value = loaded(value)
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(turn, str) for turn in value):
        return [
            {"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), value, strict=False)
        ]
    if not all(isinstance(turn, dict) for turn in value):
        return None
    if all(turn.keys() == {"User", "Assistant"} for turn in value):
        value = [{"role": role.lower(), "content": turn[role]} for turn in value for role in ("User", "Assistant")]
    messages = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn.get("role", turn.get("from")), str):
            return None
        messages.append(_message(f"{where}, message {number}", turn))
    return messages


def _message(where: str, turn: dict[str, Any]) -> dict[str, Any]:
    # a table fills up what a message does not have
    parts = {name: part for name, part in turn.items() if part is not None}
    role = parts.pop("role", None) or parts.pop("from")
    named = next((name for name in _CONTENTS if name in parts), None)
    content = None if named is None else parts.pop(named)
    if role.lower() in (*ROLES, *_ALSO_CALLED, *_CALLS):
        role = role.lower()
    if role in _CALLS:
        return {**parts, "role": "assistant", "content": "", "tool_calls": _calls(where, content)}
    message = {"role": _ALSO_CALLED.get(role, role), "content": _content(where, content), **parts}
    if named is None and message["role"] == "user":
        raise BadRecordError(
            "a message has no text",
            where=where,
            found=f"fields {', '.join(map(str, turn))}"[:200],
            expected=f"one of {', '.join(_CONTENTS)}",
            fix=SKIP,
        )
    if not _is_learnt(where, message):
        message["weight"] = 0
    older = message.pop("function_call", None)
    if older is not None and not message.get("tool_calls"):
        message["tool_calls"] = [older]
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    else:
        message["tool_calls"] = _calls(where, message["tool_calls"])
    return message


def _is_learnt(where: str, message: dict[str, Any]) -> bool:
    """Whether a message counts where it is an answer: `weight` says so as OpenAI has it, `train` as Axolotl does."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1) or train not in (True, False):
        raise BadRecordError(
            "a message counts in part",
            where=where,
            found=f"weight {weight}, train {train}",
            expected="0 or 1",
            fix=SKIP,
        )
    return bool(weight and train)


def _content(where: str, value: object) -> str:
    """Text as it is, text parts joined by a line break as servers join them, and nothing as an empty text."""
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
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRecordError(
                "a message holds what is no text", where=where, found=f"a part of type {kind}", expected="text alone"
            )
    return "\n".join(texts)


def _calls(where: str, value: object) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is how chat templates expect them."""
    found = loaded(value)
    calls = []
    for call in found if isinstance(found, list) else [found]:
        called = {name: part for name, part in call.items() if part is not None} if isinstance(call, dict) else {}
        function = called.get("function", called)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecordError(
                "a tool call cannot be read",
                where=where,
                found=ascii(call)[:80],
                expected='an object such as {"type": "function", "function": {"name": "...", "arguments": {...}}}',
            )
        function = {name: part for name, part in function.items() if part is not None and name not in ("id", "type")}
        function["arguments"] = loaded(function.get("arguments", {}))
        around = {name: called[name] for name in ("id", "type") if name in called}
        calls.append({"type": "function", **around, "function": function})
    return calls


def loaded(value: object) -> Any:
    """What a JSON text says of an object or a list; any other value, and text that is too deep, as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, (dict, list)) and not is_deep(found) else value


def is_deep(value: object) -> bool:
    """Whether more than `MAX_DEPTH` lists and objects lie within one another."""
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
