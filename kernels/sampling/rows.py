"""Sampling and top-k in a few passes over logits [N, V] on any device, without a host sync.

All results come from one softmax: the top-1 token's probability gives its logprob, and every other logprob is this one
minus the difference of the logits. Sampling accumulates the sums of blocks in float64 and then searches only the blocks
that contain a point. A CPU processes a few rows at a time, in memory that stays mapped and partly cached.

Memory in addition to the logits, except on a CPU: N x V float32; as much again at a temperature other than 1; as much
again for further temperatures, or for samples if the block size (32 to 128 at n = 50) does not divide the vocabulary;
and, for samples, twice N x n x block size float32.

Legend: N rows, V vocabulary, K ids kept, T further temperatures, n samples, G blocks of ids, D = N x n samples
of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capgap.kernels.sampling.largest import largest

_PART_ELEMENTS_CPU = 2**20  # 4 MiB of float32
_LARGEST_POINT = 1 - 2**-40  # below 1, so that rounding cannot carry a point past the last id
_MOST_PADDING = 1 / 16  # up to this share of padded columns, they are set to -inf rather than cut off
_LEAST_UNIT = 32  # the smallest number of ids that are gathered together


@dataclass(frozen=True)
class TopkRows:
    """The top-k tokens of each row.

    Attributes:
        ids_NK: Ids by falling logprob [N, K], int32; the order of equal logprobs is undefined.
        logprobs_NK: Their logprobs [N, K], float32, nats.
        tail_N: Probability of all other ids together [N], float32; exactly 0 if K = V.
        label_logprobs_N: Logprob of the label [N], float32, nats; it has the same bits as the label's entry in
            `logprobs_NK` if the label is kept, and is -inf if the label is not in the vocabulary.
        log_tails_NT: Log of the sum of p^power over all other ids, for each power [N, T], float32; -inf if K = V.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor
    label_logprobs_N: Tensor
    log_tails_NT: Tensor


@dataclass(frozen=True)
class SampledRows:
    """Systematic samples from each row.

    Attributes:
        samples_Nn: Sampled ids in ascending order, repeated if sampled more than once [N, n], int32.
        label_logprobs_N: Logprob of the label [N], float32, nats; -inf if the label is not in the vocabulary.
        top_logprobs_N: Logprob of the top-1 token [N], float32, nats; it has the same bits as the label's logprob if
            the label is this token.
    """

    samples_Nn: Tensor
    label_logprobs_N: Tensor
    top_logprobs_N: Tensor


def topk_rows(
    logits_NV: Tensor,
    labels_N: Tensor,
    top_k: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    powers: Sequence[float] = (),
) -> TopkRows:
    """Return the `top_k` most probable tokens of softmax(logits / temperature).

    The tail is the sum of the other ids' probabilities, not 1 minus the rest, so that a tail of 1e-9 keeps its digits.

    Args:
        logits_NV: Logits of any floating dtype; the softmax is computed in float32.
        labels_N: Real next tokens, of any integer dtype.
        top_k: K, at most the size of the vocabulary.
        temperature: The logits are divided by it.
        vocab_size: Columns at or past it are padding, and are overwritten if they are few; None if all are real.
        powers: temperature / T for each further temperature T for which a tail is computed; the probabilities at T are
            proportional to these powers of the probabilities at `temperature`.

    Raises:
        ValueError: Shapes, dtypes or settings do not fit together.
    """
    check_rows(logits_NV, labels_N, temperature, vocab_size)
    check_num_kept(top_k, logits_NV.shape[1] if vocab_size is None else vocab_size)
    check_powers(powers)
    rows = _empty_topk(logits_NV, top_k, len(powers))
    for part in _parts(logits_NV):
        _keep(rows, part, _softmax(logits_NV[part], temperature, vocab_size, top_k), labels_N[part], powers)
    return rows


