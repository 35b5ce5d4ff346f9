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
        {"from": "FUNCTION_CALL", "value": '{"name": "add", "arguments": {"a": 3}}'},
    ],
)
def test_calls_of_tools_have_their_arguments_as_objects(turn: dict[str, Any]) -> None:
    assert _read({"messages": [ASKED, turn]}).messages == [ASKED, CALLED]


@pytest.mark.parametrize("arguments", ["", " ", "null", None, "{}", {}])
def test_a_call_without_arguments_has_an_empty_object_of_them(arguments: object) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": arguments}}]
    found = _read({"messages": [ASKED, {"role": "assistant", "tool_calls": calls}]}).messages[1]["tool_calls"]
    assert found == [{"type": "function", "function": {"name": "add", "arguments": {}}}]


@pytest.mark.parametrize("calls", [None, [], "[]", ""])
def test_a_message_with_an_empty_list_of_calls_has_none(calls: object) -> None:
    assert _read({"messages": [ASKED, {**ANSWERED, "tool_calls": calls}]}) == Conversation(BOTH, [])


@pytest.mark.parametrize("said", [{"from": "observation", "value": "7"}, {"role": "tool", "content": "7"}])
def test_what_a_tool_says_is_its_message(said: dict[str, str]) -> None:
    assert _read({"messages": [ASKED, CALLED, said]}).messages[-1] == {"role": "tool", "content": "7"}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), TOOL, [TOOL["function"]]])
@pytest.mark.parametrize("field", ["messages", AUTO])
def test_definitions_of_tools_beside_the_messages_are_kept(tools: Any, field: str) -> None:
    found = _read({"messages": BOTH, "tools": tools}, field)
    assert found == Conversation(BOTH, [TOOL])
    assert Conversation.from_json(found.to_json()) == found
    for none in ([], "[]", " ", "null", None):
        assert _read({"messages": BOTH, "tools": none}, field).tools == []


def test_a_named_field_is_the_one_that_is_read() -> None:
    other = [{"role": "user", "content": "other"}, ANSWERED]
    record = {"messages": BOTH, "chat": other, "request": {"messages": BOTH, "tools": [TOOL]}}
    assert _read(record, "chat").messages == other
    assert _read(record, "request") == Conversation(BOTH, [TOOL])
    with pytest.raises(BadRecordError, match=r"no messages in field 'turns'; found fields chat, messages, request"):
        _read(record, "turns")


@pytest.mark.parametrize("role", ["Assistant", "gpt", "ChatGPT", "model", "BOT", "ai"])
@pytest.mark.parametrize("field", ["chosen", "completion"])
def test_an_answer_of_messages_follows_its_prompt_whatever_the_assistant_is_called(role: str, field: str) -> None:
    for answer in ([{"role": role, "content": "7"}], [{"role": None, "from": role, "value": "7"}]):
        assert _read({"prompt": "3 + 4?", field: answer}).messages == BOTH
        assert _read({"prompt": "3 + 4?", field: json.dumps(answer)}).messages == BOTH


@pytest.mark.parametrize(
    "said",
    [
        '[{"from": "Paris", "to": "Rome"}]',
        '[{"role": "admin", "name": "Bob"}]',
        '[{"role": "user", "text": "Bob"}]',
        '[{"role": "assistant", "age": 3}]',
        '[{"role": "user"}, {"role": "assistant"}]',
    ],
)
def test_an_answer_that_is_json_is_a_text_unless_the_assistant_speaks_last_in_it(said: str) -> None:
    assert _read({"prompt": "3 + 4?", "completion": said}).messages == [ASKED, {"role": "assistant", "content": said}]
    if "assistant" not in said and "user" not in said:
        assert _read({"prompt": said, "completion": "7"}).messages == [{"role": "user", "content": said}, ANSWERED]
    assert _read({"prompt": "3 + 4?", "completion": json.dumps(BOTH)}).messages == BOTH


