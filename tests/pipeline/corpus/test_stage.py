from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from capgap.pipeline.corpus.tokenizer import END_OF_TEXT, train_tokenizer
from capgap.pipeline.models.checks import fresh_model
from capgap.pipeline.models.tokenizers import load_tokenizer, tokenizer_facts
from capgap.pipeline.stage.context import Instance, StageInput
from capgap.pipeline.stage.folder import content_files
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import InputError
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_model import ModelShape

SPLITS = ("teacher", "student", "heldout")
CORPUS = Instance("corpus")


def _tokens(run: RunFile, manifest: Manifest, split: str) -> np.ndarray:
    """All tokens of a split as one row."""
    shard_set = manifest.shard_sets[split]
    reader = ShardReader(Path(run.out) / "corpus", shard_set)
    return np.concatenate([reader.read(i)[0].tokens_BL1.ravel() for i in range(reader.shard_set.num_members)])


def _documents(run: RunFile, manifest: Manifest, split: str) -> list[str]:
    """The texts of a split, from its tokens; the last one may be cut."""
    tokenizer = load_tokenizer(Path(run.out) / "corpus" / "tokenizer")
    tokens = _tokens(run, manifest, split)
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_token_id) + 1)
    return [tokenizer.decode(part[part != tokenizer.eos_token_id]) for part in parts if len(part)]


