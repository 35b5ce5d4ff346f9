"""Scores sequences with one model.

Legend: B sequences of a batch, S sequences, L targets a sequence, N labelled positions, V real vocabulary.

Only real ids take part: a padded row of the head is cut off before the softmax. The head computes in float32 even where
the model is bfloat16, as it does in the cache; bfloat16 logits alone would change many a top id.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from capgap.pipeline.progress import Meter
from capgap.schemas.errors import InputError
from capgap.schemas.records import Sequences

Visit = Callable[[torch.Tensor], None]

_CHUNK_ROWS = 1024


def score(
    model: nn.Module,
    sequences: Sequences,
    *,
    name: str,
    vocab_size: int,
    batch_sequences: int,
    visit: Visit | None = None,
    num_visited: int = 0,
    meter: Meter | None = None,
) -> npt.NDArray[np.float64]:
    """Loss of every sequence, summed over its labels.

    Args:
        model: a causal LM of Hugging Face's interface, on its device and in eval mode.
        sequences: what is scored; a label is a token after the first whose mask is True.
        name: of the model, for errors.
        vocab_size: real ids; columns of the logits at or past it are ignored.
        batch_sequences: sequences in one forward pass.
        visit: called with the float32 logprobs [n, V] of the labelled positions of the first `num_visited` sequences,
            in order, some at a time.
        num_visited: see `visit`.
        meter: counts sequences and tokens.

    Returns:
        Nats [S], float64; 0 for a sequence without labels.

    Raises:
        InputError: a loss is NaN or infinite.
    """
    compute_head_in_float32(model)
    device = next(model.parameters()).device
    nats_S = np.zeros(len(sequences), np.float64)
    for start in range(0, len(sequences), batch_sequences):
        tokens_BL1 = torch.from_numpy(sequences.tokens_BL1[start : start + batch_sequences]).long().to(device)
        mask_BL1 = torch.from_numpy(sequences.mask_BL1[start : start + batch_sequences]).to(device)
        with torch.inference_mode():
            logits_BLV = model(input_ids=tokens_BL1[:, :-1], use_cache=False).logits[..., :vocab_size]
            for i in range(len(tokens_BL1)):
                visit_one = visit if start + i < num_visited else None
                nats_S[start + i] = _score_one(logits_BLV[i], tokens_BL1[i, 1:], mask_BL1[i, 1:], visit_one)
        _check(nats_S[start : start + batch_sequences], name, start)
        if meter is not None:
            meter.advance(len(tokens_BL1), tokens_BL1[:, 1:].numel(), name)
    return nats_S


def compute_head_in_float32(model: nn.Module) -> None:
    """Give the output head weights of its own in float32; an embedding tied to it keeps its own."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or head.weight.dtype == torch.float32:
        return
    head.weight = nn.Parameter(head.weight.detach().float(), requires_grad=False)
    if getattr(head, "bias", None) is not None:
        head.bias = nn.Parameter(head.bias.detach().float(), requires_grad=False)
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def _score_one(logits_LV: torch.Tensor, labels_L: torch.Tensor, mask_L: torch.Tensor, visit: Visit | None) -> float:
    positions_N = mask_L.nonzero().squeeze(1)
    nats = 0.0
    for start in range(0, len(positions_N), _CHUNK_ROWS):
        chunk_N = positions_N[start : start + _CHUNK_ROWS]
        logprobs_NV = logits_LV[chunk_N].float().log_softmax(-1)
        nats -= float(logprobs_NV.gather(1, labels_L[chunk_N, None]).sum(dtype=torch.float64))
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