@pytest.mark.parametrize(
    ("beside", "question"),
    [
        ({"instruction": "Add.", "context": ["3", "4"]}, "Add.\n\n3\n4"),
        ({"instruction": "Add.", "input": [{"type": "text", "text": "3 + 4"}]}, "Add.\n\n3 + 4"),
        ({"instruction": "Add.", "context": "3 + 4", "input": "now"}, "Add.\n\n3 + 4\n\nnow"),
        ({"instruction": "", "input": "3 + 4?"}, "3 + 4?"),
        ({"prompt": "Add.", "input": "3 + 4"}, "Add.\n\n3 + 4"),
        ({"prompt": "Add 3 + 4 now.", "input": "3 + 4"}, "Add 3 + 4 now."),
    ],
)
def test_what_belongs_to_a_question_follows_it(beside: dict[str, Any], question: str) -> None:
    assert _read({**beside, "output": "7"}).messages == [{"role": "user", "content": question}, ANSWERED]


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_a_system_text_in_parts_begins_the_conversation(field: str) -> None:
    assert _read({field: [{"type": "text", "text": "Be brief."}], "messages": BOTH}).messages == [SYSTEM, *BOTH]
    assert _read({"system": " ", "system_prompt": "Be brief.", "messages": BOTH}).messages == [SYSTEM, *BOTH]


def test_conversations_that_say_the_same_are_the_same_whatever_an_export_puts_beside_it() -> None:
    called = {**CALLED, "reasoning_content": "I add."}
    plain = _read({"messages": [ASKED, called, {"role": "tool", "content": "7"}, ANSWERED], "tools": [TOOL]})
    exported = [
        {"id": "m1", "timestamp": 3, **ASKED},
        {**called, "tool_calls": [{"id": "call-9", "index": 0, **CALL}], "create_time": 4.5},
        {"role": "tool", "content": "7", "tool_call_id": "call-9"},
        {**ANSWERED, "weight": 0, "metadata": {"model": "m"}},
    ]
    found = _read({"messages": exported, "tools": [TOOL]})
    assert found.said == plain.said
    assert found.messages[0] == exported[0] and found.messages[3] == exported[3], "the template is given every field"
    assert Conversation.from_json(found.to_json()) == found
    for name, other in (
        ("role", "system"),
        ("content", "8?"),
        ("name", "Bob"),
        ("reasoning", "hm"),
        ("thinking", "hm"),
    ):
        assert _read({"messages": [{**ASKED, name: other}, *exported[1:]], "tools": [TOOL]}).said != plain.said
    other_call = {**CALL, "function": {"name": "add", "arguments": {"a": 4}}}
    changed = [exported[0], {**called, "tool_calls": [other_call]}, *exported[2:]]
    assert _read({"messages": changed, "tools": [TOOL]}).said != plain.said
    assert _read({"messages": exported}).said != plain.said


def test_the_words_of_a_conversation_are_what_is_said_in_it() -> None:
    thought = {**ANSWERED, "reasoning": "I add."}
    assert _read({"messages": [SYSTEM, ASKED, CALLED, thought]}).words == "Be brief.\n\n3 + 4?\n\nI add.\n\n7"


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
        ({"messages": [{"role": "", "content": "x"}]}, "a.jsonl:1, message 1: unknown role; found ''"),
        ({"messages": [{"role": "user", "content": ""}, ANSWERED]}, "message 1: a message of the user has no text; fo"),
        ({"messages": [{"role": "user", "content": " \n"}, ANSWERED]}, "message 1: a message of the user has no text"),
        ({"messages": [{"role": "user", "content": []}, ANSWERED]}, "message 1: a message of the user has no text"),
        ({"messages": [{"role": "user"}, ANSWERED]}, "message 1: a message of the user has no text; found fields role"),
        (["", "7"], "message 1: a message of the user has no text"),
        ({"instruction": "", "output": "7"}, "message 1: a message of the user has no text"),
        ({"instruction": "Add.", "input": 21, "output": "7"}, "a.jsonl:1, field 'input': .*found a part of type int"),
        ({"question": "3?", "context": {"title": ["a"]}, "answer": "7"}, "field 'context': .* a part of type object"),
        ({"instruction": 3, "output": "7"}, "field 'instruction': a message holds something other than text"),
        (
            {"question": [ASKED], "context": "x", "answer": "7"},
            "field 'context': a text stands beside a question that is",
        ),
        (
            {"system": 5, "messages": BOTH},
            "field 'system': a message holds something other than text; found a part of type int",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message 1: a message holds something other than text; found a part of type image_url, expected text alone",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "holds something other than text; found a part of type int"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": ["x"]}]}, "message 2: a tool call cannot be read"),
        ({"messages": [{"from": "function_call", "value": "no JSON"}]}, "message 1: a tool call cannot be read"),
        ({"messages": [{"from": "function_call", "value": "[]"}]}, "message 1: a tool call cannot be read"),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": '}]}]},
            "message 2: a tool call cannot be read",
        ),
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
