"""What a rows kernel is: the step between the product that makes logits and the products that use their gradient.

    kl_N, ce_N = kernel(logits_NP, rows, settings, want_gradient)

It turns a chunk of logits into the gradient of the loss, in the same memory, and returns each row's divergence and
cross-entropy. Every implementation has this signature; `backends.py` chooses one by device. What differs between
recordings and treatments of the tail is settled before (`prepare.py`): a kernel sees distinct ids, the teacher's
probabilities and that of the one cell for all other ids, which may be 0.

Legend: N rows of a chunk, P columns of the buffer, V real columns, K ids kept a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from capgap.kernels.sparse_kl.divergence import Divergence

Backend = Literal["auto", "torch", "triton"]
"""Which rows kernel; `auto` takes Triton's on a GPU, and torch's on a CPU, in float64 and where Triton is missing."""


class Rows(NamedTuple):
    """The rows of a chunk, beside their logits and on the same device; floats are float32, or float64 in float64.

    Attributes:
        ids_NK: kept ids, int32, in any order. No id of [0, V) stands twice in a row with probability. Where the
            probability is 0 the entry is padding, and its id is any of [0, V].
        p_NK: the teacher's probabilities, repeats merged; finite, at least 0.
        p_tail_N: the teacher's probability of all other ids, at least 0. Counts only where there are other ids.
        labels_N: real next tokens, int64, all within [0, V).
        ckl_N: factor of d divergence / d (logits / T): row weight x alpha x T.
        cce_N: factor of d cross-entropy / d logits: row weight x (1 - alpha). May be 0 with `ckl_N`, or either.
    """

    ids_NK: Tensor
    p_NK: Tensor
    p_tail_N: Tensor
    labels_N: Tensor
    ckl_N: Tensor
    cce_N: Tensor

    def part(self, rows: slice) -> Rows:
        """A slice of the rows."""
        return Rows(*(field[rows] for field in self))


@dataclass(frozen=True)
class RowSettings:
    """What is the same for every row.

    Attributes:
        vocab_size: V, the real columns.
        temperature: the student's logits are divided by it for the divergence; cross-entropy is at 1.
        divergence: which.
        beta: of `jsd`.
        softcap: c, where logits stand for c tanh(logits / c); None leaves them as they are.
    """

    vocab_size: int
    temperature: float
    divergence: Divergence
    beta: float
    softcap: float | None


class RowsKernel(Protocol):
    """One implementation."""

    def __call__(
        self, logits_NP: Tensor, rows: Rows, settings: RowSettings, want_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Overwrite logits with their gradient.

        Args:
            logits_NP: raw logits (bias added, no softcap) in the first V columns; the rest is scratch, at least one
                column. Rows are contiguous and begin at multiples of 16 elements (`stride(0) == P`, or a slice of
                such a buffer's rows). Float16, bfloat16, float32 or float64. Afterwards the first V columns hold
                `ckl d divergence / d (logits / T) + cce d ce / d logits`, softcap's slope included, rounded once;
                without `want_gradient` they are scratch too.
            rows: of the chunk.
            settings: of all rows.
            want_gradient: False where neither hidden states nor head are trained.

        Returns:
            Divergence (without T^2) and cross-entropy of each row, nats, in the dtype of `rows.ckl_N`. No host sync,
            no atomics: equal inputs give equal bits.
        """
