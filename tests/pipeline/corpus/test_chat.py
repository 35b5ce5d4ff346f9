from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from capgap.pipeline.corpus.chat import MarkedChat
from capgap.pipeline.corpus.conversations import ChatFormat
from capgap.pipeline.corpus.sources import Document, read_documents
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.store import read_blocks
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import BadRecordError, InputError
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

CORPUS = Instance("corpus")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant') %}{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "[{{ message.role }}] "
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n"
    "{% endfor %}"
)


def _tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(["how much is 3 times 4? that is 12, [user] [assistant] " * 20], 300)
    tokenizer.chat_template = template
    return tokenizer


def _conversations(count: int = 40) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": f"how much is {i} times {k}?"},
            {"role": "assistant", "content": f"that is {i * k}, always."},
            {"role": "user", "content": "and again?"},
            {"role": "assistant", "content": f"still {i * k}."},
        ]
        for i in range(count)
        for k in (i % 7,)
    ]


def _run(folder: Path, **corpus: Any) -> RunFile:
    settings = {
        "tokenizer": str(folder / "tokenizer"),
        "messages_field": "messages",
        "seq_len": 24,
        "teacher_fraction": 0.3,
        "heldout_fraction": 0.2,
    }
    return RunFile.model_validate(
        {
            "name": "chat",
            "out": str(folder / "out"),
            "corpus": settings | corpus,
            "teacher": {"model": {}},
            "student": {"model": {}},
        }
    )


def _write(folder: Path, records: list[dict[str, Any]], template: str | None = TEMPLATE) -> str:
    _tokenizer(template).save_pretrained(folder / "tokenizer")
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _answers(folder: Path, manifest: Manifest) -> tuple[str, str]:
    """All that is read, and of it what counts, over all splits."""
    tokenizer = _tokenizer()
    tokens, masks = [], []
    for shard_set in manifest.shard_sets.values():
        for block, _ in read_blocks(folder / "out" / "corpus", shard_set):
            tokens.append(block.tokens_BL1.ravel())
            masks.append(block.mask_BL1.ravel())
    ids, counts = np.concatenate(tokens), np.concatenate(masks)
    return tokenizer.decode(ids), tokenizer.decode(ids[counts])


def test_what_the_assistant_says_counts_and_nothing_else(tmp_path: Path) -> None:
    source = _write(tmp_path, [{"messages": messages, "id": 3} for messages in _conversations()])
    manifest = carry_out(_run(tmp_path, sources=[source]), CORPUS)
    text, counted = _answers(tmp_path, manifest)
    end = _tokenizer().eos_token
    # an answer that a split ends within, or a sequence, counts as far as it goes; sequences are cut within answers too
    assert counted.count("that is") in range(34, 41) and counted.count(end) in range(65, 81)
    assert set("".join(counted.split(end))) <= set("that is always, still 0123456789.")
    for word in ("[user]", "[assistant]", "how much", "and again"):
        assert word in text and word not in counted
    assert text.count(end) == counted.count(end), "the template's own end ends the document: no second one is added"
    labels = sum(manifest.totals[f"num_{split}_labels"] for split in ("teacher", "student", "heldout"))
    assert 0 < labels < sum(shard_set.num_tokens for shard_set in manifest.shard_sets.values())
    assert "chat_template.jinja" in {Path(file.path).name for file in manifest.files}


def test_text_beside_conversations_counts_whole(tmp_path: Path) -> None:
    _write(tmp_path, [{"messages": messages} for messages in _conversations()])
    (tmp_path / "plain.txt").write_text("plain words " * 200)
    text, counted = _answers(
        tmp_path, carry_out(_run(tmp_path, sources=[str(tmp_path / "*.jsonl"), str(tmp_path / "plain.txt")]), CORPUS)
    )
    assert text.count("plain words") == counted.count("plain words") > 190


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_messages_are_the_same_from_lines_and_from_tables(tmp_path: Path, suffix: str) -> None:
    records = [{"messages": messages} for messages in _conversations(3)]
    records[1]["messages"][0]["name"] = "Ada"  # in a table the others have an empty one
    path = tmp_path / f"chat.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pa.parquet.write_table(pa.Table.from_pylist(records), path)
    documents = list(read_documents((str(path),), "text", "messages"))
    assert [json.loads(document.messages or "") for document in documents] == [r["messages"] for r in records]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "no"}, "chat.jsonl:41: no messages in field 'messages'; found fields text, expected a list such as"),
        ({"messages": []}, r"chat.jsonl:41: no messages in field 'messages'; found \[\], expected a list such as"),
        ({"messages": [{"content": "x"}]}, r"chat.jsonl:41: no messages .*found \[\{'content': 'x'\}\]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "chat.jsonl:41: the chat template refuses .*found no role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "chat.jsonl:41: the text holds half of a"),
    ],
)  # fmt: skip
def test_a_record_that_is_no_conversation_is_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    source = _write(tmp_path, [*({"messages": messages} for messages in _conversations()), record])
    with pytest.raises(InputError, match=message):
        carry_out(_run(tmp_path, sources=[source]), CORPUS)


