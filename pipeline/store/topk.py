"""The stored values of `topk` targets, in four profiles.

    lossless         logprobs, tail and label as float32, in four planes each
    near-lossless    codes of 1/64 nat; differences along a row, in two planes
    compact          companded codes; differences along a row, as quads with escapes
    small            like compact, but each row keeps only the ids that hold 99 % of the probability; the rest joins the
                     tail. Rows that come with padding, as they are read, have been cut before and keep all their ids

Ids keep their order and are stored as planes of ranks. Differences are stored rank by rank: those of the first ids of
all rows of a sequence, then those of the second ids, and so on. The rows of `small` differ in length, so their
differences are stored row by row. Every sequence begins a new quad.

For each extra temperature T at which a student may train, `tailJ` holds the logarithm of the unscaled tail: the sum of
p^r over all other ids, with r = temperature / T. The probabilities at T are proportional to the powers p^r of those at
the capture temperature, so dividing by the sum of all powers and the unscaled tail gives a distribution.

Legend: B sequences, L targets a sequence, K ids kept a row, T further temperatures, N = B x L rows, D ids of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from capgap.pipeline.store.checks import ROUNDING, check_distinct, check_finite, check_ids, check_logprobs
from capgap.pipeline.store.layout import RaggedValues, tail_name
from capgap.pipeline.store.planes import ESCAPE, Bytes, cumulate_runs, pack_quads, unpack_quads
from capgap.pipeline.store.quantise import Companded, LogUniform
from capgap.pipeline.store.ranking import Ranking
from capgap.schemas.errors import InputError
from capgap.schemas.records import FloatArray, IntArray, TopkTargets

FINE, COARSE = LogUniform(), Companded()

# `small` keeps the most probable ids that together hold this probability
KEPT_MASS = 0.99

# The logarithm of an unscaled tail is below this: the tail is a sum of at most 2^24 numbers of at most 1.
SHIFT_NATS = 17

# the code of a tail of 0, whose logarithm is not finite
NO_TAIL = 0xFFFF

# the code of an unknown logprob of a label, if the codec allows it
UNKNOWN_LABEL = 0xFFFF

_Values = dict[str, npt.NDArray[Any] | RaggedValues]


@dataclass(frozen=True)
class TopkShape:
    """The parameters of encoding and decoding.

    Attributes:
        profile: `lossless`, `near-lossless`, `compact` or `small`.
        seq_len: L, the number of targets in a sequence.
        top_k: K, the number of ids kept a row.
        ranking: Ranking of the ids.
        powers: Capture temperature / T for each extra temperature T.
        unknown_labels: Whether a label's logprob may be NaN, for unknown.
        was_cut: `small` keeps all ids of every row, because the rows were cut before.
    """

    profile: str
    seq_len: int
    top_k: int
    ranking: Ranking
    powers: tuple[float, ...] = ()
    unknown_labels: bool = False
    was_cut: bool = False


def topk_values(targets: TopkTargets, shape: TopkShape) -> _Values:
    """Return the values of one member's targets, by field.

    Raises:
        InputError: An id is outside the vocabulary or twice in a row, a value is NaN, a tail is no probability, or
            logprobs rise within a row.
    """
    _check(targets, shape)
    if shape.profile == "small":
        return _small_values(targets, shape)
    ranks_BLK = np.take(shape.ranking.ranks_V, targets.ids_BLK)
    flat = (len(ranks_BLK), shape.seq_len * shape.top_k)
    values: _Values = {"ids": ranks_BLK.reshape(flat)}
    if shape.profile == "lossless":
        values |= {"logprobs": _bits_of(targets.logprobs_BLK).reshape(flat), "tail": _bits_of(targets.tail_BL)}
        for number in range(len(shape.powers)):
            values[tail_name(number)] = _bits_of(targets.log_tails_BLT[..., number])
        return values | {"label": _bits_of(targets.label_logprobs_BL)}
    if shape.profile == "near-lossless":
        values["steps"] = _steps_by_rank(FINE.encode(targets.logprobs_BLK)).reshape(flat)
    else:
        values |= _quad_values(_steps_by_rank(COARSE.encode(targets.logprobs_BLK)).reshape(flat))
    return values | _fine_values(targets, targets.tail_BL, targets.log_tails_BLT, shape)


def topk_targets(values: Mapping[str, npt.NDArray[Any]], shape: TopkShape) -> TopkTargets:
    """Build the targets of one member from its values by field.

    Rows of `small` are padded to K ids with id 0 and logprob -inf.

    Raises:
        ValueError, InputError: The values are not those of a member, or contradict one another.
    """
    if shape.profile == "small":
        return _small_targets(values, shape)
    width = shape.seq_len * shape.top_k
    ids_BLK = _ids_of(values["ids"], shape).reshape(-1, shape.seq_len, shape.top_k)
    if shape.profile == "lossless":
        logprobs_BLK = values["logprobs"].view("<f4").reshape(ids_BLK.shape)
        tail_BL, labels_BL = (values[name].view("<f4") for name in ("tail", "label"))
        for name, numbers in (("logprobs", logprobs_BLK), ("tail", tail_BL), ("label", _known(labels_BL, shape))):
            check_finite(name, numbers)
        log_tails_BLT = _stacked([values[tail_name(i)].view("<f4") for i in range(len(shape.powers))], tail_BL)
        _check_log_tails(log_tails_BLT, shape)
        return TopkTargets(ids_BLK, logprobs_BLK, tail_BL, labels_BL, log_tails_BLT)
    if shape.profile == "near-lossless":
        codes_BKL = _codes_by_rank(values["steps"], shape)
        logprobs_BLK = FINE.decode(np.ascontiguousarray(codes_BKL.swapaxes(1, 2)))
    else:
        steps_BD = _unpack_sequences(values["quads"], values["escapes"], width)
        logprobs_BLK = COARSE.decode(np.ascontiguousarray(_codes_by_rank(steps_BD, shape).swapaxes(1, 2)))
    return TopkTargets(ids_BLK, logprobs_BLK, *_read_fine(values, shape))


def largest_log_tail(vocab_size: int) -> float:
    """Return an upper bound on the logarithm of an unscaled tail, in nats: a sum of `vocab_size` numbers below 1."""
    return math.log(vocab_size) + ROUNDING


def _check(targets: TopkTargets, shape: TopkShape) -> None:
    ids_BLK = targets.ids_BLK
    check_ids("ids", ids_BLK, len(shape.ranking.ids_V))
    if shape.profile == "small" and np.isneginf(targets.logprobs_BLK[:, :, -1]).any():
        is_padding_BLK = np.isneginf(targets.logprobs_BLK)
        check_logprobs("logprobs_BLK", targets.logprobs_BLK[:, :, 0])  # so the first logprob is never padding
        check_logprobs("logprobs_BLK", targets.logprobs_BLK[~is_padding_BLK])
        ids_BLK = np.where(is_padding_BLK, -1 - np.arange(shape.top_k, dtype=np.int32), ids_BLK)
    else:
        check_logprobs("logprobs_BLK", targets.logprobs_BLK)
    check_distinct("ids", ids_BLK.reshape(-1, shape.top_k))
    check_logprobs("label_logprobs_BL", _known(targets.label_logprobs_BL, shape))
    check_finite("tail_BL", targets.tail_BL)
    for worst in (targets.tail_BL.min(initial=0), targets.tail_BL.max(initial=1)):
        if not 0 <= worst <= 1 + ROUNDING:
            raise InputError("tail_BL: a tail that is no probability", found=float(worst), expected="0 to 1")
    _check_log_tails(targets.log_tails_BLT, shape)
    if (targets.logprobs_BLK[:, :, 1:] > targets.logprobs_BLK[:, :, :-1]).any():
        raise InputError("logprobs that rise within a row")


def _check_log_tails(log_tails_BLT: FloatArray, shape: TopkShape) -> None:
    if log_tails_BLT.shape[2] != len(shape.powers):
        raise InputError("log_tails_BLT: temperatures", found=log_tails_BLT.shape[2], expected=len(shape.powers))
    largest = largest_log_tail(len(shape.ranking.ids_V))
    # comparisons with NaN are false, so this refuses NaN too
    if not (log_tails_BLT <= largest).all():
        raise InputError(
            "log_tails_BLT: a value that is no logarithm of a tail",
            found=float(log_tails_BLT.max()),
            expected=f"at most {largest:.4f}",
        )


def _small_values(targets: TopkTargets, shape: TopkShape) -> _Values:
    """Keep the fewest ids of each row that hold `KEPT_MASS`, or all; rows with padding were cut before and keep all.

    Sequences are encoded one after the other, so that temporary arrays fit into the processor's cache, and every
    sequence begins a new quad.
    """
    num_kept_BL = np.empty(targets.tail_BL.shape, np.int32)
    tail_BL, log_tails_BLT = targets.tail_BL.copy(), targets.log_tails_BLT.copy()
    ranks, quads, escapes = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)], [np.zeros(0, np.uint8)]
    for sequence, (ids_LK, logprobs_LK) in enumerate(zip(targets.ids_BLK, targets.logprobs_BLK, strict=True)):
        probs_LK = np.exp(logprobs_LK)
        num_kept_BL[sequence] = _num_kept(probs_LK)
        is_whole_L = np.isneginf(logprobs_LK[:, -1]) | shape.was_cut
        if is_whole_L.any():
            num_kept_BL[sequence, is_whole_L] = np.isfinite(logprobs_LK[is_whole_L]).sum(axis=1)
        kept_LK = np.arange(shape.top_k, dtype=num_kept_BL.dtype) < num_kept_BL[sequence][:, None]
        np.copyto(probs_LK, 0, where=kept_LK)
        tail_BL[sequence] += probs_LK.sum(axis=1)
        for i, power in enumerate(shape.powers):
            dropped_LK = np.where(kept_LK, np.float32(-np.inf), logprobs_LK) * np.float32(power)
            dropped_L = np.logaddexp.reduce(dropped_LK, axis=1)
            log_tails_BLT[sequence, :, i] = np.logaddexp(log_tails_BLT[sequence, :, i], dropped_L)
        # `take` with indices takes half the time of a mask
        place_D = np.flatnonzero(kept_LK)
        ranks.append(np.take(shape.ranking.ranks_V, ids_LK.ravel().take(place_D)))
        steps_LK = COARSE.encode(logprobs_LK)
        steps_LK[:, 1:] -= steps_LK[:, :-1].copy()
        for parts, packed in zip((quads, escapes), pack_quads(steps_LK.ravel().take(place_D)), strict=True):
            parts.append(packed)
    values: _Values = {"top_k": num_kept_BL}
    values |= {"ids": _joined(ranks), "quads": _joined(quads), "escapes": _joined(escapes)}
    return values | _fine_values(targets, tail_BL, log_tails_BLT, shape)


def _small_targets(values: Mapping[str, npt.NDArray[Any]], shape: TopkShape) -> TopkTargets:
    num_kept_BL = values["top_k"].astype(np.int32)
    if num_kept_BL.size and (num_kept_BL.min() < 1 or num_kept_BL.max() > shape.top_k):
        raise ValueError(f"{num_kept_BL.min()} to {num_kept_BL.max()} ids in a row, expected 1 to {shape.top_k}")
    kept_BLK = np.arange(shape.top_k) < num_kept_BL[:, :, None]
    ids_BLK = np.zeros(kept_BLK.shape, np.int32)
    ids_D = _ids_of(values["ids"], shape)
    size = int(num_kept_BL.sum())
    if len(ids_D) != size:
        raise ValueError(f"{len(ids_D)} ids, expected {size}")
    place_D = np.flatnonzero(kept_BLK)
    ids_BLK.reshape(-1)[place_D] = ids_D
    sizes_B = num_kept_BL.sum(axis=1)
    steps_D = _unpack_ragged(values["quads"], values["escapes"], sizes_B)
    logprobs_BLK = np.full(kept_BLK.shape, -np.inf, np.float32)
    logprobs_BLK.reshape(-1)[place_D] = COARSE.decode(cumulate_runs(steps_D, num_kept_BL.ravel()))
    return TopkTargets(ids_BLK, logprobs_BLK, *_read_fine(values, shape))


def _bits_of(values: FloatArray) -> npt.NDArray[np.uint32]:
    """Return the bits of float32 values as uint32."""
    bits: npt.NDArray[np.uint32] = np.ascontiguousarray(values, "<f4").view("<u4")
    return bits


def _quad_values(steps_BD: Bytes) -> _Values:
    """Return differences [B, D] as quads and escapes; every sequence begins a new quad."""
    num_sequences, width = steps_BD.shape
    padded = steps_BD
    if width % 4:
        padded = np.zeros((num_sequences, -(-width // 4) * 4), np.uint8)
        padded[:, :width] = steps_BD
    quads, escapes = pack_quads(padded.ravel())
    escapes_B = np.count_nonzero(steps_BD >= ESCAPE, axis=1)
    return {
        "quads": quads.reshape(num_sequences, padded.shape[1] // 4),
        "escapes": RaggedValues(escapes, escapes_B),
    }


def _unpack_sequences(quads_BQ: Bytes, escapes: Bytes, width: int) -> Bytes:
    steps = unpack_quads(quads_BQ.ravel(), escapes, 4 * quads_BQ.size)
    return steps.reshape(len(quads_BQ), 4 * quads_BQ.shape[1])[:, :width]


def _unpack_ragged(quads: Bytes, escapes: Bytes, sizes_B: npt.NDArray[Any]) -> Bytes:
    """Unpack sequences of different sizes, and drop the zeros that fill up the last quad of each."""
    num_quads_B = -(-sizes_B // 4)
    steps = unpack_quads(quads, escapes, 4 * int(num_quads_B.sum()))
    ends_B = 4 * np.cumsum(num_quads_B)
    # a sequence has at most three such zeros
    filling = [place for end, more in zip(ends_B, -sizes_B % 4, strict=True) for place in range(end - more, end)]
    return np.delete(steps, np.array(filling, np.int64))


def _known(labels_BL: FloatArray, shape: TopkShape) -> FloatArray:
    """Return the labels' values that must be logprobs: all but NaN if labels may be unknown, otherwise all."""
    return labels_BL[~np.isnan(labels_BL)] if shape.unknown_labels else labels_BL


