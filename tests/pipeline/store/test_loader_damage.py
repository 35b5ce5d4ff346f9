"""Damaged members in the loader: they stop it, or other sequences replace theirs."""

from __future__ import annotations

import itertools

import pytest
import torch

from capgap.pipeline.store import Batch, LoaderSettings, SequenceLoader, ShardReader
from capgap.pipeline.store.codec import SEQUENCES
from capgap.schemas.errors import CorruptError
from tests.pipeline.store.conftest import loader_threads, rows_of, steps_of


@pytest.fixture
def many(codecs, make_reader) -> ShardReader:
    """1200 sequences in 300 members, so 64 lanes."""
    return make_reader(codecs[SEQUENCES], ((4,) * 30,) * 10)


def _damage(reader: ShardReader, shard: int, member: int) -> str:
    """Turn a bit of that member; returns how errors name it."""
    entry = reader.shard_set.shards[shard]
    with (reader.place.folder / entry.file.path).open("r+b") as file:
        file.seek(entry.member(member).offset + 20)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return reader.name_of(shard, member)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_member_stops_with_its_name_in_the_consumers_thread(many, threads: int) -> None:
    name = _damage(many, 3, 7)
    with pytest.raises(CorruptError, match=f"^{name} at byte .*checksum mismatch"):
        list(SequenceLoader(many, LoaderSettings(4, 0, threads=threads)))
    assert loader_threads() == []


@pytest.fixture
def large(codecs, make_reader) -> ShardReader:
    """4096 sequences: 4 of them may be damaged."""
    return make_reader(codecs[SEQUENCES], ((4,) * 128,) * 8)


def test_a_skipped_sequence_is_replaced_by_the_next_good_one_of_its_window(large, caplog) -> None:
    sound = list(SequenceLoader(large, LoaderSettings(64, 0)))
    places = [place for number in range(64) for place in SequenceLoader(large, LoaderSettings(64, 0)).places(number)]
    name = _damage(large, 3, 7)
    loader = SequenceLoader(large, LoaderSettings(64, 0, on_corrupt="skip"))
    found = list(loader)
    assert len(found) == len(sound)
    changed = [i for i in range(4096) if not torch.equal(_row(found, i), _row(sound, i))]
    assert changed == [i for i, place in enumerate(places) if place[:2] == (3, 7)]
    for i in changed:
        # a window is 8 sequences of a lane, of which every 64th is one
        first, within = i // 512 * 512 + i % 64, i // 64 % 8
        others = [first + 64 * ((within + further) % 8) for further in range(8)]
        good = next(other for other in others if other not in changed)
        assert torch.equal(_row(found, i), _row(sound, good))
    assert loader.skips.as_dict() == {name: 4}
    assert [name in record.getMessage() for record in caplog.records] == [True]
    for world_size, threads in ((2, 0), (8, 3)):
        ranks = [
            SequenceLoader(
                large, LoaderSettings(64, 0, rank=r, world_size=world_size, threads=threads, on_corrupt="skip")
            )
            for r in range(world_size)
        ]
        assert steps_of(ranks) == [sorted(rows_of(batch)) for batch in found]
    resumed = SequenceLoader(large, LoaderSettings(64, 0, on_corrupt="skip"))
    resumed.load_state_dict(loader.state_dict())
    assert resumed.skips.as_dict() == {name: 4}, "a resumed training still says what was skipped before"


def _row(batches: list[Batch], index: int) -> torch.Tensor:
    return batches[index // 64].input_ids_BL[index % 64]


def test_more_damage_than_one_in_a_thousand_stops(large) -> None:
    for shard, member in ((3, 7), (5, 1)):
        _damage(large, shard, member)
    with pytest.raises(CorruptError, match=r"too much is damaged .* found 8 sequences in 2 members, .* 4,"):
        list(SequenceLoader(large, LoaderSettings(64, 0, on_corrupt="skip")))


def test_what_was_repaired_since_a_training_was_interrupted_no_longer_counts(large) -> None:
    path = large.place.folder / large.shard_set.shards[3].file.path
    sound = path.read_bytes()
    repaired = _damage(large, 3, 7)
    before = SequenceLoader(large, LoaderSettings(64, 0, num_epochs=2, on_corrupt="skip"))
    list(itertools.islice(before, 64))
    path.write_bytes(sound)
    found = _damage(large, 5, 1)
    resumed = SequenceLoader(large, LoaderSettings(64, 0, num_epochs=2, on_corrupt="skip"))
    resumed.load_state_dict(before.state_dict())
    # each has 4 sequences, as many as may be damaged
    assert len(list(resumed)) == 64
    assert resumed.skips.as_dict() == {repaired: 4, found: 4}
