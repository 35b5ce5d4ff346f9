"""`manifest.json`: what a finished stage folder holds, what it was made from, and with what.

    identity = digest(stage, settings that decide the result, identities of the inputs)     known before any work
    content  = digest(the list of files with their digests)                                 known after it

A folder is finished when its manifest stands in it. `identity` decides whether it is current; `content` lets a stage
notice that an input was made again and came out different.
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
"""Stages whose result is read as that of another one."""


# A manifest may come from a stranger: no count may pass what arithmetic on offsets and arrays holds.
Count = Annotated[int, Field(ge=0, lt=1 << 48)]

# As `name` and the names of arms are checked in a run file; none begins like a flag or a hidden file.
_NAME = re.compile(r"[^\W_][\w.-]*|_[\w.-]*")
_LONGEST_NAME = 1024

# What nearly all files are called; there may be a hundred thousand of them.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def _inside(path: str) -> str:
    """The path, if it can only lead to a file of the folder."""
    if _PLAIN_PATH.fullmatch(path):
        return path
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise ValueError(f"found the path {path!r}, expected one inside the folder")
    if printable_name(path) != path:
        raise ValueError(f"found the path {path!a}, expected one without control characters")
    return path


def _named(text: str) -> str:
    """The name, if a stage, an instance or a shard can have it: it stands in commands that are meant to be pasted."""
    if _NAME.fullmatch(text) and len(text) <= _LONGEST_NAME:
        return text
    parts = text.split("/")
    if not all(_NAME.fullmatch(part) for part in parts) or len(text) > _LONGEST_NAME:
        raise ValueError(f"found {text[:80]!a}, expected a name: letters, digits, '-', '_' and '.', with '/' between")
    return text


def _digest(text: str) -> str:
    """The digest, or nothing."""
    if text and not (text.isascii() and text.isalnum()):
        raise ValueError(f"found {text[:80]!a}, expected a digest")
    return text


Name = Annotated[str, AfterValidator(_named)]
InnerPath = Annotated[str, AfterValidator(_inside)]
Digest = Annotated[str, AfterValidator(_digest)]


class FileEntry(Entry):
    """One file of a stage folder."""

    path: InnerPath
    """Relative to the folder, with forward slashes, and never out of it."""

    num_bytes: Count
    """Size."""

    sha256: Digest
    """Digest of the bytes."""


class SourceEntry(Entry):
    """A file outside the run that the stage read: text, or a given model."""

    path: str
    """Where it lies."""

    num_bytes: Count
    """Size."""

    modified_ns: int = Field(ge=-(1 << 63), lt=1 << 63)
    """Time of its last change, nanoseconds since 1970; only where it moved is the digest computed again."""

    sha256: str
    """Digest of the bytes; empty where large sources have not been read for it yet, or changed before they were."""


class Member(NamedTuple):
    """One member of a shard: a block of packed sequences.

    Attributes:
        key: its name up to the first dot.
        offset: byte of the shard at which its data begins.
        num_bytes: length of the data.
        num_sequences: sequences in the block.
        crc32: of the data as stored.
    """

    key: str
    offset: int
    num_bytes: int
    num_sequences: int
    crc32: int


class Members(Entry):
    """The members of a shard in the order of the file, a list a property: a cache has a million of them."""

    offset: tuple[Count, ...] = ()
    """Byte of the shard at which each member's data begins."""

    num_bytes: tuple[Count, ...] = ()
    """Length of the data."""

    num_sequences: tuple[Count, ...] = ()
    """Sequences in the block."""

    crc32: tuple[Count, ...] = ()
    """The crc32 of the data as stored."""

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
    """Sequences in all its members."""

    members: Members
    """What lies in it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _named(self.file.path)
        return self

    def member(self, number: int) -> Member:
        """The member of that number, counted from 0."""
        of = self.members
        return Member(
            f"{self.file.path.removesuffix('.tar')}-{number:04d}",
            of.offset[number],
            of.num_bytes[number],
            of.num_sequences[number],
            of.crc32[number],
        )

    def each_member(self) -> Iterator[Member]:
        """All of them, in order."""
        return map(self.member, range(len(self.members)))


class ShardSet(Entry):
    """The shards of one split of a corpus, or of a cache."""

    codec: str
    """Name and version of the member encoding; a reader refuses one it does not know."""

    codec_settings: dict[str, JsonValue]
    """What the codec needs beside the bytes, for example the vocabulary size."""

    seq_len: int = Field(ge=1, le=1 << 24)
    """Targets per sequence."""

    shards: tuple[ShardEntry, ...]
    """In order."""

    @property
    def num_sequences(self) -> int:
        """Sequences in all shards."""
        return sum(shard.num_sequences for shard in self.shards)

    @property
    def num_members(self) -> int:
        """Members of all shards."""
        return sum(len(shard.members) for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Targets in all shards."""
        return self.num_sequences * self.seq_len

    @property
    def num_bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(shard.file.num_bytes for shard in self.shards)


