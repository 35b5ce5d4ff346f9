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
        share: of a sequence, for those who count how far a submission is.
    """

    tokens_L1: npt.NDArray[np.int32]
    key: bytes | None = None
    share: float = 1.0

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
        top_logprob: the teacher's own top logprob after the last token: all columns, temperature 1; 0 where the engine
            has nothing to hold it against.
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
    """Engine and version, for the manifest."""

    dtype: str
    """The dtype of the teacher's weights and activations."""

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """One submission: score all requests and return them in order, exactly L rows each.

        Each request's share is given to `advance_within` as soon as it is scored.
        """

    def close(self) -> None:
        """Give back the device."""


@dataclass(frozen=True)
class PackedRows:
    """Rows as two tensors, the form in which they travel: ids [N, C] int32, numbers [N, W] float32.

    The columns of `ids_NC` are n samples and K kept ids; those of `numbers_NW` the label's logprob, in a request's last
    row the teacher's own top logprob, and for `topk` the tail, the logarithms of the T further tails and K logprobs.
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
    recording: Recording,
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    offsets_N: torch.Tensor | None,
    last_rows: torch.Tensor | None = None,
) -> PackedRows:
    """What is kept of these rows of logits, on the device of the logits, whose padding columns are overwritten.

    Args:
        recording: what to keep.
        logits_NV: of the teacher's head, padding columns and all.
        labels_N: the real next tokens.
        offsets_N: of the samples; None where nothing is sampled.
        last_rows: rows after which the engine's sampler chooses a token, int64: the teacher's own top logprob is kept.
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
    """What the teacher's own sampler sees, padding columns and all: an engine's greedy token is held against it.

    Of these rows alone, for it takes a pass over all columns; 0 in all others.
    """
    top_N = logits_NV.new_zeros(len(logits_NV), dtype=torch.float32)
    if last_rows is not None and len(last_rows):
        last_MV = logits_NV[last_rows].float()
        top_N[last_rows] = last_MV.amax(dim=-1) - torch.logsumexp(last_MV, dim=-1)
    return top_N


def unpack(
    recording: Recording, ids_LC: npt.NDArray[np.int32], numbers_LW: npt.NDArray[np.float32], where: str
) -> Scored:
    """One request's rows, taken apart.

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
