"""Other loaders on the members of a shard set: the same bytes, decoded and collated by the same functions.

    member, as opaque bytes --WebDataset | MosaicML Streaming | LitData, in torch's workers--> decode --> shuffle
                            --> micro-batch

They check neither the crc32 nor the alignment; the codec checks the zstd frame's checksum and the structure.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import webdataset
from torch.utils.data import DataLoader, IterableDataset

from capgap.pipeline.store import Codec, ShardReader
from capgap.pipeline.store.batch import Batch, collate

# Tokens of the decoded sequences that each worker shuffles: sixteen members of the made-up rows, of 8k tokens each.
_SHUFFLE_TOKENS = 131_072
_CHUNK_BYTES = 64 << 20
_FIELD = "arrow.zst"

Peer = Callable[[ShardReader, int, int], Iterator[Batch]]


def peers(reader: ShardReader, scratch: Path) -> dict[str, Peer]:
    """Write the members in the formats of the installed loaders below `scratch`, and return these loaders by name."""
    found: dict[str, Peer] = {"webdataset": through_webdataset}
    if importlib.util.find_spec("streaming"):
        found["mosaicml-streaming"] = _to_streaming(reader, scratch / "streaming")
    if importlib.util.find_spec("litdata"):
        found["litdata"] = _to_litdata(reader, scratch / "litdata")
    return found


class Members(IterableDataset[Any]):
    """Micro-batches from a dataset of members.

    Args:
        members: Yields the members' bytes; in a worker, that worker's share of them.
        codec: Decodes them.
        micro_batch: Number of sequences in a batch.
    """

    def __init__(self, members: Callable[[], Iterable[bytes]], codec: Codec, micro_batch: int) -> None:
        self._members, self._codec, self._micro_batch = members, codec, micro_batch

    def __iter__(self) -> Iterator[Batch]:
        rows = self._shuffled(self._rows())
        while len(part := list(itertools.islice(rows, self._micro_batch))) == self._micro_batch:
            yield collate(part, self._codec.num_ids)

    def _rows(self) -> Iterator[Any]:
        for data in self._members():
            sequences, targets = self._codec.decode(data, "a member")
            yield from ((sequences, targets, row) for row in range(len(sequences)))

    def _shuffled(self, rows: Iterator[Any]) -> Iterator[Any]:
        rng, held = random.Random(0), []
        size = max(1, _SHUFFLE_TOKENS // self._codec.seq_len)
        for row in rows:
            held.append(row)
            if len(held) > size:
                at = rng.randrange(len(held))
                held[at], held[-1] = held[-1], held[at]
                yield held.pop()
        rng.shuffle(held)
        yield from held


def through_webdataset(reader: ShardReader, micro_batch: int, num_workers: int) -> Iterator[Batch]:
    """Yield batches that WebDataset reads from the cache's own shards."""
    urls = [str(reader.place.folder / shard.file.path) for shard in reader.shard_set.shards]  # type: ignore[attr-defined]

    def members() -> Iterable[bytes]:
        samples = webdataset.WebDataset(urls, shardshuffle=100, nodesplitter=webdataset.split_by_node, seed=0)
        return (sample[_FIELD] for sample in samples)

    return _batches(Members(members, reader.codec, micro_batch), num_workers)


def _to_streaming(reader: ShardReader, folder: Path) -> Peer:
    import streaming

    with streaming.MDSWriter(out=str(folder), columns={"member": "bytes"}, size_limit=_CHUNK_BYTES) as writer:
        for data in members_of(reader):
            writer.write({"member": data})

    def through(reader: ShardReader, micro_batch: int, num_workers: int) -> Iterator[Batch]:
        streaming.base.util.clean_stale_shared_memory()
        dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=1)
        members = Members(lambda: (sample["member"] for sample in dataset), reader.codec, micro_batch)
        return _batches(members, num_workers)

    return through


def _to_litdata(reader: ShardReader, folder: Path) -> Peer:
    import litdata
    from litdata.streaming import Cache

    folder.mkdir(parents=True)
    cache = Cache(str(folder), chunk_bytes=_CHUNK_BYTES)
    for index, data in enumerate(members_of(reader)):
        cache[index] = data
    cache.done()
    cache.merge()

    def through(reader: ShardReader, micro_batch: int, num_workers: int) -> Iterator[Batch]:
        dataset = litdata.StreamingDataset(str(folder), shuffle=True, seed=0)
        return _batches(Members(lambda: dataset, reader.codec, micro_batch), num_workers)

    return through


def members_of(reader: ShardReader) -> Iterator[bytes]:
    """Yield the stored bytes of every member."""
    for shard in reader.shard_set.shards:
        with reader.place.open(shard.file) as file:
            for member in shard.each_member():
                file.seek(member.offset)
                yield file.read(member.num_bytes)


def _batches(dataset: Members, num_workers: int) -> Iterator[Batch]:
    return iter(DataLoader(dataset, batch_size=None, num_workers=num_workers))
