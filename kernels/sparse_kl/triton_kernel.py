# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls, no-check-untyped-defs
"""The program of the Triton rows kernel, which turns one row of logits into its gradient. README.md derives it.

    load the logits of the kept ids and of the label, and store -inf in their places and past the vocabulary
    pass 1   read the row: the largest logit and the sums of exp over all other ids
             compute the K + 1 cells in registers: divergence, cross-entropy, the cells' gradients
    pass 2   read and write the row: each other id gets its share of the gradient of its cell
             store the gradients of the kept ids and of the label, each once

All arithmetic is in float32, whatever the dtype of the logits. Each lane keeps its own sums until the row ends, so that
no step of a pass waits for another thread. There are no atomics, so the same input gives the same bits.

Legend: names with _T are at the temperature, names with _1 at temperature 1. `kept_` tensors have one value for each of
K ids, and `lane_` tensors one for each load of LOAD_V columns; all other values are scalars.
"""

from __future__ import annotations

import triton
import triton.language as tl

from capgap.kernels.sparse_kl.divergence import LOWEST_LOGPROB

_NEVER = tl.constexpr(float("-inf"))
_LOWEST = tl.constexpr(-1.0e38)  # below any logit, but finite, so that its difference to -inf is not NaN
_LOG2E = tl.constexpr(1.4426950408889634)  # a GPU computes exp with exp2
_LOWEST_LOGPROB = tl.constexpr(LOWEST_LOGPROB)