def test_the_manifest_lists_what_lies_in_the_folder(make_corpus_run) -> None:
    run = make_corpus_run()
    manifest = carry_out(run, CORPUS)
    folder = Path(run.out) / "corpus"
    assert read_manifest(folder) == manifest
    assert manifest.files == content_files(folder)
    assert {file.path for file in manifest.files} == {
        *(shard.file.path for shard_set in manifest.shard_sets.values() for shard in shard_set.shards),
        "id-counts.npz",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    assert not (folder / "work").exists()
    assert set(manifest.shard_sets) == set(SPLITS)
    assert {(s.codec, s.seq_len) for s in manifest.shard_sets.values()} == {("sequences-planes-1", 32)}
    assert {shard.num_sequences for s in manifest.shard_sets.values() for shard in s.shards[:-1]} <= {100}
    assert len(manifest.shard_sets["teacher"].shards) > 1, "one shard alone would not test their order"
    facts = CorpusFacts.model_validate(manifest.facts)
    assert facts.tokenizer == tokenizer_facts(load_tokenizer(folder / "tokenizer"))
    assert facts.tokenizer.vocab_size == 400
    for split in SPLITS:
        assert manifest.totals[f"num_{split}_tokens"] == manifest.shard_sets[split].num_tokens
        assert 0 <= facts.splits[split].num_text_tokens - len(_tokens(run, manifest, split)) <= 32


def test_the_splits_are_the_texts_and_share_none(make_corpus_run, texts: Path) -> None:
    run = make_corpus_run()
    manifest = carry_out(run, CORPUS)
    expected = {path.read_text() for path in texts.iterdir()}
    found = {split: _documents(run, manifest, split) for split in SPLITS}
    whole = {split: {text for text in documents if text in expected} for split, documents in found.items()}
    # what fills no sequence at the end of a split is shorter than any document: the last one may lack its end
    assert all(len(found[split]) - len(whole[split]) <= 1 for split in SPLITS)
    assert sum(map(len, whole.values())) == len(set().union(*whole.values())) >= len(expected) - 3
    assert all(whole.values())


def test_a_second_folder_comes_out_the_same(make_corpus_run) -> None:
    first, second = (carry_out(make_corpus_run(out), CORPUS) for out in ("here", "there"))
    assert first.content == second.content
    assert (first.identity, first.files, first.shard_sets) == (second.identity, second.files, second.shard_sets)


def test_a_current_folder_is_left_alone_unless_forced(make_corpus_run) -> None:
    run = make_corpus_run()
    first = carry_out(run, CORPUS)
    written = Path(run.out) / "corpus" / "manifest.json"
    made_at = written.stat().st_mtime_ns
    assert carry_out(run, CORPUS) == first
    assert written.stat().st_mtime_ns == made_at
    again = carry_out(run, CORPUS, remake=True)
    assert again.content == first.content
    assert written.stat().st_mtime_ns != made_at


def test_a_stale_folder_is_made_anew(make_corpus_run) -> None:
    first = carry_out(make_corpus_run(), CORPUS)
    second = carry_out(make_corpus_run(seq_len=64), CORPUS)
    assert first.identity != second.identity
    assert {shard_set.seq_len for shard_set in second.shard_sets.values()} == {64}


@pytest.mark.parametrize("seq_len", [32, 64])
def test_a_folder_without_anything_finished_goes_on_under_the_same_settings_and_under_others(
    make_corpus_run, texts: Path, seq_len: int
) -> None:
    run = make_corpus_run()
    (texts / "zz.jsonl").write_text("broken")
    with pytest.raises(InputError, match=r"zz.jsonl:1: not a JSON record"):
        carry_out(run, CORPUS)
    assert states(run)["corpus"].state is State.PARTIAL
    (texts / "zz.jsonl").unlink()
    run = make_corpus_run(seq_len=seq_len)
    manifest = carry_out(run, CORPUS)
    assert states(run)["corpus"].state is State.CURRENT
    assert manifest.content == carry_out(make_corpus_run("undisturbed", seq_len=seq_len), CORPUS).content


def test_a_stage_whose_input_is_not_made_says_what_to_run(make_corpus_run) -> None:
    with pytest.raises(
        InputError, match=r"student/seed-0: needs corpus; found missing \(never made\), expected current"
    ):
        carry_out(make_corpus_run(), Instance("student", seed=0))


def test_text_that_looks_like_the_end_token_is_text(make_corpus_run, texts: Path) -> None:
    for number, path in enumerate(sorted(texts.iterdir())):
        path.write_text(f"{number} {END_OF_TEXT}{END_OF_TEXT} {path.read_text()} {END_OF_TEXT}")
    run = make_corpus_run()
    manifest = carry_out(run, CORPUS)
    expected = {path.read_text() for path in texts.iterdir()}
    for split in SPLITS:
        documents = _documents(run, manifest, split)
        assert set(documents[:-1]) <= expected
        ends = int(
            (_tokens(run, manifest, split) == load_tokenizer(Path(run.out) / "corpus/tokenizer").eos_token_id).sum()
        )
        assert len(documents) - 1 <= ends <= len(documents), "an end token that ends no document"


def test_a_given_tokenizer_is_used_as_it_is(make_corpus_run, tmp_path: Path) -> None:
    trained = carry_out(make_corpus_run("first", vocab_size=350), CORPUS)
    folder = tmp_path / "first" / "corpus" / "tokenizer"
    run = make_corpus_run("second", vocab_size=None, tokenizer=str(folder))
    given = carry_out(run, CORPUS)
    assert CorpusFacts.model_validate(given.facts).tokenizer == CorpusFacts.model_validate(trained.facts).tokenizer
    assert given.shard_sets == trained.shard_sets
    tokenizer = load_tokenizer(folder)
    tokens = _tokens(run, given, "student")
    first = _documents(run, given, "student")[0]
    ids = tokenizer(first, add_special_tokens=False)["input_ids"]
    assert tokens[: len(ids) + 1].tolist() == [*ids, tokenizer.eos_token_id]


def test_a_given_tokenizer_comes_out_the_same_wherever_it_lay(make_corpus_run, tmp_path: Path) -> None:
    carry_out(make_corpus_run("first", vocab_size=350), CORPUS)
    folder = tmp_path / "first" / "corpus" / "tokenizer"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    contents = [
        carry_out(make_corpus_run(f"from-{i}", vocab_size=None, tokenizer=str(place)), CORPUS).content
        for i, place in enumerate((folder, moved))
    ]
    assert contents[0] == contents[1]


def test_a_teacher_that_is_given_needs_no_text(make_corpus_run) -> None:
    manifest = carry_out(make_corpus_run(teacher_fraction=0), CORPUS)
    assert set(manifest.shard_sets) == {"student", "heldout"}
    assert manifest.totals["num_teacher_tokens"] == 0
    assert manifest.facts["splits"]["teacher"]["num_documents"] == 0


def test_repeated_and_dropped_documents_are_counted(make_corpus_run, texts: Path) -> None:
    (texts / "copy.md").write_text((texts / "00.txt").read_text())
    (texts / "long.md").write_text("word " * 5000)
    manifest = carry_out(make_corpus_run(long_documents="drop", seq_len=1500), CORPUS)
    assert manifest.totals["num_repeated_documents"] == 1
    assert manifest.totals["num_dropped_documents"] == 1


def test_a_long_document_is_refused_by_its_name(make_corpus_run, texts: Path) -> None:
    (texts / "long.md").write_text("word " * 5000)
    with pytest.raises(InputError, match=r"long.md: the document is longer than a sequence; found \d+ tokens"):
        carry_out(make_corpus_run(long_documents="refuse", seq_len=1500), CORPUS)


def test_an_empty_corpus_is_refused(make_corpus_run, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"blank.txt: the corpus is empty; found no document with text in it"):
        carry_out(make_corpus_run(sources=[str(tmp_path / "blank.txt")]), CORPUS)


def test_too_little_text_names_the_split_that_went_without(make_corpus_run, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a few words of a single document")
    with pytest.raises(
        InputError, match=r"corpus: no whole sequence for the split \w+; found .* at least 33 tokens; give"
    ):
        carry_out(make_corpus_run(sources=[str(tmp_path / "one.txt")]), CORPUS)


def test_a_folder_without_a_tokenizer_is_refused(make_corpus_run, texts: Path) -> None:
    with pytest.raises(InputError, match=f"{texts}: no tokenizer can be found"):
        carry_out(make_corpus_run(vocab_size=None, tokenizer=str(texts)), CORPUS)


def test_a_tokenizer_without_an_end_token_is_refused(make_corpus_run, tmp_path: Path) -> None:
    carry_out(make_corpus_run("first"), CORPUS)
    folder = tmp_path / "first" / "corpus" / "tokenizer"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({n: v for n, v in settings.items() if n != "eos_token"}))
    with pytest.raises(InputError, match="the tokenizer has no end-of-sequence token"):
        carry_out(make_corpus_run("second", vocab_size=None, tokenizer=str(folder)), CORPUS)


def _begun(folder: Path, puts: bool = True) -> Path:
    """A tokenizer with a token to begin texts, which it puts before them or only names."""
    backend = train_tokenizer(["some text to learn from, and more of it\n"] * 9, 300).backend_tokenizer
    backend.add_special_tokens(["<bos>"])
    if puts:
        special = [("<bos>", backend.token_to_id("<bos>"))]
        backend.post_processor = TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=special)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=END_OF_TEXT).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("puts", "bos", "begins"),
    [(True, "auto", True), (True, "never", False), (False, "auto", False), (False, "always", True)],
)
def test_documents_begin_as_the_tokenizer_or_the_setting_says(
    make_corpus_run, tmp_path: Path, caplog: pytest.LogCaptureFixture, puts: bool, bos: str, begins: bool
) -> None:
    run = make_corpus_run(vocab_size=None, tokenizer=str(_begun(tmp_path / "given", puts)), bos=bos)
    with caplog.at_level("INFO", "capgap"):
        manifest = carry_out(run, CORPUS)
    first = load_tokenizer(tmp_path / "given").bos_token_id
    facts = CorpusFacts.model_validate(manifest.facts)
    assert facts.bos_ids == ((first,) if begins else ())
    for shard_set in manifest.shard_sets.values():
        reader = ShardReader(Path(run.out) / "corpus", shard_set)
        for number in range(reader.shard_set.num_members):
            part = reader.read(number)[0]
            is_first = part.tokens_BL1 == first
            if not begins:
                assert not is_first.any()
                continue
            assert is_first[part.starts_BL1].all() and is_first[:, 0].all()
            assert not part.mask_BL1[is_first].any() and part.mask_BL1[:, 2:][~is_first[:, 2:]].all()
    said = f"'<bos>' ({first})" if begins else "nothing"
    assert f"a document begins with {said} and ends with '<|endoftext|>' (0)" in caplog.text


