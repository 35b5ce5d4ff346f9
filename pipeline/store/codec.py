"""Member encoding: a block of sequences (and targets) as an Arrow IPC stream inside one checksummed zstd frame.

One Arrow row is one sequence, so that any Arrow program can read a member:

    every codec       tokens, starts, mask        fixed-size lists of L + 1
    sampled-arrow-1   num_ids, label_logprobs     fixed-size lists of L;   ids, counts: one list of all L rows' entries
    topk-arrow-1      ids, logprobs               fixed-size lists of L x K;  tail, label_logprobs: lists of L

Ids take the narrowest of 8, 16 and 32 bits that holds the vocabulary. Arrow's own compression is off: it has no
checksum, the zstd frame around the stream has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard

from capgap.pipeline.store.columns import fixed_lists, fixed_values, lists, values_of, whole_frame
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.records import SampledTargets, Sequences, Targets, TopkTargets

SEQUENCES = "sequences-arrow-1"
SAMPLED = "sampled-arrow-1"
TOPK = "topk-arrow-1"
_KNOWN = (SEQUENCES, SAMPLED, TOPK)

# Level 9 saves 2 % of the bytes and takes 2.6 times as long to write.
_ZSTD_LEVEL = 3


@dataclass(frozen=True)
class Codec:
    """How a block becomes bytes and back.

    Attributes:
        name: name with version, as the manifest states it.
        seq_len: L, targets a sequence.
        vocab_size: ids are below it.
        num_ids: n draws (`sampled`) or K kept ids (`topk`) a row; 0 for sequences alone.
    """

    name: str
    seq_len: int
    vocab_size: int
    num_ids: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the manifest must say beside the name."""
        return {"vocab_size": self.vocab_size, "num_ids": self.num_ids}

    def encode(self, sequences: Sequences, targets: Targets | None = None) -> bytes:
        """One member.

        Raises:
            InputError: an id outside the vocabulary, a NaN, or counts that do not sum to the number of draws.
        """
        _check_ids("tokens", sequences.tokens_BL1, self.vocab_size)
        columns: dict[str, pa.Array] = {
            "tokens": fixed_lists(sequences.tokens_BL1.astype(self._id_type)),
            "starts": fixed_lists(sequences.starts_BL1.astype(np.uint8)),
            "mask": fixed_lists(sequences.mask_BL1.astype(np.uint8)),
        }
        if isinstance(targets, SampledTargets):
            columns |= self._sampled_columns(targets)
        elif isinstance(targets, TopkTargets):
            columns |= self._topk_columns(targets)
        batch = pa.record_batch(list(columns.values()), names=list(columns))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compress(sink.getvalue())

    def decode(self, data: bytes, where: str) -> tuple[Sequences, Targets | None]:
        """The block of one member; `where` names it in errors.

        Raises:
            CorruptError: the frame's checksum, the Arrow stream or its shapes are wrong.
        """
        try:
            batch = pa.ipc.open_stream(pa.py_buffer(whole_frame(data))).read_next_batch()
            sequences = Sequences(
                fixed_values(batch, "tokens", self.seq_len + 1).astype(np.int32),
                fixed_values(batch, "starts", self.seq_len + 1).astype(np.bool_),
                fixed_values(batch, "mask", self.seq_len + 1).astype(np.bool_),
            )
            _check_ids("tokens", sequences.tokens_BL1, self.vocab_size)
            return sequences, self._targets(batch)
        except (
            zstandard.ZstdError,
            pa.ArrowException,
            OSError,
            StopIteration,
            KeyError,
            ValueError,
            InputError,
        ) as error:
            raise CorruptError(
                "the member cannot be decoded", where=where, found=error, expected=f"codec {self.name}"
            ) from None

    @property
    def _id_type(self) -> type[np.unsignedinteger[Any]]:
        if self.vocab_size <= 1 << 8:
            return np.uint8
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def _sampled_columns(self, targets: SampledTargets) -> dict[str, pa.Array]:
        _check_ids("ids", targets.ids_D, self.vocab_size)
        _check_finite("label_logprobs", targets.label_logprobs_BL)
        self._check_counts(targets)
        per_sequence = targets.num_ids_BL.sum(axis=1)
        count_type = np.uint8 if self.num_ids < 1 << 8 else np.uint16
        return {
            "num_ids": fixed_lists(targets.num_ids_BL.astype(count_type)),
            "ids": lists(targets.ids_D.astype(self._id_type), per_sequence),
            "counts": lists(targets.counts_D.astype(count_type), per_sequence),
            "label_logprobs": fixed_lists(targets.label_logprobs_BL.astype(np.float32)),
        }

    def _topk_columns(self, targets: TopkTargets) -> dict[str, pa.Array]:
        shape = (len(targets.ids_BLK), self.seq_len * self.num_ids)
        _check_ids("ids", targets.ids_BLK, self.vocab_size)
        for name in ("logprobs_BLK", "tail_BL", "label_logprobs_BL"):
            _check_finite(name, getattr(targets, name))
        return {
            "ids": fixed_lists(targets.ids_BLK.astype(self._id_type).reshape(shape)),
            "logprobs": fixed_lists(targets.logprobs_BLK.astype(np.float32).reshape(shape)),
            "tail": fixed_lists(targets.tail_BL.astype(np.float32)),
            "label_logprobs": fixed_lists(targets.label_logprobs_BL.astype(np.float32)),
        }

    def _targets(self, batch: pa.RecordBatch) -> Targets | None:
        if self.name == SEQUENCES:
            return None
        length, num_sequences = self.seq_len, batch.num_rows
        label_logprobs_BL = fixed_values(batch, "label_logprobs", length)
        if self.name == TOPK:
            shape = (num_sequences, length, self.num_ids)
            ids_BLK = fixed_values(batch, "ids", length * self.num_ids).astype(np.int32).reshape(shape)
            _check_ids("ids", ids_BLK, self.vocab_size)
            logprobs_BLK = fixed_values(batch, "logprobs", length * self.num_ids).reshape(shape)
            return TopkTargets(ids_BLK, logprobs_BLK, fixed_values(batch, "tail", length), label_logprobs_BL)
        targets = SampledTargets(
            fixed_values(batch, "num_ids", length).astype(np.int32),
            values_of(batch, "ids").astype(np.int32),
            values_of(batch, "counts").astype(np.int32),
            label_logprobs_BL,
        )
        _check_ids("ids", targets.ids_D, self.vocab_size)
        self._check_counts(targets)
        return targets

    def _check_counts(self, targets: SampledTargets) -> None:
        num_ids_N = targets.num_ids_BL.ravel()
        if num_ids_N.sum() != len(targets.ids_D) or len(targets.ids_D) != len(targets.counts_D):
            raise InputError("ids, counts and num_ids disagree", found=len(targets.ids_D), expected=num_ids_N.sum())
        if len(num_ids_N) and (num_ids_N.min() < 1 or targets.counts_D.min() < 1):
            raise InputError("a row without ids, or an id without draws")
        first_N = np.cumsum(num_ids_N) - num_ids_N
        sums_N = np.add.reduceat(targets.counts_D, first_N) if len(first_N) else np.zeros(0)
        if (sums_N != self.num_ids).any():
            row = int(np.flatnonzero(sums_N != self.num_ids)[0])
            raise InputError(f"counts of row {row} do not sum", found=int(sums_N[row]), expected=self.num_ids)


def codec_for(name: str, seq_len: int, settings: dict[str, Any]) -> Codec:
    """The codec that a manifest names.

    Raises:
        InputError: the name is not one that this version of capgap knows, or its settings are not the codec's.
    """
    if name not in _KNOWN:
        raise InputError(
            "unknown codec", found=name, expected=", ".join(_KNOWN), fix="update capgap to read this shard"
        )
    if settings.keys() != {"vocab_size", "num_ids"} or not all(isinstance(value, int) for value in settings.values()):
        raise InputError(f"codec {name} has other settings", found=settings, expected="numbers vocab_size and num_ids")
    return Codec(name, seq_len, **settings)


def _check_ids(name: str, ids: npt.NDArray[np.int32], vocab_size: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise InputError(
            f"{name}: an id outside the vocabulary",
            found=f"{ids.min()} to {ids.max()}",
            expected=f"0 to {vocab_size - 1}",
        )


def _check_finite(name: str, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise InputError(
            f"{name}: a value that is not finite", found=f"{int((~np.isfinite(values)).sum())} of {values.size}"
        )
