"""Writing shards. A shard's sidecar is written after its tar file, so a kill never leaves a sidecar without a shard."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

from capgap.pipeline.store.codec import Codec
from capgap.pipeline.store.files import HashingWriter, atomic_file, sha256_of
from capgap.pipeline.store.plain_tar import SUFFIX
from capgap.pipeline.store.sidecars import read_sidecar, write_sidecar
from capgap.schemas.manifest import FileEntry, Members, ShardEntry, ShardSet
from capgap.schemas.records import Sequences, Targets

# Members of less than 2k tokens take more bytes and decode more slowly; those of 8k tokens are within 1 % of the best.
_MEMBER_TOKENS = 8192
_FILE_MODE = 0o644


@dataclass(frozen=True)
class Block:
    """The content of one member: sequences and, except in a corpus, their targets."""

    sequences: Sequences
    targets: Targets | None = None


class ShardWriter:
    """Writes the shards of one set into a folder, and records in sidecars which shards are finished.

    Args:
        folder: Folder of the shards `NAME-000000.tar` and so on.
        sidecars: Folder of the sidecars, `NAME-000000.json` for each finished shard; empty it to start over.
        name: Name of the set.
        codec: Codec of all members.
    """

    def __init__(self, folder: Path, sidecars: Path, name: str, codec: Codec) -> None:
        self._folder, self._sidecars, self._name, self._codec = folder, sidecars, name, codec
        sidecars.mkdir(parents=True, exist_ok=True)

    def finished(self, index: int) -> ShardEntry | None:
        """Return the entry of shard `index` if its sidecar is sound and agrees with the file's digest, else None."""
        entry = read_sidecar(self._sidecar(index), ShardEntry)
        path = self._path(index)
        if entry is None or entry.file.path != path.name:
            return None
        if path.is_file() and path.stat().st_size == entry.file.num_bytes and sha256_of(path) == entry.file.sha256:
            return entry
        return None

    def write(self, index: int, blocks: Iterable[Block]) -> ShardEntry:
        """Write shard `index` and its sidecar, and return its entry; an existing shard is replaced."""
        path = self._path(index)
        self._sidecar(index).unlink(missing_ok=True)
        with atomic_file(path) as file:
            hashing = HashingWriter(file)
            members = self._write_members(hashing, index, blocks)
        entry = ShardEntry(
            file=FileEntry(path=path.name, num_bytes=hashing.num_bytes, sha256=hashing.sha256),
            num_sequences=sum(members.num_sequences),
            members=members,
        )
        write_sidecar(self._sidecar(index), entry)
        return entry

    def shard_set(self, shards: Iterable[ShardEntry]) -> ShardSet:
        """Return the description of these shards for the manifest."""
        return ShardSet(
            codec=self._codec.name,
            codec_settings=self._codec.settings,
            seq_len=self._codec.seq_len,
            shards=tuple(shards),
        )

    def _write_members(self, file: HashingWriter, index: int, blocks: Iterable[Block]) -> Members:
        rows: list[tuple[int, int, int, int]] = []
        # webdataset's writer uses tarfile too, but imports torch, which takes seconds and no worker of a corpus needs
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="w|") as tar:
            for number, block in enumerate(blocks):
                data = self._codec.encode(block.sequences, block.targets)
                member = tarfile.TarInfo(f"{self._stem(index)}-{number:04d}{SUFFIX}")
                # owner and time are not set, so that the same block always gives the same bytes
                member.size, member.mode = len(data), _FILE_MODE
                offset = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(member, io.BytesIO(data))
                rows.append((offset, len(data), len(block.sequences), zlib.crc32(data)))
        offsets, num_bytes, num_sequences, crcs = zip(*rows, strict=True) if rows else ((), (), (), ())
        return Members(offset=offsets, num_bytes=num_bytes, num_sequences=num_sequences, crc32=crcs)

    def _stem(self, index: int) -> str:
        return f"{self._name}-{index:06d}"

    def _path(self, index: int) -> Path:
        return self._folder / f"{self._stem(index)}.tar"

    def _sidecar(self, index: int) -> Path:
        return self._sidecars / f"{self._stem(index)}.json"


def split_blocks(sequences: Sequences, *codecs: Codec) -> Iterator[Sequences]:
    """Cut a shard's sequences into the blocks of its members, of about 8k tokens each.

    Args:
        sequences: Sequences of the shard.
        codecs: Codecs of the targets that the members will hold. If targets are large, blocks are smaller, so that a
            member of none of the codecs is larger than a reader accepts.
    """
    of_tokens = _MEMBER_TOKENS // (sequences.tokens_BL1.shape[1] - 1)
    size = max(1, min((of_tokens, *(codec.most_sequences for codec in codecs))))
    for start in range(0, len(sequences), size):
        part = slice(start, start + size)
        yield Sequences(
            np.ascontiguousarray(sequences.tokens_BL1[part]),
            np.ascontiguousarray(sequences.starts_BL1[part]),
            np.ascontiguousarray(sequences.mask_BL1[part]),
        )
