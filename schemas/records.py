"""The records that a shard holds, as arrays: packed sequences, and the teacher's targets for them.

Legend: B sequences in a block, L targets per sequence, K ids stored per row (target), T further temperatures,
D stored ids of all rows of a block together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sequences:
    """B packed sequences of L + 1 tokens.

    Attributes:
        tokens_BL1: token ids [B, L + 1], int32.
        starts_BL1: True where a token begins a document [B, L + 1], bool.
        mask_BL1: True where a token counts as a label [B, L + 1], bool; position 0 is never a label.
    """

    tokens_BL1: IntArray
    starts_BL1: BoolArray
    mask_BL1: BoolArray

    def __len__(self) -> int:
        return len(self.tokens_BL1)

    def part(self, rows: slice | npt.NDArray[np.int64]) -> Sequences:
        """Return some of the sequences, chosen by a slice or by an array of indices."""
        return Sequences(self.tokens_BL1[rows], self.starts_BL1[rows], self.mask_BL1[rows])

    @classmethod
    def joined(cls, parts: list[Sequences]) -> Sequences:
        """Return the sequences of all parts, concatenated."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


@dataclass(frozen=True)
class SampledTargets:
    """Counts of n samples from the teacher after each of B x L tokens: the distinct ids of all rows, row after row.

    Attributes:
        num_ids_BL: number of distinct ids of each row [B, L], int32; `ids_D` holds the ids of all rows, concatenated.
        ids_D: ids [D], int32, distinct within a row and in any order.
        counts_D: how often each id was sampled [D], int32; a row's counts sum to n.
        label_logprobs_BL: the teacher's logprob of the real next token [B, L], float32, nats.
    """

    num_ids_BL: IntArray
    ids_D: IntArray
    counts_D: IntArray
    label_logprobs_BL: FloatArray


@dataclass(frozen=True)
class TopkTargets:
    """The top-k tokens after each of B x L tokens, and the probability of all others (the tail).

    A row may hold fewer than K ids: the rest is padding, with id 0 and logprob -inf.

    Attributes:
        ids_BLK: ids by descending probability [B, L, K], int32.
        logprobs_BLK: their logprobs [B, L, K], float32, nats.
        tail_BL: probability of all other ids together [B, L], float32.
        label_logprobs_BL: the teacher's logprob of the real next token [B, L], float32, nats; NaN if it is not known,
            which only imported targets that do not hold this token may have.
        log_tails_BLT: for each further temperature T, the logarithm of the sum of p^(temperature / T) over all other
            ids [B, L, T], float32; -inf if there are none. At T, the probabilities of the stored ids and the tail are
            proportional to exp(logprob)^(temperature / T) and to that sum.
    """

    ids_BLK: IntArray
    logprobs_BLK: FloatArray
    tail_BL: FloatArray
    label_logprobs_BL: FloatArray
    log_tails_BLT: FloatArray


@dataclass(frozen=True)
class ProjectedTargets:
    """The teacher's top-k tokens after some of B x L tokens, as tokens of a student that has another tokenizer.

    Attributes:
        num_ids_BL: number of ids of each row [B, L], int32; 0 where there is no such target. `ids_D` holds the ids of
            all rows, concatenated.
        ids_D: ids of the student's tokenizer [D], int32, by descending probability and distinct within a row.
        logprobs_D: the teacher's logprobs of these ids [D], float32, nats.
        tail_BL: probability of everything else together [B, L], float32; 0 where there is no such target.
    """

    num_ids_BL: IntArray
    ids_D: IntArray
    logprobs_D: FloatArray
    tail_BL: FloatArray

    def part(self, rows: slice) -> ProjectedTargets:
        """Return the projected targets of a range of sequences, with all their rows."""
        before, inside = self.num_ids_BL[: rows.start].sum(), self.num_ids_BL[rows].sum()
        ids = slice(int(before), int(before + inside))
        return ProjectedTargets(self.num_ids_BL[rows], self.ids_D[ids], self.logprobs_D[ids], self.tail_BL[rows])


@dataclass(frozen=True)
class ChunkTargets:
    """A teacher's logprobs of chunks, the smallest spans that begin and end with a token in both tokenizers.

    The targets of a sequence are cut into chunks. Targets behind the last end of a chunk are in no chunk.

    Attributes:
        ends_BL: True at the last target of a chunk [B, L], bool.
        kept_BL: True where a chunk ends that students learn from [B, L], bool; all targets of it are labels.
        logprobs_BL: the teacher's logprob of each kept chunk, at its end [B, L], float32, nats; 0 everywhere else.
        projected: the teacher's distribution at kept chunks of one token in both tokenizers; None if it is not stored.
    """

    ends_BL: BoolArray
    kept_BL: BoolArray
    logprobs_BL: FloatArray
    projected: ProjectedTargets | None = None

    def part(self, rows: slice) -> ChunkTargets:
        """Return the chunks of a range of sequences."""
        projected = None if self.projected is None else self.projected.part(rows)
        return ChunkTargets(self.ends_BL[rows], self.kept_BL[rows], self.logprobs_BL[rows], projected)


Targets = SampledTargets | TopkTargets | ChunkTargets
