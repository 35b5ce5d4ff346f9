"""Stored columns of targets as ids and logprobs, in torch: what topk.py and sampled.py do, without a loop or a wait.

Shapes follow from numbers that the host knows, and every index is bounded before it is used, so no step asks the device
for a value. What contradicts the format becomes a flag beside the result.

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
    """What is looked up, on the device.

    Attributes:
        ids_V: the id of each rank, int64.
        numbers: the four numbers of each quad [256, 4], uint8.
        logprobs: of each companded code [256], float32.
    """

    ids_V: torch.Tensor
    numbers: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    def of(cls, codec: Codec, device: torch.device | str) -> Tables:
        """For a codec."""
        codes = np.arange(256, dtype=np.uint8).clip(max=NUM_COMPANDED - 1)
        return cls(
            torch.from_numpy(codec.ranking_used.ids_V.astype(np.int64)).to(device),
            torch.from_numpy(QUADS.view(np.uint8).reshape(256, 4).copy()).to(device),
            torch.from_numpy(Companded().decode(codes)).to(device),
        )

    def ids(self, ranks: torch.Tensor, faults: list[torch.Tensor]) -> torch.Tensor:
        """The ids of these ranks, int64; a fault if one is past the vocabulary."""
        last = len(self.ids_V) - 1
        faults.append(((ranks < 0) | (ranks > last)).any())
        return self.ids_V.index_select(0, ranks.clamp(0, last).flatten()).view(ranks.shape)


@dataclass(frozen=True)
class DecodedTopk:
    """N rows of `topk` targets; padding has id 0 and logprob -inf.

    Attributes:
        ids_NK: int64.
        logprobs_NK: float32, nats.
        last_N: the logprob of each row's last kept id.
        tail_N: probability of all other ids.
        label_logprobs_N: of the next token, nats; NaN for unknown.
        log_tails_TN: the logarithm of each further temperature's unscaled tail.
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
        ids_NK: int64.
        counts_NK: int32.
        label_logprobs_N: of the next token, nats.
    """

    ids_NK: torch.Tensor
    counts_NK: torch.Tensor
    label_logprobs_N: torch.Tensor


def topk_rows(batch: StoredBatch, codec: Codec, tables: Tables, faults: list[torch.Tensor]) -> DecodedTopk:
    """The rows of a batch of one of the topk codecs."""
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
        # no comparison with NaN is true
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
    # the numbers of a sequence begin a new quad
    skipped_B = 4 * batch["offsets quads"][:-1] - batch["offsets ids_0"][:-1]
    number_NK = place_NK + skipped_B.repeat_interleave(codec.seq_len, output_size=len(num_kept_N))[:, None]
    steps_NK = _taken(_steps(batch, tables, faults), number_NK) * is_kept_NK
    codes_NK = steps_NK.cumsum(1, dtype=torch.int32) & 0xFF
    logprobs_NK = _companded(codes_NK, tables, faults)
    return DecodedTopk(
        _taken(ids_D, place_NK) * is_kept_NK,
        logprobs_NK.masked_fill(~is_kept_NK, -torch.inf),
        # sums stand still behind the last kept id
        logprobs_NK[:, -1],
        *_fine(batch, codec),
    )


def sampled_rows(batch: StoredBatch, codec: Codec, tables: Tables, faults: list[torch.Tensor]) -> DecodedSamples:
    """The rows of a batch of the sampled codec."""
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
    """The numbers of which the columns are planes, int32; of four planes, their bits."""
    number = batch[f"{name}_0"].int()
    for i in range(1, 4):
        if f"{name}_{i}" not in batch:
            break
        number |= batch[f"{name}_{i}"].int() << 8 * i
    return number


def _by_row(steps_BD: torch.Tensor, length: int, kept: int, largest: int) -> torch.Tensor:
    """Codes [N, K] of steps that lie rank by rank."""
    codes_BKL = steps_BD.reshape(-1, kept, length).cumsum(1, dtype=torch.int32) & largest
    return codes_BKL.transpose(1, 2).reshape(-1, kept)


def _steps(batch: StoredBatch, tables: Tables, faults: list[torch.Tensor]) -> torch.Tensor:
    """The numbers of all quads [4 Q], int32, escapes added."""
    quads, more = batch["quads"].flatten(), batch["escapes"].int()
    numbers_D = tables.numbers.index_select(0, quads.int()).flatten().int()
    is_escaped_D = numbers_D == ESCAPE
    # how many there are up to each number: also where the next escape lies
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
    """Values at these places; any value where a place is none."""
    if not len(values_D):
        return torch.zeros(places.shape, dtype=values_D.dtype, device=values_D.device)
    return values_D.index_select(0, places.clamp(0, len(values_D) - 1).flatten()).view(places.shape)


def _companded(codes_NK: torch.Tensor, tables: Tables, faults: list[torch.Tensor]) -> torch.Tensor:
    faults.append((codes_NK >= NUM_COMPANDED).any())
    return tables.logprobs.index_select(0, codes_NK.flatten()).view(codes_NK.shape)


def _fine(batch: StoredBatch, codec: Codec) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Tails, the labels' logprobs, and the logarithms of the further tails [N]."""
    log_tails_TN = [_log_tail(batch, tail_name(number)) + SHIFT_NATS for number in range(len(codec.powers))]
    codes_N = joined(batch, "label").flatten()
    labels_N = codes_N.float() * _FINE_STEP
    if codec.unknown_labels:
        labels_N = labels_N.masked_fill(codes_N == UNKNOWN_LABEL, torch.nan)
    return _log_tail(batch, "tail").exp(), labels_N, log_tails_TN


def _log_tail(batch: StoredBatch, name: str) -> torch.Tensor:
    codes_N = joined(batch, name).flatten()
    return (codes_N.float() * _FINE_STEP).masked_fill(codes_N == NO_TAIL, -torch.inf)
