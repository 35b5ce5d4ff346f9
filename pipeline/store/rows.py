"""Rows longer than a sequence: as many whole sequences as fit, one after the other, and padding behind them.

    L = 2048, row_len = 4096:  [ sequence | sequence ]             positions 0 .. 2047, 0 .. 2047
    L = 2048, row_len = 5000:  [ sequence | sequence | padding ]   positions 0 .. 2047, 0 .. 2047, 0 .. 903

The teacher scored each sequence from its first token on and saw nothing before it, so the student must not either: its
attention ends where positions begin anew, and then a row gives the loss of its sequences. No sequence is ever cut.
Under the context rule `document` they begin anew at each document within the sequences too.

Legend: B sequences of L targets, R rows of W targets, N = B x L, M = R x W, K ids of the widest row.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from capgap.pipeline.store.batch import IGNORED_LABEL, Batch
from capgap.schemas.errors import InputError


def sequences_per_row(row_len: int, seq_len: int) -> int:
    """How many whole sequences fit into a row.

    Raises:
        InputError: not even one.
    """
    if row_len < seq_len:
        raise InputError("row_len", found=row_len, expected=f"at least {seq_len}, the targets of a sequence")
    return row_len // seq_len


def in_rows(batch: Batch, row_len: int) -> Batch:
    """The same sequences and targets as rows of `row_len`, with positions [R, W] that begin anew at each sequence.

    Padding has token 0, label -100, and no weight on any id or on the tail.
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
