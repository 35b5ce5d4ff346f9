"""What an engine is asked for and what it answers; the part of the work that is the same in every engine.

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
    """How rows of logits are turned into what is kept.

    Attributes:
        num_samples: n of `sampled`; 0 where nothing is sampled.
        top_k: K of `topk`; 0 where the top-k tokens are not kept.
        temperature: logits are divided by it.
        seed: of the samples.
        vocab_size: real vocabulary; columns past it are dropped.
        chunk_rows: rows of logits held at once.
        extra_temperatures: at which the tail of `topk` is kept too.
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
        """Probabilities at each further temperature are proportional to these powers of those at `temperature`."""
        return tuple(self.temperature / other for other in self.extra_temperatures)


@dataclass(frozen=True)
class Request:
    """Tokens to be scored by themselves: a sequence of L + 1 tokens, or a document's part of one.

    Attributes:
        tokens_L1: the last one is a label alone.
        key: what the samples depend on beside seed and position; the tokens' digest where it is left out.
    """

    tokens_L1: npt.NDArray[np.int32]
    key: bytes | None = None

    @property
    def digest(self) -> bytes:
        """The key of the request's samples, wherever and whenever it is scored."""
        return sequence_digest(self.tokens_L1) if self.key is None else self.key

    @property
    def name(self) -> str:
        """For messages: whose rows these are."""
        return f"{'sequence' if self.key is None else 'document'} {self.digest.hex()[:12]}"


@dataclass(frozen=True)
class Scored:
    """What is kept of one request.

    Attributes:
        samples_Ln: ascending samples, int32; of no column without `sampled`.
        ids_LK: ids by falling probability, int32; of no column without `topk`, like all but the last two.
        logprobs_LK: of those ids, float32.
        tail_L: probability of all other ids, float32; 0 without `topk`.
        log_tails_LT: log of the sum of p^(temperature / T) over those, for each further temperature T, float32.
        label_logprobs_L: of the real next token, float32.
        top_logprobs_L: the teacher's own top logprob: all columns, temperature 1, float32.
    """

    samples_Ln: npt.NDArray[np.int32]
    ids_LK: npt.NDArray[np.int32]
    logprobs_LK: npt.NDArray[np.float32]
    tail_L: npt.NDArray[np.float32]
    log_tails_LT: npt.NDArray[np.float32]
    label_logprobs_L: npt.NDArray[np.float32]
    top_logprobs_L: npt.NDArray[np.float32]


class Engine(Protocol):
    """Something that runs the teacher over sequences."""

    name: str
    """Engine and version, for the manifest."""

    dtype: str
    """The dtype of the teacher's weights and activations."""

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """One submission: score all requests and return them in order, exactly L rows each."""

    def close(self) -> None:
        """Give back the device."""


@dataclass(frozen=True)
class PackedRows:
    """Rows as two tensors, the form in which they travel: ids [N, C] int32, numbers [N, W] float32.

    The columns of `ids_NC` are n samples and K kept ids; those of `numbers_NW` the label's logprob, the top logprob
    and, for `topk`, the tail, the logarithms of the T further tails and K logprobs.
    """

    ids_NC: torch.Tensor
    numbers_NW: torch.Tensor


def sequence_digest(tokens_L1: npt.NDArray[np.int32]) -> bytes:
    """16 bytes that name a sequence of tokens."""
    return hashlib.blake2b(np.ascontiguousarray(tokens_L1, dtype="<i4").tobytes(), digest_size=16).digest()


def row_offsets(recording: Recording, digest: bytes, start: int, num_rows: int) -> npt.NDArray[np.float32] | None:
    """Offsets of the samples for rows `start` and on; None where nothing is sampled."""
    return offsets(recording.seed, digest, start, num_rows) if recording.num_samples else None


def record_rows(
    recording: Recording, logits_NV: torch.Tensor, labels_N: torch.Tensor, offsets_N: torch.Tensor | None
) -> PackedRows:
    """What is kept of these rows of logits, on the device of the logits."""
    n, k = recording.num_samples, recording.top_k
    temperature, vocab_size, powers = recording.temperature, recording.vocab_size, recording.powers
    if offsets_N is None:
        kept = topk_rows(logits_NV, labels_N, k, temperature, vocab_size, powers)
        return PackedRows(kept.ids_NK, _topk_numbers(recording, logits_NV, kept))
    if not k:
        drawn = sampled_rows(logits_NV, labels_N, offsets_N, n, temperature, vocab_size)
        top_N = _own_top(recording, logits_NV, drawn.top_logprobs_N)
        return PackedRows(drawn.samples_Nn, torch.stack([drawn.label_logprobs_N, top_N], dim=1))
    drawn, kept = sampled_and_topk_rows(logits_NV, labels_N, offsets_N, n, k, temperature, vocab_size, powers)
    return PackedRows(torch.cat([drawn.samples_Nn, kept.ids_NK], dim=1), _topk_numbers(recording, logits_NV, kept))


def _topk_numbers(recording: Recording, logits_NV: torch.Tensor, kept: TopkRows) -> torch.Tensor:
    top_N = _own_top(recording, logits_NV, kept.logprobs_NK[:, 0])
    columns = torch.stack([kept.label_logprobs_N, top_N, kept.tail_N], dim=1)
    return torch.cat([columns, kept.log_tails_NT, kept.logprobs_NK], dim=1)


def _own_top(recording: Recording, logits_NV: torch.Tensor, kept_top_N: torch.Tensor) -> torch.Tensor:
    """What the teacher's own sampler sees, padding columns and all: an engine's greedy token is held against it."""
    if recording.temperature == 1.0 and logits_NV.shape[1] == recording.vocab_size:
        return kept_top_N
    logits_NV = logits_NV.float()
    return logits_NV.amax(dim=-1) - torch.logsumexp(logits_NV, dim=-1)


def unpack(
    recording: Recording, ids_LC: npt.NDArray[np.int32], numbers_LW: npt.NDArray[np.float32], where: str
) -> Scored:
    """One request's rows, taken apart.

    Raises:
        InputError: the teacher's logits were not finite.
    """
    if not np.isfinite(numbers_LW[:, :2]).all():
        row = int(np.flatnonzero(~np.isfinite(numbers_LW[:, :2]).all(axis=1))[0])
        raise InputError(
            "the teacher's logits are not finite",
            where=f"{where}, token {row}",
            found=numbers_LW[row, :2].tolist(),
            expected="finite logprobs",
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
        np.ascontiguousarray(numbers_LW[:, 1]),
    )
