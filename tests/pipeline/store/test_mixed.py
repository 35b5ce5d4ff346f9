from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from capgap.pipeline.store import Batch, LoaderSettings, MixedLoader, SequenceLoader, ShardReader
from capgap.pipeline.store.codec import SEQUENCES
from capgap.schemas.errors import CorruptError, InputError


@pytest.fixture
def readers(codecs, make_reader, tmp_path) -> dict[str, ShardReader]:
    """Two caches, of 120 and 48 sequences."""
    found = {}
    for name, sizes in (("a", ((4,) * 15,) * 2), ("b", ((3,) * 16,))):
        reader = make_reader(codecs[SEQUENCES], sizes)
        (tmp_path / "shards").rename(tmp_path / name)
        found[name] = ShardReader(tmp_path / name, reader.shard_set)
    return found


def _mixed(readers, epochs: int = 4, rank: int = 0, world_size: int = 1, **settings) -> MixedLoader:
    loaders = {
        name: SequenceLoader(
            reader, LoaderSettings(4, 0, num_epochs=epochs, rank=rank, world_size=world_size, threads=2)
        )
        for name, reader in readers.items()
    }
    return MixedLoader(loaders, settings.pop("weights", {"a": 3, "b": 1}), 7, **settings)


def _rows(batches: list[Batch]) -> list[bytes]:
    return [row.numpy().tobytes() for batch in batches for row in batch.input_ids_BL]


@pytest.mark.parametrize("weights", [{"a": 3, "b": 1}, {"a": 0.5, "b": 0.5}, {"a": 1, "b": 2}])
def test_the_mix_is_that_of_the_weights(readers, weights) -> None:
    loader = MixedLoader(
        {name: SequenceLoader(reader, LoaderSettings(4, 0, num_epochs=2000)) for name, reader in readers.items()},
        weights,
        7,
    )
    for cycles in (1, 5):
        given = dict(zip("ab", loader._given(1000 * cycles), strict=True))
        for name, weight in weights.items():
            assert given[name] == pytest.approx(1000 * cycles * weight / sum(weights.values()), abs=cycles)
    assert sum(loader._given(1234)) == 1234
    share = weights["a"] / sum(weights.values())
    # a loader's own turn may be one early or late, and so may the other's
    assert max(abs(loader._given(step)[0] - step * share) for step in range(3000)) < 3


def test_each_cache_keeps_its_own_order(readers) -> None:
    found = _rows(list(_mixed(readers)))
    for reader in readers.values():
        alone = _rows(list(SequenceLoader(reader, LoaderSettings(4, 0, num_epochs=4))))
        mine = [row for row in found if row in set(alone)]
        assert mine == alone[: len(mine)]
        assert mine


def test_any_micro_batch_can_be_made_again_and_its_sequences_named(readers) -> None:
    loader = _mixed(readers)
    for number, batch in enumerate(loader):
        again = loader.micro_batch(number)
        assert _rows([again]) == _rows([batch])
        for name, row in zip(loader.names(number), _rows([batch]), strict=True):
            path, sequence = name.rsplit(", sequence ", 1)
            reader = next(reader for reader in readers.values() if path.startswith(str(reader.place.folder)))
            places = [(s, m) for s, entry in enumerate(reader.shard_set.shards) for m in range(len(entry.members))]
            (place,) = [place for place in places if reader.name_of(*place) == path]
            sequences, _ = reader.read_member(*place)
            assert sequences.tokens_BL1[int(sequence), :-1].astype("int64").tobytes() == row


def test_the_stream_ends_where_a_cache_has_no_more_to_give(readers) -> None:
    loader = _mixed(readers)
    # a step is one micro-batch here
    given = loader._given(len(loader))
    after = loader._given(len(loader) + 1)
    assert (given <= [120, 48]).all() and (after > [120, 48]).any()
    assert len(list(loader)) == len(loader)


