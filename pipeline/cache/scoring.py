"""What an engine is asked for and what it answers; the part of the work that is the same in every engine.

Legend: L targets of a sequence, K ids kept or n draws, N rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from capgap.kernels.sampling import offsets, sampled_rows, topk_rows
from capgap.schemas.errors import InputError


@dataclass(frozen=True)
class Recording:
    """How rows of logits are turned into what is kept.

    Attributes:
        kind: `sampled` or `topk`.
        num_ids: n draws or K kept ids.
        temperature: logits are divided by it.
        seed: of the draws.
        vocab_size: real vocabulary; columns past it are dropped.
        chunk_rows: rows of logits held at once.
    """

    kind: Literal["sampled", "topk"]
    num_ids: int
    temperature: float
    seed: int
    vocab_size: int
    chunk_rows: int


@dataclass(frozen=True)
class Request:
    """One sequence of L + 1 tokens to be scored."""

    tokens_L1: npt.NDArray[np.int32]

    @property
    def digest(self) -> bytes:
        """Of the tokens: the key of the sequence's draws, wherever and whenever it is scored."""
        return sequence_digest(self.tokens_L1)


@dataclass(frozen=True)
class Scored:
    """What is kept of one sequence.

    Attributes:
        ids_LK: ids by falling probability (`topk`) or ascending draws (`sampled`), int32.
        logprobs_LK: of those ids, float32; None for `sampled`.
        tail_L: probability of all other ids, float32; None for `sampled`.
        label_logprobs_L: of the real next token, float32.
        top_logprobs_L: the teacher's own top logprob: all columns, temperature 1, float32.
    """

    ids_LK: npt.NDArray[np.int32]
    logprobs_LK: npt.NDArray[np.float32] | None
    tail_L: npt.NDArray[np.float32] | None
    label_logprobs_L: npt.NDArray[np.float32]
    top_logprobs_L: npt.NDArray[np.float32]


class Engine(Protocol):
    """Something that runs the teacher over sequences."""

    name: str
    """Engine and version, for the manifest."""

    dtype: str
    """Of the teacher's weights and activations."""

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """One submission: score all requests and return them in order, exactly L rows each."""

    def close(self) -> None:
        """Give back the device."""


@dataclass(frozen=True)
class Packed:
    """Rows as two tensors, the form in which they travel: ids [N, K] int32, numbers [N, 2 or K + 3] float32.

    The columns of `numbers_NW` are the label's logprob, the top logprob and, for `topk`, the tail and K logprobs.
    """

    ids_NK: torch.Tensor
    numbers_NW: torch.Tensor


def sequence_digest(tokens_L1: npt.NDArray[np.int32]) -> bytes:
    """16 bytes that name a sequence of tokens."""
    return hashlib.blake2b(np.ascontiguousarray(tokens_L1, dtype="<i4").tobytes(), digest_size=16).digest()


def row_offsets(recording: Recording, digest: bytes, start: int, num_rows: int) -> npt.NDArray[np.float32] | None:
    """Offsets of the draws for rows `start` and on; None where nothing is drawn."""
    return offsets(recording.seed, digest, start, num_rows) if recording.kind == "sampled" else None


def record_rows(
    recording: Recording, logits_NV: torch.Tensor, labels_N: torch.Tensor, offsets_N: torch.Tensor | None
) -> Packed:
    """What is kept of these rows of logits, on the device of the logits."""
    if recording.kind == "sampled":
        assert offsets_N is not None
        drawn = sampled_rows(
            logits_NV, labels_N, offsets_N, recording.num_ids, recording.temperature, recording.vocab_size
        )
        top_N = _own_top(recording, logits_NV, drawn.top_logprobs_N)
        return Packed(drawn.draws_Nn, torch.stack([drawn.label_logprobs_N, top_N], dim=1))
    kept = topk_rows(logits_NV, labels_N, recording.num_ids, recording.temperature, recording.vocab_size)
    top_N = _own_top(recording, logits_NV, kept.logprobs_NK[:, 0])
    columns = torch.stack([kept.label_logprobs_N, top_N, kept.tail_N], dim=1)
    return Packed(kept.ids_NK, torch.cat([columns, kept.logprobs_NK], dim=1))


def _own_top(recording: Recording, logits_NV: torch.Tensor, kept_top_N: torch.Tensor) -> torch.Tensor:
    """What the teacher's own sampler sees, padding columns and all: an engine's greedy token is held against it."""
    if recording.temperature == 1.0 and logits_NV.shape[1] == recording.vocab_size:
        return kept_top_N
    logits_NV = logits_NV.float()
    return logits_NV.amax(dim=-1) - torch.logsumexp(logits_NV, dim=-1)


def unpack(ids_LK: npt.NDArray[np.int32], numbers_LW: npt.NDArray[np.float32], where: str) -> Scored:
    """One sequence's rows, taken apart.

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
    topk = numbers_LW.shape[1] > 2
    return Scored(
        ids_LK,
        np.ascontiguousarray(numbers_LW[:, 3:]) if topk else None,
        np.ascontiguousarray(numbers_LW[:, 2]) if topk else None,
        np.ascontiguousarray(numbers_LW[:, 0]),
        np.ascontiguousarray(numbers_LW[:, 1]),
    )
