"""A micro-batch as torch tensors, with the targets of its rows padded to the widest row.

Legend: B sequences, L targets a sequence, N = B x L rows, K ids of the widest row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capgap.pipeline.store.chunks import left_in_chunk, padded_rows
from capgap.schemas.records import (
    ChunkTargets,
    ProjectedTargets,
    SampledTargets,
    Sequences,
    Targets,
    TopkTargets,
)
from capgap.schemas.run_corpus import ContextRule

IGNORED_LABEL = -100


class Batch:
    """The tensors that one micro-batch of training reads.

    This is not a dataclass: Lightning would convert its fields and round the teacher's probabilities to the precision
    of the training.

    Attributes:
        input_ids_BL: First L tokens of each sequence [B, L], int64.
        labels_BL: The token after each input token [B, L], int64; -100 where the loss ignores it.
        ids_NK: Kept ids of each row [N, K], int64; padding has weight 0. None without targets.
        weights_NK: The teacher's probabilities of `ids_NK` [N, K], float32.
        tail_N: Probability of all other ids [N], float32; None if the recording has no tail. In a cache that `align`
            made, ids, weights and tail are projected targets, and are all 0 in a row without one.
        positions_BL: Position of each token in its sequence or document [B, L], int64, if a row holds several of them
            or padding; attention must not cross a place where positions restart. None if a row is one whole sequence.
        num_counted: Number of labels that are not -100, if the host knows it; this saves counting them on the device.
        chunk_left_N: Number of rows of the same chunk that follow each row [N], int64; -1 in rows outside every chunk
            to learn from. None unless `align` made the cache.
        chunk_logprobs_N: The teacher's logprob of a chunk, in the chunk's last row [N], float32, nats; 0 in other rows.
        writer_logprobs_N: For text that a student wrote, the logprob with which it sampled each label [N], float32,
            nats; NaN where there is no label. None unless the loader was asked for it.
        teacher_logprobs_N: The teacher's logprob of each label [N], float32, nats; present with `writer_logprobs_N`.
    """

    def __init__(
        self,
        input_ids_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        ids_NK: torch.Tensor | None = None,
        weights_NK: torch.Tensor | None = None,
        tail_N: torch.Tensor | None = None,
        positions_BL: torch.Tensor | None = None,
        num_counted: int | None = None,
        chunk_left_N: torch.Tensor | None = None,
        chunk_logprobs_N: torch.Tensor | None = None,
        writer_logprobs_N: torch.Tensor | None = None,
        teacher_logprobs_N: torch.Tensor | None = None,
    ) -> None:
        self.input_ids_BL, self.labels_BL = input_ids_BL, labels_BL
        self.ids_NK, self.weights_NK, self.tail_N = ids_NK, weights_NK, tail_N
        self.positions_BL, self.num_counted = positions_BL, num_counted
        self.chunk_left_N, self.chunk_logprobs_N = chunk_left_N, chunk_logprobs_N
        self.writer_logprobs_N, self.teacher_logprobs_N = writer_logprobs_N, teacher_logprobs_N

    @property
    def num_tokens(self) -> int:
        """Return the number of targets in the batch, including padding."""
        return self.labels_BL.numel()

    def __repr__(self) -> str:
        """Return the device, then the shape and dtype of each tensor on a line of its own."""
        lines = [f"Batch on {self.labels_BL.device}: {self.num_tokens:,} targets"]
        # tensors that only few batches have are left out where they are None
        rare = ("chunk", "writer", "teacher")
        shown = {name: one for name, one in self.tensors().items() if one is not None or not name.startswith(rare)}
        width = max(map(len, shown)) + 1
        for name, value in shown.items():
            about = "none" if value is None else f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            lines.append(f"  {name:<{width}} {about}")
        return "\n".join(lines)

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Return the tensors by name, in the order of the constructor's arguments."""
        return {name: value for name, value in vars(self).items() if name != "num_counted"}

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return a copy of the batch with `change` applied to each tensor."""
        changed: dict[str, Any] = {name: one if one is None else change(one) for name, one in self.tensors().items()}
        return Batch(**changed, num_counted=self.num_counted)

    def to(self, device: torch.device | str) -> Batch:
        """Return a copy of the batch on another device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class TargetTemperature:
    """A temperature that differs from the one at which the stored logprobs were captured.

    Attributes:
        number: Index of the temperature in the cache's extra temperatures.
        power: Capture temperature / this temperature; the probabilities at this temperature are proportional to this
            power of the stored probabilities.
    """

    number: int
    power: float


Sample = tuple[Sequences, Targets | None, int]
"""A decoded block (sequences and targets) and the index of one sequence in it."""