def test_a_resumed_mix_is_the_mix(readers) -> None:
    whole = _rows(list(_mixed(readers)))
    rng = random.Random(0)
    for stop in rng.sample(range(1, len(whole) // 4), 20):
        first = _mixed(readers)
        begun = list(itertools.islice(first, stop))
        second = _mixed(readers)
        second.load_state_dict(first.state_dict())
        assert _rows(begun) + _rows(list(second)) == whole


def test_ranks_take_turns_alike_and_are_disjoint(readers) -> None:
    streams = [list(_mixed(readers, rank=rank, world_size=2, max_tokens=4 * 12 * 30)) for rank in range(2)]
    alone = list(_mixed(readers, max_tokens=4 * 12 * 30))
    assert [len(stream) for stream in streams] == [30, 30]
    for a, b, whole in zip(*streams, alone, strict=True):
        assert sorted(_rows([a, b])) == sorted(_rows([whole]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"a": 1}}, r"weights; found \['a'\], expected one for each of \['a', 'b'\]"),
        ({"weights": {"a": 1, "b": 0}}, "expected numbers above 0"),
        ({"weights": {"a": 1, "b": 1e-5}}, "none below one in 1000"),
        ({"max_tokens": 10**9}, "a: a cache is too small for the mix"),
    ],
)
def test_what_cannot_be_mixed_is_refused(readers, settings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _mixed(readers, **settings)


def _by_steps(readers, sizes: dict[str, tuple[int, int]], **settings) -> MixedLoader:
    """Loaders with steps and micro-batches of these sizes."""
    loaders = {
        name: SequenceLoader(reader, LoaderSettings(sizes[name][0], 0, micro_batch=sizes[name][1]))
        for name, reader in readers.items()
    }
    return MixedLoader(loaders, {"a": 3, "b": 2}, 7, **settings)


def test_the_stream_ends_with_a_whole_step(readers) -> None:
    """Steps of three micro-batches of 4 sequences of 12 targets."""
    whole = _by_steps(readers, {"a": (12, 4), "b": (12, 4)})
    assert len(whole) == 3 * whole.num_steps > 0
    assert (whole._given(whole.num_steps + 1) > whole._has).any()
    for max_tokens in (3 * 48, 3 * 48 * 4 - 1, 3 * 48 * 4):
        loader = _by_steps(readers, {"a": (12, 4), "b": (12, 4)}, max_tokens=max_tokens)
        assert (loader.num_steps, loader.num_tokens) == (max_tokens // 144, max_tokens // 144 * 144)
        assert (len(list(loader)), loader.tokens_per_step) == (3 * loader.num_steps, 144)


def test_passes_over_the_counted_cache_are_epochs(readers) -> None:
    of_a = _by_steps(readers, {"a": (12, 4), "b": (12, 4)}, epochs_of="a").steps_per_epoch
    of_b = _by_steps(readers, {"a": (12, 4), "b": (12, 4)}, epochs_of="b").steps_per_epoch
    # 10 steps of `a` take 3 of 5 turns, 4 steps of `b` 2 of 5
    assert (of_a, of_b) == (pytest.approx(10 * 5 / 3), pytest.approx(4 * 5 / 2))


def test_steps_of_unequal_micro_batches_and_less_than_a_step_are_refused(readers) -> None:
    with pytest.raises(InputError, match=r"micro-batches in a step; found \[1, 3\], expected one number"):
        _by_steps(readers, {"a": (12, 4), "b": (4, 4)})
    with pytest.raises(InputError, match="not enough data for one step of the mix"):
        _by_steps(readers, {"a": (12, 4), "b": (12, 4)}, max_tokens=143)


def test_a_state_of_another_mix_is_refused(readers) -> None:
    with pytest.raises(
        InputError, match=r"another mix; found {'shares': .* expected {'shares': .*; restore the caches"
    ):
        _mixed(readers).load_state_dict(_mixed(readers, weights={"a": 1, "b": 1}).state_dict())


def _on_ranks(readers, world_size: int, micro_batch: int) -> list[MixedLoader]:
    """The loaders of all ranks, with steps of 12 sequences."""
    found = []
    for rank in range(world_size):
        settings = LoaderSettings(
            12, 0, num_epochs=9, rank=rank, world_size=world_size, micro_batch=micro_batch, threads=0
        )
        loaders = {name: SequenceLoader(reader, settings) for name, reader in readers.items()}
        found.append(MixedLoader(loaders, {"a": 3, "b": 2}, 7))
    return found


def _steps_of(ranks: list[MixedLoader]) -> list[list[bytes]]:
    """The sequences of each step that is left, sorted."""
    streams = [[_rows([batch]) for batch in rank] for rank in ranks]
    parts = len(ranks[0]) // ranks[0].num_steps
    return [
        sorted(row for stream in streams for rows in stream[first : first + parts] for row in rows)
        for first in range(0, len(streams[0]), parts)
    ]


def test_the_steps_of_a_mix_and_its_resumes_are_the_same_on_any_ranks_with_any_micro_batches(readers) -> None:
    steps = _steps_of(_on_ranks(readers, 1, 12))
    begun = _on_ranks(readers, 1, 3)[0]
    list(itertools.islice(begun, 4 * 7))
    for world_size, micro_batch in ((1, 3), (2, 6), (2, 2), (4, 3), (12, 1)):
        assert _steps_of(_on_ranks(readers, world_size, micro_batch)) == steps
        ranks = _on_ranks(readers, world_size, micro_batch)
        for rank in ranks:
            rank.load_state_dict(begun.state_dict())
        assert _steps_of(ranks) == steps[7:]


def test_a_state_within_a_step_of_a_mix_is_taken_up_by_ranks_that_divide_it_and_no_others(readers) -> None:
    steps = _rows(list(_on_ranks(readers, 1, 12)[0]))
    begun = _on_ranks(readers, 1, 3)[0]
    list(itertools.islice(begun, 4 * 7 + 2))
    same, finer = _on_ranks(readers, 1, 3)[0], _on_ranks(readers, 1, 2)[0]
    for loader in (same, finer):
        loader.load_state_dict(begun.state_dict())
        assert _rows(list(loader)) == steps[12 * 7 + 6 :]
    with pytest.raises(InputError, match=r"within a step.* found 90 rows, expected a multiple of 12, the rows"):
        _on_ranks(readers, 1, 12)[0].load_state_dict(begun.state_dict())


def test_caches_of_unequal_sequences_are_mixed_in_rows_of_one_length(readers, codecs, make_reader, tmp_path) -> None:
    """Rows of 26: two sequences of 12 and 2 of padding, or one of 20 and 6 of padding."""
    longer = make_reader(dataclasses.replace(codecs[SEQUENCES], seq_len=20), ((4,) * 10,))
    caches = {"a": (readers["a"], 8), "long": (longer, 4)}

    def make(**settings) -> MixedLoader:
        loaders = {
            name: SequenceLoader(reader, LoaderSettings(size, 0, num_epochs=9, row_len=26))
            for name, (reader, size) in caches.items()
        }
        return MixedLoader(loaders, {"a": 1, "long": 1}, 7, **settings)

    whole = list(make(max_tokens=1000))
    assert {tuple(batch.input_ids_BL.shape) for batch in whole} == {(4, 26)}
    # a turn of `a` has 8 x 12 targets, one of `long` 4 x 20
    targets = [80 if (batch.positions_BL == 19).any() else 96 for batch in whole]
    assert {80, 96} == set(targets) and sum(targets) <= 1000 < sum(targets) + 96
    for stop in range(len(whole)):
        first = make(max_tokens=1000)
        list(itertools.islice(first, stop))
        second = make(max_tokens=1000)
        second.load_state_dict(first.state_dict())
        assert _rows(list(second)) == _rows(whole[stop:])
    with pytest.raises(InputError, match=r"\(rows in a batch, targets in a row\); found .*\(4, 12\), \(4, 20\)"):
        MixedLoader(
            {name: SequenceLoader(reader, LoaderSettings(4, 0)) for name, (reader, _) in caches.items()},
            {"a": 1, "long": 1},
            7,
        )


@pytest.mark.parametrize("threads", [0, 2])
def test_a_batch_that_could_not_be_made_does_not_count_as_handed_out(readers, tmp_path, threads: int) -> None:
    def make() -> MixedLoader:
        settings = LoaderSettings(4, 0, num_epochs=2, threads=threads)
        loaders = {name: SequenceLoader(reader, settings) for name, reader in readers.items()}
        return MixedLoader(loaders, {"a": 3, "b": 1}, 7)

    expected = _rows(list(make()))
    path = tmp_path / "b" / readers["b"].shard_set.shards[0].file.path
    sound = path.read_bytes()
    path.write_bytes(bytes(len(sound)))
    broken, handed_out = make(), []
    with pytest.raises(CorruptError, match="checksum mismatch"):
        for batch in broken:
            handed_out.append(batch)
    state = broken.state_dict()
    assert state["position"] == 4 * len(handed_out) == sum(of["position"] for of in state["loaders"].values())
    path.write_bytes(sound)
    resumed = make()
    resumed.load_state_dict(state)
    assert _rows(handed_out) + _rows(list(resumed)) == expected
    assert _rows(handed_out) + _rows(list(broken)) == expected
