"""A stage that was begun from other sources is not continued: the file is named, by a run and by slices."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.stage.context import Instance, Slice
from capgap.pipeline.stage.folder import LOCK_NAME
from capgap.pipeline.stage.manifests import read_work_order
from capgap.pipeline.store.locks import ProcessLock
from capgap.pipeline.workflow import slices
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.slices import carry_out_slice
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import MismatchError
from capgap.schemas.run_file import RunFile

CORPUS = Instance("corpus")


@pytest.fixture
def run(make_corpus_run: Callable[..., RunFile], texts: Path, tmp_path: Path) -> RunFile:
    """A run whose corpus has a tokenizer's folder among its sources, and several units."""
    train_tokenizer([path.read_text() for path in texts.iterdir()], 300).save_pretrained(tmp_path / "tokenizer")
    size = sum(path.stat().st_size for path in texts.iterdir())
    return make_corpus_run(tokenizer=str(tmp_path / "tokenizer"), vocab_size=None, unit_bytes=size // 4)


def _begin(run: RunFile) -> Path:
    """Make one unit of the corpus, and return its folder."""
    assert carry_out_slice(run, CORPUS, Slice(0, 4)) is None
    return Path(run.out) / "corpus"


def _write_other_tokenizer(folder: Path) -> None:
    train_tokenizer(["quite other words " * 40], 300).save_pretrained(folder / "tokenizer")


def test_a_begun_corpus_does_not_go_on_with_another_tokenizer(run: RunFile, tmp_path: Path) -> None:
    _begin(run)
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "kept")
    _write_other_tokenizer(tmp_path)
    state = states(run)["corpus"]
    changed = f"source {tmp_path / 'tokenizer' / 'tokenizer.json'} changed since this stage was begun"
    assert state.state is State.PARTIAL and state.why.endswith(f" units, {changed}")
    for go_on in (carry_out, lambda run, corpus: carry_out_slice(run, corpus, Slice(1, 4))):
        with pytest.raises(MismatchError, match=f"begun under other settings or from other sources; found {changed}"):
            go_on(run, CORPUS)
    # restored, though at another time, it is the same file
    shutil.copy(tmp_path / "kept" / "tokenizer.json", tmp_path / "tokenizer")
    assert carry_out(run, CORPUS).content == carry_out(run, CORPUS, remake=True).content


def test_slices_are_not_joined_with_another_tokenizer(run: RunFile, tmp_path: Path) -> None:
    folder = _begin(run)
    with ProcessLock(folder / LOCK_NAME) as at_work:
        assert at_work.shared()
        assert carry_out_slice(run, CORPUS, Slice(1, 4)) is None
        _write_other_tokenizer(tmp_path)
        with pytest.raises(MismatchError, match=r"on other sources; found source .*tokenizer.json changed since"):
            carry_out_slice(run, CORPUS, Slice(2, 4))


def test_slices_leave_the_digests_of_large_sources_to_the_last_one(
    run: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "_MOST_BYTES", 1000)
    folder = _begin(run)
    assert {entry.sha256 for entry in read_work_order(folder).sources} == {""}
    sources = carry_out_slice(run, CORPUS, Slice(None)).sources
    assert sources == read_work_order(folder).sources
    assert states(run)["corpus"].state is State.CURRENT
    assert carry_out(run, CORPUS, remake=True).sources == sources
