"""Text and models outside the run: a change in them makes the stage that read them stale, and names the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.manifests import record_sources, with_digests
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.run_file import RunFile

MakeRun = Callable[..., RunFile]


@pytest.fixture
def run(make_corpus_run: MakeRun) -> RunFile:
    """A run whose corpus is finished."""
    run = make_corpus_run()
    carry_out(run, Instance("corpus"))
    return run


def _corpus(run: RunFile) -> tuple[State, str]:
    state = states(run)["corpus"]
    return state.state, state.why


def test_unchanged_text_is_current(run: RunFile) -> None:
    assert _corpus(run) == (State.CURRENT, "")


def test_a_changed_text_is_named(run: RunFile, texts: Path) -> None:
    (texts / "07.txt").write_text("quite another text")
    assert _corpus(run) == (State.STALE, f"source {texts / '07.txt'} changed")


def test_a_text_of_the_same_size_with_another_letter_is_named(run: RunFile, texts: Path) -> None:
    path = texts / "07.txt"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    assert _corpus(run) == (State.STALE, f"source {path} changed")


def test_a_text_that_was_only_touched_is_current(run: RunFile, texts: Path) -> None:
    os.utime(texts / "07.txt", ns=(0, 0))
    assert _corpus(run) == (State.CURRENT, "")


def test_a_new_and_a_missing_text_are_named(run: RunFile, texts: Path) -> None:
    (texts / "more.txt").write_text("one more text")
    assert _corpus(run) == (State.STALE, f"source {texts / 'more.txt'} is new")
    (texts / "more.txt").unlink()
    (texts / "03.txt").unlink()
    assert _corpus(run) == (State.STALE, f"source {texts / '03.txt'} is gone")


def test_a_corpus_outlives_the_text_it_was_made_from(run: RunFile, texts: Path) -> None:
    texts.rename(texts.with_name("away"))
    assert _corpus(run) == (State.CURRENT, "")


def test_the_digest_of_a_source_is_computed_once_and_again_only_where_its_time_moved(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a text")
    first = record_sources([path], digests=False)
    assert with_digests(first) == record_sources([path])
    known = tuple(entry.model_copy(update={"sha256": "5a"}) for entry in first)
    assert record_sources([path], known) == with_digests(known) == known
    os.utime(path, ns=(0, 0))
    assert record_sources([path], known) == record_sources([path]) != known
    assert with_digests(first) == first, "what changed meanwhile has no digest of what was read"
    path.unlink()
    assert with_digests(first) == first


def test_what_follows_from_changed_text_is_made_again(run: RunFile, texts: Path) -> None:
    before = carry_out(run, Instance("corpus"))
    (texts / "07.txt").write_text("quite another text, " * 40)
    after = carry_out(run, Instance("corpus"))
    assert after.identity == before.identity
    assert after.content != before.content
    assert _corpus(run) == (State.CURRENT, "")


def test_other_weights_in_a_given_model_s_folder_are_another_content(run: RunFile, tmp_path: Path) -> None:
    from capgap.pipeline.models.checks import corpus_tokenizer, fresh_model
    from capgap.pipeline.models.load import model_path, save_model
    from capgap.pipeline.stage.context import StageInput
    from capgap.schemas.run_model import ModelShape

    corpus = StageInput(Path(run.out) / "corpus", carry_out(run, Instance("corpus")))
    shape = ModelShape(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)
    folder = tmp_path / "given"
    save_model(fresh_model(shape, corpus, seed=0), corpus_tokenizer(corpus), folder)
    given = RunFile.model_validate({**run.model_dump(), "teacher": {"path": str(folder)}})
    before = carry_out(given, Instance("teacher"))
    assert model_path(StageInput(Path(run.out) / "teacher", before)) == str(folder)
    save_model(fresh_model(shape, corpus, seed=1), corpus_tokenizer(corpus), folder)
    state = states(given)["teacher"]
    assert (state.state, state.why) == (State.STALE, f"source {folder / 'model.safetensors'} changed")
    assert carry_out(given, Instance("teacher")).content != before.content