class InputEntry(Entry):
    """A folder that the stage read."""

    path: str
    """Where it was."""

    identity: Digest
    """Its manifest's identity."""

    content: Digest
    """Its manifest's content."""


class WorkOrder(Entry):
    """`work.json`: what a stage set out to do; written before the work, kept beside the manifest after it."""

    stage: Name
    """Name of the stage."""

    instance: Name
    """Stage, arm and seed as one path, for example `train/distilled/seed-0`."""

    settings: dict[str, JsonValue]
    """Settings that decide the result."""

    inputs: dict[str, InputEntry]
    """By role: corpus, teacher, cache and so on."""

    identity: Digest
    """Digest of stage, settings and the inputs' identities."""

    sources: tuple[SourceEntry, ...] = ()
    """Files outside the run that are read, as they were before the work; empty until they have been recorded."""


class Manifest(WorkOrder):
    """A finished stage."""

    format: Literal["capgap-manifest-1"] = "capgap-manifest-1"
    """Version of this layout."""

    seal: Digest = ""
    """Digest of everything else in this manifest, written when it is finished."""

    content: Digest
    """Digest of the digests of `files` and `sources`."""

    files: tuple[FileEntry, ...]
    """Everything in the folder that belongs to the result."""

    shard_sets: dict[str, ShardSet] = Field(default_factory=dict)
    """By name: `teacher`, `student` and `heldout` for a corpus, `targets` for a cache."""

    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """What later stages must know; one of the models in `facts`."""

    totals: dict[str, JsonValue] = Field(default_factory=dict)
    """Counts for people: tokens, documents, bytes, steps."""

    versions: dict[str, str]
    """Versions of Python, capgap and the packages that matter, of the process that finished the stage."""

    earlier_versions: tuple[dict[str, str], ...] = ()
    """Of each process before it that was killed and had others: those that differ."""

    started: str
    """UTC, ISO 8601."""

    wall_s: float
    """Seconds that processes worked on it: those of all together, also where some were killed or worked at once, as
    slices do. Of a killed one what its last heartbeat says."""

    command: tuple[str, ...]
    """The command line."""

    resolved: dict[str, Any] = Field(default_factory=dict)
    """The whole run file with its defaults, operational settings included."""

    @property
    def read_as(self) -> str:
        """The stage whose result it is to whoever reads it."""
        return STANDS_FOR.get(self.stage, self.stage)

    @model_validator(mode="after")
    def _check(self) -> Self:
        shards = [shard.file.path.casefold() for part in self.shard_sets.values() for shard in part.shards]
        for name, paths in (("files", [file.path for file in self.files]), ("shard_sets", shards)):
            if len(set(paths)) < len(paths):
                raise ValueError(f"{name}: found a path twice, expected each once")
        return self
