"""Whether the documents of captures begin with BOS is found out, said and written down; it is never a label."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from capgap.pipeline.interchange.importing import import_captures
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.store import read_blocks
from capgap.schemas.facts import CacheFacts, CorpusFacts


@pytest.mark.parametrize(
    ("begun", "puts", "said"),
    [
        ("all", True, "a document begins with '<bos>'"),
        ("all", False, "a document begins with '<bos>'"),  # whoever made the captures put it there
        ("some", True, "30 of 60 documents begin with '<bos>', as the tokenizer would have it"),
        ("none", True, "none of 60 documents begin with '<bos>', as the tokenizer would have it"),
        ("none", False, "a document begins with nothing"),
    ],
)
def test_whether_documents_begin_with_bos_is_a_fact_and_bos_is_never_a_label(
    teacher: Any,
    write: Callable[..., Path],
    settings_for: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    begun: str,
    puts: bool,
    said: str,
) -> None:
    backend = load_tokenizer(teacher.tokenizer).backend_tokenizer
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    if puts:
        backend.post_processor = TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
        )
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<bos>").save_pretrained(
        tmp_path / "tokenizer"
    )
    is_begun = [begun == "all" or (begun == "some" and number < 30) for number in range(60)]
    # two documents a row; the teacher knows nothing of what follows a beginning or an end
    documents = [_begun(row, [bos] * has) for row, has in zip(teacher.rows, is_begun, strict=True)]
    rows = [
        {name: [*one[name], *two[name]] for name in one}
        for one, two in zip(documents[::2], documents[1::2], strict=True)
    ]
    settings = settings_for(write(rows), tokenizer=str(tmp_path / "tokenizer"), context="document")
    with caplog.at_level(logging.INFO):
        made = import_captures(settings)
    assert said in caplog.text
    (told,) = [vars(record) for record in caplog.records if vars(record).get("event") == "import_beginnings"]
    num_begun = {"all": 60, "some": 30, "none": 0}[begun]
    assert told["fields"] == {"num_begun": num_begun, "num_documents": 60}
    facts = CacheFacts.model_validate(made.cache.manifest.facts)
    assert facts.bos_ids == CorpusFacts.model_validate(made.corpus.manifest.facts).bos_ids
    assert facts.bos_ids == ((bos,) if begun == "all" else ())
    num_bos = 0
    for name in ("topk", "heldout-topk"):
        for sequences, _ in read_blocks(made.cache.path, made.cache.manifest.shard_sets[name]):
            num_bos += int((sequences.tokens_BL1 == bos).sum())
            assert not sequences.mask_BL1[sequences.tokens_BL1 == bos].any()
    assert num_bos == {"all": 60, "some": 30, "none": 0}[begun]
    splits = CorpusFacts.model_validate(made.corpus.manifest.facts).splits
    assert sum(split.num_text_tokens for split in splits.values()) == sum(len(row["input_ids"]) for row in teacher.rows)


def _begun(row: dict[str, Any], mark: list[int]) -> dict[str, Any]:
    """A document with that before it, and a target after each of its tokens."""
    ids, logprobs = list(range(8)), [-5.0] * 8
    return {
        "input_ids": [*mark, *row["input_ids"]],
        "starts": [True, *[False] * (len(row["input_ids"]) + len(mark) - 1)],
        "ids": [*[ids] * len(mark), *row["ids"], ids],
        "logprobs": [*[logprobs] * len(mark), *row["logprobs"], logprobs],
    }