def test_another_beginning_is_another_corpus(make_corpus_run, tmp_path: Path) -> None:
    given = str(_begun(tmp_path / "given"))
    runs = [make_corpus_run(vocab_size=None, tokenizer=given, bos=bos) for bos in ("auto", "never")]
    assert len({states(run)["corpus"].order.identity for run in runs}) == 2


def test_a_fresh_model_knows_what_its_texts_begin_with(make_corpus_run, tmp_path: Path) -> None:
    carry_out(make_corpus_run(vocab_size=None, tokenizer=str(_begun(tmp_path / "given"))), CORPUS)
    corpus = StageInput(tmp_path / "out" / "corpus", read_manifest(tmp_path / "out" / "corpus"))
    config = fresh_model(ModelShape(hidden_size=16, num_layers=1, num_heads=2), corpus, 0).config
    tokenizer = load_tokenizer(tmp_path / "given")
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize("teacher", [{"model": {}}, {"path": "somewhere"}, None], ids=["learns", "given", "none"])
def test_text_that_is_kept_for_a_teacher_that_learns_nothing_is_said(
    make_corpus_run, caplog: pytest.LogCaptureFixture, teacher: dict[str, Any] | None
) -> None:
    settings = make_corpus_run().model_dump(exclude_unset=True) | {"teacher": teacher}
    run = RunFile.model_validate({name: value for name, value in settings.items() if value is not None})
    num_tokens = carry_out(run, Instance("corpus")).totals["num_teacher_tokens"]
    said = (
        f"corpus.teacher_fraction keeps 50 % of the documents, {num_tokens:,} tokens, for a teacher that learns nothing"
    )
    assert (said in caplog.text) == (teacher is not None and "path" in teacher)
