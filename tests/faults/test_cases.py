"""Inputs of real reports that once went wrong: each is written anew, as small as it can be, and the command is typed.

    byte-level files declared Llama's                     test_a_byte_level_tokenizer_that_is_declared_llama_s_...
    weights missing, or under a wrapper's names           test_a_model_that_lacks_weights_..., ..._under_a_wrapper_s_...
    no beginning of sequence                              test_every_document_begins_with_what_...
    an instruct teacher and a base student                test_special_tokens_that_are_only_named_otherwise_...
    definitions of tools beside the messages              test_definitions_of_tools_..., test_a_call_that_...
    pointers of Git LFS, downloads that broke off         test_a_file_that_was_not_fetched_whole_...
    brackets in a path                                    test_brackets_in_a_path_are_no_pattern
    a folder of this and that                             test_of_a_folder_texts_are_read_and_the_rest_is_counted
    ShareGPT's records                                    test_sharegpt_s_turns_are_openai_s, ..._whom_the_assistant_...
    null and binary texts                                 test_a_text_that_is_null_or_binary_...
    pieces of SentencePiece alone                         test_pieces_alone_are_read_or_the_package_is_named
    a student of another architecture, the same files     test_the_same_files_beside_another_architecture_...

What is like them stands in test_similar_inputs.py.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from inputs import END, POINTER, START, TEXTS, TURN, Typed, change, edit, llama, qwen, save, tokenizer, without
from tokenizers import Tokenizer

DOWN = "model.layers.1.mlp.down_proj.weight"
CHAT = {"messages_field": "auto", "context": "document", "whole_conversations": True, "seq_len": 60}


def test_a_byte_level_tokenizer_that_is_declared_llama_s_keeps_the_ids_of_its_file(typed: Typed) -> None:
    folder = save(typed.folder / "declared", llama(), tokenizer(bos_token=START))
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast", add_bos_token=True, legacy=True)
    typed.makes("corpus", "teacher", "student", **_all(folder))
    assert "gives other ids than tokenizer.json does" in typed.said
    ids, starts, _ = typed.tokens()
    first = int(starts.nonzero()[0][1])
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin, *text, end = ids[:first].tolist()
    assert (begin, end) == (301, 300) and file.decode(text) in TEXTS
    assert text == file.encode(file.decode(text), add_special_tokens=False).ids


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_that_lacks_weights_is_refused_before_anything_is_made(typed: Typed, role: str) -> None:
    folder = change(typed.copy(), without(DOWN))
    line = typed.refused("run", **{role: {"path": str(folder)}})
    assert f"{role}.path: {folder}: the weights are not those of the model" in line and f"1 missing: {DOWN}" in line


@pytest.mark.parametrize(
    ("prefix", "who"),
    [("_orig_mod.", "torch.compile"), ("module.", "DataParallel"), ("base_model.model.", "PEFT"), ("student.", "")],
)
def test_a_model_under_a_wrapper_s_names_is_refused_and_the_prefix_named(typed: Typed, prefix: str, who: str) -> None:
    folder = change(typed.copy(), lambda tensors: {prefix + name: one for name, one in tensors.items()})
    line = typed.refused("run", teacher={"path": str(folder)})
    assert f"26 unexpected: {prefix}model.embed_tokens.weight" in line and repr(prefix) in line and who in line


@pytest.mark.parametrize("context", ["packed", "document"])
def test_every_document_begins_with_what_the_tokenizer_puts_before_a_text(typed: Typed, context: str) -> None:
    given = _all(save(typed.folder / "begins", qwen(), tokenizer(puts=START, bos_token=START)))
    typed.makes("corpus", **given | {"corpus": given["corpus"] | {"context": context}})
    assert "a document begins with '<|im_start|>' (301) and ends with '<|endoftext|>' (300)" in typed.said
    ids, starts, mask = typed.tokens()
    assert (ids[starts] == 301).all() and not mask[ids == 301].any()
    typed.makes("corpus", **given | {"corpus": given["corpus"] | {"bos": "never"}})
    assert "no document begins with '<|im_start|>', as its tokenizer would have it" in typed.said
    assert not (typed.tokens()[0] == 301).any()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"eos_token": TURN}, "eos_token is '<|im_end|>', not '<|endoftext|>'"),
        ({"pad_token": TURN}, "pad_token is '<|im_end|>', not '<|endoftext|>'"),
        ({"pad_token": None}, "pad_token is None, not '<|endoftext|>'"),
        ({"unk_token": END}, "unk_token is '<|endoftext|>', not None"),
        (
            {"pad_token": "[PAD]", "more": ("[PAD]",)},
            "1 special tokens more than the corpus has, which occur in no text",
        ),
    ],
)
def test_special_tokens_that_are_only_named_otherwise_are_a_notice(
    typed: Typed, names: dict[str, Any], said: str
) -> None:
    folder = save(typed.folder / "other", llama(), tokenizer(**names))
    typed.makes("corpus", "teacher", "cache", teacher={"path": str(folder)})
    assert typed.type("student", student={"path": str(folder)}) == 0
    assert said in typed.said
    made = json.loads((typed.folder / "out/student/seed-0/model/tokenizer_config.json").read_text())
    assert (made["eos_token"], made["pad_token"]) == (END, END), "the corpus's names count"


TOOLS = [{"type": "function", "function": {"name": "add", "description": "sums up", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}}
SPOKEN = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }} of {{ call.function.arguments.b }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _with_tools() -> list[Any]:
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    asked = {"role": "user", "content": "3 and 4?"}
    return [
        {"messages": [asked | {"content": f"{i}: 3 and 4?"}, answer, {"role": "tool", "content": "7"}], "tools": TOOLS}
        for i in range(40)
    ]


def test_definitions_of_tools_reach_the_chat_template_and_calls_are_learnt(typed: Typed) -> None:
    folder = save(typed.folder / "tools", qwen(), tokenizer(chat=SPOKEN))
    sources = [str(typed.records(_with_tools()))]
    typed.makes("corpus", corpus=CHAT | {"seq_len": 250, "tokenizer": str(folder), "sources": sources})
    assert typed.text().count('"description": "sums up"') == 40
    assert typed.text(learnt=True) == "add of 4<|im_end|>" * 40


def test_a_call_that_the_chat_template_does_not_write_is_no_answer(typed: Typed) -> None:
    line = typed.refused(corpus=CHAT | {"sources": [str(typed.records(_with_tools()))]})
    assert "records.jsonl:1, message 2: the answer leaves no text; found tool calls that the chat template" in line
    assert "define tools, which the chat template does not write" in typed.said


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("pointer", "a Git LFS pointer in the place of model.safetensors; run `git lfs install` and `git lfs pull`"),
        ("cut", "model.safetensors ends too early"),
        ("shard", "files of weights are missing; found 2 of the 3 that model.safetensors.index.json names, exp"),
        ("index", "download model.safetensors.index.json too"),
    ],
)
def test_a_file_that_was_not_fetched_whole_is_named_as_what_it_is(typed: Typed, role: str, how: str, said: str) -> None:
    if how in ("shard", "index"):
        folder = save(typed.folder / "model", qwen(), max_shard_size="50KB")
        (folder / ("model.safetensors.index.json" if how == "index" else "model-00002-of-00003.safetensors")).unlink()
    else:
        file = typed.copy() / "model.safetensors"
        folder, data = file.parent, file.read_bytes()
        file.write_bytes(POINTER.encode() if how == "pointer" else data[: len(data) // 2])
    assert said in typed.refused("run", **{role: {"path": str(folder)}})


def test_brackets_in_a_path_are_no_pattern(typed: Typed) -> None:
    path = typed.records([{"text": text} for text in TEXTS], "my [texts]/file [1].jsonl")
    for source in (path, path.parent, f"{path.parent}/*.jsonl"):
        typed.makes("corpus", corpus={"sources": [str(source)]})
        assert typed.text().count("is its square") > 50


def test_of_a_folder_texts_are_read_and_the_rest_is_counted(typed: Typed) -> None:
    folder = typed.records([{"text": text} for text in TEXTS[:20]], "data/a.jsonl").parent
    rest = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[20:40])
    typed.source("data/b.jsonl.gz", gzip.compress(rest.encode()))
    typed.source("data/c.json", json.dumps([{"text": text} for text in TEXTS[40:]]))
    for name in ("README.md", ".cache/x.jsonl", ".git/config.txt", "LICENSE", "picture.png", "notes.docx"):
        typed.source(f"data/{name}", '{"text": "HIDDEN"}\n')
    (folder / "loop").symlink_to(folder)
    typed.makes("corpus", corpus={"sources": [str(folder)]})
    assert f"{folder}: read 1 .json, 1 .jsonl, 1 .jsonl.gz; not read: " in typed.said
    for other in ("1 .docx", "1 .jsonl", "1 .md", "1 .png", "1 .txt", "1 LICENSE", "1 links to folders"):
        assert other in typed.said.partition("not read: ")[2]
    assert typed.text().count(END) >= 58 and "HIDDEN" not in typed.text()


def _asked(i: int) -> list[tuple[str, str]]:
    return [("system", "be brief"), ("user", f"what is {i}?"), ("assistant", f"it is {i}, of course")]


def test_sharegpt_s_turns_are_openai_s(typed: Typed) -> None:
    other = {"user": "human", "assistant": "gpt", "system": "system"}
    forms = {
        "openai": [{"messages": [{"role": role, "content": text} for role, text in _asked(i)]} for i in range(40)],
        "sharegpt": [
            {"conversations": [{"from": other[role], "value": text} for role, text in _asked(i)]} for i in range(40)
        ],
    }
    found = []
    for name, records in forms.items():
        sources = [str(typed.records(records, f"{name}.jsonl"))]
        for field in ("auto", next(iter(records[0]))):
            typed.makes("corpus", corpus=CHAT | {"sources": sources, "messages_field": field})
            found.append((typed.text(), typed.text(learnt=True)))
    assert len(set(found)) == 1 and found[0][1].count("of course<|im_end|>") == 40


STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/...') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_conversation_that_the_assistant_begins_is_named_or_skipped(typed: Typed) -> None:
    folder = save(typed.folder / "strict", qwen(), tokenizer(chat=STRICT))
    records: list[Any] = [{"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "yes?"}]}]
    for i in range(99):
        records.append({"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "so"}]})
    corpus = CHAT | {"tokenizer": str(folder), "sources": [str(typed.records(records))]}
    line = typed.refused(corpus=corpus)
    assert "records.jsonl:1: the chat template refuses the conversation; found roles must alternate" in line or (
        "records.jsonl:1: the assistant begins the conversation, which the chat template refuses" in line
    )
    typed.makes("corpus", corpus=corpus | {"on_bad_record": "skip"})
    assert "left out 1 of 100 records that cannot be used" in typed.said
    assert typed.text(learnt=True) == "so<|im_end|>" * 99


def test_a_text_that_is_null_or_binary_is_named_as_such_and_can_be_skipped(typed: Typed) -> None:
    texts = [*TEXTS * 3, None]
    tables = {"null": pa.table({"text": texts}), "binary": pa.table({"text": [text.encode() for text in TEXTS]})}
    for name, table in tables.items():
        pa.parquet.write_table(table, typed.folder / f"{name}.parquet")
    line = typed.refused(corpus={"sources": [str(typed.folder / "null.parquet")]})
    assert "null.parquet#180: no text in field 'text'; found null, expected a string in 'text'; remove the rec" in line
    lines = typed.records([{"text": text} for text in texts])
    assert "records.jsonl:181: no text in field 'text'; found null" in typed.refused(corpus={"sources": [str(lines)]})
    line = typed.refused(corpus={"sources": [str(typed.folder / "binary.parquet")]})
    assert f"binary.parquet#0: no text in field 'text'; found {len(TEXTS[0])} bytes of binary" in line
    skipping = {"sources": [str(lines)], "on_bad_record": "skip"}
    assert typed.type("plan", corpus=skipping) == 0, typed.said
    typed.makes("corpus", corpus=skipping)
    assert "left out 1 of 181 records" in typed.said


def test_pieces_alone_are_read_or_the_package_is_named(typed: Typed, tmp_path: Path) -> None:
    folder = typed.folder / "pieces"
    folder.mkdir()
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"add_bos_token": True, "legacy": False}))
    if importlib.util.find_spec("sentencepiece") is None:
        (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
        line = typed.refused(code=3, corpus={"tokenizer": str(folder)})
        assert "found tokenizer.model without a tokenizer.json, and a package that reads it is not installed" in line
        assert "run `pip install sentencepiece" in line
        return
    import sentencepiece

    text = typed.source("pieces.txt", "\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=330, model_type="bpe", byte_fallback=True,
        minloglevel=2, num_threads=1, hard_vocab_limit=False,
    )  # fmt: skip
    typed.makes("corpus", corpus={"tokenizer": str(folder)})
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids, starts, _ = typed.tokens()
    begin, *first, end = ids[: starts.nonzero()[0][1]].tolist()
    assert (begin, end) == (own.bos_id(), own.eos_id()) and first == own.encode(own.decode(first))


def test_the_same_files_beside_another_architecture_are_the_same_tokenizer(typed: Typed) -> None:
    llama(num_hidden_layers=1).save_pretrained(typed.folder / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(typed.base / name, typed.folder / "llama")
    typed.makes("corpus", "student", student={"path": str(typed.folder / "llama")})


def _all(folder: Path) -> dict[str, dict[str, Any]]:
    """The model as teacher and student, and its tokenizer."""
    return {
        "corpus": {"tokenizer": str(folder)},
        "teacher": {"path": str(folder)},
        "student": {"path": str(folder)},
    }
