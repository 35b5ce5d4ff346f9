"""The text side of a run: of its corpus, or of the cache that stands for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.models.text import RunText, write_tokenizer
from capgap.pipeline.models.tokenizers import tokenizer_facts
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.stage.folder import content_files
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.facts import CacheFacts, CorpusFacts, RecordingFacts, SplitFacts
from capgap.schemas.manifest import FileEntry, Manifest, Members, ShardEntry, ShardSet

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
KEPT = RecordingFacts(num_ids=4, temperatures=(1.0,))


def _manifest(stage: str, facts: Any, names: tuple[str, ...], files: tuple[FileEntry, ...]) -> Manifest:
    members = Members(offset=(0,), num_bytes=(1,), num_sequences=(1,), crc32=(0,))
    sets = {}
    for name in names:
        file = FileEntry(path=f"{name}.tar", num_bytes=1, sha256="0")
        shard = ShardEntry(file=file, num_sequences=1, members=members)
        sets[name] = ShardSet(codec=name, codec_settings={}, seq_len=8, shards=(shard,))
    return Manifest(
        stage=stage, instance=stage, settings={}, inputs={}, identity="0", content="1", files=files, versions={},
        facts=facts.model_dump(mode="json"), shard_sets=sets, started="2026-01-01T00:00:00Z", wall_s=1.0, command=(),
    )  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> StageInput:
    tokenizer = train_tokenizer(["a text that is long enough to train a tokenizer on, " * 20], 300)
    tokenizer.save_pretrained(tmp_path / "corpus" / "tokenizer")
    facts = CorpusFacts(
        tokenizer=tokenizer_facts(tokenizer),
        context="document",
        splits={"heldout": SplitFacts(num_documents=1, num_text_bytes=4, num_text_tokens=2)},
        text_sources=("here",),
        whole_conversations=False,
    )
    files = content_files(tmp_path / "corpus")
    return StageInput(tmp_path / "corpus", _manifest("corpus", facts, ("student", "heldout"), files))


def _cache(corpus: StageInput, folder: Path, *names: str) -> StageInput:
    facts = CacheFacts(
        **RunText(corpus).facts.model_dump(),
        temperature=1.0,
        recordings={"sampled": KEPT, "topk": KEPT},
        padded_vocab_size=320,
        num_teacher_parameters=1000,
        engines=("by hand",),
        dtypes=("float32",),
        mean_label_loss=1.0,
    )
    sets = ("sampled", "topk", *names)
    return StageInput(folder, _manifest("cache", facts, sets, content_files(folder)))


def test_it_is_the_corpus_s_where_there_is_one_and_else_the_cache_s(corpus: StageInput, tmp_path: Path) -> None:
    write_tokenizer(corpus, "nowhere", tmp_path / "cache")
    cache = _cache(corpus, tmp_path / "cache", "heldout-topk")
    here, there = RunText.among({"cache": cache, "corpus": corpus}), RunText.among({"cache": cache})
    assert (here.made, there.made) == (corpus, cache)
    assert (here.of_cache, there.of_cache) == (False, True)
    for name in CorpusFacts.model_fields:
        assert getattr(here.facts, name) == getattr(there.facts, name)
    assert here.seq_len == there.seq_len == 8
    assert tokenizer_facts(here.tokenizer()) == tokenizer_facts(there.tokenizer()) == here.facts.tokenizer
    assert [text.heldout_shards().codec for text in (here, there)] == ["heldout", "heldout-topk"]


def test_held_out_sequences_are_those_of_the_recording_or_of_any(corpus: StageInput, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    both = RunText(_cache(corpus, tmp_path / "cache", "heldout-sampled", "heldout-topk"))
    assert [both.heldout_shards(name).codec for name in ("sampled", "topk", None)] == [
        "heldout-sampled",
        "heldout-topk",
        "heldout-topk",
    ]
    with pytest.raises(InputError, match=r"no held-out sequences .*reuse\.corpus.* cache\.num_heldout_sequences"):
        RunText(_cache(corpus, tmp_path / "cache", "heldout-sampled")).heldout_shards("topk")


def test_a_cache_has_the_corpus_s_very_files(corpus: StageInput, tmp_path: Path) -> None:
    for _ in range(2):  # as a cache that is opened again
        write_tokenizer(corpus, "nowhere", tmp_path / "cache")
        found, expected = ({f.path: f.sha256 for f in content_files(p)} for p in (tmp_path / "cache", corpus.path))
        assert found == expected and "tokenizer/tokenizer.json" in found


def test_a_cache_has_the_teacher_s_chat_template_where_the_corpus_has_none(corpus: StageInput, tmp_path: Path) -> None:
    tokenizer = RunText(corpus).tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "teacher")
    write_tokenizer(corpus, str(tmp_path / "teacher"), tmp_path / "cache")
    found = AutoTokenizer.from_pretrained(tmp_path / "cache" / "tokenizer")
    assert found.chat_template == TEMPLATE
    assert tokenizer_facts(found) == RunText(corpus).facts.tokenizer
    # and keeps the corpus's own
    tokenizer.chat_template = "own"
    tokenizer.save_pretrained(tmp_path / "talks" / "tokenizer")
    manifest = corpus.manifest.model_copy(update={"files": content_files(tmp_path / "talks")})
    write_tokenizer(StageInput(tmp_path / "talks", manifest), str(tmp_path / "teacher"), tmp_path / "other")
    assert AutoTokenizer.from_pretrained(tmp_path / "other" / "tokenizer").chat_template == "own"


@pytest.mark.parametrize("names", [("default", "tool_use"), ("rag", "tool_use"), ("default",)])
def test_a_cache_has_all_named_chat_templates_of_the_teacher(
    corpus: StageInput, tmp_path: Path, names: tuple[str, ...]
) -> None:
    tokenizer = RunText(corpus).tokenizer()
    tokenizer.chat_template = {name: f"{TEMPLATE}{name}" for name in names}
    tokenizer.save_pretrained(tmp_path / "teacher")
    write_tokenizer(corpus, str(tmp_path / "teacher"), tmp_path / "cache")
    found = AutoTokenizer.from_pretrained(tmp_path / "cache" / "tokenizer")
    assert found.chat_template == AutoTokenizer.from_pretrained(tmp_path / "teacher").chat_template
    assert found.get_chat_template("tool_use" if "tool_use" in names else None).startswith(TEMPLATE)


def test_the_name_of_a_chat_template_leads_to_no_other_folder(corpus: StageInput, tmp_path: Path) -> None:
    tokenizer = RunText(corpus).tokenizer()
    tokenizer.save_pretrained(tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer_config.json"
    templates = [{"name": "default", "template": "x"}, {"name": "../../x", "template": "y"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    with pytest.raises(InputError, match=r"the name of a chat template is not a valid file name; found '\.\./\.\./x'"):
        write_tokenizer(corpus, str(tmp_path / "teacher"), tmp_path / "cache")


def test_a_template_with_special_tokens_that_the_corpus_does_not_know_is_not_kept_with_the_text(
    corpus: StageInput, tmp_path: Path
) -> None:
    tokenizer = RunText(corpus).tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    for template, kept in ((f"<|turn|>{TEMPLATE}", None), (TEMPLATE, TEMPLATE)):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "teacher")
        write_tokenizer(corpus, str(tmp_path / "teacher"), tmp_path / "cache")
        found = AutoTokenizer.from_pretrained(tmp_path / "cache" / "tokenizer")
        assert found.chat_template == kept and tokenizer_facts(found) == RunText(corpus).facts.tokenizer


def test_a_damaged_tokenizer_is_not_read(corpus: StageInput) -> None:
    path = corpus.path / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(CorruptError, match=r"tokenizer\.json: not the file that the manifest lists"):
        RunText(corpus).tokenizer()


def test_only_a_cache_is_read_from_a_url(corpus: StageInput, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reuse\.corpus: must lie on a local disk"):
        RunText(dataclasses.replace(corpus, location="http://127.0.0.1/corpus")).tokenizer()
    (tmp_path / "cache").mkdir()
    bare = dataclasses.replace(_cache(corpus, tmp_path / "cache"), location="http://127.0.0.1/cache")
    with pytest.raises(InputError, match="the folder tokenizer is missing"):
        RunText(bare).tokenizer()
