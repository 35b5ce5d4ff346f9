"""Member encoding: a block of sequences (and targets) as an Arrow IPC stream inside one checksummed zstd frame.

One Arrow row is one sequence, so that any Arrow program can read a member:

    every codec             tokens (planes of ranks), starts, mask (bits)
    sampled-planes-1        `sampled`: the sampled ids, and the count of each
    topk-PROFILE-1          `topk`: the top-k tokens, their logprobs and the tail
    chunks-1                `chunks`: where chunks end, and the logprobs of the kept chunks

layout.py defines the columns of each codec.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard
from pydantic import JsonValue, ValidationError

from capgap.pipeline.store.alignment import EXACT, StoredError
from capgap.pipeline.store.checks import check_ids
from capgap.pipeline.store.chunks import chunk_targets, chunk_values
from capgap.pipeline.store.codec_settings import EXPECTED, CodecSettings
from capgap.pipeline.store.columns import MAX_MEMBER_BYTES, from_frame, to_frame
from capgap.pipeline.store.layout import (
    CHUNKS,
    CODECS,
    PROFILES,
    SAMPLED,
    SEQUENCES,
    TOPK,
    TOPK_CODECS,
    Field,
    RaggedValues,
    fields_of,
    read_values,
    to_columns,
)
from capgap.pipeline.store.planes import pack_bits, unpack_bits
from capgap.pipeline.store.ranking import RANKING_NAME, Ranking, read_ranking
from capgap.pipeline.store.sampled import LABELS, sampled_targets, sampled_values
from capgap.pipeline.store.topk import COARSE, FINE, TopkShape, topk_targets, topk_values
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.records import ChunkTargets, SampledTargets, Sequences, Targets, TopkTargets

__all__ = ["CHUNKS", "PROFILES", "SAMPLED", "SEQUENCES", "TOPK", "TOPK_CODECS", "Codec", "codec_for", "decoding"]

_LABEL_ERROR = StoredError(label_nats=LABELS.error_nats)
_ERRORS = {
    SEQUENCES: EXACT,
    # projected targets may come from a cache of any profile below, so the largest of their errors is allowed
    CHUNKS: StoredError(FINE.error_nats, COARSE.error_nats, COARSE.floor_nats),
    SAMPLED: _LABEL_ERROR,
    TOPK_CODECS["lossless"]: EXACT,
    TOPK_CODECS["near-lossless"]: StoredError(FINE.error_nats, FINE.error_nats, FINE.floor_nats),
    TOPK_CODECS["compact"]: StoredError(FINE.error_nats, COARSE.error_nats, COARSE.floor_nats),
    TOPK_CODECS["small"]: StoredError(FINE.error_nats, COARSE.error_nats, COARSE.floor_nats),
}

# The writer may choose any zstd level. Measured at topk 64: near-lossless takes 1.29 us a token at level 3, and 0.49 us
# at level 1 for 0.7 % more bytes. compact takes 0.92 us at level 3, 0.45 us at level 2 for 1.8 % more, and 0.39 us at
# level 1 for 3.1 % more. Sampled rows are small, so that level 3 takes only 0.2 us.
_ZSTD_LEVELS = {
    SEQUENCES: 3,
    SAMPLED: 3,
    CHUNKS: 3,
    TOPK_CODECS["lossless"]: 1,
    TOPK_CODECS["near-lossless"]: 1,
    TOPK_CODECS["compact"]: 2,
    TOPK_CODECS["small"]: 1,
}

# room for the schema, and for the padding of columns in Arrow's stream
_MAX_SCHEMA_BYTES = 1 << 16
# where a list ends in a column of lists of any size; columns of fixed sizes do without
_OFFSET_BYTES = 4


@dataclass(frozen=True)
class Codec:
    """Encodes blocks as the bytes of members, and decodes them.

    Attributes:
        name: Name with version, as the manifest states it.
        seq_len: L, the number of targets in a sequence.
        vocab_size: All ids are below this number.
        num_ids: n samples (`sampled`) or K kept ids (`topk`, projected `chunks`) a row; 0 if rows have no ids.
        ranking: Ranking of the ids. If it is None, ids are stored as they are.
        temperature: Capture temperature; it is written to the manifest only if there are extra temperatures.
        extra_temperatures: Further temperatures for which `topk` stores a tail.
        unknown_labels: Whether a label's logprob may be NaN (unknown) if its id is not kept; for `topk` only.
        was_cut: `small` writes every id of a row, because the rows were cut before. Only the writer uses this.
    """

    name: str
    seq_len: int
    vocab_size: int
    num_ids: int = 0
    ranking: Ranking | None = None
    temperature: float = 1.0
    extra_temperatures: tuple[float, ...] = ()
    unknown_labels: bool = False
    was_cut: bool = False

    @property
    def settings(self) -> dict[str, JsonValue]:
        """Return the settings that the manifest must hold in addition to the codec's name."""
        extra = self.extra_temperatures or None
        settings = CodecSettings(
            vocab_size=self.vocab_size,
            num_ids=self.num_ids,
            temperature=None if extra is None else self.temperature,
            extra_temperatures=extra,
            unknown_labels=self.unknown_labels or None,
            ranking=None if self.ranking is None else RANKING_NAME,
            ranking_sha256=None if self.ranking is None else self.ranking.sha256,
        )
        return settings.model_dump(mode="json", exclude_none=True)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """Return the fields that are stored for each sequence, in the order of the columns."""
        return fields_of(self.name, self.seq_len, self.vocab_size, self.num_ids, len(self.extra_temperatures))

    @property
    def powers(self) -> tuple[float, ...]:
        """Return, for each extra temperature, the power of the stored probabilities that gives its probabilities."""
        return tuple(self.temperature / other for other in self.extra_temperatures)

    @property
    def error(self) -> StoredError:
        """Return the largest difference between a logprob as it was written and as it is read."""
        return _ERRORS[self.name]

    def encode(self, sequences: Sequences, targets: Targets | None = None) -> bytes:
        """Encode a block as the bytes of one member.

        Raises:
            InputError: An id is outside the vocabulary, a value is NaN, counts do not sum to the number of samples, or
                a member of so many sequences may be larger than a reader accepts.
        """
        if len(sequences) > self.most_sequences:
            raise InputError(
                f"a member of codec {self.name} may be larger than a reader accepts",
                found=f"{len(sequences)} x {self.sequence_bytes:,} bytes",
                expected=f"at most {MAX_MEMBER_BYTES:,}",
                fix="keep fewer ids of each target, or make shorter sequences",
            )
        check_ids("tokens", sequences.tokens_BL1, self.vocab_size)
        values: dict[str, npt.NDArray[Any] | RaggedValues] = {
            "tokens": np.take(self.ranking_used.ranks_V, sequences.tokens_BL1),
            "starts": pack_bits(sequences.starts_BL1),
            "mask": pack_bits(sequences.mask_BL1),
        }
        if isinstance(targets, SampledTargets):
            values |= sampled_values(targets, self.ranking_used, self.num_ids)
        elif isinstance(targets, TopkTargets):
            values |= topk_values(targets, self._topk)
        elif isinstance(targets, ChunkTargets):
            values |= chunk_values(targets, self.vocab_size, self.num_ids)
        fields = self.fields if targets is not None else tuple(field for field in self.fields if field.part == "text")
        return to_frame(to_columns(fields, values), _ZSTD_LEVELS[self.name])

    def decode(self, data: bytes, where: str, num_sequences: int | None = None) -> tuple[Sequences, Targets | None]:
        """Decode the block of one member.

        Args:
            data: Bytes of the member.
            where: Name of the member in errors.
            num_sequences: Number of sequences that the manifest states; a frame that claims more bytes than these can
                take is refused before memory is allocated.

        Raises:
            CorruptError: The frame's checksum, the Arrow stream or its shapes are wrong.
        """
        with decoding(self, where):
            values = read_values(self.fields, from_frame(data, self.most_bytes(num_sequences)))
            return self._sequences(values), self._targets(values)

    def most_bytes(self, num_sequences: int | None) -> int:
        """Return the most bytes that an inflated member may have: 8 a kept id, and 32 for the rest of a target.

        This is more than `encode` needs, because other programs' members may take more, for bits of nulls or padding.
        """
        if num_sequences is None:
            return MAX_MEMBER_BYTES
        per_target = 8 * self.num_ids + 4 * len(self.extra_temperatures) + 32
        return min(MAX_MEMBER_BYTES, _MAX_SCHEMA_BYTES + num_sequences * (self.seq_len + 1) * per_target)

    @property
    def most_sequences(self) -> int:
        """Return the most sequences that a member may have so that every reader accepts it; 0 if one is too large."""
        return (MAX_MEMBER_BYTES - _MAX_SCHEMA_BYTES) // self.sequence_bytes

    @cached_property
    def sequence_bytes(self) -> int:
        """Return the most bytes that `encode` takes for one sequence, before they are compressed."""
        most_ids = self.seq_len * min(self.num_ids, self.vocab_size)
        return sum(
            len(field.columns) * (_OFFSET_BYTES + np.dtype(field.kind).itemsize * (field.width or most_ids))
            for field in self.fields
        )

    def _sequences(self, values: dict[str, npt.NDArray[Any]]) -> Sequences:
        check_ids("tokens", values["tokens"], self.vocab_size)
        starts_BL1, mask_BL1 = (unpack_bits(values[name], self.seq_len + 1) for name in ("starts", "mask"))
        return Sequences(np.take(self.ranking_used.ids_V, values["tokens"]), starts_BL1, mask_BL1)

    def _targets(self, values: dict[str, npt.NDArray[Any]]) -> Targets | None:
        if self.name == SEQUENCES:
            return None
        if self.name == SAMPLED:
            return sampled_targets(values, self.ranking_used, self.num_ids)
        if self.name == CHUNKS:
            return chunk_targets(values, self.seq_len, self.vocab_size, self.num_ids)
        return topk_targets(values, self._topk)

    @property
    def ranking_used(self) -> Ranking:
        """Return the ranking, or the identity if ids are not ranked."""
        return _identity(self.vocab_size) if self.ranking is None else self.ranking

    @property
    def _topk(self) -> TopkShape:
        return TopkShape(
            PROFILES[self.name],
            self.seq_len,
            self.num_ids,
            self.ranking_used,
            self.powers,
            self.unknown_labels,
            self.was_cut,
        )


