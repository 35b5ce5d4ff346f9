"""The records that a shard holds, as arrays: packed sequences, and the teacher's targets for them.

Legend: B sequences in a block, L targets a sequence, K ids kept a row, T further temperatures, D distinct ids of
a whole block.
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
        tokens_BL1: ids [B, L + 1], int32.
        starts_BL1: True where a token begins a document [B, L + 1].
        mask_BL1: True where a token counts as a label [B, L + 1]; position 0 is never a label.
    """

    tokens_BL1: IntArray
    starts_BL1: BoolArray
    mask_BL1: BoolArray

    def __len__(self) -> int:
        return len(self.tokens_BL1)

    def part(self, rows: slice | npt.NDArray[np.int64]) -> Sequences:
        """Some of the sequences, by a slice or by their places."""
        return Sequences(self.tokens_BL1[rows], self.starts_BL1[rows], self.mask_BL1[rows])

    @classmethod
    def joined(cls, parts: list[Sequences]) -> Sequences:
        """The sequences of all parts, one after the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


@dataclass(frozen=True)
class SampledTargets:
    """Counts of n samples from the teacher after each of B x L tokens, all distinct ids, row after row.

    Attributes:
        num_ids_BL: distinct ids of each row [B, L], int32; the rows' ids follow one another in `ids_D`.
        ids_D: ids [D], int32; the order within a row is open.
        counts_D: how often each id was sampled [D], int32; a row's counts sum to n.
        label_logprobs_BL: the teacher's logprob of the real next token [B, L], float32, nats.
    """

    num_ids_BL: IntArray
    ids_D: IntArray
    counts_D: IntArray
    label_logprobs_BL: FloatArray


@dataclass(frozen=True)
class TopkTargets:
    """The top-k tokens after each of B x L tokens, and the mass of all others.

    A row may hold fewer than K ids: what is left is padding, with id 0 and logprob -inf.

    Attributes:
        ids_BLK: ids by falling probability [B, L, K], int32.
        logprobs_BLK: their logprobs [B, L, K], float32, nats.
        tail_BL: probability of every other id together [B, L], float32.
        label_logprobs_BL: the teacher's logprob of the real next token [B, L], float32, nats; NaN where nobody knows
            it, which only a target that was not made here and does not keep the token may say.
        log_tails_BLT: for each further temperature, the logarithm of the sum of p^(temperature / T) over every other
            id [B, L, T], float32; -inf where there is none. At T the kept ids' probabilities and the tail are
            proportional to exp(logprob)^(temperature / T) and to that sum.
    """

    ids_BLK: IntArray
    logprobs_BLK: FloatArray
    tail_BL: FloatArray
    label_logprobs_BL: FloatArray
    log_tails_BLT: FloatArray


@dataclass(frozen=True)
class ProjectedTargets:
    """The teacher's top-k tokens after some of B x L tokens, as tokens of a student's other tokenizer.

    Attributes:
        num_ids_BL: ids of each row [B, L], int32; 0 where there is no such target. Those of all rows lie in a row.
        ids_D: ids of the student [D], int32, by falling probability, distinct in a row.
        logprobs_D: their logprobs under the teacher [D], float32, nats.
        tail_BL: probability of all else together [B, L], float32; 0 where there is no such target.
    """

    num_ids_BL: IntArray
    ids_D: IntArray
    logprobs_D: FloatArray
    tail_BL: FloatArray

    def part(self, rows: slice) -> ProjectedTargets:
        """Those of some sequences, which follow one another."""
        before, inside = self.num_ids_BL[: rows.start].sum(), self.num_ids_BL[rows].sum()
        ids = slice(int(before), int(before + inside))
        return ProjectedTargets(self.num_ids_BL[rows], self.ids_D[ids], self.logprobs_D[ids], self.tail_BL[rows])


@dataclass(frozen=True)
class ChunkTargets:
    """What a teacher of another tokenizer says of chunks: of spans on whose borders both tokenizations agree.

    The targets of a sequence are cut into chunks; those behind the last end are in none.

    Attributes:
        ends_BL: True at the last target of a chunk [B, L].
        kept_BL: True where that chunk is one to learn from [B, L]; all of its targets are labels then.
        logprobs_BL: there the teacher's logprob of the chunk [B, L], float32, nats; 0 everywhere else.
        projected: the teacher's distribution at kept chunks of one token in both tokenizers; None where none is kept.
    """

    ends_BL: BoolArray
    kept_BL: BoolArray
    logprobs_BL: FloatArray
    projected: ProjectedTargets | None = None

    def part(self, rows: slice) -> ChunkTargets:
        """Those of some sequences, which follow one another."""
        projected = None if self.projected is None else self.projected.part(rows)
        return ChunkTargets(self.ends_BL[rows], self.kept_BL[rows], self.logprobs_BL[rows], projected)


Targets = SampledTargets | TopkTargets | ChunkTargets
