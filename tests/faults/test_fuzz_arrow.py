"""Arrow streams that are spoilt where it hurts: lengths, offsets and counts in the metadata, columns of other kinds.

Checksums are made anew after the spoiling. `CAPGAP_ARROW` says how many there are, `CAPGAP_SEED` chooses others.
"""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from test_fuzz import NAMES, bounded_memory, shard_of

from capgap.pipeline.store import ShardReader
from capgap.schemas.errors import CapgapError
from capgap.schemas.manifest import ShardSet

NUM = int(os.environ.get("CAPGAP_ARROW", "600"))
SEED = int(os.environ.get("CAPGAP_SEED", "17"))
VALUES = [0, 1, -1, 7, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, -(1 << 63)]
# as in test_fuzz: a length that is believed asks for far more memory than there is
__all__ = ["bounded_memory"]


def test_no_spoilt_stream_is_more_than_an_error_with_a_name(tmp_path: Path) -> None:
    chance, read = random.Random(SEED), Counter[str]()
    for number in range(NUM):
        name, kind = chance.choice(NAMES), chance.choice(list(KINDS))
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        shard_set, data, content = shard_of(name, folder)
        try:
            spoilt = KINDS[kind](content, chance)
        except (pa.ArrowException, NotImplementedError):
            continue  # Arrow itself refuses to make it
        altered = with_member(folder, shard_set, spoilt)
        try:
            reader = ShardReader(folder, altered)
            for read_one in (reader.read_member, reader.read_stored):
                try:
                    read_one(0, 0)
                    read[f"{kind}: read"] += 1
                except CapgapError:
                    read[f"{kind}: refused"] += 1
        except BaseException as error:
            (tmp_path / "spoilt.arrow").write_bytes(spoilt)
            pytest.fail(f"CAPGAP_SEED={SEED}, number {number}, {kind} of {name}: {error!r}; see {tmp_path}")
        finally:
            (folder / shard_set.shards[0].file.path).write_bytes(data)
    print(f"{NUM} spoilt streams, seed {SEED}: {dict(sorted(read.items()))}")


def with_member(folder: Path, shard_set: ShardSet, content: bytes) -> ShardSet:
    """The shard with this as its only member, and checksums and sizes that agree."""
    shard = shard_set.shards[0]
    member = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    whole = bytes(512) + member + bytes(-len(member) % 512 + 1024)
    (folder / shard.file.path).write_bytes(whole)
    places = {"offset": (512,), "num_bytes": (len(member),), "crc32": (zlib.crc32(member),)}
    file = shard.file.model_copy(update={"num_bytes": len(whole)})
    altered = shard.model_copy(update={"members": shard.members.model_copy(update=places), "file": file})
    return shard_set.model_copy(update={"shards": (altered,)})


def metadata_of(content: bytes) -> list[range]:
    """Where the metadata of each message lies."""
    found, place = [], 0
    for message in pa.ipc.MessageReader.open_stream(content):
        size = struct.unpack_from("<i", content, place + 4)[0]
        found.append(range(place + 8, place + 8 + size))
        place += 8 + size + (0 if message.body is None else message.body.size)
    return found


def _number(content: bytes, chance: random.Random, size: int, where: range) -> bytes:
    """An aligned number takes another value: of the list, near its own, or one that stands elsewhere."""
    spoilt = bytearray(content)
    layout = {2: "<h", 4: "<i", 8: "<q"}[size]
    for _ in range(chance.choice([1, 1, 1, 2])):
        place, other = (chance.randrange(where.start, max(where.start + 1, where.stop - size)) for _ in range(2))
        place, other = place - place % size, other - other % size
        own = struct.unpack_from(layout, spoilt, place)[0]
        value = chance.choice([*VALUES, own + 1, own - 1, own * 2, -own, struct.unpack_from(layout, spoilt, other)[0]])
        half = 1 << (8 * size - 1)
        struct.pack_into(layout, spoilt, place, (value + half) % (2 * half) - half)
    return bytes(spoilt)


def _of_metadata(size: int) -> Callable[[bytes, random.Random], bytes]:
    return lambda content, chance: _number(content, chance, size, chance.choice(metadata_of(content)))


def _of_body(content: bytes, chance: random.Random) -> bytes:
    last = metadata_of(content)[1]
    return _number(content, chance, chance.choice([2, 4, 8]), range(last.stop, len(content) - 8))


def _other_columns(content: bytes, chance: random.Random) -> bytes:
    batch = pa.ipc.open_stream(content).read_next_batch()
    names, columns = list(batch.schema.names), list(batch.columns)
    which = chance.randrange(len(columns))
    column = columns[which]
    kind = chance.choice(
        ["drop", "rename", "double", "swap", "cast", "nulls", "short", "dictionary", "large", "nested"]
    )
    if kind == "drop":
        del names[which], columns[which]
    elif kind == "rename":
        names[which] = chance.choice(["", "\0", names[which].upper(), names[0], "x" * 5000])
    elif kind == "double":
        names.append(names[which])
        columns.append(column)
    elif kind == "swap":
        columns.reverse()
    elif kind == "cast":
        columns[which] = pa.array(column.to_pylist()).cast(chance.choice([pa.string(), pa.binary(), pa.float64()]))
    elif kind == "nulls":
        columns[which] = pa.array([None, *column.to_pylist()[1:]], column.type)
    elif kind == "short":
        columns = [one.slice(0, 1) for one in columns]
    elif kind == "dictionary":
        columns[which] = column.dictionary_encode()
    elif kind == "large":
        columns[which] = pa.array([b"\xff" * chance.choice([0, 1, 100_000])] * len(column), column.type)
    else:
        columns[which] = pa.array([[value] for value in column.to_pylist()])
    return _stream([pa.RecordBatch.from_arrays(columns, names)])


def _other_batches(content: bytes, chance: random.Random) -> bytes:
    batch = pa.ipc.open_stream(content).read_next_batch()
    return _stream(chance.choice([[batch, batch], [batch.slice(0, 0)], [batch.slice(1)], [batch.slice(0, 0), batch]]))


def _other_bytes(content: bytes, chance: random.Random) -> bytes:
    """What a column of bytes holds, cut, longer, or with numbers changed: the stream is sound, the planes are not."""
    batch = pa.ipc.open_stream(content).read_next_batch()
    columns = list(batch.columns)
    which = [number for number, one in enumerate(columns) if pa.types.is_binary(one.type)]
    if not which:
        return _of_body(content, chance)
    number = chance.choice(which)
    values = columns[number].to_pylist()
    row = chance.randrange(len(values))
    value = bytearray(values[row] or b"\0")
    for _ in range(chance.choice([1, 1, 4])):
        if chance.random() < 0.3:
            value = value[: chance.randrange(len(value) + 1)] + bytes(chance.choice([0, 0, 1, 9]))
        elif value:
            value[chance.randrange(len(value))] = chance.choice([0, 1, 127, 128, 255])
    values[row] = bytes(value)
    columns[number] = pa.array(values, columns[number].type)
    return _stream([pa.RecordBatch.from_arrays(columns, schema=batch.schema)])


def _stream(batches: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "words of metadata": _of_metadata(8),
    "halves of metadata": _of_metadata(4),
    "quarters of metadata": _of_metadata(2),
    "body": _of_body,
    "columns": _other_columns,
    "batches": _other_batches,
    "bytes of a column": _other_bytes,
}
