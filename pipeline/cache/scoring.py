"""The requests and results of an engine, and the part of the scoring that is the same in every engine.

Legend: L targets of a request, K ids kept, n samples, T further temperatures, N rows, V vocabulary, C = n + K,
W = 3 + T + K with `topk`, else 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from capgap.kernels.sampling import TopkRows, offsets, sampled_and_topk_rows, sampled_rows, topk_rows
from capgap.schemas.errors import InputError


@dataclass(frozen=True)
class Recording:
    """The parts of each row of logits that a cache keeps.

    Attributes:
        num_samples: number of samples per row for `sampled`; 0 where nothing is sampled.
        top_k: number of ids per row for `topk`; 0 where the top-k tokens are not kept.
        temperature: number that the logits are divided by.
        seed: seed of the samples.
        vocab_size: size of the real vocabulary; columns at or past it are dropped.
        chunk_rows: number of rows of logits that are held at once.
        extra_temperatures: further temperatures at which the tail of `topk` is kept.
    """

    num_samples: int
    top_k: int
    temperature: float
    seed: int
    vocab_size: int
    chunk_rows: int
    extra_temperatures: Sequence[float] = ()

    @property
    def powers(self) -> tuple[float, ...]:
        """The exponents that turn probabilities at `temperature` into those of each further one, up to a factor."""
        return tuple(self.temperature / other for other in self.extra_temperatures)


@dataclass(frozen=True)
class Request:
    """L + 1 tokens to be scored by themselves: a whole sequence, or the part of a sequence that is one document.

    Attributes:
        tokens_L1: the tokens [L + 1], int32; the last one is only a label.
        key: bytes that the samples depend on beside seed and position; None stands for the digest of the tokens.
        share: part of a sequence that the request is, for the progress of a submission.
    """

    tokens_L1: npt.NDArray[np.int32]
    key: bytes | None = None
    share: float = 1.0

    @property
    def digest(self) -> bytes:
        """The key of the request's samples, which is the same on every machine and in every run."""
        return sequence_digest(self.tokens_L1) if self.key is None else self.key

    @property
    def name(self) -> str:
        """The name of the request in messages."""
        return f"{'sequence' if self.key is None else 'document'} {self.digest.hex()[:12]}"


@dataclass(frozen=True)
class Scored:
    """The rows that a cache keeps of one request.

    Attributes:
        samples_Ln: samples in ascending order, int32; without columns unless `sampled` is recorded.
        ids_LK: ids by falling probability, int32; without columns unless `topk` is recorded.
        logprobs_LK: logprobs of `ids_LK`, float32.
        tail_L: probability of all ids that are not in `ids_LK`, float32; 0 unless `topk` is recorded.
        log_tails_LT: log of the sum of p^(temperature / T) over the ids of the tail, for each further temperature T,
            float32; without columns unless `topk` is recorded.
        label_logprobs_L: logprob of the real next token, float32.
        top_logprob: the teacher's own top logprob after the last token, over all columns and at temperature 1, in
            nats; 0 where the engine cannot compare it with a greedy token.
    """

    samples_Ln: npt.NDArray[np.int32]
    ids_LK: npt.NDArray[np.int32]
    logprobs_LK: npt.NDArray[np.float32]
    tail_L: npt.NDArray[np.float32]
    log_tails_LT: npt.NDArray[np.float32]
    label_logprobs_L: npt.NDArray[np.float32]
    top_logprob: float


class Engine(Protocol):
    """Something that runs the teacher over sequences."""

    name: str
    """Name and version of the engine, for the manifest."""

    dtype: str
    """The dtype of the teacher's weights and activations."""

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Score all requests as one submission, and return the results in order, with exactly L rows each.

        The engine reports each request's share to `advance_within` as soon as the request is scored.
        """

    def close(self) -> None:
        """Free the device's memory."""


@dataclass(frozen=True)
class PackedRows:
    """Rows as two tensors, for transport between processes: ids [N, C] int32 and numbers [N, W] float32.

    The columns of `ids_NC` are n samples and K kept ids. The columns of `numbers_NW` are the label's logprob; the
    teacher's own top logprob, in a request's last row only; and for `topk` the tail, the logarithms of the T further
    tails and K logprobs.
    """

    ids_NC: torch.Tensor
    numbers_NW: torch.Tensor