@contextmanager
def decoding(codec: Codec, where: str) -> Iterator[None]:
    """Turn every error of reading a member into a CorruptError that names the member."""
    try:
        yield
    except (
        zstandard.ZstdError,
        pa.ArrowException,
        OSError,
        StopIteration,
        KeyError,
        ValueError,
        IndexError,
        OverflowError,
        MemoryError,
        struct.error,
        InputError,
    ) as error:
        raise CorruptError(
            "the member cannot be decoded", where=where, found=error, expected=f"codec {codec.name}"
        ) from None


def codec_for(
    name: str, seq_len: int, settings: Mapping[str, JsonValue], read_file: Callable[[str], bytes] | None = None
) -> Codec:
    """Return the codec that a manifest names.

    Args:
        name: Name with version.
        seq_len: L, the number of targets in a sequence.
        settings: The codec's settings in the manifest.
        read_file: Reads a file of the folder by its name; needed if the settings name a ranking.

    Raises:
        InputError: This version of capgap does not know the codec, or the settings do not belong to it.
        CorruptError: The ranking is not the one that the members were written with.
    """
    if name not in CODECS:
        raise InputError(
            "unknown codec", found=name, expected=", ".join(CODECS), fix="update capgap to read this shard"
        )
    given = _settings_of(name, settings)
    ranking = None
    if given.ranking is not None and given.ranking_sha256 is not None:
        assert read_file is not None, "a ranking is read from the folder of the shards"
        ranking = read_ranking(read_file(given.ranking), given.ranking_sha256, given.vocab_size, given.ranking)
    return Codec(
        name,
        seq_len,
        given.vocab_size,
        given.num_ids,
        ranking,
        given.temperature or 1.0,
        given.extra_temperatures or (),
        given.unknown_labels or False,
    )


def _settings_of(name: str, settings: Mapping[str, JsonValue]) -> CodecSettings:
    try:
        given = CodecSettings.model_validate(settings)
    except ValidationError:
        given = None
    if given is None or (given.only_for_topk and name not in PROFILES):
        raise InputError(f"codec {name} has other settings", found=settings, expected=EXPECTED)
    return given


@lru_cache(maxsize=4)
def _identity(vocab_size: int) -> Ranking:
    return Ranking(np.arange(vocab_size, dtype=np.int32))
