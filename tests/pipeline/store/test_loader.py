"""Legend: B sequences, L targets a sequence, N = B x L rows, K ids of the widest row."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import subprocess
import sys

import pytest
import torch

from capgap.pipeline.store import Batch, LoaderSettings, SequenceLoader, ShardReader
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK
from capgap.schemas.errors import InputError
from tests.pipeline.store.conftest import loader_threads, rows_of, steps_of

# 41 sequences in 7 members, so 2 lanes: steps of 4 leave one sequence over
SIZES = ((7, 5), (9,), (1, 6, 8, 5))


@pytest.fixture
def reader(codecs, make_reader) -> ShardReader:
    return make_reader(codecs[SAMPLED], SIZES)


@pytest.fixture
def many(codecs, make_reader) -> ShardReader:
    """1200 sequences in 300 members, so 64 lanes."""
    return make_reader(codecs[SEQUENCES], ((4,) * 30,) * 10)


def _same(a: Batch, b: Batch) -> bool:
    pairs = zip(a.tensors().values(), b.tensors().values(), strict=True)
    return all(x is y is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)


def _all_same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


@pytest.mark.parametrize("name", [SEQUENCES, SAMPLED, TOPK])
@pytest.mark.parametrize("position", [0, 1, 9, 10, 11, 24, 25])
def test_what_remains_after_a_resume_is_the_same_to_the_bit(codecs, make_reader, name: str, position: int) -> None:
    reader = make_reader(codecs[name], SIZES)
    settings = {"num_epochs": 3, "max_tokens": 25 * 4 * 12}  # two and a half epochs
    whole = list(SequenceLoader(reader, LoaderSettings(4, 3, **settings)))
    first = SequenceLoader(reader, LoaderSettings(4, 3, **settings))
    begun = list(itertools.islice(first, position))
    assert _all_same(begun, whole[:position])
    second = SequenceLoader(reader, LoaderSettings(4, 3, **settings, threads=position % 4, ahead=1 + position % 3))
    second.load_state_dict(first.state_dict())
    assert _all_same(list(second), whole[position:])
    assert len(second) == len(whole) == 25


@pytest.mark.parametrize("num_kills", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_and_resumes_with_other_ranks_and_micro_batches_take_the_same_steps(many, num_kills: int) -> None:
    """Killed after any step, and resumed with any number of ranks, micro-batches and threads."""
    whole = steps_of([SequenceLoader(many, LoaderSettings(128, 5, num_epochs=2, threads=0))])
    assert len(whole) == 18
    rng = random.Random(0)
    for _ in range(num_kills):
        step, found, state = 0, [], None
        while step < 18:
            world_size, stop = 2 ** rng.randint(0, 6), rng.randint(step + 1, 18)
            share = 128 // world_size
            micro_batch = rng.choice([size for size in (share, share // 2) if size])
            ranks = [
                SequenceLoader(
                    many,
                    LoaderSettings(
                        128, 5, num_epochs=2, micro_batch=micro_batch, rank=rank, world_size=world_size, threads=0
                    ),
                )
                for rank in rng.sample(range(world_size), 1)
            ]
            for rank in ranks:
                if state is not None:
                    rank.load_state_dict(state)
                parts = share // micro_batch
                mine = [rows_of(batch) for batch in itertools.islice(rank, (stop - step) * parts)]
                for number, expected in enumerate(whole[step:stop]):
                    rows = [row for part in mine[number * parts : (number + 1) * parts] for row in part]
                    assert len(rows) == share and set(rows) <= set(expected)
                found += mine
                state = rank.state_dict()
            step = stop
        assert state is not None and state["position"] == 18 * 128


@pytest.mark.parametrize("num_kills", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_after_random_kills_any_ranks_and_workers_go_on_to_the_bit(codecs, make_reader, num_kills: int) -> None:
    """Rank r of w has every w-th sequence, so the ranks' rows, dealt out in turn, are one process's in its order."""
    reader = make_reader(codecs[SAMPLED], SIZES)
    settings = {"batch_sequences": 12, "seed": 4, "num_epochs": 4}
    whole = [rows_of(batch) for batch in SequenceLoader(reader, LoaderSettings(**settings, threads=0))]
    assert len(whole) == 12
    rng = random.Random(1)
    for _ in range(num_kills):
        kill_step, before, world_size, workers = (
            rng.randrange(12),
            rng.choice([1, 2, 3, 4, 6, 12]),
            rng.choice([1, 2, 3, 4, 6, 12]),
            rng.randrange(4),
        )
        killed = SequenceLoader(
            reader, LoaderSettings(**settings, rank=rng.randrange(before), world_size=before, threads=workers)
        )
        batches = iter(killed)
        for _ in range(kill_step):
            next(batches)
        ranks = [
            SequenceLoader(reader, LoaderSettings(**settings, rank=rank, world_size=world_size, threads=workers))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.load_state_dict(killed.state_dict())
        batches.close()
        steps = zip(*([rows_of(batch) for batch in rank] for rank in ranks), strict=True)
        found = [[row for dealt in zip(*parts, strict=True) for row in dealt] for parts in steps]
        assert found == whole[kill_step:], (kill_step, before, world_size, workers)


# Logs a digest of every batch, and then keeps the state; killed when the log has so many lines, and begun again.
LOGGED = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
from capgap.pipeline.store import LoaderSettings, SequenceLoader, ShardReader
from capgap.schemas.manifest import ShardSet

folder, kills = Path(sys.argv[1]), json.loads(sys.argv[2])
reader = ShardReader(folder, ShardSet.model_validate_json((folder / "set.json").read_text()))
log, state = folder / "log", folder / "state"

def read():
    loader = SequenceLoader(reader, LoaderSettings(4, 3, num_epochs=6, threads=2))
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text()))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for batch in loader:
        digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in batch.tensors().values() if v is not None))
        os.write(file, f"{loader.state_dict()['position']} {digest.hexdigest()}\\n".encode())
        (folder / "new").write_text(json.dumps(loader.state_dict()))
        (folder / "new").replace(state)
        # it is killed soon, however busy the machine
        signal.pause() if kill is not None and lines() >= kill + 4 else time.sleep(0.002)

def lines():
    return len(log.read_bytes().splitlines()) if log.exists() else 0

for kill in [*kills, None]:
    child = os.fork()
    if not child:
        read()
        os._exit(0)
    while kill is not None and lines() < kill:
        time.sleep(0.0005)
    if kill is not None:
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == (0 if kill is None else signal.SIGKILL)
"""