BAD: list[Any] = [
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]},
    {"messages": [{"role": "narrator", "content": "x"}]},
    {"text": "no conversation"},
    "no record",
]


@pytest.mark.parametrize("settings", [{}, {"whole_conversations": True, "context": "document", "seq_len": 64}])
def test_bad_conversations_are_skipped_counted_and_named(
    tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    template = TEMPLATE + "{% if add_generation_prompt %}[assistant] {% endif %}"
    source = _write(tmp_path, [*({"messages": messages} for messages in _conversations()), *BAD], template)
    with caplog.at_level(logging.WARNING, "capgap"):
        skipped = _run(tmp_path, sources=[source], on_bad_record="skip", max_bad_fraction=0.2, **settings)
        manifest = carry_out(skipped, CORPUS)
    assert manifest.totals["num_bad_records"] == len(BAD)
    for number in range(41, 46):
        assert sum(f"chat.jsonl:{number}" in message for message in caplog.messages) == 1
    with pytest.raises(InputError, match=r"too many records cannot be used; found 5 of 45 records, first corpus"):
        carry_out(_run(tmp_path, sources=[source], on_bad_record="skip", **settings), CORPUS, remake=True)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_conversation_stops_the_corpus_by_name(tmp_path: Path, bad: Any) -> None:
    source = _write(tmp_path, [*({"messages": messages} for messages in _conversations()), bad])
    with pytest.raises(BadRecordError, match=r"^corpus.sources: .*chat.jsonl:41"):
        carry_out(_run(tmp_path, sources=[source]), CORPUS)


def _exported(count: int, times: int) -> list[dict[str, Any]]:
    """Each conversation so many times, every message with an id and a time of its own."""
    return [
        {"messages": [{**message, "id": f"{time}-{number}-{i}", "at": time} for i, message in enumerate(messages)]}
        for time in range(times)
        for number, messages in enumerate(_conversations(count))
    ]


@pytest.mark.parametrize("dedup", ["unit", "all"])
def test_a_conversation_that_was_exported_twice_counts_once_and_reaches_one_split(tmp_path: Path, dedup: str) -> None:
    source = _write(tmp_path, _exported(40, 2))
    manifest = carry_out(_run(tmp_path, sources=[source], dedup=dedup), CORPUS)
    assert manifest.totals["num_repeated_documents"] == 40
    once = carry_out(_run(tmp_path, sources=[_write(tmp_path, _exported(40, 1))], dedup=dedup), CORPUS, remake=True)
    assert once.shard_sets == manifest.shard_sets


def test_every_form_of_a_conversation_makes_the_same_corpus(tmp_path: Path) -> None:
    from_value = {"user": "human", "assistant": "gpt"}
    forms: dict[str, list[Any]] = {
        "messages": [{"messages": messages} for messages in _conversations()],
        "json": [{"messages": json.dumps(messages)} for messages in _conversations()],
        "sharegpt": [
            {"conversations": [{"from": from_value[m["role"]], "value": m["content"]} for m in messages]}
            for messages in _conversations()
        ],
        "prompt": [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in _conversations()],
    }
    found = {}
    for name, records in forms.items():
        (tmp_path / name).mkdir()
        source = _write(tmp_path / name, records)
        manifest = carry_out(_run(tmp_path / name, sources=[source], messages_field="auto"), CORPUS)
        found[name] = _answers(tmp_path / name, manifest)
    assert all(one == found["messages"] for one in found.values())


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (None, "found no chat template, expected one with {% generation %} and"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "found no marks, expected one with {% gener",
        ),
    ],
)
def test_a_template_that_does_not_mark_answers_is_refused(tmp_path: Path, template: str | None, found: str) -> None:
    source = _write(tmp_path, [{"messages": messages} for messages in _conversations()], template)
    with pytest.raises(InputError, match=f"corpus.tokenizer: {tmp_path}/tokenizer: the chat template .*{found}"):
        carry_out(_run(tmp_path, sources=[source]), CORPUS)


def test_marks_whose_place_in_the_text_is_not_known_are_refused_before_the_text_is_read(tmp_path: Path) -> None:
    before, _, turn = TEMPLATE.partition("[{{")
    template = before + "{% filter trim %}[{{" + turn.replace("\n", "{% endfilter %}\n")
    source = _write(tmp_path, [{"messages": messages} for messages in _conversations()], template)
    said = f"corpus.tokenizer: {tmp_path}/tokenizer: the chat template marks answers within a macro, a filter"
    with pytest.raises(InputError, match=said):
        carry_out(_run(tmp_path, sources=[source]), CORPUS)
    assert not (tmp_path / "out" / "corpus" / "work" / "listing.json").exists()


