"""Random access to the members of shards through the manifest's offsets, with a checksum check on every read.

On every read, the bytes of a member are checked by the member's crc32, by the checksum in the zstd frame, and by the
alignment of targets with tokens. The sha256 of a whole shard is checked when it is downloaded, and by `capgap verify`.
The reader does not check it: hashing a shard of a gigabyte takes half a second and a read of the whole file, and finds
nothing that the checksums of the members do not find.
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
        folder: Folder of the shards: a path, a URL, or a place from `place_of`.
        shard_set: Description of the shards, from the folder's manifest.

    Attributes:
        place: Place of the shards.
        codec: Codec of the members.
        quarantined: The fault of each shard in quarantine, by path; these shards are not opened. None behind a URL,
            where the digest of each whole shard is checked on arrival instead.

    Raises:
        InputError: The codec is unknown.
        CorruptError: The description contradicts itself.
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
        """Read the block of member `index`, counted over all shards.

        Raises:
            CorruptError: The bytes, structure or alignment are wrong; the message names shard and member.
            InputError: The shard's file is missing.
        """
        shard = bisect(self._first_members, index) - 1
        return self.read_member(shard, index - self._first_members[shard])

    def read_member(self, shard: int, member: int) -> tuple[Sequences, Targets | None]:
        """Read the block of one member by the numbers of its shard and of itself; errors are those of `read`."""
        return self._read(*self._listed(shard, member))

    def decode_member(self, shard: int, member: int, data: bytes) -> tuple[Sequences, Targets | None]:
        """Decode the block of one member from its bytes; errors are those of `read`, but no file is opened."""
        entry, listed = self._listed(shard, member)
        where = self._name_of(entry, listed)
        _require_checksum(data, listed, where)
        return self._decoded(data, listed, where)

    def read_stored(self, shard: int, member: int) -> StoredBlock:
        """Read the columns of one member as they are stored, without a check of their values or alignment.

        Raises:
            CorruptError: The bytes or structure are wrong; the message names shard and member.
            InputError: The shard's file is missing.
        """
        entry, found = self._listed(shard, member)
        where = self._name_of(entry, found)
        block = read_stored(self.codec, self._bytes_of(entry, found, where), where, found.num_sequences)
        _require_size(len(block), found, where)
        return block

    def name_of(self, shard: int, member: int) -> str:
        """Return the name of a member in errors."""
        return self._name_of(*self._listed(shard, member))

    def _listed(self, shard: int, member: int) -> tuple[ShardEntry, Member]:
        """Return the entries of a shard and its member; a damaged manifest may list fewer than a caller expects."""
        shards = self.shard_set.shards
        if not (0 <= shard < len(shards) and 0 <= member < len(shards[shard].members)):
            raise CorruptError(
                "the manifest lists no such member",
                where=f"shard {shard}, member {member} of {self.shard_set.codec}",
                found=f"{len(shards)} shards of {self.shard_set.num_members} members together",
                fix="run the stage that wrote it again",
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
        data, where = self._stored_bytes(shard, member), f"{where} at byte {member.offset}"
        try:
            _require_checksum(data, member, where)
        except CorruptError:
            if not self.place.reopens(shard.file):
                raise
            data = self._stored_bytes(shard, member)
            _require_checksum(data, member, where)
        return data

    def _stored_bytes(self, shard: ShardEntry, member: Member) -> bytes:
        with self.place.open(shard.file) as file:
            file.seek(member.offset)
            return file.read(member.num_bytes)


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
    """Yield every block of a shard set, in the order of the manifest.

    Raises:
        CorruptError: A member is damaged, as `ShardReader.read` describes.
    """
    reader = ShardReader(folder, shard_set)
    for index in range(shard_set.num_members):
        yield reader.read(index)
