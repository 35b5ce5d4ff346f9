"""Rows that hold several sequences: as many whole sequences as fit, one after the other, then padding.

    L = 2048, row_len = 4096:  [ sequence | sequence ]             positions 0 .. 2047, 0 .. 2047
    L = 2048, row_len = 5000:  [ sequence | sequence | padding ]   positions 0 .. 2047, 0 .. 2047, 0 .. 903

The teacher scored each sequence without anything before it, so the student must not see the sequences before it either:
attention must not cross a place where positions restart. Then a row gives the same loss as its sequences would alone.
No sequence is ever cut. Under the context rule `document`, positions restart at each document within a sequence too.

Legend: B sequences of L targets, R rows of W targets, N = B x L, M = R x W, K ids of the widest row.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from capgap.pipeline.store.batch import IGNORED_LABEL, Batch
from capgap.schemas.errors import InputError


def sequences_per_row(row_len: int, seq_len: int) -> int:
    """Return how many whole sequences fit into a row.

    Raises:
        InputError: A row is shorter than a sequence.
    """
    if row_len < seq_len:
        raise InputError("row_len", found=row_len, expected=f"at least {seq_len}, the targets of a sequence")
    return row_len // seq_len


def in_rows(batch: Batch, row_len: int) -> Batch:
    """Arrange the sequences of a batch in rows of `row_len` targets, with positions that restart at each sequence.

    Padding has token 0, label -100, and weight 0 on every id and on the tail.
    """
    num_sequences, seq_len = batch.input_ids_BL.shape
    per_row = sequences_per_row(row_len, seq_len)
    num_rows, padding = num_sequences // per_row, row_len - per_row * seq_len
    places_W = torch.arange(row_len, device=batch.input_ids_BL.device)
    positions_BL = places_W[:seq_len].expand(num_sequences, -1) if batch.positions_BL is None else batch.positions_BL

    def rows(values: torch.Tensor, fill: int = 0) -> torch.Tensor:
        return pad(values.reshape(num_rows, per_row * seq_len), (0, padding), value=fill)

    def targets(values: torch.Tensor | None, fill: int = 0) -> torch.Tensor | None:
        if values is None or not padding:
            return values
        columns = values[0].numel() if values.dim() > 1 else 1
        wide = values.reshape(num_rows, per_row * seq_len * columns)
        return pad(wide, (0, padding * columns), value=fill).reshape(num_rows * row_len, *values.shape[1:])

    return Batch(
        rows(batch.input_ids_BL),
        rows(batch.labels_BL, IGNORED_LABEL),
        targets(batch.ids_NK),
        targets(batch.weights_NK),
        targets(batch.tail_N),
        torch.cat([rows(positions_BL)[:, : row_len - padding], places_W[:padding].expand(num_rows, -1)], 1),
        batch.num_counted,
        targets(batch.chunk_left_N, -1),
        targets(batch.chunk_logprobs_N),
        targets(batch.writer_logprobs_N),
        targets(batch.teacher_logprobs_N),
    )
