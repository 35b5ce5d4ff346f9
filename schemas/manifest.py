"""`manifest.json`: the contents of a finished stage folder, its inputs, settings and versions.

    identity = digest(stage, settings that decide the result, identities of the inputs)     known before any work
    content  = digest(the list of files with their digests)                                 known after it

A folder is finished when it contains its manifest. `identity` decides whether the folder is current; `content` shows
whether an input was made again with a different result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, JsonValue, model_validator

from capgap.schemas.base import Entry
from capgap.schemas.printable import printable_name

MANIFEST_NAME = "manifest.json"
WORK_NAME = "work.json"

STANDS_FOR = {"align": "cache"}
"""Stages whose result is read as the result of another stage."""


# A manifest may be untrusted: counts are bounded so that sums of offsets and array sizes cannot overflow 64 bits.
Count = Annotated[int, Field(ge=0, lt=1 << 48)]

# The same characters as names of runs and arms in a run file; a name begins neither like a flag nor a hidden file.
_NAME = re.compile(r"[^\W_][\w.-]*|_[\w.-]*")
_LONGEST_NAME = 1024

# Nearly all paths match this fast check, which matters because a manifest may list a hundred thousand files.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def _inside(path: str) -> str:
    """Return the path, or raise ValueError if it leads out of the folder or has control characters."""
    if _PLAIN_PATH.fullmatch(path):
        return path
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise ValueError(f"found the path {path!r}, expected one inside the folder")
    if printable_name(path) != path:
        raise ValueError(f"found the path {path!a}, expected one without control characters")
    return path


def _named(text: str) -> str:
    """Return the name of a stage, instance or shard, or raise ValueError if it is unsafe to paste into a shell."""
    if _NAME.fullmatch(text) and len(text) <= _LONGEST_NAME:
        return text
    parts = text.split("/")
    if not all(_NAME.fullmatch(part) for part in parts) or len(text) > _LONGEST_NAME:
        raise ValueError(f"found {text[:80]!a}, expected a name: letters, digits, '-', '_' and '.', with '/' between")
    return text


def _digest(text: str) -> str:
    """Return the digest, which may be empty, or raise ValueError if it has other characters than letters and digits."""
    if text and not (text.isascii() and text.isalnum()):
        raise ValueError(f"found {text[:80]!a}, expected a digest")
    return text


Name = Annotated[str, AfterValidator(_named)]
InnerPath = Annotated[str, AfterValidator(_inside)]
Digest = Annotated[str, AfterValidator(_digest)]


class FileEntry(Entry):
    """One file of a stage folder."""

    path: InnerPath
    """Path relative to the folder, with forward slashes; it never leads out of the folder."""

    num_bytes: Count
    """Size in bytes."""

    sha256: Digest
    """SHA-256 digest of the bytes."""


class SourceEntry(Entry):
    """A file outside the run that the stage read: text, or a given model."""

    path: str
    """Path of the file."""

    num_bytes: Count
    """Size in bytes."""

    modified_ns: int = Field(ge=-(1 << 63), lt=1 << 63)
    """Time of the file's last change, in nanoseconds since 1970. The digest is computed again only if it changes."""

    sha256: str
    """SHA-256 digest of the bytes. Empty if a large source has not been read for it yet, or changed before it was."""


class Member(NamedTuple):
    """One member of a shard: a block of packed sequences.

    Attributes:
        key: the member's name up to its first dot.
        offset: byte of the shard at which the member's data begins.
        num_bytes: length of the data in bytes.
        num_sequences: number of sequences in the block.
        crc32: CRC-32 of the data as stored.
    """

    key: str
    offset: int
    num_bytes: int
    num_sequences: int
    crc32: int


class Members(Entry):
    """The members of a shard in the order of the file: one list per property, because a cache has a million members."""

    offset: tuple[Count, ...] = ()
    """Byte of the shard at which each member's data begins."""

    num_bytes: tuple[Count, ...] = ()
    """Length of each member's data in bytes."""

    num_sequences: tuple[Count, ...] = ()
    """Number of sequences in each member's block."""

    crc32: tuple[Count, ...] = ()
    """CRC-32 of each member's data as stored."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not len(self.offset) == len(self.num_bytes) == len(self.num_sequences) == len(self.crc32):
            lengths = [len(self.offset), len(self.num_bytes), len(self.num_sequences), len(self.crc32)]
            raise ValueError(f"members: found lists of {lengths}, expected equal lengths")
        return self

    def __len__(self) -> int:
        return len(self.offset)


class ShardEntry(Entry):
    """One finished shard."""

    file: FileEntry
    """The tar file."""

    num_sequences: Count
    """Number of sequences in all members."""

    members: Members
    """The blocks of sequences in the file."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _named(self.file.path)
        return self

    def member(self, number: int) -> Member:
        """Return the member with this number, counted from 0."""
        of = self.members
        return Member(
            f"{self.file.path.removesuffix('.tar')}-{number:04d}",
            of.offset[number],
            of.num_bytes[number],
            of.num_sequences[number],
            of.crc32[number],
        )

    def each_member(self) -> Iterator[Member]:
        """Iterate over all members, in order."""
        return map(self.member, range(len(self.members)))


