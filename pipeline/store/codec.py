"""Member encoding: a block of sequences (and targets) as an Arrow IPC stream inside one checksummed zstd frame.

One Arrow row is one sequence, so that any Arrow program can read a member:

    every codec             tokens (planes of ranks), starts, mask (bits)
    sampled-planes-1        `sampled`: ids and counts of draws
    topk-PROFILE-1          `topk`: the likeliest ids, their logprobs and the tail
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import zstandard

from capgap.pipeline.store.alignment import EXACT, StoredError
from capgap.pipeline.store.checks import check_ids
from capgap.pipeline.store.columns import MAX_MEMBER_BYTES, Columns, fixed_lists, from_frame, to_frame
from capgap.pipeline.store.planes import join_planes, num_planes, pack_bits, split_planes, unpack_bits
from capgap.pipeline.store.ranking import RANKING_NAME, Ranking, read_ranking
from capgap.pipeline.store.sampled import LABELS, sampled_columns, sampled_targets
from capgap.pipeline.store.topk import COARSE, FINE, TopkShape, topk_columns, topk_targets
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.records import SampledTargets, Sequences, Targets, TopkTargets
from capgap.schemas.run_cache import Profile

SEQUENCES = "sequences-planes-1"
SAMPLED = "sampled-planes-1"
TOPK_CODECS: dict[str, str] = {profile: f"topk-{profile}-1" for profile in get_args(Profile)}
TOPK = TOPK_CODECS["near-lossless"]

PROFILES = {name: profile for profile, name in TOPK_CODECS.items()}
_KNOWN = (SEQUENCES, SAMPLED, *PROFILES)
_LABEL_ERROR = StoredError(label_nats=LABELS.error_nats)
_ERRORS = {
    SEQUENCES: EXACT,
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
    TOPK_CODECS["lossless"]: 1,
    TOPK_CODECS["near-lossless"]: 1,
    TOPK_CODECS["compact"]: 2,
    TOPK_CODECS["small"]: 1,
}


# Manifests may come from strangers: these bound what their numbers can ask for. A count of draws has 16 bits.
_MAX_VOCAB_SIZE = 1 << 24
_MAX_IDS = (1 << 16) - 1
_MAX_SCHEMA_BYTES = 1 << 16


@dataclass(frozen=True)
class Codec:
    """How a block becomes bytes and back.

    Attributes:
        name: name with version, as the manifest states it.
        seq_len: L, targets a sequence.
        vocab_size: ids are below it.
        num_ids: n draws (`sampled`) or K kept ids (`topk`) a row; 0 for sequences alone.
        ranking: of the ids; None stores them as they are.
        temperature: at which the teacher was recorded; told only where there are further ones.
        extra_temperatures: at which `topk` has a tail too.
        unknown_labels: a label's logprob may be NaN, for unknown, where its id is not kept; for `topk`.
    """

    name: str
    seq_len: int
    vocab_size: int
    num_ids: int = 0
    ranking: Ranking | None = None
    temperature: float = 1.0
    extra_temperatures: tuple[float, ...] = ()
    unknown_labels: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What the manifest must say beside the name."""
        numbers: dict[str, Any] = {"vocab_size": self.vocab_size, "num_ids": self.num_ids}
        if self.extra_temperatures:
            numbers |= {"temperature": self.temperature, "extra_temperatures": list(self.extra_temperatures)}
        if self.unknown_labels:
            numbers["unknown_labels"] = True
        if self.ranking is None:
            return numbers
        return {**numbers, "ranking": RANKING_NAME, "ranking_sha256": self.ranking.sha256}

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
            InputError: an id outside the vocabulary, a NaN, or counts that do not sum to the number of draws.
        """
        check_ids("tokens", sequences.tokens_BL1, self.vocab_size)
        ranks_BL1 = np.take(self.ranking_used.ranks_V, sequences.tokens_BL1)
        planes = split_planes(ranks_BL1, num_planes(self.vocab_size - 1))
        columns = {f"tokens_{i}": fixed_lists(plane) for i, plane in enumerate(planes)}
        columns |= {
            "starts": fixed_lists(pack_bits(sequences.starts_BL1)),
            "mask": fixed_lists(pack_bits(sequences.mask_BL1)),
        }
        if isinstance(targets, SampledTargets):
            columns |= sampled_columns(targets, self.ranking_used, self.num_ids)
        elif isinstance(targets, TopkTargets):
            columns |= topk_columns(targets, self._topk)
        return to_frame(columns, _ZSTD_LEVELS[self.name])

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
            columns = from_frame(data, self.most_bytes(num_sequences))
            sequences, targets = self._sequences(columns), self._targets(columns)
            columns.require_all_read()
            return sequences, targets

    def most_bytes(self, num_sequences: int | None) -> int:
        """A bound on a member's bytes once it is inflated: 8 for each kept id, 32 for what else a target has."""
        if num_sequences is None:
            return MAX_MEMBER_BYTES
        per_target = 8 * self.num_ids + 4 * len(self.extra_temperatures) + 32
        return min(MAX_MEMBER_BYTES, _MAX_SCHEMA_BYTES + num_sequences * (self.seq_len + 1) * per_target)

    def _sequences(self, columns: Columns) -> Sequences:
        width = self.seq_len + 1
        planes = [columns.fixed(f"tokens_{i}", width) for i in range(num_planes(self.vocab_size - 1))]
        ranks_BL1 = join_planes(planes)
        check_ids("tokens", ranks_BL1, self.vocab_size)
        starts_BL1, mask_BL1 = (unpack_bits(columns.fixed(name, -(-width // 8)), width) for name in ("starts", "mask"))
        return Sequences(np.take(self.ranking_used.ids_V, ranks_BL1), starts_BL1, mask_BL1)

    def _targets(self, columns: Columns) -> Targets | None:
        if self.name == SEQUENCES:
            return None
        if self.name == SAMPLED:
            return sampled_targets(columns, self.ranking_used, self.seq_len, self.num_ids)
        return topk_targets(columns, self._topk)

    @property
    def ranking_used(self) -> Ranking:
        """The ranking, or the ids as they are."""
        return _identity(self.vocab_size) if self.ranking is None else self.ranking

    @property
    def _topk(self) -> TopkShape:
        return TopkShape(
            PROFILES[self.name], self.seq_len, self.num_ids, self.ranking_used, self.powers, self.unknown_labels
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
    name: str, seq_len: int, settings: dict[str, Any], read_file: Callable[[str], bytes] | None = None
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
    if name not in _KNOWN:
        raise InputError(
            "unknown codec", found=name, expected=", ".join(_KNOWN), fix="update capgap to read this shard"
        )
    numbers = {key: value for key, value in settings.items() if key in ("vocab_size", "num_ids")}
    heat = {key: value for key, value in settings.items() if key in ("temperature", "extra_temperatures")}
    unknown = {key: value for key, value in settings.items() if key == "unknown_labels"}
    named = {key: value for key, value in settings.items() if key not in {*numbers, *heat, *unknown}}
    if (
        len(numbers) != 2
        or not all(isinstance(value, int) for value in numbers.values())
        or not 0 < numbers["vocab_size"] <= _MAX_VOCAB_SIZE
        or not 0 <= numbers["num_ids"] <= _MAX_IDS
        or not _are_temperatures(heat)
        or (heat and name not in PROFILES)
        or (unknown and (name not in PROFILES or unknown["unknown_labels"] is not True))
        or named.keys() not in (set(), {"ranking", "ranking_sha256"})
        or not all(isinstance(value, str) for value in named.values())
        or named.get("ranking", RANKING_NAME) != RANKING_NAME
    ):
        raise InputError(
            f"codec {name} has other settings",
            found=settings,
            expected=f"numbers vocab_size, at most {_MAX_VOCAB_SIZE}, and num_ids, at most {_MAX_IDS}; if ids are "
            f"ranked, ranking, {RANKING_NAME}, and ranking_sha256; "
            "for topk at more than one temperature, temperature and extra_temperatures; "
            "and for topk whose labels' logprobs are not all known, unknown_labels, true",
        )
    if heat:
        numbers |= {"temperature": heat["temperature"], "extra_temperatures": tuple(heat["extra_temperatures"])}
    numbers |= unknown
    if not named:
        return Codec(name, seq_len, **numbers)
    assert read_file is not None, "a ranking is read from the folder of the shards"
    data = read_file(named["ranking"])
    return Codec(
        name,
        seq_len,
        **numbers,
        ranking=read_ranking(data, named["ranking_sha256"], numbers["vocab_size"], named["ranking"]),
    )


def _are_temperatures(found: dict[str, Any]) -> bool:
    """Both or neither; numbers above 0."""
    if not found:
        return True
    extra = found.get("extra_temperatures")
    if len(found) != 2 or not isinstance(extra, list) or not extra:
        return False
    every = [found["temperature"], *extra]
    return all(isinstance(value, (int, float)) and 0 < value < float("inf") for value in every)


@lru_cache(maxsize=4)
def _identity(vocab_size: int) -> Ranking:
    return Ranking(np.arange(vocab_size, dtype=np.int32))
