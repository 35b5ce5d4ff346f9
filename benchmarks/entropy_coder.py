"""Compare an entropy coder for sampled ids and counts with what a cache stores: bytes per token, and speed of decoding.

python benchmarks/entropy_coder.py --cache runs/demo/cache     needs a finished cache that holds samples

The coder is constriction's range coder (`pip install constriction`). Distributions are estimated on half of the cache's
members, and the other half is coded with them. A row's ids are a set, so they are coded by rising rank. A quarter of an
octave of ranks is a kind: each id's kind is coded given the kind before it, and its place within the kind uniformly.
Counts are coded given the rank's octave and the row's number of ids. All rows of a member are coded together, first id
by first id, then second by second, so that one call of the coder has many symbols with one distribution.

Legend: N rows, K ids of the widest row, k a place among them, D ids of all rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from entropy_bounds import bounds
from machine import RESULTS, keep
from stored_parts import parts_of

from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader, keep_freed_memory
from capgap.schemas.records import SampledTargets

_QUARTERS = 4
_NUM_KINDS = 24 * _QUARTERS  # kinds of ranks below 2^24
_MOST_OCTAVES = 8  # classes of two octaves of ranks, for the distributions of counts
_WIDTHS = (4, 8, 16, 32, 1 << 24)  # classes of a row's number of ids, for the distributions of counts

Array = Any  # a NumPy array of integers


def main() -> None:
    """Measure, print the figures, and write them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("runs/demo/cache"), help="a finished stage's folder")
    parser.add_argument("--name", default="demo", help="name of the cache in the results")
    parser.add_argument(
        "--members", type=int, default=4, help="members of the cache that are read; every second one is coded"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    manifest = read_manifest(flags.cache)
    assert manifest is not None, f"{flags.cache} is no finished stage"
    reader = ShardReader(flags.cache, manifest.shard_sets["sampled"])
    figures = measure(reader, flags.members, flags.repeats)
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(keep(f"entropy-coder-{flags.name}", "cpu", figures, flags.results))


def measure(reader: ShardReader, num_members: int, repeats: int) -> dict[str, Any]:
    """Return bytes per token and decoded tokens per CPU second, for the coder and for the cache's own codec."""
    places = [
        (shard, member)
        for shard, entry in enumerate(reader.shard_set.shards)
        for member in range(len(entry.members.offset))
    ][:num_members]
    found = [_targets_of(reader, place) for place in places]
    coder = Coder([Rows.of(one, reader) for one in found[::2]], reader.codec.num_ids)
    stored = places[1::2]
    rows = [Rows.of(one, reader) for one in found[1::2]]
    coded = [coder.encode(one) for one in rows]
    for one, words in zip(rows, coded, strict=True):
        assert coder.decode(words, len(one.sizes_N)) == one, "other ids were read than written"
    num_tokens = sum(len(one.sizes_N) for one in rows)
    return {
        "constriction": version("constriction"),
        "samples": reader.codec.num_ids,
        "vocab_size": reader.codec.vocab_size,
        "num_tokens": num_tokens,
        "ids_per_token": round(sum(one.ranks_D.size for one in rows) / num_tokens, 2),
        "coder_bytes": {part: round(sum(one[part].nbytes for one in coded) / num_tokens, 2) for part in coded[0]},
        "coder_total_bytes": round(sum(part.nbytes for one in coded for part in one.values()) / num_tokens, 2),
        "stored_bytes": round(sum(_stored_bytes(reader, place) for place in stored) / num_tokens, 2),
        "bounds": bounds(found, None, reader.codec.vocab_size),
        "coder_decode_tokens_per_cpu_s": _speed(
            lambda: [coder.decode(words, len(one.sizes_N)) for one, words in zip(rows, coded, strict=True)],
            num_tokens,
            repeats,
        ),
        "coder_ns_per_symbol": coder.symbol_ns(repeats),
        # this decodes the whole member, with its tokens, label logprobs and checks
        "stored_decode_tokens_per_cpu_s": _speed(
            lambda: [reader.codec.decode(_data(reader, place), "here") for place in stored], num_tokens, repeats
        ),
    }


class Rows:
    """Ranks and counts of the ids of all rows, by rising rank within a row.

    Attributes:
        sizes_N: Number of ids of each row.
        ranks_D: Ranks of all rows' ids, row after row.
        counts_D: How often each id was sampled.
    """

    def __init__(self, sizes_N: Array, ranks_D: Array, counts_D: Array) -> None:
        self.sizes_N, self.ranks_D, self.counts_D = sizes_N, ranks_D, counts_D

    @classmethod
    def of(cls, targets: SampledTargets, reader: ShardReader) -> Rows:
        """Return the rows of a cache's targets, with each row sorted by rank."""
        assert reader.codec.ranking is not None
        sizes_N = targets.num_ids_BL.ravel().astype(np.int64)
        ranks_D = reader.codec.ranking.ranks_V[targets.ids_D].astype(np.int64)
        order_D = np.lexsort((ranks_D, np.repeat(np.arange(len(sizes_N)), sizes_N)))
        return cls(sizes_N, ranks_D[order_D], targets.counts_D[order_D].astype(np.int64))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and all(
            np.array_equal(mine, theirs) for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


class Coder:
    """Encodes and decodes rows, with distributions that are estimated on other rows."""

    def __init__(self, told: list[Rows], num_samples: int) -> None:
        self._model = _stream().model
        kinds, contexts, counts, sizes = [], [], [], []
        for rows in told:
            kinds_D = _kind_of(rows.ranks_D)
            kinds.append(kinds_D)
            contexts.append(_before(kinds_D, rows.sizes_N))
            counts.append(rows.counts_D)
            sizes.append(rows.sizes_N)
        most = num_samples + 1
        self._sizes = self._categorical(np.concatenate(sizes), most)
        by_kind = np.concatenate(contexts)
        self._kinds = [
            self._categorical(np.concatenate(kinds)[by_kind == context], _NUM_KINDS)
            for context in range(_NUM_KINDS + 1)
        ]
        by_row = np.concatenate([_counted_as(rows) for rows in told])
        self._counts = [
            self._categorical(np.concatenate(counts)[by_row == context], most)
            for context in range(_MOST_OCTAVES * len(_WIDTHS))
        ]

    def encode(self, rows: Rows) -> dict[str, Array]:
        """Return the coded sizes, kinds, places within kinds, and counts, each as 32-bit words."""
        kinds_D = _kind_of(rows.ranks_D)
        parts = {"sizes": _Encoder(), "kinds": _Encoder(), "within": _Encoder(), "counts": _Encoder()}
        parts["sizes"].add(rows.sizes_N, self._sizes)
        before_D = _before(kinds_D, rows.sizes_N)
        for chosen_D in _by_place(rows.sizes_N):
            for context in np.unique(before_D[chosen_D]):
                one_D = chosen_D[before_D[chosen_D] == context]
                parts["kinds"].add(kinds_D[one_D], self._kinds[context])
        for kind in np.unique(kinds_D):
            low, width = _span(kind)
            if width > 1:
                parts["within"].add(rows.ranks_D[kinds_D == kind] - low, self._model.Uniform(width))
        counted_as_D = _counted_as(rows)
        for context in np.unique(counted_as_D):
            parts["counts"].add(rows.counts_D[counted_as_D == context], self._counts[context])
        return {name: one.words() for name, one in parts.items()}

    def decode(self, words: dict[str, Array], num_rows: int) -> Rows:
        """Return the rows that `encode` was given."""
        parts = {name: _stream().queue.RangeDecoder(one) for name, one in words.items()}
        sizes_N = parts["sizes"].decode(self._sizes, num_rows).astype(np.int64)
        num_ids = int(sizes_N.sum())
        kinds_D, before_D = np.zeros(num_ids, np.int64), np.full(num_ids + 1, _NUM_KINDS, np.int64)
        for place, chosen_D in enumerate(_by_place(sizes_N)):
            before = kinds_D[chosen_D - 1] if place else before_D[chosen_D]
            # the encoder coded the rows context by context, in the order of the rows
            order = np.argsort(before, kind="stable")
            contexts, starts = np.unique(before[order], return_index=True)
            drawn = [
                parts["kinds"].decode(self._kinds[context], int(size))
                for context, size in zip(contexts, np.diff(np.append(starts, len(order))), strict=True)
            ]
            kinds_D[chosen_D[order]] = np.concatenate(drawn)
        ranks_D = np.zeros(num_ids, np.int64)
        order_D = np.argsort(kinds_D, kind="stable")
        kinds, starts = np.unique(kinds_D[order_D], return_index=True)
        for kind, some_D in zip(kinds, np.split(order_D, starts[1:]), strict=True):
            low, width = _span(kind)
            ranks_D[some_D] = low
            if width > 1:
                ranks_D[some_D] += parts["within"].decode(self._model.Uniform(width), len(some_D))
        rows = Rows(sizes_N, ranks_D, np.zeros(num_ids, np.int64))
        counted_as_D = _counted_as(rows)
        order_D = np.argsort(counted_as_D, kind="stable")
        contexts, starts = np.unique(counted_as_D[order_D], return_index=True)
        for context, some_D in zip(contexts, np.split(order_D, starts[1:]), strict=True):
            rows.counts_D[some_D] = parts["counts"].decode(self._counts[context], len(some_D))
        return rows

    def symbol_ns(self, repeats: int) -> float:
        """Return the CPU nanoseconds per symbol where one call decodes 100,000 symbols of one distribution."""
        model = self._kinds[_NUM_KINDS]
        encoder = _stream().queue.RangeEncoder()
        encoder.encode(np.tile(np.arange(10, dtype=np.int32), 10_000), model)
        words = encoder.get_compressed()
        return round(
            1e9 / _speed(lambda: _stream().queue.RangeDecoder(words).decode(model, 100_000), 100_000, repeats), 1
        )

    def _categorical(self, symbols: Array, size: int) -> Any:
        shares = np.bincount(symbols, minlength=size)[:size] + 0.05
        return self._model.Categorical((shares / shares.sum()).astype(np.float32), perfect=False)


class _Encoder:
    def __init__(self) -> None:
        self._encoder = _stream().queue.RangeEncoder()

    def add(self, symbols: Array, model: Any) -> None:
        self._encoder.encode(symbols.astype(np.int32), model)

    def words(self) -> Array:
        return self._encoder.get_compressed()


def _stream() -> Any:
    import constriction  # an optional package, whose submodules cannot be imported by name

    return constriction.stream


def _kind_of(ranks_D: Array) -> Array:
    """Return each rank's kind: the quarter of the octave of rank + 1; the lowest ranks are kinds of their own."""
    above_D = ranks_D + 1
    octaves_D = np.frexp(above_D.astype(np.float64))[1] - 1
    return octaves_D * _QUARTERS + (above_D * _QUARTERS >> octaves_D) - _QUARTERS


def _span(kind: int) -> tuple[int, int]:
    """Return the lowest rank of a kind, and its number of ranks."""
    octave, quarter = divmod(int(kind), _QUARTERS)
    low, high = (-(-(_QUARTERS + one << octave) // _QUARTERS) for one in (quarter, quarter + 1))
    return low - 1, high - low


def _before(kinds_D: Array, sizes_N: Array) -> Array:
    """Return the kind of each id's predecessor in its row; `_NUM_KINDS` for a row's first id."""
    before_D = np.concatenate([[_NUM_KINDS], kinds_D[:-1]])
    before_D[np.cumsum(sizes_N)[:-1]] = _NUM_KINDS
    return before_D


def _by_place(sizes_N: Array) -> list[Array]:
    """Return the indices of all rows' first ids, then of their second ids, and so on."""
    starts_N = np.cumsum(sizes_N) - sizes_N
    return [starts_N[sizes_N > k] + k for k in range(int(sizes_N.max()))]


def _counted_as(rows: Rows) -> Array:
    """Return each id's context for coding its count: a class of its rank and a class of its row's number of ids."""
    octaves_D = np.minimum(_kind_of(rows.ranks_D) // _QUARTERS // 2, _MOST_OCTAVES - 1)
    return octaves_D * len(_WIDTHS) + np.repeat(np.searchsorted(_WIDTHS, rows.sizes_N), rows.sizes_N)


def _targets_of(reader: ShardReader, place: tuple[int, int]) -> SampledTargets:
    _, targets = reader.read_member(*place)
    assert isinstance(targets, SampledTargets)
    return targets


def _data(reader: ShardReader, place: tuple[int, int]) -> bytes:
    shard = reader.shard_set.shards[place[0]]
    entry = shard.member(place[1])
    with reader.place.open(shard.file) as file:
        file.seek(entry.offset)
        return file.read(entry.num_bytes)


def _stored_bytes(reader: ShardReader, place: tuple[int, int]) -> int:
    """Return the bytes of a member's ids and counts, each column compressed alone."""
    parts = parts_of(_data(reader, place))
    return parts["ids"] + parts["values"]


def _speed(way: Callable[[], object], num_tokens: int, repeats: int) -> int:
    """Return the tokens per CPU second of the fastest repeat, after one warm-up that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        started = time.process_time()
        way()
        taken.append(time.process_time() - started)
    return round(num_tokens / min(taken[1:]))


if __name__ == "__main__":
    main()
