"""The held-out text that models are measured on."""

from __future__ import annotations

import json

import pytest
from tiny_chats import CHATML, conversations

from capgap.pipeline.corpus.conversations import ChatFormat
from capgap.pipeline.corpus.sources import Document
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.corpus.whole import in_whole_rows
from capgap.pipeline.eval.heldout import labels_per_byte
from capgap.pipeline.models.tokenizers import tokenizer_facts
from capgap.schemas.facts import CorpusFacts, SourceCounts, SplitFacts

TALKS = conversations(20)


@pytest.mark.parametrize("counted", [True, False], ids=["corpus", "import"])
def test_bytes_of_conversations_are_those_of_the_answers_that_are_learnt(counted: bool) -> None:
    tokenizer = train_tokenizer(["say 12 it is 345! again 67. 890\n" * 20], 300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    chat = ChatFormat(tokenizer, "it")
    rows = [row for talk in TALKS for row in chat.encode(Document("a:1", "", json.dumps(talk))).rows]
    sequences = in_whole_rows(rows, 64, int(tokenizer.eos_token_id))
    num_labels = int(sequences.mask_BL1.sum())
    num_tokens, num_bytes = (sum(map(len, each)) for each in ([r.ids for r in rows], [r.document.text for r in rows]))
    by_source = {"a": SourceCounts(num_text_tokens=num_tokens, num_text_bytes=num_bytes, num_labels=num_labels)}
    split = SplitFacts(
        num_documents=20,
        num_text_bytes=num_bytes,
        num_text_tokens=num_tokens,
        by_source=by_source if counted else {},
    )
    facts = CorpusFacts(
        tokenizer=tokenizer_facts(tokenizer),
        context="document",
        splits={"heldout": split},
        text_sources=("a",),
        whole_conversations=True,
    )
    num_said = sum(len(one["content"].encode()) for talk in TALKS for one in talk if one["role"] == "assistant")
    found = labels_per_byte(facts, sequences, lambda: tokenizer)
    assert found == num_labels / num_said
    assert found > 2 * num_tokens / num_bytes, "or marks and questions were counted too"


def test_where_all_text_is_learnt_its_bytes_are_those_that_the_corpus_counted(make_sequences) -> None:
    counts = {"num_text_bytes": 480, "num_text_tokens": 144}
    tokenizer = train_tokenizer(["a text " * 20], 300)
    for source, masked in ({"a": SourceCounts(**counts, num_labels=144)}, True), ({}, False):
        facts = CorpusFacts(
            tokenizer=tokenizer_facts(tokenizer),
            context="packed",
            splits={"heldout": SplitFacts(num_documents=6, **counts, by_source=source)},
            text_sources=("a",),
            whole_conversations=False,
        )
        assert labels_per_byte(facts, make_sequences(masked=masked), lambda: tokenizer) == 144 / 480