def sequence_digest(tokens_L1: npt.NDArray[np.int32]) -> bytes:
    """Return a digest of 16 bytes that identifies a sequence of tokens."""
    return hashlib.blake2b(np.ascontiguousarray(tokens_L1, dtype="<i4").tobytes(), digest_size=16).digest()


def row_offsets(recording: Recording, digest: bytes, start: int, num_rows: int) -> npt.NDArray[np.float32] | None:
    """Return the sampling offsets of `num_rows` rows from row `start` on; None where nothing is sampled."""
    return offsets(recording.seed, digest, start, num_rows) if recording.num_samples else None


def record_rows(
    recording: Recording,
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    offsets_N: torch.Tensor | None,
    last_rows: torch.Tensor | None = None,
) -> PackedRows:
    """Compute what is kept of these rows of logits, on their device. The padding columns are overwritten.

    Args:
        recording: what to keep of each row of logits.
        logits_NV: logits of the teacher's head, padding columns included.
        labels_N: the real next tokens.
        offsets_N: sampling offset of each row; None where nothing is sampled.
        last_rows: int64 indices of the rows after which the engine's sampler chooses a token; the teacher's own top
            logprob is kept for these rows.
    """
    n, k = recording.num_samples, recording.top_k
    temperature, vocab_size, powers = recording.temperature, recording.vocab_size, recording.powers
    top_N = _own_top(logits_NV, last_rows)
    if offsets_N is None:
        kept = topk_rows(logits_NV, labels_N, k, temperature, vocab_size, powers)
        return PackedRows(kept.ids_NK, _topk_numbers(kept, top_N))
    if not k:
        drawn = sampled_rows(logits_NV, labels_N, offsets_N, n, temperature, vocab_size)
        return PackedRows(drawn.samples_Nn, torch.stack([drawn.label_logprobs_N, top_N], dim=1))
    drawn, kept = sampled_and_topk_rows(logits_NV, labels_N, offsets_N, n, k, temperature, vocab_size, powers)
    return PackedRows(torch.cat([drawn.samples_Nn, kept.ids_NK], dim=1), _topk_numbers(kept, top_N))


def _topk_numbers(kept: TopkRows, top_N: torch.Tensor) -> torch.Tensor:
    columns = torch.stack([kept.label_logprobs_N, top_N, kept.tail_N], dim=1)
    return torch.cat([columns, kept.log_tails_NT, kept.logprobs_NK], dim=1)


def _own_top(logits_NV: torch.Tensor, last_rows: torch.Tensor | None) -> torch.Tensor:
    """Return the top logprob over all columns, padding included, to be compared with the engine's greedy token.

    It is computed for `last_rows` only, as it takes a pass over all columns, and is 0 in all other rows.
    """
    top_N = logits_NV.new_zeros(len(logits_NV), dtype=torch.float32)
    if last_rows is not None and len(last_rows):
        last_MV = logits_NV[last_rows].float()
        top_N[last_rows] = last_MV.amax(dim=-1) - torch.logsumexp(last_MV, dim=-1)
    return top_N


def unpack(
    recording: Recording, ids_LC: npt.NDArray[np.int32], numbers_LW: npt.NDArray[np.float32], where: str
) -> Scored:
    """Split the packed rows of one request into its arrays; `where` names the request in errors.

    Raises:
        InputError: the teacher's logits were not finite.
    """
    if not np.isfinite(numbers_LW[:, 0]).all():
        row = int(np.flatnonzero(~np.isfinite(numbers_LW[:, 0]))[0])
        raise InputError(
            "the teacher's logits are not finite",
            where=f"{where}, token {row}",
            found=float(numbers_LW[row, 0]),
            expected="a finite logprob of the next token",
            fix="check the teacher's weights, or score in another cache.dtype",
        )
    first = 3 + len(recording.extra_temperatures)
    tail_L = numbers_LW[:, 2] if recording.top_k else np.zeros(len(numbers_LW), np.float32)
    return Scored(
        np.ascontiguousarray(ids_LC[:, : recording.num_samples]),
        np.ascontiguousarray(ids_LC[:, recording.num_samples :]),
        np.ascontiguousarray(numbers_LW[:, first:]),
        np.ascontiguousarray(tail_L),
        np.ascontiguousarray(numbers_LW[:, 3:first]),
        np.ascontiguousarray(numbers_LW[:, 0]),
        float(numbers_LW[-1, 1]),
    )