def _fine_values(targets: TopkTargets, tail_BL: FloatArray, log_tails_BLT: FloatArray, shape: TopkShape) -> _Values:
    with np.errstate(divide="ignore"):
        values: _Values = {"tail": _tail_codes(np.log(tail_BL))}
    for number in range(log_tails_BLT.shape[2]):
        values[tail_name(number)] = _tail_codes(log_tails_BLT[..., number] - np.float32(SHIFT_NATS))
    return values | {"label": _label_codes(targets.label_logprobs_BL, shape)}


def _read_fine(values: Mapping[str, npt.NDArray[Any]], shape: TopkShape) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the tails, the labels' logprobs, and the logarithms of the extra temperatures' tails."""
    tail_BL = np.exp(_tail_logs(values["tail"]))
    names = map(tail_name, range(len(shape.powers)))
    log_tails = [_tail_logs(values[name]) + np.float32(SHIFT_NATS) for name in names]
    labels_BL = FINE.decode(values["label"])
    if shape.unknown_labels:
        labels_BL[values["label"] == UNKNOWN_LABEL] = np.nan
    return tail_BL, labels_BL, _stacked(log_tails, tail_BL)


def _label_codes(labels_BL: FloatArray, shape: TopkShape) -> npt.NDArray[np.uint16]:
    if not shape.unknown_labels:
        return FINE.encode(labels_BL)
    is_unknown_BL = np.isnan(labels_BL)
    codes_BL = np.minimum(FINE.encode(np.where(is_unknown_BL, np.float32(0), labels_BL)), np.uint16(UNKNOWN_LABEL - 1))
    codes_BL[is_unknown_BL] = UNKNOWN_LABEL
    return codes_BL


def _tail_codes(logs_BL: FloatArray) -> npt.NDArray[np.uint16]:
    codes_BL = np.minimum(FINE.encode(logs_BL), np.uint16(NO_TAIL - 1))
    codes_BL[np.isneginf(logs_BL)] = NO_TAIL
    return codes_BL


def _tail_logs(codes_BL: npt.NDArray[Any]) -> FloatArray:
    logs_BL = FINE.decode(codes_BL)
    logs_BL[codes_BL == NO_TAIL] = -np.inf
    return logs_BL


def _stacked(arrays: list[FloatArray], like_BL: FloatArray) -> FloatArray:
    stacked = np.empty((*like_BL.shape, len(arrays)), np.float32)
    for number, array in enumerate(arrays):
        stacked[..., number] = array
    return stacked


def _steps_by_rank(codes_BLK: npt.NDArray[Any]) -> npt.NDArray[Any]:
    codes_BKL = np.ascontiguousarray(codes_BLK.swapaxes(1, 2))
    codes_BKL[:, 1:] -= codes_BKL[:, :-1].copy()
    return codes_BKL


def _codes_by_rank(steps_BD: npt.NDArray[Any], shape: TopkShape) -> npt.NDArray[Any]:
    codes_BKL = steps_BD.reshape(len(steps_BD), shape.top_k, shape.seq_len).copy()
    for k in range(1, shape.top_k):
        codes_BKL[:, k] += codes_BKL[:, k - 1]
    return codes_BKL


def _joined(parts: list[npt.NDArray[Any]]) -> RaggedValues:
    """Concatenate one part for each sequence; the first part in the list is empty and only gives the dtype."""
    return RaggedValues(np.concatenate(parts), np.array([len(part) for part in parts[1:]], np.int64))


def _ids_of(ranks: npt.NDArray[Any], shape: TopkShape) -> IntArray:
    check_ids("ids", ranks, len(shape.ranking.ids_V))
    ids: IntArray = np.take(shape.ranking.ids_V, ranks)
    return ids


def _num_kept(probs_LK: FloatArray) -> npt.NDArray[np.int64]:
    """Return the smallest number of ids of each row that hold `KEPT_MASS`, or the number of all ids."""
    num_kept_L = np.full(len(probs_LK), probs_LK.shape[1])
    # a cumulative sum is the slowest step, so it is left out for rows whose plain sum shows that they need all ids
    some = np.flatnonzero(probs_LK.sum(axis=1) - probs_LK[:, -1] >= KEPT_MASS - ROUNDING)
    enough = np.cumsum(probs_LK[some], axis=1) >= np.float32(KEPT_MASS)
    num_kept_L[some] = np.where(enough[:, -1], enough.argmax(axis=1) + 1, probs_LK.shape[1])
    return num_kept_L
