"""A corpus of several units: the same whoever makes it, and in whatever pieces."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from capgap.pipeline.corpus.listing import list_units
from capgap.pipeline.corpus.prepare import prepare
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.corpus.unit import UnitMaker
from capgap.pipeline.corpus.unit_record import UnitRecord
from capgap.pipeline.stage.context import Instance, Slice, StageContext
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.ranking import count_ids, read_counts
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.slices import carry_out_slice
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_corpus import CorpusSettings
from capgap.schemas.run_file import RunFile

CORPUS = Instance("corpus")
SPLITS = ("teacher", "student", "heldout")
NUM_UNITS = 5


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files of lines, and a tokenizer of their text."""
    folder = tmp_path_factory.mktemp("lines")
    rng = np.random.default_rng(3)
    words = ["".join(rng.choice(list("abcdefgh \u00fc"), size=5)) for _ in range(80)]
    texts = [f"{number} {' '.join(rng.choice(words, size=int(rng.integers(5, 40))))}" for number in range(600)]
    texts[400] = texts[3]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:350]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[350:]))
    train_tokenizer(texts, 350).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def make(lines: Path, tmp_path: Path) -> Callable[..., RunFile]:
    def run(out: str = "out", **changed: object) -> RunFile:
        size = sum(path.stat().st_size for path in lines.glob("*.jsonl"))
        settings = {"sources": [f"{lines}/*.jsonl"], "tokenizer": str(lines / "tokenizer"), "seq_len": 16}
        settings |= {"teacher_fraction": 0.4, "heldout_fraction": 0.2, "shard_sequences": 40}
        settings |= {"unit_bytes": size // NUM_UNITS + 1}
        settings |= changed
        settings = {name: value for name, value in settings.items() if value is not None}
        return RunFile.model_validate({"name": "tried", "out": str(tmp_path / out), "corpus": settings})

    return run


def _folder(run: RunFile) -> Path:
    return Path(run.out) / "corpus"


def _texts(run: RunFile, manifest: Manifest, split: str) -> list[int]:
    reader = ShardReader(_folder(run), manifest.shard_sets[split])
    return np.concatenate([reader.read(n)[0].tokens_BL1.ravel() for n in range(reader.shard_set.num_members)]).tolist()


def test_units_are_cut_at_line_ends_and_hold_every_record_once(make, lines: Path) -> None:
    manifest = carry_out(make(), CORPUS)
    names = {split: [shard.file.path for shard in part.shards] for split, part in manifest.shard_sets.items()}
    assert {name.split("-")[1] for name in names["teacher"]} == {f"{n:05d}" for n in range(NUM_UNITS)}
    facts = CorpusFacts.model_validate(manifest.facts)
    # the repeated text stands in another unit than the first
    assert manifest.totals["num_repeated_documents"] == 0
    # of each split what fills no sequence at the end of a unit is in no shard
    packed = sum(facts.splits[split].num_documents for split in SPLITS)
    assert 600 - 3 * NUM_UNITS <= packed <= 600
    by_length = facts.splits["student"].by_length
    assert sum(by_length) == sum(one.num_documents for one in facts.splits["student"].by_source.values())
    num_tokens = facts.splits["student"].num_text_tokens
    assert sum(n * (2**i // 2) for i, n in enumerate(by_length)) <= num_tokens
    assert num_tokens < sum(n * 2**i for i, n in enumerate(by_length))
    text = sum(len(json.loads(line)["text"].encode()) for path in lines.glob("*.jsonl") for line in path.open())
    assert 0.97 * text < sum(facts.splits[split].num_text_bytes for split in SPLITS) <= text


@pytest.mark.slow
@pytest.mark.parametrize("dedup", ["unit", "all"])
def test_several_processes_make_what_one_process_makes(make, dedup: str) -> None:
    one, several = (carry_out(make(f"by-{n}", workers=n, dedup=dedup), CORPUS) for n in (1, 3))
    assert (several.content, several.facts) == (one.content, one.facts)


def test_slices_and_what_goes_on_after_a_kill_make_what_one_process_makes(make) -> None:
    one = carry_out(make("one"), CORPUS)
    sliced = make("sliced")
    assert carry_out_slice(sliced, CORPUS, Slice(1, 2)) is None
    assert carry_out_slice(sliced, CORPUS, Slice(None)).content == one.content
    again = carry_out_slice(sliced, CORPUS, Slice(0, 2))
    assert again.shard_sets == one.shard_sets and again.facts == one.facts
    # an ordinary run goes on from what slices made, and makes again what was damaged since
    begun = make("begun")
    assert carry_out_slice(begun, CORPUS, Slice(0, 2)) is None
    assert states(begun)["corpus"].why == f"3 of {NUM_UNITS} units"
    damaged = next(_folder(begun).glob("student-00002-*.tar"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    kept = next(_folder(begun).glob("student-00000-*.tar"))
    made_at = kept.stat().st_mtime_ns
    assert carry_out(begun, CORPUS).content == one.content
    assert kept.stat().st_mtime_ns == made_at


def test_texts_that_stand_in_several_units_go_where_that_is_asked_for(make) -> None:
    one = carry_out(make("one", dedup="all"), CORPUS)
    assert one.totals["num_repeated_documents"] == 1
    sliced = make("sliced", dedup="all")
    assert carry_out_slice(sliced, CORPUS, Slice(1, 2)) is None
    assert carry_out_slice(sliced, CORPUS, Slice(0, 2)).content == one.content


def test_a_split_with_a_limit_has_whole_shards_and_no_more_whoever_knew_of_it(make) -> None:
    limits = {"teacher": 2000, "student": 1000}
    one, free = carry_out(make("one", max_tokens=limits), CORPUS), carry_out(make("free"), CORPUS)
    for split, most in limits.items():
        tokens = one.shard_sets[split].num_tokens
        assert most <= tokens < most + 40 * 16
        assert _texts(make("one"), one, split) == _texts(make("free"), free, split)[: tokens // 16 * 17]
    assert one.shard_sets["heldout"] == free.shard_sets["heldout"]
    # units that are made from the last to the first do not know what those before them hold
    run = make("back", max_tokens=limits)
    for number in reversed(range(1, NUM_UNITS)):
        assert carry_out_slice(run, CORPUS, Slice(number, NUM_UNITS)) is None
    back = carry_out(run, CORPUS)
    assert (back.content, back.facts) == (one.content, one.facts)


@pytest.mark.parametrize("max_tokens", [{}, {"student": 1200, "heldout": 600}])
def test_what_is_counted_of_a_split_begins_in_its_shards(make, lines: Path, max_tokens: dict[str, int]) -> None:
    sources = [str(lines / "a.jsonl"), str(lines / "b.jsonl")]
    # sequences of several documents, so that some stand in none at the end of a unit
    run = make(sources=sources, max_tokens=max_tokens, seq_len=120, shard_sequences=4)
    manifest = carry_out(run, CORPUS)
    splits = CorpusFacts.model_validate(manifest.facts).splits
    for split in SPLITS:
        reader = ShardReader(_folder(run), manifest.shard_sets[split])
        blocks = [reader.read(number)[0] for number in range(reader.shard_set.num_members)]
        facts = splits[split]
        assert facts.num_documents == sum(int(block.starts_BL1.sum()) for block in blocks)
        for name in ("num_documents", "num_text_bytes", "num_text_tokens"):
            assert getattr(facts, name) == sum(getattr(one, name) for one in facts.by_source.values())
        assert sum(facts.by_length) == facts.num_documents
        # the last document of a unit that is cut is counted whole, and of another that is not the end is missing
        longest = 2 ** len(facts.by_length)
        assert abs(facts.num_text_tokens - manifest.shard_sets[split].num_tokens) < NUM_UNITS * longest
    if max_tokens:
        assert set(splits["heldout"].by_source) == set(sources[:1]), "the second is past the limit"


def test_what_is_past_every_limit_is_not_read(make, lines: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lines"
    folder.mkdir()
    shutil.copy(lines / "a.jsonl", folder)
    (folder / "z.jsonl").write_text("broken\n" * 3000)
    limits = {"teacher": 600, "student": 600, "heldout": 100}
    run = make(sources=[f"{folder}/*.jsonl"], max_tokens=limits)
    assert {split: part.num_tokens for split, part in carry_out(run, CORPUS).shard_sets.items()} == {
        "teacher": 640,
        "student": 640,
        "heldout": 640,
    }


def test_the_ids_are_counted_as_the_shards_hold_them(make) -> None:
    run = make(max_tokens={"student": 1000})
    manifest = carry_out(run, CORPUS)
    for split in SPLITS:
        reader = ShardReader(_folder(run), manifest.shard_sets[split])
        blocks = (reader.read(number)[0] for number in range(reader.shard_set.num_members))
        found = read_counts(_folder(run), manifest.files, split, 350)
        assert np.array_equal(found, count_ids(blocks, 350))


def test_a_mixture_has_its_shares_and_stands_mixed_from_the_beginning(make, lines: Path) -> None:
    sources = {
        "plain": {"paths": [str(lines / "a.jsonl")], "weight": 3},
        "other": {"paths": [str(lines / "b.jsonl")], "weight": 1},
    }
    run = make(sources=None, mixture=sources, unit_bytes=4000)
    manifest = carry_out(run, CORPUS)
    splits = CorpusFacts.model_validate(manifest.facts).splits
    text = {name: sum(splits[split].by_source[name].num_text_bytes for split in SPLITS) for name in sources}
    # about 80 of 250 documents are drawn: their number is four deviations from it at most
    assert text["plain"] / text["other"] == pytest.approx(3, rel=0.4)
    listing = list_units(run.corpus)
    order = [listing.source_of(unit) for unit in range(len(listing.units))]
    assert set(order[:4]) == {0, 1} == set(order[-4:])
    again = make("again", sources=None, mixture=sources, unit_bytes=4000)
    assert carry_out_slice(again, CORPUS, Slice(1, 2)) is None
    assert carry_out(again, CORPUS).content == manifest.content


def test_a_source_with_a_limit_is_read_to_the_end_of_a_unit(make, lines: Path) -> None:
    sources = {
        "plain": {"paths": [str(lines / "a.jsonl")]},
        "other": {"paths": [str(lines / "b.jsonl")], "max_tokens": 500, "text_field": "text"},
    }
    manifest = carry_out(make(sources=None, mixture=sources, unit_bytes=4000), CORPUS)
    splits = CorpusFacts.model_validate(manifest.facts).splits
    tokens = {name: sum(splits[split].by_source[name].num_text_tokens for split in SPLITS) for name in sources}
    assert 500 <= tokens["other"] < 500 + 4000 < tokens["plain"]


def test_row_groups_of_parquet_are_read_alone_and_named_by_their_rows(make, lines: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in (lines / "a.jsonl").open()]
    table = pa.table({"text": texts, "other": [1] * len(texts)})
    pa.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=50)
    settings = CorpusSettings(sources=(str(tmp_path / "t.parquet"),), unit_bytes=1)
    parts = [part for unit in list_units(settings).units for part in unit]
    assert [(part.start, part.end, part.first_row) for part in parts] == [(n, n + 1, 50 * n) for n in range(7)]
    run = make(sources=[str(tmp_path / "t.parquet")], unit_bytes=8000)
    found = carry_out(run, CORPUS).shard_sets
    same = make("lines", sources=[str(lines / "a.jsonl")], unit_bytes=1 << 20)
    # one unit of the same texts: all of them, in their order, and less of it lost at the ends of units
    joined = carry_out(same, CORPUS).shard_sets
    for split in SPLITS:
        assert 0 <= joined[split].num_sequences - found[split].num_sequences <= 7


def test_a_source_that_changed_since_it_was_listed_is_named_and_a_begun_corpus_does_not_go_on(
    make, lines: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lines"
    shutil.copytree(lines, folder, ignore=shutil.ignore_patterns("tokenizer"))
    run = make(sources=[f"{folder}/*.jsonl"])
    assert carry_out_slice(run, CORPUS, Slice(0, NUM_UNITS)) is None
    job = prepare(StageContext(run, CORPUS, _folder(run), {}, "cpu"))
    with (folder / "b.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(InputError, match=r"b.jsonl: the file changed since the sources were listed; found .* bytes"):
        UnitMaker(job).make(NUM_UNITS - 1, lambda *_: None)
    (folder / "b.jsonl").unlink()
    with pytest.raises(InputError, match=r"b.jsonl: the file is gone"):
        UnitMaker(job).make(NUM_UNITS - 1, lambda *_: None)
    assert NUM_UNITS - 1 not in job.units.made()
    with pytest.raises(MismatchError, match=r"the sources changed since this corpus was begun; found .*b.jsonl"):
        prepare(StageContext(run, CORPUS, _folder(run), {}, "cpu"))
    with pytest.raises(MismatchError, match=r"begun .* from other sources; found source .*b.jsonl is gone since"):
        carry_out(run, CORPUS)
    assert carry_out(run, CORPUS, remake=True).totals["num_damaged_files"] == 0


def test_a_damaged_file_is_named_and_may_be_left_out(make, lines: Path, tmp_path: Path, caplog) -> None:
    data = gzip.compress((lines / "b.jsonl").read_bytes() * 4)
    (tmp_path / "torn.jsonl.gz").write_bytes(data[: len(data) // 2])
    sources = [str(tmp_path / "torn.jsonl.gz"), str(lines / "a.jsonl")]
    with pytest.raises(InputError, match=r"torn.jsonl.gz: cannot be decompressed"):
        carry_out(make(sources=sources), CORPUS)
    with caplog.at_level("WARNING", "capgap"):
        manifest = carry_out(make(sources=sources, on_damaged_file="skip"), CORPUS)
    assert manifest.totals["num_damaged_files"] == 1
    assert any("left out the rest of a file" in said and "torn.jsonl.gz" in said for said in caplog.messages)
    assert manifest.totals["num_student_tokens"] > 0


@pytest.mark.slow
def test_a_killed_worker_stops_the_stage_by_name_and_the_next_run_goes_on(make) -> None:
    run = make(workers=2)
    code = (
        "import os, signal, sys\n"
        "from capgap.pipeline.corpus import unit\n"
        "from capgap.pipeline.workflow.carry_out import carry_out\n"
        "from capgap.pipeline.stage.context import Instance\n"
        "from capgap.schemas.run_file import RunFile\n"
        "made = unit.UnitMaker.make\n"
        "def make(self, number, advance):\n"
        "    if number == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return made(self, number, advance)\n"
        "unit.UnitMaker.make = make\n"
        "if __name__ == '__main__':\n"
        "    carry_out(RunFile.model_validate_json(sys.argv[1]), Instance('corpus'))\n"
    )
    script = Path(run.out).parent / "killing.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-P", str(script), run.model_dump_json()],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert "MachineError: corpus.workers: a process was killed; found signal 9" in done.stderr
    assert states(run)["corpus"].state is State.PARTIAL
    assert carry_out(run, CORPUS).content == carry_out(make("one"), CORPUS).content


def test_a_record_of_a_unit_says_what_is_in_it(make) -> None:
    run = make()
    assert carry_out_slice(run, CORPUS, Slice(2, NUM_UNITS)) is None
    job = prepare(StageContext(run, CORPUS, _folder(run), {}, "cpu"))
    record = job.record(2)
    assert isinstance(record, UnitRecord) and job.record(1) is None
    num_sequences = {split: sum(shard.num_sequences for shard in record.shards[split]) for split in SPLITS}
    counts = job.counts(2)
    assert {split: int(counts[n].sum()) for n, split in enumerate(SPLITS)} == {
        split: 17 * number for split, number in num_sequences.items()
    }


def test_text_is_read_from_urls_and_an_absent_bucket_is_named(make, lines: Path, s3_server: str) -> None:
    files = fsspec.filesystem("s3")
    files.mkdir("texts")
    for path in lines.glob("*.jsonl"):
        files.put(str(path), f"texts/some/{path.name}")
    here = carry_out(make("here"), CORPUS)
    for number, source in enumerate(("s3://texts/some/*.jsonl", "s3://texts/some")):
        there = carry_out(make(f"there-{number}", sources=[source]), CORPUS)
        assert there.shard_sets == here.shard_sets
        assert not [entry for entry in there.sources if entry.path.endswith(".jsonl")]
    with pytest.raises(InputError, match=r"corpus.sources: s3://absent/a.jsonl: (no text found|cannot be read)"):
        carry_out(make("absent", sources=["s3://absent/a.jsonl"]), CORPUS)


@pytest.mark.slow
def test_a_corpus_that_is_killed_a_hundred_times_comes_out_the_same(make) -> None:
    began = time.monotonic()
    one = carry_out(make("one", unit_bytes=400), CORPUS)
    whole_s = time.monotonic() - began
    run = make("killed", unit_bytes=400)
    rng = np.random.default_rng(0)
    num_killed = 0
    # those that end before they are killed do not count, and what they made is held against the other and thrown away
    while num_killed < 100:
        # forked after the imports, so that a kill falls into the work; nothing here has a thread yet
        pid = os.fork()
        if pid == 0:
            try:
                carry_out(run, CORPUS)
            finally:
                os._exit(0)
        time.sleep(float(rng.uniform(0, whole_s)))
        os.kill(pid, signal.SIGKILL)
        num_killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) < 0
        if states(run)["corpus"].state is State.CURRENT:
            assert read_manifest(_folder(run)).content == one.content
            shutil.rmtree(_folder(run))
    assert carry_out(run, CORPUS).content == one.content


@pytest.mark.slow
def test_a_ray_cluster_makes_what_one_process_makes(make, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    one = carry_out(make("one", dedup="all"), CORPUS)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        assert carry_out(make("ray", workers=2, dedup="all"), CORPUS).content == one.content
    finally:
        cluster.shutdown()