class ShardSet(Entry):
    """The shards of one split of a corpus, or of one recording of a cache."""

    codec: str
    """Name and version of the members' encoding. A reader refuses a codec that it does not know."""

    codec_settings: dict[str, JsonValue]
    """Settings that are needed to decode the members, for example the size of the vocabulary."""

    seq_len: int = Field(ge=1, le=1 << 24)
    """Targets per sequence."""

    shards: tuple[ShardEntry, ...]
    """The shards in order."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences in all shards."""
        return sum(shard.num_sequences for shard in self.shards)

    @property
    def num_members(self) -> int:
        """Number of members in all shards."""
        return sum(len(shard.members) for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Number of targets in all shards."""
        return self.num_sequences * self.seq_len

    def first_shards(self, max_tokens: int | None) -> tuple[ShardEntry, ...]:
        """Return the smallest number of first shards that hold `max_tokens` tokens, or all shards."""
        total = 0
        for number, shard in enumerate(self.shards, start=1):
            total += shard.num_sequences * self.seq_len
            if max_tokens is not None and total >= max_tokens:
                return self.shards[:number]
        return self.shards

    @property
    def num_bytes(self) -> int:
        """Size of all shard files together, in bytes."""
        return sum(shard.file.num_bytes for shard in self.shards)


class InputEntry(Entry):
    """A stage folder that the stage read."""

    path: str
    """Path of the folder when it was read."""

    identity: Digest
    """The identity in its manifest."""

    content: Digest
    """The content digest in its manifest."""


class WorkOrder(Entry):
    """`work.json`: the task of a stage, written before the work begins and kept beside the manifest after it."""

    stage: Name
    """Name of the stage."""

    instance: Name
    """Stage, arm and seed as one path, for example `train/distilled/seed-0`."""

    settings: dict[str, JsonValue]
    """Settings that decide the result."""

    inputs: dict[str, InputEntry]
    """Inputs by role: `corpus`, `teacher`, `cache` and so on."""

    identity: Digest
    """Digest of stage, settings and the inputs' identities."""

    sources: tuple[SourceEntry, ...] = ()
    """Files outside the run that are read, as they were before the work; empty until they have been recorded."""


class Manifest(WorkOrder):
    """The manifest of a finished stage."""

    format: Literal["capgap-manifest-1"] = "capgap-manifest-1"
    """Version of this layout."""

    seal: Digest = ""
    """Digest of everything else in this manifest, by which a later change of it is noticed."""

    content: Digest
    """Digest of the digests of `files` and `sources`."""

    files: tuple[FileEntry, ...]
    """All files of the folder that belong to the result."""

    shard_sets: dict[str, ShardSet] = Field(default_factory=dict)
    """Shard sets by name: the splits `teacher`, `student` and `heldout` of a corpus, or the recordings of a cache
    (`sampled`, `topk` or `chunks`, and `heldout-` with each)."""

    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """Facts that later stages need; one of the models in the module `facts`."""

    totals: dict[str, JsonValue] = Field(default_factory=dict)
    """Counts for people to read: tokens, documents, bytes, steps."""

    versions: dict[str, str]
    """Versions of Python, capgap and important packages in the process that finished the stage."""

    earlier_versions: tuple[dict[str, str], ...] = ()
    """For each earlier process that was killed and had different versions, the versions that differ."""

    started: str
    """Time at which the stage began: UTC, in ISO 8601."""

    wall_s: float
    """Working time of all processes of the stage together, in seconds. It includes killed processes, up to their last
    heartbeat, and slices that worked at the same time."""

    command: tuple[str, ...]
    """The command that was typed, which may be that of a whole run; credentials in it are `***`."""

    resolved: dict[str, Any] = Field(default_factory=dict)
    """The whole run file with all defaults, including operational settings."""

    @property
    def read_as(self) -> str:
        """The name of the stage as which its readers treat this result."""
        return STANDS_FOR.get(self.stage, self.stage)

    @model_validator(mode="after")
    def _check(self) -> Self:
        shards = [shard.file.path.casefold() for part in self.shard_sets.values() for shard in part.shards]
        for name, paths in (("files", [file.path for file in self.files]), ("shard_sets", shards)):
            if len(set(paths)) < len(paths):
                raise ValueError(f"{name}: found a path twice, expected each once")
        return self