def sampled_rows(
    logits_NV: Tensor,
    labels_N: Tensor,
    offsets_N: Tensor,
    num_samples: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> SampledRows:
    """Return `num_samples` systematic samples from softmax(logits / temperature).

    Sample j is the id at which the cumulative distribution first exceeds (j + offset) / n. An id of probability 0 is
    never sampled.

    Args:
        logits_NV: Logits of any floating dtype; the softmax is computed in float32.
        labels_N: Real next tokens, of any integer dtype.
        offsets_N: One number in [0, 1) for each row, of any floating dtype.
        num_samples: n.
        temperature: The logits are divided by it.
        vocab_size: Columns at or past it are padding, and are overwritten if they are few; None if all are real.

    Raises:
        ValueError: Shapes, dtypes or settings do not fit together.
    """
    check_rows(logits_NV, labels_N, temperature, vocab_size)
    check_samples(offsets_N, num_samples, logits_NV)
    points_Nn = _points(offsets_N, num_samples)
    rows = _empty_sampled(logits_NV, num_samples)
    for part in _parts(logits_NV):
        softmax = _softmax(logits_NV[part], temperature, vocab_size)
        _sample(rows, part, softmax, labels_N[part], points_Nn[part], vocab_size)
    return rows


def sampled_and_topk_rows(
    logits_NV: Tensor,
    labels_N: Tensor,
    offsets_N: Tensor,
    num_samples: int,
    top_k: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    powers: Sequence[float] = (),
) -> tuple[SampledRows, TopkRows]:
    """Return the results of `sampled_rows` and `topk_rows`, equal in every bit, from one softmax.

    Raises:
        ValueError: Shapes, dtypes or settings do not fit together.
    """
    check_rows(logits_NV, labels_N, temperature, vocab_size)
    check_samples(offsets_N, num_samples, logits_NV)
    check_num_kept(top_k, logits_NV.shape[1] if vocab_size is None else vocab_size)
    check_powers(powers)
    points_Nn = _points(offsets_N, num_samples)
    sampled, kept = _empty_sampled(logits_NV, num_samples), _empty_topk(logits_NV, top_k, len(powers))
    for part in _parts(logits_NV):
        softmax = _softmax(logits_NV[part], temperature, vocab_size, top_k)
        _sample(sampled, part, softmax, labels_N[part], points_Nn[part], vocab_size)
        _keep(kept, part, softmax, labels_N[part], powers)
    return sampled, kept


def check_rows(logits_NV: Tensor, labels_N: Tensor, temperature: float, vocab_size: int | None) -> None:
    """Raise ValueError if the arguments that sampling and top-k share do not fit together."""
    if logits_NV.dim() != 2 or logits_NV.shape[1] == 0 or not logits_NV.is_floating_point():
        raise ValueError(f"logits_NV: got {list(logits_NV.shape)} {logits_NV.dtype}, expected [N, V] of a float dtype")
    if labels_N.shape != logits_NV.shape[:1] or labels_N.is_floating_point() or labels_N.device != logits_NV.device:
        raise ValueError(
            f"labels_N: got {list(labels_N.shape)} {labels_N.dtype} on {labels_N.device}, "
            f"expected [{logits_NV.shape[0]}] of an integer dtype on {logits_NV.device}"
        )
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature}, expected a finite number above 0")
    if vocab_size is not None and not 1 <= vocab_size <= logits_NV.shape[1]:
        raise ValueError(f"vocab_size: got {vocab_size}, expected 1 to {logits_NV.shape[1]}, the columns of logits_NV")


def check_num_kept(top_k: int, vocab_size: int) -> None:
    """Raise ValueError unless `top_k` is between 1 and the vocabulary's size."""
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k: got {top_k}, expected 1 to {vocab_size}, the vocabulary")


def check_powers(powers: Sequence[float]) -> None:
    """Raise ValueError if a power is not a finite number above 0."""
    for power in powers:
        if not 0.0 < power < float("inf"):
            raise ValueError(f"powers: got {power}, expected finite numbers above 0")


def check_samples(offsets_N: Tensor, num_samples: int, logits_NV: Tensor) -> None:
    """Raise ValueError if the offsets do not fit the rows, or `num_samples` is below 1."""
    if offsets_N.shape != logits_NV.shape[:1] or not offsets_N.is_floating_point():
        raise ValueError(
            f"offsets_N: got {list(offsets_N.shape)} {offsets_N.dtype}, "
            f"expected [{logits_NV.shape[0]}] of a floating dtype"
        )
    if offsets_N.device != logits_NV.device:
        raise ValueError(f"offsets_N: got {offsets_N.device}, expected {logits_NV.device}")
    if num_samples < 1:
        raise ValueError(f"num_samples: got {num_samples}, expected at least 1")


