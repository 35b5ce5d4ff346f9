"""Repeated documents of a whole corpus: found by digests, of the text that is taken, and forgotten with the text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from capgap.pipeline.corpus.making import ANY, find_all_repeated, make_slice
from capgap.pipeline.corpus.prepare import prepare
from capgap.pipeline.corpus.repeated import earlier_digests, find_repeated, write_digests
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.corpus.unit import CorpusJob, UnitMaker
from capgap.pipeline.stage.context import Instance, StageContext
from capgap.pipeline.stage.unit_notes import UnitNotes
from capgap.schemas.run_file import RunFile

Begin = Callable[..., CorpusJob]


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _texts(name: str, number: int) -> list[str]:
    return [f"{name} number {i} with a word and another word" for i in range(number)]


def _num_documents(job: CorpusJob) -> int:
    return sum(one.num_documents for unit in range(job.units.total) for one in job.record(unit).counts.values())


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    """Begin a corpus of files in the folder, and return its job."""
    train_tokenizer(_texts("a", 100), 300).save_pretrained(tmp_path / "tokenizer")

    def begun(**corpus: object) -> CorpusJob:
        settings = {"tokenizer": str(tmp_path / "tokenizer"), "seq_len": 16, "dedup": "all"} | corpus
        run = RunFile.model_validate({"name": "tried", "out": str(tmp_path), "corpus": settings})
        (tmp_path / "corpus").mkdir(exist_ok=True)
        return prepare(StageContext(run, Instance("corpus"), tmp_path / "corpus", {}, "cpu"))

    return begun


def test_what_occurs_in_an_earlier_unit_is_found_in_every_bucket(tmp_path: Path) -> None:
    notes = UnitNotes(tmp_path, tmp_path, "digested", 4)
    for name in ("digests", "digested"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    known = [rng.bytes(16) for _ in range(60)]
    units = [[known[number] for number in rng.integers(60, size=30)] for _ in range(4)]
    for number, digests in enumerate(units):
        write_digests(notes, number, digests)
    find_repeated(tmp_path, len(units), bucket_documents=10)
    before: set[bytes] = set()
    for number, digests in enumerate(units):
        assert earlier_digests(tmp_path, number) == before & set(digests)
        before |= set(digests)
    assert earlier_digests(tmp_path, 3)


def test_the_repeated_documents_of_an_older_text_are_forgotten(begin: Begin, tmp_path: Path) -> None:
    old, new = _texts("a", 100), _texts("b", 100)
    old[50:60], new[90:95] = old[:10], new[:5]
    _write(tmp_path / "a.jsonl", old)
    # killed before the first unit was finished, and the text is another one afterwards
    find_all_repeated(begin(sources=[str(tmp_path / "a.jsonl")], unit_bytes=2000))
    _write(tmp_path / "a.jsonl", new)
    job = begin(sources=[str(tmp_path / "a.jsonl")], unit_bytes=2000)
    make_slice(job, ANY)
    assert job.units.total > 1
    assert sum(job.record(unit).num_repeated for unit in range(job.units.total)) == 5
    assert _num_documents(job) == 95


def test_a_text_that_the_weight_of_one_source_leaves_out_is_taken_from_another(begin: Begin, tmp_path: Path) -> None:
    for name in "ab":
        _write(tmp_path / f"{name}.jsonl", _texts("same", 400))
    # the second is short for its weight, so all of it is wanted, and of the first only a part
    sources = {"a": {"paths": [str(tmp_path / "a.jsonl")], "weight": 1}}
    sources["b"] = {"paths": [str(tmp_path / "b.jsonl")], "weight": 10}
    job = begin(mixture=sources)
    assert job.listing.shares[0] < 1 == job.listing.shares[1]
    make_slice(job, ANY)
    assert _num_documents(job) == 400
    num_repeated = [job.record(unit).num_repeated for unit in range(2)]
    # those that the first source gave; their number is 40 on average, and here six deviations from it at most
    assert num_repeated[0] == 0 and 4 <= num_repeated[1] <= 76


def test_repeated_documents_are_known_where_a_file_before_them_is_gone_since(begin: Begin, tmp_path: Path) -> None:
    texts = _texts("b", 50)
    texts[20] = texts[10]
    _write(tmp_path / "a.jsonl", _texts("a", 50))
    _write(tmp_path / "b.jsonl", texts)
    job = begin(sources=[str(tmp_path / "*.jsonl")], on_damaged_file="skip")
    find_all_repeated(job)
    (tmp_path / "a.jsonl").unlink()
    record = UnitMaker(job).make(0, lambda *_: None)
    assert len(record.damaged) == 1 and "a.jsonl: the file is gone" in record.damaged[0]
    assert (record.num_repeated, _num_documents(job)) == (1, 49)


def test_nothing_is_kept_of_a_file_that_changes_while_it_is_read(begin: Begin, tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", _texts("a", 300))
    _write(tmp_path / "b.jsonl", _texts("b", 300))
    job = begin(sources=[str(tmp_path / "*.jsonl")], on_damaged_file="skip", dedup="unit")
    num_calls = []

    def change_once(*_: int) -> None:
        """Called after the first documents of the first file have been encoded."""
        num_calls.append(1)
        if len(num_calls) == 1:
            _write(tmp_path / "a.jsonl", _texts("another", 301))

    record = UnitMaker(job).make(0, change_once)
    assert len(record.damaged) == 1 and "a.jsonl: the file changed since" in record.damaged[0]
    assert _num_documents(job) == 300
    shutil.rmtree(tmp_path / "corpus")
    alone = UnitMaker(begin(sources=[str(tmp_path / "b.jsonl")], dedup="unit"))
    assert alone.make(0, lambda *_: None).shards == record.shards
