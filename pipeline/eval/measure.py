"""Scores sequences with one model.

Legend: P parts of a batch, m targets of a part, M targets of the longest part, S sequences, L targets per sequence, N
labelled positions, V real vocabulary.

A part is a sequence or, under the context rule `document`, one document of a sequence. Each part is a row of its own,
so that no architecture sees across documents. The padding after a part changes none of its logits in a causal model.

Only real ids are scored: padded rows of the head are cut off before the softmax. The head sums in float32 even where
the model is bfloat16, as in the cache stage, because bfloat16 logits would change many top-1 ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from capgap.pipeline.eval.calibration import CalibrationError
from capgap.pipeline.models.head_product import sum_head_in_float32
from capgap.pipeline.stage.progress import Meter
from capgap.schemas.errors import InputError
from capgap.schemas.records import Sequences
from capgap.schemas.run_corpus import ContextRule

Visit = Callable[[torch.Tensor], None]

_CHUNK_ROWS = 1024


def score(
    model: nn.Module,
    sequences: Sequences,
    *,
    name: str,
    vocab_size: int,
    batch_sequences: int,
    context: ContextRule = "packed",
    visit: Visit | None = None,
    num_visited: int = 0,
    calibration: CalibrationError | None = None,
    meter: Meter | None = None,
) -> npt.NDArray[np.float64]:
    """Return the loss of every sequence, summed over its labels.

    Args:
        model: A causal LM of Hugging Face's interface, on its device and in eval mode.
        sequences: The sequences that are scored; a label is a token after the first whose mask is True.
        name: Name of the model, for errors.
        vocab_size: Number of real ids; columns of the logits at or past it are ignored.
        batch_sequences: Number of sequences in one forward pass; under `document`, as many documents as have no more
            tokens than that.
        context: The context rule: whether the model sees the whole sequence or only a token's document.
        visit: Called with the float32 logprobs [n, V] of the labelled positions of the first `num_visited` sequences,
            in order, some positions at a time.
        num_visited: Number of sequences that `visit` is called for.
        calibration: Counts every labelled position.
        meter: Counts sequences and tokens.

    Returns:
        Nats [S], float64; 0 for a sequence without labels.

    Raises:
        InputError: A loss is NaN or infinite.
    """
    sum_head_in_float32(model)
    nats_S = np.zeros(len(sequences), np.float64)
    most_tokens = batch_sequences * (sequences.tokens_BL1.shape[1] - 1)
    for parts in _batches(_parts(sequences, context), most_tokens):
        with torch.inference_mode():
            logits_PMV = model(input_ids=_tokens(sequences, parts, model), use_cache=False).logits[..., :vocab_size]
            for part, logits_MV in zip(parts, logits_PMV, strict=True):
                visit_one = visit if part.sequence < num_visited else None
                nats_S[part.sequence] += _score_one(logits_MV[: len(part)], sequences, part, visit_one, calibration)
        first, last = parts[0].sequence, parts[-1].sequence + 1
        _check(nats_S[first:last], name, first)
        if meter is not None:
            ended = sum(part.stop == sequences.tokens_BL1.shape[1] - 1 for part in parts)
            meter.advance(ended, sum(map(len, parts)), name)
    return nats_S


@dataclass(frozen=True)
class _Part:
    """The targets `start` to `stop` of a sequence, which are scored in a row of their own."""

    sequence: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def _parts(sequences: Sequences, context: ContextRule) -> Iterator[_Part]:
    """Yield the parts in the order of the tokens.

    A document that began in an earlier sequence is scored without its earlier tokens.
    """
    length = sequences.tokens_BL1.shape[1] - 1
    for sequence, starts_L1 in enumerate(sequences.starts_BL1):
        firsts = np.flatnonzero(starts_L1[1:length]) + 1 if context == "document" else ()
        for start, stop in pairwise((0, *map(int, firsts), length)):
            yield _Part(sequence, start, stop)


def _batches(parts: Iterable[_Part], most_tokens: int) -> Iterator[list[_Part]]:
    """Yield batches of parts with at most `most_tokens` tokens, padding included, but of at least one part."""
    batch: list[_Part] = []
    for part in parts:
        longest = max(map(len, (*batch, part)))
        if batch and longest * (len(batch) + 1) > most_tokens:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def _tokens(sequences: Sequences, parts: list[_Part], model: nn.Module) -> torch.Tensor:
    tokens_PM = torch.zeros((len(parts), max(map(len, parts))), dtype=torch.int64)
    for row_M, part in zip(tokens_PM, parts, strict=True):
        row_M[: len(part)] = torch.from_numpy(sequences.tokens_BL1[part.sequence, part.start : part.stop])
    return tokens_PM.to(next(model.parameters()).device)


def _score_one(
    logits_mV: torch.Tensor,
    sequences: Sequences,
    part: _Part,
    visit: Visit | None,
    calibration: CalibrationError | None,
) -> float:
    next_tokens = slice(part.start + 1, part.stop + 1)
    labels_m = torch.from_numpy(sequences.tokens_BL1[part.sequence, next_tokens]).long().to(logits_mV.device)
    positions_N = torch.from_numpy(np.flatnonzero(sequences.mask_BL1[part.sequence, next_tokens])).to(logits_mV.device)
    nats = 0.0
    for start in range(0, len(positions_N), _CHUNK_ROWS):
        chunk_N = positions_N[start : start + _CHUNK_ROWS]
        logprobs_NV = logits_mV[chunk_N].float().log_softmax(-1)
        nats -= float(logprobs_NV.gather(1, labels_m[chunk_N, None]).sum(dtype=torch.float64))
        if calibration is not None:
            calibration.add(part.sequence, logprobs_NV, labels_m[chunk_N])
        if visit is not None:
            visit(logprobs_NV)
    return nats


def _check(nats_B: npt.NDArray[np.float64], name: str, start: int) -> None:
    if np.isfinite(nats_B).all():
        return
    worst = int(np.argmin(np.isfinite(nats_B)))
    raise InputError(
        f"the loss of held-out sequence {start + worst} is not a number",
        where=name,
        found=nats_B[worst],
        fix="the weights are broken: train again with a lower learning_rate or in a wider precision",
    )