def _parts(logits_NV: Tensor) -> Iterator[slice]:
    """Yield slices of the rows: all rows at once, or a few at a time on a CPU."""
    num_rows = max(1, len(logits_NV))
    if logits_NV.device.type == "cpu":
        num_rows = max(1, _PART_ELEMENTS_CPU // logits_NV.shape[1])
    return (slice(start, start + num_rows) for start in range(0, len(logits_NV), num_rows))


def _empty_topk(logits_NV: Tensor, top_k: int, num_powers: int) -> TopkRows:
    num_rows = len(logits_NV)
    return TopkRows(
        logits_NV.new_empty((num_rows, top_k), dtype=torch.int32),
        logits_NV.new_empty((num_rows, top_k), dtype=torch.float32),
        logits_NV.new_empty(num_rows, dtype=torch.float32),
        logits_NV.new_empty(num_rows, dtype=torch.float32),
        logits_NV.new_empty((num_rows, num_powers), dtype=torch.float32),
    )


def _empty_sampled(logits_NV: Tensor, num_samples: int) -> SampledRows:
    num_rows = len(logits_NV)
    return SampledRows(
        logits_NV.new_empty((num_rows, num_samples), dtype=torch.int32),
        logits_NV.new_empty(num_rows, dtype=torch.float32),
        logits_NV.new_empty(num_rows, dtype=torch.float32),
    )


def _points(offsets_N: Tensor, num_samples: int) -> Tensor:
    steps_n = torch.arange(num_samples, dtype=torch.float64, device=offsets_N.device)
    return ((steps_n + offsets_N.double()[:, None]) / num_samples).clamp_(0, _LARGEST_POINT)


@dataclass(frozen=True)
class _Softmax:
    """Scaled logits, probabilities in float32, logit and logprob of the top-1 token, and, if asked for, the top k."""

    scaled_NV: Tensor
    probs_NV: Tensor
    top_N1: Tensor
    top_logprob_N1: Tensor
    kept_NK: Tensor
    ids_NK: Tensor

    def logprobs(self, scaled: Tensor) -> Tensor:
        """Return the logprobs of some scaled logits; in one row, equal logits give equal bits in every call."""
        return scaled.float() - self.top_N1 + self.top_logprob_N1


def _softmax(logits_NV: Tensor, temperature: float, vocab_size: int | None, top_k: int = 0) -> _Softmax:
    """Return the softmax of the real ids; at temperature 1, the scaled logits are not copied."""
    logits_NV = _without_padding(logits_NV, vocab_size)
    if temperature != 1.0:
        logits_NV = logits_NV.float() / temperature
    probs_NV = torch.softmax(logits_NV, -1, dtype=torch.float32)
    kept_NK, ids_NK = largest(logits_NV, top_k) if top_k else (logits_NV[:, :0], logits_NV[:, :0])
    top_N1 = kept_NK[:, :1] if top_k else logits_NV.amax(-1, keepdim=True)
    top_prob_N1 = probs_NV.gather(-1, ids_NK[:, :1]) if top_k else probs_NV.amax(-1, keepdim=True)
    return _Softmax(logits_NV, probs_NV, top_N1.float(), top_prob_N1.log(), kept_NK, ids_NK)


def _without_padding(logits_NV: Tensor, vocab_size: int | None) -> Tensor:
    """Remove the padded columns, or set them to -inf if they are few, because a slice would be copied later."""
    num_columns = logits_NV.shape[1]
    if vocab_size is None or vocab_size == num_columns:
        return logits_NV
    if num_columns - vocab_size > _MOST_PADDING * num_columns:
        return logits_NV[:, :vocab_size]
    logits_NV[:, vocab_size:] = float("-inf")
    return logits_NV


def _sample(
    rows: SampledRows,
    part: slice,
    softmax: _Softmax,
    labels_N: Tensor,
    points_Nn: Tensor,
    vocab_size: int | None,
) -> None:
    """Write the samples of a part of the rows into `rows`."""
    rows.label_logprobs_N[part] = _at_label(softmax, labels_N)
    rows.top_logprobs_N[part] = softmax.top_logprob_N1[:, 0]
    rows.samples_Nn[part] = _inverse_cdf(softmax.probs_NV, points_Nn, vocab_size or softmax.probs_NV.shape[1])


def _keep(rows: TopkRows, part: slice, softmax: _Softmax, labels_N: Tensor, powers: Sequence[float]) -> None:
    """Write the top-k tokens of a part of the rows into `rows`, and overwrite the probabilities."""
    rows.label_logprobs_N[part] = _at_label(softmax, labels_N)
    rows.logprobs_NK[part] = softmax.logprobs(softmax.kept_NK)
    rows.ids_NK[part] = softmax.ids_NK
    rows.tail_N[part] = softmax.probs_NV.scatter_(-1, softmax.ids_NK, 0.0).sum(-1)
    if powers:
        rows.log_tails_NT[part] = _log_tails(softmax, powers)


def _log_tails(softmax: _Softmax, powers: Sequence[float]) -> Tensor:
    """Return the log of the sum of p^power over all ids that are not kept, for each power [N, T].

    It is computed from the logits, because a probability that is 0 in float32 may have a root that is not. It
    overwrites the probabilities and needs as much memory again.
    """
    others_NV = torch.sub(softmax.scaled_NV, softmax.top_N1, out=softmax.probs_NV)
    others_NV.scatter_(-1, softmax.ids_NK, float("-inf"))
    largest_N1 = others_NV.amax(-1, keepdim=True)
    # if all ids are kept, the largest is -inf, and -inf minus -inf would be NaN
    others_NV.sub_(largest_N1.clamp(min=torch.finfo(torch.float32).min))
    largest_N = (largest_N1 + softmax.top_logprob_N1)[:, 0]
    return torch.stack([power * largest_N + (others_NV * power).exp_().sum(-1).log_() for power in powers], dim=1)


def _at_label(softmax: _Softmax, labels_N: Tensor) -> Tensor:
    labels_N = labels_N.long()
    known_N = (labels_N >= 0) & (labels_N < softmax.scaled_NV.shape[1])
    at_label_N1 = softmax.scaled_NV.gather(-1, labels_N.where(known_N, 0)[:, None])
    return softmax.logprobs(at_label_N1)[:, 0].where(known_N, float("-inf"))


def _inverse_cdf(probs_NV: Tensor, points_Nn: Tensor, vocab_size: int) -> Tensor:
    """Return the ids at points in [0, 1) of the cumulative distribution, int32 [N, n], in the order of the points.

    Columns at or past `vocab_size`, if there are any, must have probability 0; they fill up the last block.
    """
    num_rows, num_columns = probs_NV.shape
    size = _block_size(vocab_size, points_Nn.shape[1])
    num_blocks = -(-vocab_size // size)
    # blocks are gathered in units whose size divides both a row and a block
    unit = math.gcd(num_columns, size)
    if num_columns < num_blocks * size or unit < min(size, _LEAST_UNIT):
        probs_NV = nn.functional.pad(probs_NV[:, :vocab_size], (0, num_blocks * size - vocab_size))
        num_columns, unit = num_blocks * size, size
    ends_NG = probs_NV[:, : num_blocks * size].view(num_rows, num_blocks, size).sum(-1).cumsum(-1, dtype=torch.float64)
    points_Nn = points_Nn * ends_NG[:, -1:]
    block_Nn = torch.searchsorted(ends_NG, points_Nn, right=True).clamp_(max=num_blocks - 1)
    begins_NG = nn.functional.pad(ends_NG, (1, 0))
    left_Nn = (points_Nn - begins_NG.gather(1, block_Nn)).float()

    first_N1 = torch.arange(num_rows, device=probs_NV.device)[:, None] * (num_columns // unit)
    units_D1 = (first_N1 + block_Nn * (size // unit)).view(-1, 1)
    if unit < size:
        units_D1 = units_D1 + torch.arange(size // unit, device=probs_NV.device)
    inside_D = probs_NV.view(-1, unit).index_select(0, units_D1.view(-1)).view(-1, size).cumsum(-1)
    # rounding may move a point to the block's end or past it, where no id has a probability above 0
    largest_D1 = torch.nextafter(inside_D[:, -1:], inside_D.new_zeros(()))
    # count the ids whose interval ends at or before the point; this is faster than a search in every block
    within_D = inside_D.le_(torch.minimum(left_Nn.view(-1, 1), largest_D1)).sum(-1)
    return (block_Nn * size + within_D.view_as(block_Nn).long()).to(torch.int32)


def _block_size(vocab_size: int, num_samples: int) -> int:
    """Return the number of ids in a block, a power of two that balances V / size block sums and n x size ids inside.

    It is 32, 64 and 128 for V = 4096, 32000 and 128256 at n = 50, the fastest sizes as measured on a CPU.
    """
    return 1 << max(3, round(math.log2(3 * math.sqrt(vocab_size / num_samples))))
