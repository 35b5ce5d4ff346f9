from __future__ import annotations

import json
from typing import Any

import pytest

from capgap.pipeline.corpus.records import AUTO, Conversation, read_record
from capgap.schemas.errors import BadRecordError

ASKED, ANSWERED = {"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "7"}
BOTH = [ASKED, ANSWERED]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def _read(record: Any, field: str | None = AUTO) -> Any:
    return read_record("a.jsonl:1", record, "text", field)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": BOTH}, BOTH),
        ({"messages": json.dumps(BOTH)}, BOTH),
        (BOTH, BOTH),
        (json.dumps(BOTH), BOTH),
        (["3 + 4?", "7"], BOTH),
        ({"conversation": [{"User": "3 + 4?", "Assistant": "7"}]}, BOTH),
        ({"conversations": [{"from": "human", "value": "3 + 4?"}, {"from": "gpt", "value": "7"}]}, BOTH),
        ({"conversations": [{"role": "user", "value": "3 + 4?"}, {"from": "model", "content": "7"}]}, BOTH),
        ({"system": "Be brief.", "conversations": BOTH}, [SYSTEM, *BOTH]),
        ({"system": "Be long.", "messages": [SYSTEM, *BOTH]}, [SYSTEM, *BOTH]),
        ({"instruction": "3 + 4?", "input": "", "output": "7"}, BOTH),
        (
            {"instruction": "Add.", "input": "3 + 4", "output": "7"},
            [{"role": "user", "content": "Add.\n\n3 + 4"}, ANSWERED],
        ),
        ({"prompt": "3 + 4?", "completion": "7"}, BOTH),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, BOTH),
        ({"prompt": "3 + 4?", "chosen": "7", "rejected": "8"}, BOTH),
        ({"prompt": "3 + 4?", "chosen": BOTH, "rejected": []}, BOTH),
        ({"prompt": [ASKED], "chosen": [ANSWERED], "rejected": []}, BOTH),
        ({"chosen": BOTH, "rejected": BOTH}, BOTH),
        ({"system_prompt": "Be brief.", "question": "3 + 4?", "response": "7"}, [SYSTEM, *BOTH]),
        ({"prompt": "3 + 4?", "completion": '{"sum": 7}'}, [ASKED, {"role": "assistant", "content": '{"sum": 7}'}]),
        ({"prompt": "3 + 4?", "completion": "[7]"}, [ASKED, {"role": "assistant", "content": "[7]"}]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "3 + 4?"}]}, ANSWERED]}, BOTH),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "3 +"}, "4?"]}, ANSWERED]},
            [{"role": "user", "content": "3 +\n4?"}, ANSWERED],
        ),
        ({"messages": [{"role": "developer", "content": "Be brief.", "name": None}, *BOTH]}, [
            {"role": "developer", "content": "Be brief."}, *BOTH,
        ]),
    ],
)  # fmt: skip
def test_every_usual_form_is_the_same_conversation(record: Any, messages: list[dict[str, Any]]) -> None:
    assert _read(record) == Conversation(messages, [])


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 3}'}, "type": None}]},
        {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"a": 3}'}},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([{"name": "add", "arguments": {"a": 3}}])},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 3}}'},
    ],
)
def test_calls_of_tools_have_their_arguments_as_objects(turn: dict[str, Any]) -> None:
    assert _read({"messages": [ASKED, turn]}).messages == [ASKED, CALLED]


@pytest.mark.parametrize("said", [{"from": "observation", "value": "7"}, {"role": "tool", "content": "7"}])
def test_what_a_tool_says_is_its_message(said: dict[str, str]) -> None:
    assert _read({"messages": [ASKED, CALLED, said]}).messages[-1] == {"role": "tool", "content": "7"}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), TOOL, [TOOL["function"]]])
@pytest.mark.parametrize("field", ["messages", AUTO])
def test_definitions_of_tools_beside_the_messages_are_kept(tools: Any, field: str) -> None:
    found = _read({"messages": BOTH, "tools": tools}, field)
    assert found == Conversation(BOTH, [TOOL])
    assert Conversation.from_json(found.to_json()) == found
    assert _read({"messages": BOTH, "tools": []}, field).tools == []


def test_a_named_field_is_the_one_that_is_read() -> None:
    other = [{"role": "user", "content": "other"}, ANSWERED]
    record = {"messages": BOTH, "chat": other, "request": {"messages": BOTH, "tools": [TOOL]}}
    assert _read(record, "chat").messages == other
    assert _read(record, "request") == Conversation(BOTH, [TOOL])
    with pytest.raises(BadRecordError, match=r"no messages in field 'turns'; found fields chat, messages, request"):
        _read(record, "turns")


def _nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "x"},
            "a.jsonl:1: no conversation; found fields text, expected a list such .*set corpus.messages_f",
        ),
        ({"messages": []}, r"no conversation; found \[\]"),
        ({"messages": [{"content": "x"}]}, "no conversation; found"),
        ({"messages": "no JSON"}, "no conversation; found 'no JSON'"),
        ({"prompt": "only"}, "no conversation; found fields prompt"),
        (None, "no conversation; found null in place of a record"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "a.jsonl:1, message 1: unknown role; found 'narrator'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message 1: a message holds what is no text; found a part of type image_url, expected text alone",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "holds what is no text; found a part of type int"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": ["x"]}]}, "message 2: a tool call cannot be read"),
        ({"messages": [{"from": "function_call", "value": "no JSON"}]}, "message 1: a tool call cannot be read"),
        ({"messages": BOTH, "tools": "search"}, "the tools cannot be read; found 'search'"),
        ({"messages": _nested(70)}, "nested too deeply; found more than 64"),
        ({"messages": _nested(900)}, "nested too deeply"),
        ({"messages": "[" * 900 + "]" * 900}, "no conversation"),
        ({"messages": '{"messages": ' * 900 + "1" + "}" * 900}, "no conversation"),
        ({"messages": BOTH, "tools": _nested(900)}, "nested too deeply"),
        ({"messages": [{"role": "user", "content": "\ud800"}, ANSWERED]}, "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_a_conversation_is_named_with_its_place(record: Any, message: str) -> None:
    with pytest.raises(BadRecordError, match=message):
        _read(record)


@pytest.mark.parametrize(
    ("value", "found"),
    [(None, "null"), (b"x\xff", "2 bytes of binary"), (3, "a number"), ([], "a list"), ({}, "an object")],
)
def test_a_field_that_holds_no_text_is_named_as_what_it_is(value: object, found: str) -> None:
    with pytest.raises(BadRecordError, match=rf"no text in field 'text'; found {found}, expected a string .*skip"):
        _read({"text": value}, None)