@triton.jit
def sparse_rows(
    logits_ptr,
    row_stride,
    ids_ptr,
    p_ptr,
    p_tail_ptr,
    labels_ptr,
    ckl_ptr,
    cce_ptr,
    divergence_ptr,
    ce_ptr,
    vocab_size,
    num_columns,
    top_k,
    inverse_temperature,
    beta,
    softcap,
    DIVERGENCE: tl.constexpr,
    TEMPERED: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    LOAD_V: tl.constexpr,
):
    """Process one row; `rows.py` describes the arguments.

    `row_stride` and `num_columns` are multiples of 16. Masks compare with `num_columns` rather than with the size of
    the vocabulary, so that loads stay 128 bits wide even if that size is odd.
    """
    # cast because a compiler may pass Python numbers as float64
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    beta = tl.cast(beta, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    row = tl.program_id(0).to(tl.int64)  # 64 bits because row * row_stride may exceed 2^31
    logits_ptr += row * row_stride
    columns = tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_K)

    p = tl.load(p_ptr + row * top_k + k, mask=k < top_k, other=0.0)
    ids = tl.load(ids_ptr + row * top_k + k, mask=k < top_k, other=0)
    kept = p > 0.0
    label = tl.load(labels_ptr + row).to(tl.int32)
    kept_logits, kept_slope = _capped(
        tl.load(logits_ptr + ids, mask=kept, other=_NEVER).to(tl.float32), softcap, CAPPED
    )
    label_logit, label_slope = _capped(tl.load(logits_ptr + label).to(tl.float32), softcap, CAPPED)
    is_label = kept & (ids == label)
    label_is_kept = tl.max(is_label.to(tl.int32), axis=0) > 0
    tl.debug_barrier()
    tl.store(logits_ptr + ids, tl.full([BLOCK_K], _NEVER, tl.float32).to(logits_ptr.dtype.element_ty), mask=kept)
    tl.store(logits_ptr + label, tl.cast(_NEVER, tl.float32).to(logits_ptr.dtype.element_ty))
    rest = vocab_size + tl.arange(0, BLOCK_REST)
    nothing = tl.full([BLOCK_REST], _NEVER, tl.float32).to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + rest, nothing, mask=rest < num_columns)
    tl.debug_barrier()

    lane_largest = tl.full([BLOCK_V // LOAD_V], _LOWEST, tl.float32)
    lane_sum_1 = tl.zeros([BLOCK_V // LOAD_V], tl.float32)
    lane_sum_T = tl.zeros([BLOCK_V // LOAD_V], tl.float32)
    for start in range(0, num_columns, BLOCK_V):
        column = start + columns
        raw = tl.load(logits_ptr + column, mask=column < num_columns, other=_NEVER).to(tl.float32)
        logits, _ = _capped(raw, softcap, CAPPED)
        # the columns of one load belong to one thread and share one running maximum
        loaded = tl.reshape(logits, [BLOCK_V // LOAD_V, LOAD_V])
        raised = tl.maximum(lane_largest, tl.max(loaded, axis=1))
        rise = (lane_largest - raised) * _LOG2E
        distance = (loaded - raised[:, None]) * _LOG2E
        lane_sum_1 = lane_sum_1 * tl.exp2(rise) + tl.sum(tl.exp2(distance), axis=1)
        if TEMPERED:
            lane_sum_T *= tl.exp2(rise * inverse_temperature)
            lane_sum_T += tl.sum(tl.exp2(distance * inverse_temperature), axis=1)
        lane_largest = raised
    largest = tl.max(lane_largest, axis=0)
    lane_distance = (lane_largest - largest) * _LOG2E
    sum_1 = tl.sum(lane_sum_1 * tl.exp2(lane_distance), axis=0)
    sum_T = sum_1
    if TEMPERED:
        sum_T = tl.sum(lane_sum_T * tl.exp2(lane_distance * inverse_temperature), axis=0)

    # if the label is not kept, it is one of the other ids and is added to their sums
    largest_unlabelled = largest
    unlabelled_1 = sum_1
    label_at_rest = tl.where(label_is_kept, _NEVER, label_logit)
    largest = tl.maximum(largest_unlabelled, label_at_rest)
    sum_1 = unlabelled_1 * tl.exp(largest_unlabelled - largest) + tl.exp(label_at_rest - largest)
    if TEMPERED:
        sum_T *= tl.exp((largest_unlabelled - largest) * inverse_temperature)
        sum_T += tl.exp((label_at_rest - largest) * inverse_temperature)
    else:
        sum_T = sum_1

    # the softmax at 1 and at T, relative to the largest of all logits
    top = tl.maximum(largest, tl.max(kept_logits, axis=0))
    exp_rest_1 = tl.exp(largest - top)
    exp_kept_1 = tl.exp(kept_logits - top)
    total_1 = sum_1 * exp_rest_1 + tl.sum(exp_kept_1, axis=0)
    exp_kept_T = exp_kept_1
    total_T = total_1
    if TEMPERED:
        exp_kept_T = tl.exp((kept_logits - top) * inverse_temperature)
        total_T = sum_T * tl.exp((largest - top) * inverse_temperature) + tl.sum(exp_kept_T, axis=0)
    tl.store(ce_ptr + row, tl.log(total_1) - (label_logit - top))

    has_rest = sum_1 != 0.0  # a sum of NaN counts as present and makes the results NaN
    sum_1 = tl.where(has_rest, sum_1, 1.0)  # avoids a division by 0
    sum_T = tl.where(has_rest, sum_T, 1.0)
    log_total = tl.log(total_T)
    logq = tl.where(kept, (kept_logits - top) * inverse_temperature - log_total, 0.0)
    q = exp_kept_T / total_T
    logq_tail = tl.where(has_rest, (largest - top) * inverse_temperature + tl.log(sum_T) - log_total, 0.0)
    q_tail = tl.where(has_rest, tl.exp(logq_tail), 0.0)
    p_tail = tl.where(has_rest, tl.load(p_tail_ptr + row), 0.0)
    value, grad, grad_tail = _coarse(logq, q, logq_tail, q_tail, p, p_tail, beta, DIVERGENCE)
    tl.store(divergence_ptr + row, value)

    if GRADIENT:
        ckl = tl.load(ckl_ptr + row)
        cce = tl.load(cce_ptr + row)
        rest_T = ckl * grad_tail / sum_T
        rest_1 = cce * exp_rest_1 / total_1
        for start in range(0, num_columns, BLOCK_V):
            column = start + columns
            raw = tl.load(logits_ptr + column, mask=column < num_columns, other=_NEVER).to(tl.float32)
            logits, slope = _capped(raw, softcap, CAPPED)
            d_logits = _rest_gradient(logits, largest, rest_T, rest_1, inverse_temperature, TEMPERED) * slope
            tl.store(logits_ptr + column, d_logits.to(logits_ptr.dtype.element_ty), mask=column < num_columns)
        # 1 - q of the label is summed from the other ids, because 1 - q would round away a confident label's gradient
        unlabelled_1 *= tl.exp(largest_unlabelled - top)
        unlabelled_1 = (unlabelled_1 + tl.sum(tl.where(is_label, 0.0, exp_kept_1), axis=0)) / total_1
        d_kept = ckl * grad + cce * tl.where(is_label, -unlabelled_1, exp_kept_1 / total_1)
        d_label = rest_T * tl.exp((label_logit - largest) * inverse_temperature) - cce * unlabelled_1
        tl.debug_barrier()
        tl.store(logits_ptr + ids, (d_kept * kept_slope).to(logits_ptr.dtype.element_ty), mask=kept)
        tl.store(logits_ptr + label, (d_label * label_slope).to(logits_ptr.dtype.element_ty), mask=label_is_kept == 0)


@triton.jit
def _capped(raw, softcap, CAPPED: tl.constexpr):
    """Return the softcapped logits and their slope; -inf stays -inf. tanh is computed with exp on every backend."""
    logits = raw
    slope = 1.0
    if CAPPED:
        small = tl.exp(-2.0 * tl.abs(raw) / softcap)
        inverse = 1.0 / (1.0 + small)
        tanh = (1.0 - small) * inverse
        logits = tl.where(raw == _NEVER, _NEVER, softcap * tl.where(raw < 0.0, -tanh, tanh))
        slope = 4.0 * small * inverse * inverse
    return logits, slope


@triton.jit
def _rest_gradient(logits, largest, rest_T, rest_1, inverse_temperature, TEMPERED: tl.constexpr):
    """Return the gradient of ids that are not kept; it is 0 where the logit is -inf."""
    distance = (logits - largest) * _LOG2E
    if TEMPERED:
        gradient = rest_T * tl.exp2(distance * inverse_temperature) + rest_1 * tl.exp2(distance)
    else:
        gradient = (rest_T + rest_1) * tl.exp2(distance)
    return gradient


@triton.jit
def _coarse(logq, q, logq_tail, q_tail, p, p_tail, beta, DIVERGENCE: tl.constexpr):
    """Return the divergence of K + 1 cells, and its gradients by the cells' logits, as `divergence.coarse` does."""
    logp = tl.log(tl.where(p > 0.0, p, 1.0))
    logp_tail = tl.log(tl.where(p_tail > 0.0, p_tail, 1.0))
    if DIVERGENCE == "forward_kl":
        mass = tl.sum(p, axis=0) + p_tail
        value = tl.sum(p * (logp - logq), axis=0) + p_tail * (logp_tail - logq_tail)
        grad = q * mass - p
        grad_tail = q_tail * mass - p_tail
    else:
        if DIVERGENCE == "reverse_kl":
            logp_tail = tl.where(p_tail > 0.0, logp_tail, _LOWEST_LOGPROB)
            slope = tl.where(q > 0.0, logq - tl.maximum(logp, _LOWEST_LOGPROB), 0.0)
            slope_tail = tl.where(q_tail > 0.0, logq_tail - tl.maximum(logp_tail, _LOWEST_LOGPROB), 0.0)
            value = 0.0
        else:
            mixture = beta * p + (1.0 - beta) * q
            mixture_tail = beta * p_tail + (1.0 - beta) * q_tail
            logm = tl.log(tl.where(mixture > 0.0, mixture, 1.0))
            logm_tail = tl.log(tl.where(mixture_tail > 0.0, mixture_tail, 1.0))
            slope = tl.where(q > 0.0, (1.0 - beta) * (logq - logm), 0.0)
            slope_tail = tl.where(q_tail > 0.0, (1.0 - beta) * (logq_tail - logm_tail), 0.0)
            value = beta * (tl.sum(p * (logp - logm), axis=0) + p_tail * (logp_tail - logm_tail))
        mean = tl.sum(q * slope, axis=0) + q_tail * slope_tail
        value += mean
        grad = q * (slope - mean)
        grad_tail = q_tail * (slope_tail - mean)
    return value, grad, grad_tail
