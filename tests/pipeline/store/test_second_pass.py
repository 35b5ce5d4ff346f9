"""A loader at its end: nothing is left of it, and a second pass is refused rather than empty."""

from __future__ import annotations

import itertools

import pytest

from capgap.pipeline.store import LoaderSettings, MixedLoader, SequenceLoader, ShardReader
from capgap.pipeline.store.codec import SEQUENCES
from capgap.schemas.errors import InputError


@pytest.fixture
def reader(codecs, make_reader) -> ShardReader:
    return make_reader(codecs[SEQUENCES], ((7, 5), (9,), (1, 6, 8, 5)))


def test_the_state_of_a_loader_at_its_end_leaves_nothing(reader) -> None:
    loader = SequenceLoader(reader, LoaderSettings(4, 3))
    assert len(list(loader)) == 10
    resumed = SequenceLoader(reader, LoaderSettings(4, 3))
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []


def test_a_second_pass_over_a_loader_is_refused_and_not_empty(reader) -> None:
    loader = SequenceLoader(reader, LoaderSettings(4, 3))
    begin, seen = loader.state_dict(), 0
    with pytest.raises(InputError, match="second pass after all 10 batches, expected one pass, which goes over the da"):
        for _ in range(3):
            for _ in loader:
                seen += 1
    assert seen == 10
    # an iterator that was left goes on, and a state that was put back counts from there
    loader.load_state_dict(begin)
    assert len(list(itertools.islice(loader, 3))) + len(list(loader)) == 10


def test_a_second_pass_over_a_mix_is_refused_and_not_empty(reader) -> None:
    loader = MixedLoader({name: SequenceLoader(reader, LoaderSettings(4, 3)) for name in "ab"}, {"a": 1, "b": 1}, 7)
    begin = loader.state_dict()
    list(loader)
    with pytest.raises(InputError, match=f"a second pass after all {len(loader)} batches"):
        next(iter(loader))
    loader.load_state_dict(begin)
    assert len(list(loader)) == len(loader)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_second_pass_is_refused_too_where_the_first_stops_at_its_last_batch(reader, mixed: bool) -> None:
    loader = SequenceLoader(reader, LoaderSettings(4, 3))
    if mixed:
        loader = MixedLoader({name: SequenceLoader(reader, LoaderSettings(4, 3)) for name in "ab"}, {"a": 1, "b": 1}, 7)
    begin = loader.state_dict()
    assert len(list(zip(range(len(loader)), loader, strict=False))) == len(loader)
    with pytest.raises(InputError, match=f"a second pass after all {len(loader)} batches"):
        next(iter(loader))
    loader.load_state_dict(begin)
    assert len(list(loader)) == len(loader)
