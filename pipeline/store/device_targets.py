"""The decoding of topk.py and sampled.py in torch operations, without loops and without waiting for the device.

All shapes follow from numbers that the host knows, and every index is clamped before it is used, so no step reads a
value back from the device. A contradiction of the format is reported as a flag in the list `faults`.

Legend: B sequences, L targets a sequence, N = B x L rows, K ids of the widest row, D values of all rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from capgap.pipeline.store.codec import Codec
from capgap.pipeline.store.layout import PROFILES, tail_name
from capgap.pipeline.store.planes import ESCAPE, QUADS
from capgap.pipeline.store.quantise import NUM_COMPANDED, Companded
from capgap.pipeline.store.stored_batch import StoredBatch
from capgap.pipeline.store.topk import NO_TAIL, SHIFT_NATS, UNKNOWN_LABEL, largest_log_tail

_FINE_STEP = -1 / 64


@dataclass(frozen=True)
class Tables:
    """Look-up tables on the device.

    Attributes:
        ids_V: The id of each rank [V], int64.
        numbers: The four numbers of each quad [256, 4], uint8.
        logprobs: The logprob of each companded code [256], float32, nats.
    """

    ids_V: torch.Tensor
    numbers: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    def of(cls, codec: Codec, device: torch.device | str) -> Tables:
        """Make the tables for a codec."""
        codes = np.arange(256, dtype=np.uint8).clip(max=NUM_COMPANDED - 1)
        return cls(
            torch.from_numpy(codec.ranking_used.ids_V.astype(np.int64)).to(device),
            torch.from_numpy(QUADS.view(np.uint8).reshape(256, 4).copy()).to(device),
            torch.from_numpy(Companded().decode(codes)).to(device),
        )

    def ids(self, ranks: torch.Tensor, faults: list[torch.Tensor]) -> torch.Tensor:
        """Return the ids of these ranks, int64, and report a fault if a rank is outside the vocabulary."""
        last = len(self.ids_V) - 1
        faults.append(((ranks < 0) | (ranks > last)).any())
        return self.ids_V.index_select(0, ranks.clamp(0, last).flatten()).view(ranks.shape)


@dataclass(frozen=True)
class DecodedTopk:
    """N rows of `topk` targets; padding has id 0 and logprob -inf.

    Attributes:
        ids_NK: Kept ids [N, K], int64.
        logprobs_NK: Their logprobs [N, K], float32, nats.
        last_N: The logprob of each row's last kept id [N], float32, nats.
        tail_N: Probability of all other ids [N], float32.
        label_logprobs_N: The logprob of the next token [N], float32, nats; NaN if it is unknown.
        log_tails_TN: For each extra temperature, the logarithm of its unscaled tail [N], float32.
    """

    ids_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    last_N: torch.Tensor
    tail_N: torch.Tensor
    label_logprobs_N: torch.Tensor
    log_tails_TN: list[torch.Tensor]


@dataclass(frozen=True)
class DecodedSamples:
    """N rows of `sampled` targets; padding has id 0 and count 0.

    Attributes:
        ids_NK: Sampled ids [N, K], int64.
        counts_NK: The number of samples of each id [N, K], int32.
        label_logprobs_N: The logprob of the next token [N], float32, nats.
    """

    ids_NK: torch.Tensor
    counts_NK: torch.Tensor
    label_logprobs_N: torch.Tensor


def topk_rows(batch: StoredBatch, codec: Codec, tables: Tables, faults: list[torch.Tensor]) -> DecodedTopk:
    """Decode the targets of a batch of one of the `topk` codecs."""
    profile, length, kept = PROFILES[codec.name], codec.seq_len, codec.num_ids
    if profile == "small":
        return _small_rows(batch, codec, tables, faults)
    ids_NK = tables.ids(joined(batch, "ids"), faults).view(-1, kept)
    if profile == "lossless":
        logprobs_NK = joined(batch, "logprobs").view(torch.float32).view(-1, kept)
        tail_N, labels_N = (joined(batch, name).view(torch.float32).flatten() for name in ("tail", "label"))
        known_N = labels_N.where(~labels_N.isnan(), 0.0) if codec.unknown_labels else labels_N
        faults += [~values.isfinite().all() for values in (logprobs_NK, tail_N, known_N)]
        names = map(tail_name, range(len(codec.powers)))
        log_tails_TN = [joined(batch, name).view(torch.float32).flatten() for name in names]
        # comparisons with NaN are false, so NaN is a fault too
        faults += [~(log_tail_N <= largest_log_tail(codec.vocab_size)).all() for log_tail_N in log_tails_TN]
        return DecodedTopk(ids_NK, logprobs_NK, logprobs_NK[:, -1], tail_N, labels_N, log_tails_TN)
    if profile == "near-lossless":
        codes_NK = _by_row(joined(batch, "steps"), length, kept, 0xFFFF)
        logprobs_NK = codes_NK.float() * _FINE_STEP
    else:
        steps_BD = _steps(batch, tables, faults).view(batch.num_sequences, -1)[:, : length * kept]
        logprobs_NK = _companded(_by_row(steps_BD, length, kept, 0xFF), tables, faults)
    return DecodedTopk(ids_NK, logprobs_NK, logprobs_NK[:, -1], *_fine(batch, codec))


def _small_rows(batch: StoredBatch, codec: Codec, tables: Tables, faults: list[torch.Tensor]) -> DecodedTopk:
    num_kept_N = batch["top_k"].int().flatten()
    ends_N = num_kept_N.cumsum(0, dtype=torch.int32)
    column_K = torch.arange(codec.num_ids, device=batch.device, dtype=torch.int32)
    is_kept_NK = column_K < num_kept_N[:, None]
    place_NK = (ends_N - num_kept_N)[:, None] + column_K
    ids_D = tables.ids(joined(batch, "ids"), faults)
    # each sequence begins a new quad, so fill numbers lie between the numbers of two sequences
    skipped_B = 4 * batch["offsets quads"][:-1] - batch["offsets ids_0"][:-1]
    number_NK = place_NK + skipped_B.repeat_interleave(codec.seq_len, output_size=len(num_kept_N))[:, None]
    steps_NK = _taken(_steps(batch, tables, faults), number_NK) * is_kept_NK
    codes_NK = steps_NK.cumsum(1, dtype=torch.int32) & 0xFF
    logprobs_NK = _companded(codes_NK, tables, faults)
    return DecodedTopk(
        _taken(ids_D, place_NK) * is_kept_NK,
        logprobs_NK.masked_fill(~is_kept_NK, -torch.inf),
        # steps behind the last kept id are 0, so the last column repeats that id's logprob
        logprobs_NK[:, -1],
        *_fine(batch, codec),
    )


def sampled_rows(batch: StoredBatch, codec: Codec, tables: Tables, faults: list[torch.Tensor]) -> DecodedSamples:
    """Decode the targets of a batch of the `sampled` codec."""
    num_repeated_N = batch["num_repeated"].int().flatten()
    counts_R = batch["counts"].int()
    sums_R = torch.nn.functional.pad(counts_R.cumsum(0, dtype=torch.int32), (1, 0))
    ends_N = num_repeated_N.cumsum(0, dtype=torch.int32)
    first_N = ends_N - num_repeated_N
    num_once_N = codec.num_ids - (sums_R[ends_N] - sums_R[first_N])
    first_once_N = num_once_N.cumsum(0, dtype=torch.int32) - num_once_N
    column_K = torch.arange(batch.widest, device=batch.device, dtype=torch.int32)
    is_repeated_NK = column_K < num_repeated_N[:, None]
    is_id_NK = column_K < (num_repeated_N + num_once_N)[:, None]
    place_NK, once_NK = first_N[:, None] + column_K, (first_once_N - num_repeated_N)[:, None] + column_K
    steps_NK = _taken(joined(batch, "once"), once_NK) * (is_id_NK & ~is_repeated_NK)
    ranks_NK = _taken(joined(batch, "repeated"), place_NK).where(is_repeated_NK, steps_NK.cumsum(1, dtype=torch.int32))
    counts_NK = _taken(counts_R, place_NK).where(is_repeated_NK, is_id_NK.int())
    ids_NK = tables.ids(ranks_NK * is_id_NK, faults) * is_id_NK
    return DecodedSamples(ids_NK, counts_NK, joined(batch, "label").flatten().float() * _FINE_STEP)


def joined(batch: StoredBatch, name: str) -> torch.Tensor:
    """Join the byte planes of a field to numbers, int32; four planes give the bits of the number."""
    number = batch[f"{name}_0"].int()
    for i in range(1, 4):
        if f"{name}_{i}" not in batch:
            break
        number |= batch[f"{name}_{i}"].int() << 8 * i
    return number


def _by_row(steps_BD: torch.Tensor, length: int, kept: int, largest: int) -> torch.Tensor:
    """Return the codes [N, K] of differences that are stored rank by rank."""
    codes_BKL = steps_BD.reshape(-1, kept, length).cumsum(1, dtype=torch.int32) & largest
    return codes_BKL.transpose(1, 2).reshape(-1, kept)


def _steps(batch: StoredBatch, tables: Tables, faults: list[torch.Tensor]) -> torch.Tensor:
    """Return the numbers of all quads [4 Q], int32, with their escapes added."""
    quads, more = batch["quads"].flatten(), batch["escapes"].int()
    numbers_D = tables.numbers.index_select(0, quads.int()).flatten().int()
    is_escaped_D = numbers_D == ESCAPE
    # the count of escapes before each number is also the index of the next escape
    found_D = torch.nn.functional.pad(is_escaped_D.cumsum(0, dtype=torch.int32), (1, 0))
    if quads.numel() and "offsets quads" in batch:
        borders_B1 = 4 * batch["offsets quads"]
    else:
        borders_B1 = torch.arange(batch.num_sequences + 1, device=batch.device) * (
            len(numbers_D) // batch.num_sequences
        )
    faults.append((found_D[borders_B1] != batch["offsets escapes"]).any())
    return numbers_D + _taken(more, found_D[:-1]) * is_escaped_D


def _taken(values_D: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the values at these places; a place outside the array gives an arbitrary value."""
    if not len(values_D):
        return torch.zeros(places.shape, dtype=values_D.dtype, device=values_D.device)
    return values_D.index_select(0, places.clamp(0, len(values_D) - 1).flatten()).view(places.shape)


def _companded(codes_NK: torch.Tensor, tables: Tables, faults: list[torch.Tensor]) -> torch.Tensor:
    faults.append((codes_NK >= NUM_COMPANDED).any())
    return tables.logprobs.index_select(0, codes_NK.flatten()).view(codes_NK.shape)


def _fine(batch: StoredBatch, codec: Codec) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return the tails, the labels' logprobs, and the logarithm of each extra temperature's tail, each [N]."""
    log_tails_TN = [_log_tail(batch, tail_name(number)) + SHIFT_NATS for number in range(len(codec.powers))]
    codes_N = joined(batch, "label").flatten()
    labels_N = codes_N.float() * _FINE_STEP
    if codec.unknown_labels:
        labels_N = labels_N.masked_fill(codes_N == UNKNOWN_LABEL, torch.nan)
    return _log_tail(batch, "tail").exp(), labels_N, log_tails_TN


def _log_tail(batch: StoredBatch, name: str) -> torch.Tensor:
    codes_N = joined(batch, name).flatten()
    return (codes_N.float() * _FINE_STEP).masked_fill(codes_N == NO_TAIL, -torch.inf)
