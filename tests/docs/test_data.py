"""The records of docs/how-to/data.md are read as the page says, and its settings are settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from capgap.pipeline.corpus.kinds import known_suffixes
from capgap.pipeline.corpus.records import AUTO, Conversation, read_record
from capgap.pipeline.corpus.sources import read_documents
from capgap.pipeline.corpus.turns import MAX_DEPTH
from capgap.pipeline.models.chat_template import NUM_STEPS, NUM_STEPS_PER_CHARACTER
from capgap.pipeline.models.text_growth import MAX_GROWTH
from capgap.schemas.run_corpus import CorpusSettings

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "data.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_every_record_of_the_page_is_read_from_a_file(tmp_path: Path) -> None:
    text, *chats = _blocks("json")
    (tmp_path / "text.jsonl").write_text(text)
    (document,) = read_documents((str(tmp_path / "text.jsonl"),), "text")
    assert document.text.startswith("Many a little")
    (tmp_path / "chats.jsonl").write_text("".join(chats))
    documents = list(read_documents((str(tmp_path / "chats.jsonl"),), "text", AUTO))
    assert len(documents) == "".join(chats).count("\n") == 13
    for document in documents:
        found = Conversation.from_json(document.messages or "")
        assert found.messages[-1] == {"role": "assistant", "content": "7"}
        assert "3 + 4" in found.messages[-2]["content"] or found.messages[-2]["role"] == "tool"


@pytest.mark.parametrize("block", _blocks("yaml"))
def test_every_setting_of_the_page_is_one(block: str) -> None:
    CorpusSettings.model_validate(yaml.safe_load(block)["corpus"])


def test_kinds_and_bounds_are_those_of_the_page() -> None:
    table = {
        suffix for line in PAGE.splitlines() if line.startswith("| `") for suffix in re.findall(r"`(\.\w+)`", line)
    }
    packed = set(re.findall(r"`(\.gz)`, `(\.bz2)`, `(\.xz)` or `(\.zst)`", PAGE)[0])
    assert table | packed == set(re.findall(r"\.\w+", known_suffixes()))
    assert (NUM_STEPS, NUM_STEPS_PER_CHARACTER, MAX_DEPTH, MAX_GROWTH) == (10_000_000, 100, 64, 64)
    for said in ("10 million steps and 100 more", "more than 64 deep", "more than 64 characters out of one"):
        assert said in " ".join(PAGE.split())


def test_a_named_field_is_that_field_and_no_other() -> None:
    record = {"messages": ["a", "b"], "turns": ["c", "d"]}
    found = read_record("x", record, "text", "turns")
    assert isinstance(found, Conversation) and [message["content"] for message in found.messages] == ["c", "d"]
