"""A training without the shards that are in quarantine, whatever the lanes that they fill."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from capgap.pipeline.store import LoaderSettings, SequenceLoader, ShardReader
from capgap.pipeline.store.codec import SEQUENCES
from capgap.pipeline.store.quarantine import write_quarantine
from capgap.schemas.errors import CorruptError


@pytest.fixture
def without(codecs, make_reader) -> Callable[..., ShardReader]:
    """A reader of shards of equally many members of 2 sequences, some of them in quarantine."""

    def make(num_shards: int, num_members: int, *lost: int) -> ShardReader:
        reader = make_reader(codecs[SEQUENCES], ((2,) * num_members,) * num_shards)
        files = [shard.file.path for shard in reader.shard_set.shards]
        write_quarantine(reader.place.folder, {files[shard]: "a flipped bit" for shard in lost})
        return ShardReader(reader.place.folder, reader.shard_set)

    return make


def _steps(reader: ShardReader, world_size: int = 1, state: dict | None = None) -> list[list[bytes]]:
    """The sequences of each step that is left, in order."""
    ranks = []
    for rank in range(world_size):
        settings = LoaderSettings(
            8, 0, num_epochs=2, rank=rank, world_size=world_size, on_corrupt="skip", threads=rank % 2
        )
        loader = SequenceLoader(reader, settings)
        if state is not None:
            loader.load_state_dict(state)
        ranks.append([[row.numpy().tobytes() for row in batch.input_ids_BL] for batch in loader])
    return [[row for dealt in zip(*parts, strict=True) for row in dealt] for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize(
    ("num_shards", "num_members", "lost"), [(4, 8, (1,)), (4, 40, (0, 3)), (8, 32, (7,)), (20, 10, (0, 5, 6))]
)
def test_a_training_does_without_quarantined_shards_on_any_ranks(without, num_shards, num_members, lost) -> None:
    reader = without(num_shards, num_members, *lost)
    steps = _steps(reader)
    assert len(steps) == 2 * num_shards * num_members * 2 // 8
    sound = set()
    for shard, member in itertools.product(range(num_shards), range(num_members)):
        if shard not in lost:
            tokens = reader.read_member(shard, member)[0].tokens_BL1
            sound |= {row[:-1].astype("int64").tobytes() for row in tokens}
    assert {row for step in steps for row in step} == sound
    for world_size in (2, 8):
        assert _steps(reader, world_size) == steps


def test_a_training_without_a_shard_goes_on_exactly_where_it_stopped(without) -> None:
    reader = without(4, 40, 2)
    steps = _steps(reader)
    first = SequenceLoader(reader, LoaderSettings(8, 0, num_epochs=2, on_corrupt="skip"))
    list(itertools.islice(first, 27))
    for world_size in (1, 4):
        assert _steps(reader, world_size, first.state_dict()) == steps[27:]


def test_a_cache_of_which_nothing_is_sound_is_named(without) -> None:
    reader = without(2, 8, 0, 1)
    with pytest.raises(CorruptError, match=r"-000000.tar: no sound sequence is left; found .* all of 2 shards; run"):
        next(iter(SequenceLoader(reader, LoaderSettings(4, 0, on_corrupt="skip", threads=0))))


def test_a_quarantined_shard_is_named_once_with_the_number_of_its_members(without, caplog) -> None:
    reader = without(4, 8, 1, 2)
    list(SequenceLoader(reader, LoaderSettings(8, 0, num_epochs=2, on_corrupt="skip", threads=2)))
    names = [reader.place.name_of(reader.shard_set.shards[shard].file) for shard in (1, 2)]
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"skipped: {name}: the shard is in quarantine, with 8 members; found a flipped bit" for name in names
    ]
