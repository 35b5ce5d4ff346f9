"""Reading shards through the manifest's offsets: any member at any time, its checksum checked on every read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from capgap.pipeline.store.alignment import check_alignment
from capgap.pipeline.store.codec import Codec, codec_for
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.manifest import MemberEntry, ShardEntry, ShardSet
from capgap.schemas.records import Sequences, Targets


class ShardReader:
    """Random access to the members of a shard set.

    Args:
        folder: holds the shard files.
        shard_set: their description, from the folder's manifest.

    Raises:
        InputError: the codec is unknown.
    """

    def __init__(self, folder: Path, shard_set: ShardSet) -> None:
        self._folder = folder
        self.shard_set = shard_set
        self.codec: Codec = codec_for(
            shard_set.codec, shard_set.seq_len, dict(shard_set.codec_settings), self._read_file
        )
        self.members: list[tuple[ShardEntry, MemberEntry]] = [
            (shard, member) for shard in shard_set.shards for member in shard.members
        ]

    def read(self, index: int) -> tuple[Sequences, Targets | None]:
        """The block of member `index`, counted over all shards.

        Raises:
            CorruptError: bytes, structure or alignment are wrong; the message names shard and member.
            InputError: the shard's file is missing.
        """
        shard, member = self.members[index]
        where = f"{self._folder / shard.file.path}, member {member.key}"
        sequences, targets = self.codec.decode(self._bytes_of(shard, member, where), where)
        if len(sequences) != member.num_sequences:
            raise CorruptError(
                "wrong number of sequences", where=where, found=len(sequences), expected=member.num_sequences
            )
        if targets is not None:
            check_alignment(sequences, targets, self.codec.num_ids, where, self.codec.error)
        return sequences, targets

    def _read_file(self, name: str) -> bytes:
        path = self._folder / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise InputError(
                "a file that the shards cannot be read without is missing",
                where=path,
                fix="rerun the stage that wrote it",
            ) from None

    def _bytes_of(self, shard: ShardEntry, member: MemberEntry, where: str) -> bytes:
        path = self._folder / shard.file.path
        try:
            with path.open("rb") as file:
                file.seek(member.offset)
                data = file.read(member.num_bytes)
        except FileNotFoundError:
            raise InputError(
                "the shard is missing", where=path, fix="rerun the stage that wrote it; the other shards are kept"
            ) from None
        if len(data) != member.num_bytes or zlib.crc32(data) != member.crc32:
            raise CorruptError(
                "checksum mismatch",
                where=f"{where} at byte {member.offset}",
                found=f"{len(data)} bytes with crc32 {zlib.crc32(data):08x}",
                expected=f"{member.num_bytes} bytes with crc32 {member.crc32:08x}",
                fix="delete the shard and rerun the stage that wrote it; the other shards are kept",
            )
        return data


def read_blocks(folder: Path, shard_set: ShardSet) -> Iterator[tuple[Sequences, Targets | None]]:
    """Every block of the set, in order.

    Raises:
        CorruptError: as `ShardReader.read`.
    """
    reader = ShardReader(folder, shard_set)
    for index in range(len(reader.members)):
        yield reader.read(index)