@pytest.mark.parametrize("answer", ["smile \U0001f600", "\U0001f600", "\U0001f600 smile"])
def test_each_token_of_a_character_at_the_edge_of_an_answer_is_learnt(answer: str) -> None:
    tokenizer = _tokenizer(TEMPLATE.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"))
    messages = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}])
    made = MarkedChat(tokenizer, "it").encode(Document("chat.jsonl:1", "", messages))
    assert made.mask is not None
    learnt = [one for one, counts in zip(made.ids, made.mask, strict=True) if counts]
    assert tokenizer.decode(learnt).strip() == answer


@pytest.mark.parametrize("role", ["tool", "function"])
@pytest.mark.parametrize("of_chat", [MarkedChat, ChatFormat])
def test_a_conversation_whose_tool_result_the_template_leaves_out_is_named(
    role: str, of_chat: type[MarkedChat] | type[ChatFormat]
) -> None:
    # as many templates do it with roles that they do not know
    loses = TEMPLATE.replace("{{ raise_exception('no role ' + message.role) }}", "{% continue %}")
    loses += "{% if add_generation_prompt %}[assistant] {% endif %}"
    writes = loses.replace("{% continue %}", "[result] {{ message.content | tojson }}\n{% continue %}")
    # the result stands elsewhere too
    turns = [("user", "3 + 4?"), ("assistant", "let me see"), (role, '{"sum": "7"}'), ("assistant", '{"sum": "7"}')]
    messages = json.dumps([{"role": role, "content": content} for role, content in turns])
    document = Document("chat.jsonl:1", "", messages)
    with pytest.raises(BadRecordError, match=f"chat.jsonl:1, message 3: the chat template leaves out .* role {role}"):
        of_chat(_tokenizer(loses), "it").encode(document)
    of_chat(_tokenizer(writes), "it").encode(document)


def test_conversations_without_any_answer_are_refused(tmp_path: Path) -> None:
    source = _write(tmp_path, [{"messages": messages[:1]} for messages in _conversations(200)])
    with pytest.raises(InputError, match=r"no token counts as a label in the split teacher; found .* without an"):
        carry_out(_run(tmp_path, sources=[source]), CORPUS)


ENDED = TEMPLATE.replace("[{{ message.role }}] ", "[{{ message.role }}]{{ eos_token }}")


@pytest.mark.parametrize(
    ("template", "is_in_one_row"),
    [
        (ENDED + "{% if add_generation_prompt %}[assistant]{{ eos_token }}{% endif %}", True),
        (TEMPLATE + "{% if add_generation_prompt %}[assistant] {% endif %}", False),
    ],
)
@pytest.mark.parametrize("most", [{}, {"student": 8 * 80, "heldout": 1}])
def test_whole_conversations_are_counted_without_their_padding_and_as_far_as_they_are_taken(
    tmp_path: Path, template: str, is_in_one_row: bool, most: dict[str, int]
) -> None:
    source = _write(tmp_path, [{"messages": messages} for messages in _conversations(200)], template)
    settings = {"sources": [source], "whole_conversations": True, "context": "document", "shard_sequences": 8}
    manifest = carry_out(_run(tmp_path, **settings, seq_len=80, max_tokens=most), CORPUS)
    for split in ("student", "heldout"):
        blocks = [block for block, _ in read_blocks(tmp_path / "out" / "corpus", manifest.shard_sets[split])]
        text = "".join(_tokenizer().decode(block.tokens_BL1.ravel()) for block in blocks)
        facts = manifest.facts["splits"][split]
        (counts,) = facts["by_source"].values()
        assert facts["num_documents"] == counts["num_documents"] == len(set(re.findall(r"how much is (\d+)", text)))
        assert sum(facts["by_length"]) == facts["num_documents"]
        if is_in_one_row or not most:
            assert counts["num_labels"] == manifest.totals[f"num_{split}_labels"]
            assert counts["num_text_tokens"] <= manifest.shard_sets[split].num_tokens * 81 // 80
        if most:
            assert manifest.shard_sets[split].num_sequences == 8


def test_a_conversation_that_is_too_long_is_split_dropped_or_refused_as_text_is(tmp_path: Path) -> None:
    long = [*_conversations(1)[0], {"role": "assistant", "content": "very " * 40}]
    source = _write(tmp_path, [*({"messages": messages} for messages in _conversations()), {"messages": long}])
    counted = {}
    for rule in ("split", "drop"):
        run = _run(tmp_path, sources=[source], long_documents=rule, seq_len=100)
        counted[rule] = _answers(tmp_path, carry_out(run, CORPUS, remake=True))[1].count("very")
    # less what fills no sequence at the end of its split
    assert counted["split"] > 20 and counted["drop"] == 0
    with pytest.raises(InputError, match=r"chat.jsonl:41: the document is longer than a sequence; found \d+ tokens"):
        carry_out(_run(tmp_path, sources=[source], long_documents="refuse", seq_len=100), CORPUS, remake=True)