def collate(
    samples: list[Sample],
    num_samples: int,
    temperature: TargetTemperature | None = None,
    context: ContextRule = "packed",
) -> Batch:
    """Collate sequences into one micro-batch.

    Args:
        samples: The sequences, each as its block and its index in the block.
        num_samples: Samples a row, by which the counts of `sampled` targets are divided.
        temperature: The extra temperature of the `topk` targets; None for the capture temperature.
        context: The context rule. Under `document`, the batch has positions that restart at each document.
    """
    tokens_BL1 = np.stack([sequences.tokens_BL1[row] for sequences, _, row in samples]).astype(np.int64)
    mask_BL1 = np.stack([sequences.mask_BL1[row] for sequences, _, row in samples])
    labels_BL = np.where(mask_BL1[:, 1:], tokens_BL1[:, 1:], IGNORED_LABEL)
    batch = Batch(torch.from_numpy(tokens_BL1[:, :-1].copy()), torch.from_numpy(labels_BL))
    batch.num_counted = int(mask_BL1[:, 1:].sum())
    if context == "document":
        starts_BL1 = np.stack([sequences.starts_BL1[row] for sequences, _, row in samples])
        batch.positions_BL = positions_in_documents(torch.from_numpy(starts_BL1))
    first = samples[0][1]
    if isinstance(first, SampledTargets):
        return _with_sampled(batch, samples, num_samples)
    if isinstance(first, TopkTargets):
        return _with_topk(batch, samples, temperature)
    if isinstance(first, ChunkTargets):
        return _with_chunks(batch, samples)
    return batch


def positions_in_documents(starts_BL1: torch.Tensor) -> torch.Tensor:
    """Return the position of each of the first L tokens in its document [B, L], int64.

    A document that began in an earlier sequence starts again at position 0, as it did when the teacher scored it.
    """
    places_L = torch.arange(starts_BL1.shape[1] - 1, device=starts_BL1.device)
    first_BL = (places_L * starts_BL1[:, :-1]).cummax(1).values
    return places_L - first_BL


def _with_sampled(batch: Batch, samples: list[Sample], num_samples: int) -> Batch:
    parts = [_rows_of(targets, row) for _, targets, row in samples if isinstance(targets, SampledTargets)]
    num_ids_N = np.concatenate([part[0] for part in parts])
    # a mask of the filled places takes half the time of computing the index of each id
    filled_NK = np.arange(num_ids_N.max(), dtype=num_ids_N.dtype) < num_ids_N[:, None]
    ids_NK, weights_NK = np.zeros(filled_NK.shape, np.int64), np.zeros(filled_NK.shape, np.float32)
    ids_NK[filled_NK] = np.concatenate([part[1] for part in parts])
    weights_NK[filled_NK] = np.concatenate([part[2] for part in parts]) / np.float32(num_samples)
    batch.ids_NK, batch.weights_NK = torch.from_numpy(ids_NK), torch.from_numpy(weights_NK)
    return batch


def _rows_of(targets: SampledTargets, row: int) -> tuple[npt.NDArray[np.int32], ...]:
    start = int(targets.num_ids_BL[:row].sum())
    part = slice(start, start + int(targets.num_ids_BL[row].sum()))
    return targets.num_ids_BL[row], targets.ids_D[part], targets.counts_D[part]


def _with_topk(batch: Batch, samples: list[Sample], temperature: TargetTemperature | None) -> Batch:
    parts = [(targets, row) for _, targets, row in samples if isinstance(targets, TopkTargets)]
    ids_NK = np.concatenate([targets.ids_BLK[row] for targets, row in parts]).astype(np.int64)
    logprobs_NK = np.concatenate([targets.logprobs_BLK[row] for targets, row in parts])
    if temperature is None:
        weights_NK = np.exp(logprobs_NK)
        tail_N = np.concatenate([targets.tail_BL[row] for targets, row in parts])
    else:
        log_tail_N = np.concatenate([targets.log_tails_BLT[row, :, temperature.number] for targets, row in parts])
        logprobs_NK = logprobs_NK * np.float32(temperature.power)
        # divided by the largest summand, the weights cannot overflow and at least one of them is not 0
        largest_N = np.maximum(logprobs_NK.max(axis=1), log_tail_N)
        weights_NK, tail_N = np.exp(logprobs_NK - largest_N[:, None]), np.exp(log_tail_N - largest_N)
    # rounded probabilities sum to almost 1, their powers to any number; the loss needs rows that sum to 1
    total_N = weights_NK.sum(axis=1) + tail_N
    batch.ids_NK, batch.weights_NK = torch.from_numpy(ids_NK), torch.from_numpy(weights_NK / total_N[:, None])
    batch.tail_N = torch.from_numpy(tail_N / total_N)
    return batch


def _with_chunks(batch: Batch, samples: list[Sample]) -> Batch:
    parts = [(targets, slice(row, row + 1)) for _, targets, row in samples if isinstance(targets, ChunkTargets)]
    chosen = [targets.part(row) for targets, row in parts]
    batch.chunk_left_N = torch.from_numpy(np.concatenate([left_in_chunk(one).ravel() for one in chosen]))
    batch.chunk_logprobs_N = torch.from_numpy(np.concatenate([one.logprobs_BL.ravel() for one in chosen]))
    projected = [one.projected for one in chosen if one.projected is not None]
    return _with_projected(batch, projected) if projected else batch


def _with_projected(batch: Batch, parts: list[ProjectedTargets]) -> Batch:
    joined = ProjectedTargets(*(np.concatenate([vars(one)[name] for one in parts]) for name in vars(parts[0])))
    ids_NK, logprobs_NK, tail_N = padded_rows(joined)
    weights_NK = np.exp(logprobs_NK)
    # rounded probabilities do not sum to exactly 1, so each row is divided by its sum; rows without a target stay 0
    total_N = np.where(joined.num_ids_BL.ravel() > 0, weights_NK.sum(axis=1) + tail_N, np.float32(1))
    batch.ids_NK, batch.weights_NK = torch.from_numpy(ids_NK), torch.from_numpy(weights_NK / total_N[:, None])
    batch.tail_N = torch.from_numpy(tail_N / total_N)
    return batch