def test_a_process_that_is_killed_any_time_goes_on_with_the_batches_that_remained(codecs, make_reader) -> None:
    reader = make_reader(codecs[SAMPLED], SIZES)
    folder = reader.place.folder
    (folder / "set.json").write_text(reader.shard_set.model_dump_json())
    kills = sorted(random.Random().sample(range(1, 55), 4))
    subprocess.run([sys.executable, "-c", LOGGED, str(folder), json.dumps(kills)], check=True, timeout=1800)
    whole = SequenceLoader(reader, LoaderSettings(4, 3, num_epochs=6))
    expected = []
    for number, batch in enumerate(whole, 1):
        data = b"".join(v.numpy().tobytes() for v in batch.tensors().values() if v is not None)
        expected.append(f"{4 * number} {hashlib.sha256(data).hexdigest()}")
    found = (folder / "log").read_text().splitlines()
    assert len(expected) == 60 <= len(found) <= 60 + len(kills), f"killed at {kills}"
    # between its line and its state a batch may be taken again: then it is the same
    assert [line for i, line in enumerate(found) if line not in found[:i]] == expected, f"killed at {kills}"
    assert set(found) == set(expected)


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_ranks_are_disjoint_and_together_take_the_steps_of_one(many, world_size: int) -> None:
    alone = steps_of([SequenceLoader(many, LoaderSettings(128, 1, num_epochs=2, threads=0))])
    ranks = [
        SequenceLoader(many, LoaderSettings(128, 1, num_epochs=2, rank=rank, world_size=world_size, threads=0))
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {18}
    assert steps_of(ranks) == alone
    assert all(len(set(step)) == 128 for step in alone)
    for epoch in (alone[:9], alone[9:]):
        assert len({row for step in epoch for row in step}) == 9 * 128, "no sequence twice in an epoch"


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_smaller_micro_batches_hold_the_same_sequences_in_the_same_order(reader, micro_batch: int) -> None:
    whole = [row for batch in SequenceLoader(reader, LoaderSettings(8, 1, num_epochs=3)) for row in rows_of(batch)]
    parts = SequenceLoader(reader, LoaderSettings(8, 1, num_epochs=3, micro_batch=micro_batch))
    assert len(parts) == 15 * 8 // micro_batch
    assert [row for batch in parts for row in rows_of(batch)] == whole


@pytest.mark.parametrize("seed", [0, 1])
def test_an_epoch_holds_no_sequence_twice_and_leaves_out_only_what_fills_no_step(reader, seed: int) -> None:
    rows = [row for batch in SequenceLoader(reader, LoaderSettings(4, seed)) for row in rows_of(batch)]
    assert len(set(rows)) == len(rows) == 40


def test_seeds_and_epochs_have_orders_of_their_own(reader) -> None:
    streams = [list(SequenceLoader(reader, LoaderSettings(4, seed, num_epochs=2))) for seed in (0, 1)]
    epochs = [part for stream in streams for part in (stream[:10], stream[10:])]
    assert len({tuple(row for batch in epoch for row in rows_of(batch)) for epoch in epochs}) == 4


def test_every_rank_has_the_same_state_whatever_was_made_ahead(reader) -> None:
    ranks = [SequenceLoader(reader, LoaderSettings(8, 1, num_epochs=2, rank=rank, world_size=2)) for rank in range(2)]
    for rank in ranks:
        list(itertools.islice(rank, 3))
    assert ranks[0].state_dict() == ranks[1].state_dict()
    assert ranks[0].state_dict()["position"] == 24


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"batch_sequences": 8}, "batch_sequences", id="another step"),
        pytest.param({"seed": 2}, "seed", id="another seed"),
        pytest.param({"lanes": 4}, "lanes", id="other lanes"),
    ],
)
def test_a_state_of_another_order_is_refused(reader, change, named: str) -> None:
    loader = SequenceLoader(reader, LoaderSettings(4, 3))
    list(itertools.islice(loader, 9))
    other = SequenceLoader(reader, LoaderSettings(**({"batch_sequences": 4, "seed": 3} | change)))
    with pytest.raises(
        InputError, match=rf"checkpoint of another data order; found {{'{named}'.* expected .*; restore"
    ):
        other.load_state_dict(loader.state_dict())


