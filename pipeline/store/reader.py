"""Reading shards through the manifest's offsets: any member at any time, its checksum checked on every read.

Every byte of a shard that is ever used is covered by its member's crc32, by the checksum in the zstd frame and by the
alignment of targets with tokens, on every read. The sha256 of a whole shard is checked where the bytes arrive from
elsewhere, and by `capgap verify`: to hash a shard of a gigabyte before its first member is read takes half a second and
a read of the whole, and would find nothing that the member's own checksums do not.
"""

from __future__ import annotations

import zlib
from bisect import bisect
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from capgap.pipeline.store.alignment import check_alignment
from capgap.pipeline.store.codec import Codec, codec_for
from capgap.pipeline.store.places import LocalPlace, ShardPlace, place_of
from capgap.pipeline.store.quarantine import read_quarantine
from capgap.pipeline.store.stored import StoredBlock, read_stored
from capgap.schemas.errors import CorruptError
from capgap.schemas.manifest import Member, ShardEntry, ShardSet
from capgap.schemas.records import Sequences, Targets


class ShardReader:
    """Random access to the members of a shard set.

    Args:
        folder: holds the shard files: a path, a URL, or a place that `place_of` made.
        shard_set: their description, from the folder's manifest.

    Attributes:
        quarantined: what is wrong with the shards in quarantine, by path; they are not opened.

    Raises:
        InputError: the codec is unknown.
        CorruptError: the description contradicts itself.
    """

    def __init__(self, folder: Path | str | ShardPlace, shard_set: ShardSet) -> None:
        self.place = folder if isinstance(folder, ShardPlace) else place_of(folder)
        self.quarantined = read_quarantine(self.place.folder) if isinstance(self.place, LocalPlace) else {}
        self.shard_set = shard_set
        for shard in shard_set.shards:
            if shard.num_sequences != sum(shard.members.num_sequences):
                raise CorruptError(
                    "the manifest contradicts itself",
                    where=self.place.name_of(shard.file),
                    found=f"{shard.num_sequences} sequences",
                    expected=f"{sum(shard.members.num_sequences)}, as in its members",
                )
        self.codec: Codec = codec_for(
            shard_set.codec, shard_set.seq_len, dict(shard_set.codec_settings), self.place.read
        )

    def read(self, index: int) -> tuple[Sequences, Targets | None]:
        """The block of member `index`, counted over all shards.

        Raises:
            CorruptError: bytes, structure or alignment are wrong; the message names shard and member.
            InputError: the shard's file is missing.
        """
        shard = bisect(self._first_members, index) - 1
        return self.read_member(shard, index - self._first_members[shard])

    def read_member(self, shard: int, member: int) -> tuple[Sequences, Targets | None]:
        """The block of one member of one shard, by their numbers; errors as `read`."""
        return self._read(*self._listed(shard, member))

    def decode_member(self, shard: int, member: int, data: bytes) -> tuple[Sequences, Targets | None]:
        """The block of one member whose bytes somebody else has read; errors as `read`, but no file is opened."""
        entry, listed = self._listed(shard, member)
        where = self._name_of(entry, listed)
        _require_checksum(data, listed, where)
        return self._decoded(data, listed, where)

    def read_stored(self, shard: int, member: int) -> StoredBlock:
        """The columns of one member as they are stored; what they say is not looked at, nor their alignment.

        Raises:
            CorruptError: bytes or structure are wrong; the message names shard and member.
            InputError: the shard's file is missing.
        """
        entry, found = self._listed(shard, member)
        where = self._name_of(entry, found)
        block = read_stored(self.codec, self._bytes_of(entry, found, where), where, found.num_sequences)
        _require_size(len(block), found, where)
        return block

    def name_of(self, shard: int, member: int) -> str:
        """A member as errors name it."""
        return self._name_of(*self._listed(shard, member))

    def _listed(self, shard: int, member: int) -> tuple[ShardEntry, Member]:
        """A shard and its member; a damaged manifest may list fewer of either than whoever reads it knows of."""
        shards = self.shard_set.shards
        if not (0 <= shard < len(shards) and 0 <= member < len(shards[shard].members)):
            raise CorruptError(
                "the manifest lists no such member",
                where=f"shard {shard}, member {member} of {self.shard_set.codec}",
                found=f"{len(shards)} shards of {self.shard_set.num_members} members together",
                fix="make the stage again that wrote it",
            )
        return shards[shard], shards[shard].member(member)

    @cached_property
    def _first_members(self) -> list[int]:
        return list(accumulate((len(shard.members) for shard in self.shard_set.shards[:-1]), initial=0))

    def _read(self, shard: ShardEntry, member: Member) -> tuple[Sequences, Targets | None]:
        where = self._name_of(shard, member)
        return self._decoded(self._bytes_of(shard, member, where), member, where)

    def _decoded(self, data: bytes, member: Member, where: str) -> tuple[Sequences, Targets | None]:
        sequences, targets = self.codec.decode(data, where, member.num_sequences)
        _require_size(len(sequences), member, where)
        if targets is not None:
            check_alignment(sequences, targets, self.codec.num_ids, where, self.codec.error)
        return sequences, targets

    def _name_of(self, shard: ShardEntry, member: Member) -> str:
        return f"{self.place.name_of(shard.file)}, member {member.key}"

    def _bytes_of(self, shard: ShardEntry, member: Member, where: str) -> bytes:
        if shard.file.path in self.quarantined:
            raise CorruptError(
                "the shard is in quarantine",
                where=where,
                found=self.quarantined[shard.file.path],
                fix="run the stage that wrote it again, or set train.on_corrupt to skip",
            )
        if member.offset + member.num_bytes > shard.file.num_bytes:
            raise CorruptError(
                "the manifest places the member outside its shard",
                where=where,
                found=f"bytes {member.offset} to {member.offset + member.num_bytes}",
                expected=f"within {shard.file.num_bytes}",
            )
        with self.place.open(shard.file) as file:
            file.seek(member.offset)
            data = file.read(member.num_bytes)
        _require_checksum(data, member, f"{where} at byte {member.offset}")
        return data


def _require_checksum(data: bytes, member: Member, where: str) -> None:
    if len(data) != member.num_bytes or zlib.crc32(data) != member.crc32:
        raise CorruptError(
            "checksum mismatch",
            where=where,
            found=f"{len(data)} bytes with crc32 {zlib.crc32(data):08x}",
            expected=f"{member.num_bytes} bytes with crc32 {member.crc32:08x}",
            fix="delete the shard and rerun the stage that wrote it; the other shards are kept",
        )


def _require_size(num_sequences: int, member: Member, where: str) -> None:
    if num_sequences != member.num_sequences:
        raise CorruptError("wrong number of sequences", where=where, found=num_sequences, expected=member.num_sequences)


def read_blocks(folder: Path | str, shard_set: ShardSet) -> Iterator[tuple[Sequences, Targets | None]]:
    """Every block of the set, in order.

    Raises:
        CorruptError: as `ShardReader.read`.
    """
    reader = ShardReader(folder, shard_set)
    for index in range(shard_set.num_members):
        yield reader.read(index)
