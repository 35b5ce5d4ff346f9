"""Attention that stays within each sequence or document of a packed row, and a test that a model keeps to it.

Transformers makes the masks of eager, sdpa and flex attention from positions that begin again at 0. Whether a model
respects these positions cannot be told from its signature: a model with a recurrent state takes positions too. So each
model is tested on one tiny row before a training.

Legend: B rows, L tokens a row, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, masking_utils

from capgap.pipeline.train.modes import in_evaluation
from capgap.schemas.errors import InputError

# For these, transformers makes masks from positions in batches of any number of rows. For flash attention it does so
# only in batches of one row.
_ATTENTION_THAT_ENDS = ("eager", "sdpa", "flex_attention")
# A document of a single token stands between two documents that are longer than a short convolution reaches back.
_DOCUMENT_LENGTHS = (6, 1, 7)
# Relative to the norm of the hidden states. Another order of summation changes them by up to 4e-7 in float32 (14 tiny
# models) and by a hundredth in bfloat16 after many layers. Attention to another document changes them by a third or
# more, even with fresh weights.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_OTHER_TOLERANCE = 0.05
_FIX = "make corpus and cache with corpus.context: packed, and leave train.row_len out"


def ending_attention(model: PreTrainedModel, positions_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the decoder's keyword argument that ends attention where positions begin again.

    Args:
        model: The model that is called with the argument.
        positions_BL: The position of each token within its sequence or document, int64.

    Raises:
        InputError: The model takes no positions, or its attention does not follow them.
    """
    attention = model.config._attn_implementation
    takes = "position_ids" in inspect.signature(model.base_model.forward).parameters
    if not takes or attention not in _ATTENTION_THAT_ENDS:
        raise InputError(
            "this model would look across the sequences or documents of a row",
            where=_name_of(model),
            found=f"attention {attention}" if takes else "a model without positions",
            expected=f"attention {' or '.join(_ATTENTION_THAT_ENDS)}",
            fix=_FIX,
        )
    return {"position_ids": positions_BL}


@contextmanager
def rows_are_known(positions_BL: torch.Tensor | None) -> Iterator[None]:
    """Tell transformers whether rows hold several documents, which it would otherwise read from the GPU and wait for.

    Args:
        positions_BL: The positions that `ending_attention` was given, or None where every row is one sequence.
    """
    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = (lambda _: None) if positions_BL is None else _document_numbers
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks


def _document_numbers(positions_BL: torch.Tensor) -> torch.Tensor:
    """Return the number of each token's document in its row [B, L], as transformers computes it."""
    steps_BL = torch.diff(positions_BL, prepend=positions_BL[:, :1] - 1)
    return (steps_BL != 1).cumsum(-1)


@torch.no_grad()
def require_ending_attention(model: PreTrainedModel, row_len: int) -> None:
    """Check that the model gives the documents of a packed row the hidden states that each has on its own.

    Args:
        model: The model, on any device. The check runs there, in the model's dtype.
        row_len: Number of tokens in a row of the training.

    Raises:
        InputError: The model takes no positions, or its attention reaches across documents in spite of them.
    """
    chunk = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    if chunk is not None and chunk < row_len:
        raise InputError(
            "this model cuts attention into chunks that are counted from the beginning of a row, not of a document",
            where=_name_of(model),
            found=f"attention_chunk_size = {chunk}",
            expected=f"at least {row_len}, the tokens of a row",
            fix=_FIX,
        )
    apart = _apart(model)
    tolerance = _TOLERANCE.get(model.dtype, _OTHER_TOLERANCE)
    # written with `not`, so that a NaN is refused as well
    if not apart <= tolerance:
        raise InputError(
            "this model would look across the sequences or documents of a row",
            where=_name_of(model),
            found=f"hidden states that differ by {apart:.2g} of their size from those of a document alone",
            expected=f"at most {tolerance:g}",
            fix=_FIX,
        )


def _apart(model: PreTrainedModel) -> float:
    """Return the largest relative difference between a document's hidden states in a packed row and on its own."""
    num_ids = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(num_ids, (1, length), generator=generator) for length in _DOCUMENT_LENGTHS]
    documents = [document_1L.to(model.device) for document_1L in documents]
    positions_1L = torch.cat([torch.arange(length) for length in _DOCUMENT_LENGTHS])[None].to(model.device)
    several = ending_attention(model, positions_1L)
    # The caller's autocast would round by more than the tolerance of the model's own dtype.
    with in_evaluation(model), torch.autocast(model.device.type, enabled=False):
        row_1LH = model.base_model(input_ids=torch.cat(documents, 1), use_cache=False, **several).last_hidden_state
        alone = [model.base_model(input_ids=one_1L, use_cache=False).last_hidden_state for one_1L in documents]
    parts = zip(row_1LH.split(_DOCUMENT_LENGTHS, 1), alone, strict=True)
    return max(float((found - wanted).float().norm() / wanted.float().norm()) for found, wanted in parts)


def _name_of(model: PreTrainedModel) -> str:
    return f"{model.name_or_path} ({model.config.model_type})" if model.name_or_path else model.config.model_type