def test_a_state_within_a_step_is_refused_by_ranks_that_cannot_divide_it(reader) -> None:
    loader = SequenceLoader(reader, LoaderSettings(8, 3, micro_batch=2))
    list(itertools.islice(loader, 5))
    state = loader.state_dict()
    SequenceLoader(reader, LoaderSettings(8, 3, micro_batch=1, world_size=2)).load_state_dict(state)
    with pytest.raises(InputError, match=r"within a step.* found 10 sequences, expected a multiple of 8"):
        SequenceLoader(reader, LoaderSettings(8, 3, world_size=2)).load_state_dict(state)


def test_a_state_of_another_cache_is_refused(codecs, make_reader, reader, tmp_path) -> None:
    (tmp_path / "shards").rename(tmp_path / "first")
    loader = SequenceLoader(make_reader(codecs[SAMPLED], SIZES[:2]), LoaderSettings(4, 3))
    with pytest.raises(InputError, match=r"another data order; found {.*'shards'"):
        SequenceLoader(reader, LoaderSettings(4, 3)).load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"world_size": 3}, "does not divide.* 4 sequences, 1 a micro-batch on 3 ranks"),
        ({"world_size": 2, "batch_sequences": 5}, "does not divide.* 5 sequences, 2 a micro-batch on 2 ranks"),
        ({"micro_batch": 3}, "does not divide.* multiple of 3"),
        ({"batch_sequences": 42}, "found 41 sequences, expected at least 42"),
        ({"max_tokens": 47}, "max_tokens: not enough data for one step .* found 47, expected at least 48"),
    ],
)
def test_what_cannot_be_divided_is_refused(reader, given, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SequenceLoader(reader, LoaderSettings(**({"batch_sequences": 4, "seed": 0} | given)))


def test_threads_are_gone_after_the_last_batch_and_after_closing(reader) -> None:
    batches = iter(SequenceLoader(reader, LoaderSettings(4, 0, threads=3)))
    for _ in range(10):
        next(batches)
    assert loader_threads() == [], "nobody need ask for an eleventh"
    batches = iter(SequenceLoader(reader, LoaderSettings(4, 0, threads=3)))
    next(batches)
    assert loader_threads()
    batches.close()
    assert loader_threads() == []


def test_each_block_is_decoded_once_an_epoch_and_memory_is_bounded(many, monkeypatch) -> None:
    read = []
    original = many.read_member
    monkeypatch.setattr(many, "read_member", lambda *key: read.append(key) or original(*key))
    loader = SequenceLoader(many, LoaderSettings(12, 0, threads=4))
    list(loader)
    assert len(read) == 300
    read.clear()
    small = SequenceLoader(many, LoaderSettings(12, 0, num_epochs=2, threads=4, max_block_bytes=3000))
    assert _all_same(list(small), list(SequenceLoader(many, LoaderSettings(12, 0, num_epochs=2))))
    assert 0 < small.blocks.num_bytes <= 3000


def test_in_a_single_epoch_a_block_is_dropped_after_its_last_sequence(many) -> None:
    once, twice = (SequenceLoader(many, LoaderSettings(12, 0, num_epochs=epochs, threads=0)) for epochs in (1, 2))
    held = [once.blocks.num_bytes for _ in once]
    assert held[-1] == 0
    list(itertools.islice(twice, 100))
    assert max(held) < 0.75 * twice.blocks.num_bytes, "a second epoch finds all of a small set decoded"


def test_batches_are_pinned_where_asked(reader) -> None:
    if not torch.cuda.is_available():
        pytest.skip("page-locked memory needs CUDA")
    assert next(iter(SequenceLoader(reader, LoaderSettings(4, 0)))).input_ids_BL.is_pinned()
