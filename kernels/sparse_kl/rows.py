"""The interface of a rows kernel, the step between the product that makes logits and those that use their gradient.

    kl_N, ce_N = kernel(logits_NP, rows, settings, want_gradient)

A rows kernel turns a chunk of logits into the gradient of the loss, in the same memory, and returns each row's
divergence and cross-entropy. Every implementation has this signature; `backends.py` chooses one by device. `prepare.py`
has already removed the differences between recordings and treatments of the tail: a kernel gets distinct ids, the
teacher's probabilities of them, and the probability of one cell for all other ids, which may be 0.

Legend: N rows of a chunk, P columns of the buffer, V real columns, K ids kept a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from capgap.kernels.sparse_kl.divergence import Divergence

Backend = Literal["auto", "torch", "triton"]
"""The rows kernel; `auto` takes Triton's on a GPU, and torch's on a CPU, in float64 and without Triton."""


class Rows(NamedTuple):
    """The data of a chunk's rows other than their logits, on the same device.

    Floats are float32, or float64 for float64 logits.

    Attributes:
        ids_NK: Kept ids, int32, in any order. In a row, no id has a probability above 0 in two places. A place of
            probability 0 is padding, and its id is any number in [0, V].
        p_NK: The teacher's probabilities of these ids, finite and at least 0.
        p_tail_N: The teacher's probability of all other ids, at least 0. It is ignored if there are no other ids.
        labels_N: Real next tokens, int64, all in [0, V).
        ckl_N: Factor of d divergence / d (logits / T): row weight x alpha x T. It may be 0.
        cce_N: Factor of d cross-entropy / d logits: row weight x (1 - alpha). It may be 0.
    """

    ids_NK: Tensor
    p_NK: Tensor
    p_tail_N: Tensor
    labels_N: Tensor
    ckl_N: Tensor
    cce_N: Tensor

    def part(self, rows: slice) -> Rows:
        """Return a slice of the rows."""
        return Rows(*(field[rows] for field in self))


@dataclass(frozen=True)
class RowSettings:
    """The settings that are the same for every row.

    Attributes:
        vocab_size: V, the number of real columns.
        temperature: The student's logits are divided by it for the divergence; cross-entropy is at temperature 1.
        divergence: Name of the divergence.
        beta: The parameter beta of `jsd`.
        softcap: c, if the model's logits are c tanh(logits / c); None without a softcap.
    """

    vocab_size: int
    temperature: float
    divergence: Divergence
    beta: float
    softcap: float | None


class RowsKernel(Protocol):
    """The signature of a rows kernel."""

    def __call__(
        self, logits_NP: Tensor, rows: Rows, settings: RowSettings, want_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Overwrite logits with their gradient, without a host sync; equal inputs give equal bits.

        Args:
            logits_NP: Raw logits (bias added, no softcap) in the first V columns, in float16, bfloat16, float32 or
                float64. The remaining columns, at least one, are scratch. Rows are contiguous and begin at multiples of
                16 elements (`stride(0) == P`, or a slice of such a buffer's rows). Afterwards, the first V columns hold
                `ckl d divergence / d (logits / T) + cce d ce / d logits`, including the slope of the softcap, rounded
                once; without `want_gradient`, their content is undefined.
            rows: Data of the chunk's rows.
            settings: Settings of all rows.
            want_gradient: False if neither the hidden states nor the head are trained.

        Returns:
            Divergence (without T^2) and cross-entropy of each row, nats, in the dtype of `rows.ckl_N`.
        """
