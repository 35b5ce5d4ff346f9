"""What a document begins with: the post-processor's token, that of a known family, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.models.bos import document_bos
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.schemas.errors import InputError


def _folder(path: Path, bos: str | None, model_type: str | None, puts: tuple[str, ...] = (), **config: Any) -> Path:
    """A tokenizer that calls its beginning so, beside a model of that family."""
    backend: Tokenizer = train_tokenizer(["the cat sat on the mat " * 9], 300).backend_tokenizer
    backend.add_special_tokens(list(dict.fromkeys([*puts, *([bos] if bos else [])])))
    if puts:
        special = [(token, backend.token_to_id(token)) for token in puts]
        single = " ".join([*puts, "$A"])
        backend.post_processor = TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=special)
    names = {"eos_token": "<|endoftext|>"} | ({"bos_token": bos} if bos else {})
    PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names).save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | config))
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def _found(folder: Path, rule: Any) -> list[str]:
    tokenizer = load_tokenizer(folder)
    return tokenizer.convert_ids_to_tokens(list(document_bos(tokenizer, folder, rule)))


def test_what_the_post_processor_puts_before_a_text_begins_a_document(tmp_path: Path) -> None:
    assert _found(_folder(tmp_path / "one", "<s>", None, ("<s>",)), "auto") == ["<s>"]
    assert _found(tmp_path / "one", "always") == ["<s>"]
    assert _found(_folder(tmp_path / "two", "<sop>", None, ("[gMASK]", "<sop>")), "auto") == ["[gMASK]", "<sop>"]


def test_never_is_never_and_says_what_the_tokenizer_would_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _found(_folder(tmp_path, "<s>", "llama", ("<s>",)), "never") == []
    assert "corpus.bos: never: no document begins with '<s>', as its tokenizer would have it" in caplog.text


@pytest.mark.parametrize(
    ("bos", "model_type", "begins"),
    [
        ("<bos>", "gemma3_text", True),
        ("<bos>", "gemma2", True),
        ("<|begin_of_text|>", "llama", True),
        ("<s>", "llama", True),
        ("<s>", "mistral", True),
        ("<BOS_TOKEN>", "cohere2", True),
        ("<|im_start|>", "llama", False),  # SmolLM2
        ("<|endoftext|>", "qwen2", False),
        ("<|endoftext|>", "gpt2", False),
        ("<s>", "phi3", False),
        ("<bos>", None, False),
        (None, "gemma2", False),
    ],
)
def test_files_that_say_nothing_follow_the_family(
    tmp_path: Path, bos: str | None, model_type: str | None, begins: bool
) -> None:
    assert _found(_folder(tmp_path, bos, model_type), "auto") == ([bos] if begins else [])


def test_files_that_say_no_are_believed_whatever_the_family(tmp_path: Path) -> None:
    assert _found(_folder(tmp_path, "<bos>", "gemma3_text", add_bos_token=False), "auto") == []


def test_always_needs_a_token_and_says_what_serving_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _found(_folder(tmp_path / "some", "<|im_start|>", "qwen2"), "always") == ["<|im_start|>"]
    assert "the tokenizer puts no '<|im_start|>' before a text by itself" in caplog.text
    with pytest.raises(
        InputError, match=r"corpus\.bos: always: the tokenizer has no token to begin .*; found no bos_t"
    ):
        _found(_folder(tmp_path / "none", None, "qwen2"), "always")


def test_a_tokenizer_that_is_trained_here_begins_nothing() -> None:
    assert document_bos(train_tokenizer(["some text"] * 3, 300), None, "auto") == ()
