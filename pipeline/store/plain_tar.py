"""The check that a shard's tar headers agree with its manifest; capgap's reader ignores them, other programs do not."""

from __future__ import annotations

import tarfile
from pathlib import Path

from capgap.schemas.errors import CorruptError
from capgap.schemas.manifest import ShardEntry

SUFFIX = ".arrow.zst"


def require_plain_tar(path: Path, shard: ShardEntry) -> None:
    """Raise CorruptError unless the tar holds exactly the listed members, in order, as plain files named after them.

    This refuses absolute names, names with `..`, links, devices, and members that the manifest does not list. So
    unpacking a shard writes only files `KEY.arrow.zst`, and only into the chosen folder.
    """
    place = 0
    with path.open("rb") as file:
        for member in shard.each_member():
            where = f"{path}, member {member.key}"
            file.seek(place)
            try:
                found = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise CorruptError("no tar header", where=f"{where} at byte {place}", found=error) from None
            if (found.name, found.type) != (member.key + SUFFIX, tarfile.REGTYPE):
                raise CorruptError(
                    "another tar member than the manifest lists",
                    where=f"{where} at byte {place}",
                    found=f"{found.name!a} of type {found.type!r}",
                    expected=f"the file {member.key}{SUFFIX}",
                )
            if (place + tarfile.BLOCKSIZE, found.size) != (member.offset, member.num_bytes):
                raise CorruptError(
                    "the tar header and the manifest disagree",
                    where=where,
                    found=f"{found.size} bytes from byte {place + tarfile.BLOCKSIZE}",
                    expected=f"{member.num_bytes} from {member.offset}",
                )
            place = member.offset + -(-member.num_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        file.seek(place)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise CorruptError(
                    "bytes after the last member that the manifest lists",
                    where=path,
                    found=f"others than zeros after byte {place}",
                    expected="zeros to the end of the file",
                )
