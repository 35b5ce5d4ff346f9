"""Member encoding: a block of sequences (and targets) as an Arrow IPC stream inside one checksummed zstd frame.

One Arrow row is one sequence, so that any Arrow program can read a member:

    every codec             tokens (planes of ranks), starts, mask (bits)
    sampled-planes-1        `sampled`: the ids that were sampled, and how often each was
    topk-PROFILE-1          `topk`: the top-k tokens, their logprobs and the tail
    chunks-1                `chunks`: where chunks end, and the logprobs of those that are kept

Which columns these are stands in layout.py.
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
    # of projected targets, whose cache may have had any of the profiles below
    CHUNKS: StoredError(FINE.error_nats, COARSE.error_nats, COARSE.floor_nats),
    SAMPLED: _LABEL_ERROR,
    TOPK_CODECS["lossless"]: EXACT,
    TOPK_CODECS["near-lossless"]: StoredError(FINE.error_nats, FINE.error_nats, FINE.floor_nats),
    TOPK_CODECS["compact"]: StoredError(FINE.error_nats, COARSE.error_nats, COARSE.floor_nats),
    TOPK_CODECS["small"]: StoredError(FINE.error_nats, COARSE.error_nats, COARSE.floor_nats),
}

# A level is the writer's choice. Measured on topk 64, near-lossless: 1.29 us a token at level 3, 0.49 at level 1, for
# 0.7 % more bytes; compact: 0.92, 0.45 at level 2 and 0.39 at level 1, for 1.8 % and 3.1 %. Sampled rows are small:
# level 3 takes 0.2 us.
_ZSTD_LEVELS = {
    SEQUENCES: 3,
    SAMPLED: 3,
    CHUNKS: 3,
    TOPK_CODECS["lossless"]: 1,
    TOPK_CODECS["near-lossless"]: 1,
    TOPK_CODECS["compact"]: 2,
    TOPK_CODECS["small"]: 1,
}

_MAX_SCHEMA_BYTES = 1 << 16


@dataclass(frozen=True)
class Codec:
    """How a block becomes bytes and back.

    Attributes:
        name: name with version, as the manifest states it.
        seq_len: L, targets a sequence.
        vocab_size: ids are below it.
        num_ids: n samples (`sampled`) or K kept ids (`topk`, projected `chunks`) a row; 0 where there are none.
        ranking: of the ids; None stores them as they are.
        temperature: at which the teacher was recorded; written down only where there are further ones.
        extra_temperatures: at which `topk` has a tail too.
        unknown_labels: a label's logprob may be NaN, for unknown, where its id is not kept; for `topk`.
        was_cut: `small` writes all ids that a row comes with; the writer's choice, of which no reader needs to know.
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
        """What the manifest must say beside the name."""
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
        """What is stored of each sequence, in the order of the columns."""
        return fields_of(self.name, self.seq_len, self.vocab_size, self.num_ids, len(self.extra_temperatures))

    @property
    def powers(self) -> tuple[float, ...]:
        """Probabilities at each further temperature are proportional to these powers of the stored ones."""
        return tuple(self.temperature / other for other in self.extra_temperatures)

    @property
    def error(self) -> StoredError:
        """How far a logprob that was read may be from what was written."""
        return _ERRORS[self.name]

    def encode(self, sequences: Sequences, targets: Targets | None = None) -> bytes:
        """One member.

        Raises:
            InputError: an id outside the vocabulary, a NaN, or counts that do not sum to the number of samples.
        """
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
        """The block of one member; `where` names it in errors.

        Args:
            data: the member.
            where: names it in errors.
            num_sequences: that the manifest says it holds: no memory is given to a frame that claims more.

        Raises:
            CorruptError: the frame's checksum, the Arrow stream or its shapes are wrong.
        """
        with decoding(self, where):
            values = read_values(self.fields, from_frame(data, self.most_bytes(num_sequences)))
            return self._sequences(values), self._targets(values)

    def most_bytes(self, num_sequences: int | None) -> int:
        """A bound on a member's bytes once it is inflated: 8 for each kept id, 32 for what else a target has."""
        if num_sequences is None:
            return MAX_MEMBER_BYTES
        per_target = 8 * self.num_ids + 4 * len(self.extra_temperatures) + 32
        return min(MAX_MEMBER_BYTES, _MAX_SCHEMA_BYTES + num_sequences * (self.seq_len + 1) * per_target)

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
        """The ranking, or the ids as they are."""
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
    """Whatever reading a member raises becomes a CorruptError that names it."""
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
    """The codec that a manifest names.

    Args:
        name: with version.
        seq_len: L.
        settings: as the manifest has them.
        read_file: reads a file of the folder, by its name: the ranking, where the settings name one.

    Raises:
        InputError: the name is not one that this version of capgap knows, or its settings are not the codec's.
        CorruptError: the ranking is not the one that the members were written with.
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
