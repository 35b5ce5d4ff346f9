"""Inputs like those of real reports, of every kind that people have: each comes out right, or is refused by name."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from inputs import (
    END,
    POINTER,
    START,
    TEXTS,
    TURN,
    VOCAB_SIZE,
    Typed,
    change,
    edit,
    llama,
    qwen,
    save,
    tokenizer,
)
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import BertConfig, T5Config, T5ForConditionalGeneration

LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
CHAT = {"messages_field": "auto", "context": "document", "whole_conversations": True, "seq_len": 120}
Change = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("crlf.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("mark.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("blank-lines.jsonl", LINES.replace("\n", "\n\n  \n").encode()),
        ("CAPITALS.JSONL.GZ", gzip.compress(LINES.encode())),
        ("not-a-number.jsonl", LINES.replace('{"text"', '{"score": NaN, "text"').encode()),
        ("indented.json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()),
        ("values.json", LINES.encode()),
        ("table.csv", ("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS))).encode()),
        ("table.tsv", ("id\ttext\r\n" + "".join(f"{i}\t{text}\r\n" for i, text in enumerate(TEXTS))).encode()),
        ("large.parquet", pa.table({"text": pa.array(TEXTS, pa.large_string())})),
        ("view.parquet", pa.table({"text": pa.array(TEXTS, pa.string_view())})),
        ("dictionary.parquet", pa.table({"text": pa.array(TEXTS).dictionary_encode(), "n": range(len(TEXTS))})),
    ],
)
def test_texts_come_out_whole_however_they_are_filed(typed: Typed, name: str, data: Any) -> None:
    path = typed.folder / name
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        pa.parquet.write_table(data, path)
    typed.makes("corpus", corpus={"sources": [str(path)]})
    found = set(typed.text().split(END))
    # the ends of the two splits do not fill a sequence, and a blank was put around nothing
    assert len(found & set(TEXTS)) >= len(TEXTS) - 4


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("pointer.txt", POINTER, "a Git LFS pointer in the place of pointer.txt; run `git lfs install`"),
        ("pointer.parquet", POINTER, "a Git LFS pointer in the place of pointer.parquet"),
        ("pointer.jsonl.zst", POINTER, "a Git LFS pointer in the place of pointer.jsonl.zst"),
        ("page.jsonl", "<!DOCTYPE html>\n", "in '<!DOCTYPE html>', expected one JSON value a line"),
        ("commas.jsonl", LINES.replace("\n", ",\n"), "commas.jsonl:1: not a JSON record; found Extra data"),
        ("list.jsonl", json.dumps([{"text": "a"}]), "found a list in place of a record"),
        ("list.jsonl", json.dumps([{"text": "a"}]), "give a file that is one list the suffix .json"),
        (
            "strings.jsonl",
            '"a"\n"b"\n',
            "found a string in place of a record, expected an object with a str",
        ),
        (
            "wide.csv",
            "text\na\n".encode("utf-16"),
            "found 0xff, the byte-order mark of UTF-16, expected UTF-8",
        ),
        ("wide.json", '[{"text": "a"}]'.encode("utf-16"), "the byte-order mark of UTF-16"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "latin.jsonl:1, byte 13: not valid UTF-8; found 0xe9"),
        ("german.csv", 'id;text\n1;"a, b"\n', "the values are separated by another character; found 'id;text'"),
        ("bare.csv", '1,"a b"\n2,"c d"\n', "no column 'text'; found 1, a b, expected text"),
        ("twice.csv", "text,text\na,b\n", "2 columns are called 'text'"),
        ("ragged.csv", "id,text\n1,a\n2\n", "the row's fields do not match the header; found 1 fields, expected 2"),
        ("open.csv", 'id,text\n1,"a\n', "cannot be read as separated values"),
        ("cut.jsonl.gz", gzip.compress(LINES.encode())[:300], "Compressed file ended before the end-of-stream marker"),
        ("nested.parquet", pa.table({"row": [{"text": "a"}]}), "no column 'text'; found row"),
        ("lists.parquet", pa.table({"text": [["a"]]}), "lists.parquet#0: no text in field 'text'; found a list"),
        ("numbers.parquet", pa.table({"text": [1.5]}), "found a number, expected a string"),
        ("words.docx", "a", "unknown kind of file; found .docx"),
        ("data.jsonl.zip", "a", "unknown kind of file; found .zip"),
    ],
)
def test_a_source_that_is_no_text_is_named(typed: Typed, name: str, data: Any, said: str) -> None:
    if isinstance(data, pa.Table):
        pa.parquet.write_table(data, typed.folder / name)
    else:
        typed.source(name, data)
    assert said in typed.refused(corpus={"sources": [str(typed.folder / name)]})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("ftp://example.com/texts.jsonl", "text is not read from such a URL; found ftp://, expected one of s3, "),
        ("owner/name", "`hf download --repo-type dataset owner/name --local-dir FOLDER`"),
        ("texts/absent.jsonl", "check the path, from "),
    ],
)
def test_a_source_that_is_not_on_this_machine_says_what_to_do(typed: Typed, source: str, said: str) -> None:
    line = typed.refused(corpus={"sources": [source]})
    assert line.startswith(f"capgap: corpus.sources: {source}: ") and said in line


def _turns(*turns: dict[str, Any], **beside: Any) -> dict[str, Any]:
    return {"messages": list(turns), **beside}


USER, SAID = {"role": "user", "content": "how many?"}, {"role": "assistant", "content": "just seven"}


@pytest.mark.parametrize(
    ("record", "read", "learnt"),
    [
        (_turns({"role": "User", "content": "how many?"}, {"role": "ASSISTANT", "content": "just seven"}), "", ""),
        ({"conversations": [{"from": "Human", "value": "how many?"}, {"from": "GPT", "value": "just seven"}]}, "", ""),
        ([{"role": "prompter", "text": "how many?"}, {"role": "assistant", "text": "just seven"}], "", ""),
        (_turns({"role": "user", "content": [{"type": "text", "text": "how many?"}]}, SAID), "", ""),
        ({"messages": json.dumps([USER, SAID])}, "", ""),
        ({"prompt": "how many?", "chosen": "just seven", "rejected": "none"}, "", ""),
        ({"prompt": "how many?", "chosen": [USER, SAID], "rejected": [USER, SAID]}, "", ""),
        ({"question": "how many?", "answer": "just seven"}, "", ""),
        ({"instruction": "how many?", "input": "", "output": "just seven"}, "", ""),
        ({"instruction": "how many?", "context": "of mice", "response": "just seven"}, "how many?\n\nof mice", ""),
        ({"instruction": "how many?", "history": [["who", "me"]], "output": "just seven"}, "user\nwho", "me<|im_end|>"),
        (_turns(USER, {"role": "assistant", "content": "WRONG", "weight": 0}, USER, SAID), "WRONG", ""),
        (_turns(USER, {"role": "assistant", "content": "WRONG", "train": False}, USER, SAID), "WRONG", ""),
        (_turns({"role": "user", "content": f"how {TURN} many?"}, SAID), "< |im_end|> many?", ""),
    ],
)
def test_a_conversation_in_a_usual_form_is_read_and_its_answers_learnt(
    typed: Typed, record: Any, read: str, learnt: str
) -> None:
    # records that are the same are one; each has a number somewhere
    texts = [json.dumps(record).replace("seven", f"{i}") for i in range(40)]
    path = typed.source("chat.jsonl", "\n".join(texts))
    for whole in (False, True):
        typed.makes("corpus", corpus=CHAT | {"sources": [str(path)], "whole_conversations": whole})
        assert (read or "how many?") in typed.text()
        assert set(typed.text(learnt=True)) <= set(f"just 0123456789{TURN}{learnt}")
    assert sorted(typed.text(learnt=True).split(TURN)[:-1]) == sorted(
        [f"just {i}" for i in range(40)] + [learnt.removesuffix(TURN)] * 40 * bool(learnt)
    )


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "how many?", "response": ["seven", "eight"]}, "no conversation; found fields prompt, response"),
        ({"prompt": "how many?", "rejected": "none"}, "no conversation; found fields prompt, rejected"),
        (
            {"instruction": "how many?", "history": "who? me", "output": "seven"},
            "no conversation; found fields hist",
        ),
        ({"chosen": "Human: hi Assistant: hello", "rejected": "no"}, "no conversation; found fields chosen, rejected"),
        ({"dialog": [{"speaker": "a", "utterance": "b"}]}, "no conversation; found fields dialog"),
        ({"messages": repr([USER, SAID])}, "no conversation; found \"[{'role'"),
        ({"text": "words"}, "no conversation; found fields text"),
        (_turns(), "no conversation; found []"),
        (
            _turns({"role": "user", "utterance": "how many?"}, SAID),
            "message 1: a message of the user has no text; found fields",
        ),
        (_turns({"role": "user", "content": None}, SAID), "message 1: a message of the user has no text"),
        (_turns({"role": "user", "content": ""}, SAID), "message 1: a message of the user has no text; found ''"),
        (
            {"instruction": "how many?", "input": 21, "output": "seven"},
            "field 'input': a message holds something other than text",
        ),
        (
            _turns({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, SAID),
            "a part of type",
        ),
        (_turns({"role": "user", "content": 3}, SAID), "holds something other than text; found a part of type int"),
        (_turns({"role": "narrator", "content": "a"}, SAID), "message 1: unknown role; found 'narrator'"),
        (_turns(USER, {"role": "assistant", "content": None}), "the answer leaves no text; found none"),
        (_turns(USER, {"role": "assistant", "content": " \n"}), "the answer leaves no text"),
        (_turns(USER, {**SAID, "weight": 0.5}), "message 2: a message's weight is neither 0 nor 1; found weight 0.5"),
        (_turns(USER), "the conversation has no turn of the assistant; found roles user"),
        (_turns(USER, SAID, tools="none of them"), "the tools cannot be read"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_named(typed: Typed, record: Any, said: str) -> None:
    records = [_turns(USER, {"role": "assistant", "content": f"just {i}"}) for i in range(20)]
    path = typed.records([*records, record])
    line = typed.refused(corpus=CHAT | {"sources": [str(path)]})
    assert f"{path}:21" in line and said in line


def _config(**values: Any) -> Change:
    return lambda folder: edit(folder / "config.json", **values)


def _tensors(how: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    return lambda folder: change(folder, how)


def _only(*names: str) -> Change:
    """Nothing but these files, without anything in them."""

    def made(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")

    return made


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _linked(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "gone")


def _twice(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors", {"format": "pt"})
    name = next(iter(tensors))
    save_file({name: tensors[name] + 1}, folder / "b.safetensors", {"format": "pt"})
    index = {"weight_map": {one: "a.safetensors" for one in tensors} | {"another": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _anew(model: Callable[[], Any]) -> Change:
    def made(folder: Path) -> None:
        shutil.rmtree(folder)
        save(folder, model())

    return made


ENCODER = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 32}
SEQ2SEQ = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_only("adapter_config.json", "adapter_model.safetensors"), "an adapter of PEFT without its model"),
        (_only("model-Q4_K_M.gguf"), "only model-Q4_K_M.gguf, expected"),
        (_only(), "no config.json, and no weights"),
        (_pickled, "no weights as safetensors; found only pytorch_model.bin"),
        (_linked, "model.safetensors, links to files that no longer exist"),
        (_twice, "a tensor lies in two files; found model.embed_tokens.weight in a.safetensors and b.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text(POINTER), "a Git LFS pointer in the place of config.json"),
        (_config(model_type=None), "config.json names no architecture"),
        (_config(model_type="unheard_of"), "transformers does not know this architecture"),
        (_config(model_type="own", auto_map={"AutoConfig": "code.Own"}), "needs Python code that comes with it"),
        (_config(num_hidden_layers=3, layer_types=None), "12 missing: model.layers.2."),
        (_config(num_hidden_layers=1, layer_types=None), "12 unexpected: model.layers.1."),
        (_config(vocab_size=320), "model.embed_tokens.weight 304x32, not 320x32"),
        (
            _config(quantization_config={"quant_method": "fp8"}),
            "the weights are not quantised, though config",
        ),
        (
            _config(quantization_config={"quant_method": "gptq", "bits": 4}),
            "take quantization_config out of config",
        ),
        (
            _tensors(lambda all_: all_ | {"lm_head.weight": torch.randn(VOCAB_SIZE, 32)}),
            "set tie_word_embeddings to",
        ),
        (_config(tie_word_embeddings=False), "1 missing: lm_head.weight"),
        (_config(max_position_embeddings=16), "the model takes shorter sequences"),
        (_config(use_bidirectional_attention=True), "whose tokens attend to later tokens"),
        (_anew(lambda: qwen(vocab_size=302)), "found 302 rows in its embedding, expected at least 303"),
        (
            _anew(lambda: tiny_model(BertConfig(vocab_size=VOCAB_SIZE, **ENCODER))),
            "a bert whose tokens attend to later tokens",
        ),
        (
            _anew(lambda: T5ForConditionalGeneration(T5Config(vocab_size=VOCAB_SIZE, **SEQ2SEQ))),
            "found an encoder beside the decoder",
        ),
    ],
)
def test_a_model_that_is_none_is_named_before_anything_is_made(typed: Typed, spoil: Change, said: str) -> None:
    folder = typed.copy()
    spoil(folder)
    line = typed.refused("run", teacher={"path": str(folder)})
    assert f"teacher.path: {folder}: " in line and said in line


def _bare(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("model."): one for name, one in tensors.items()}


def _own_head(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize(
    "spoil",
    [
        _tensors(_own_head),  # the tied head saved too, as it is
        _tensors(_bare),  # the body alone, whose head is tied
        _tensors(lambda all_: all_ | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        _tensors(lambda all_: all_ | {"vision_tower.weight": torch.ones(3)}),
        _tensors(lambda all_: {name: one.to(torch.bfloat16) for name, one in all_.items()}),
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors"),
        _anew(lambda: llama(vocab_size=512)),  # more padding than anything else
    ],
)
def test_a_model_with_more_or_less_than_it_needs_is_whole(typed: Typed, spoil: Change) -> None:
    folder = typed.copy()
    spoil(folder)
    typed.makes("corpus", "student", student={"path": str(folder)})


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GemmaTokenizer", "T5Tokenizer", "CohereTokenizerFast", "Unheard"])
def test_whatever_class_is_named_the_ids_are_those_of_the_file(typed: Typed, name: str) -> None:
    folder = edit(typed.copy() / "tokenizer_config.json", tokenizer_class=name)
    typed.makes("corpus", corpus={"tokenizer": str(folder)})
    assert len(set(typed.text().split(END)) & set(TEXTS)) >= len(TEXTS) - 4


@pytest.mark.parametrize(
    ("made", "config", "begins"),
    [
        ({"bos_token": START}, {"add_bos_token": True}, START),  # the file's class would put it
        ({"bos_token": START}, {"add_bos_token": False}, None),
        ({"bos_token": START}, {}, None),  # as SmolLM2 has it
        ({"bos_token": "<s>", "more": ("<s>",)}, {}, "<s>"),  # Llama 2 out of GGUF
        ({"bos_token": "<|begin_of_text|>", "more": ("<|begin_of_text|>",)}, {}, "<|begin_of_text|>"),
        ({"puts": START}, {}, START),  # a post-processor, and no bos_token
    ],
)
def test_a_document_begins_as_the_files_or_the_family_say(
    typed: Typed, made: dict[str, Any], config: dict[str, Any], begins: str | None
) -> None:
    folder = save(typed.folder / "llama", llama(vocab_size=320), tokenizer(**made))
    edit(folder / "tokenizer_config.json", **config)
    typed.makes("corpus", corpus={"tokenizer": str(folder)})
    beginnings = {text.startswith(str(begins)) for text in typed.text().split(END)[1:-1] if text.strip()}
    assert beginnings == {begins is not None}


def _file(**parts: Any) -> Change:
    def made(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        for name, part in parts.items():
            content[name] = content[name] | part if isinstance(part, dict) and content[name] else part
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return made


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "a Git LFS pointer in the place of tokenizer"),
        (_file(model={"dropout": 0.1}), "the tokenizer's ids are drawn at random; found dropout 0.1"),
        (
            lambda folder: edit(folder / "tokenizer_config.json", eos_token="</s>"),
            "eos_token '</s>', which tokenizer",
        ),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "no end-of-sequence token"),
    ],
)
def test_a_tokenizer_that_cannot_be_one_is_named(typed: Typed, spoil: Change, said: str) -> None:
    folder = typed.copy()
    spoil(folder)
    assert said in typed.refused(corpus={"tokenizer": str(folder)})


def test_truncation_and_padding_in_the_tokenizer_s_file_are_not_applied(typed: Typed) -> None:
    folder = typed.copy()
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    _file(truncation=truncation)(folder)
    typed.makes("corpus", corpus={"tokenizer": str(folder)})
    assert len(set(typed.text().split(END)) & set(TEXTS)) >= len(TEXTS) - 4
