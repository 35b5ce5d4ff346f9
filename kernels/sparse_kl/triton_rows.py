"""The rows kernel in Triton, for logits in float16, bfloat16 or float32 on a GPU.

A row is read twice and written once. Apart from the logits, there are only tensors of [N] and [N, K]. On a CPU, the
kernel runs only if Triton was imported under TRITON_INTERPRET=1. It is slow there and meant for tests.

Legend: N rows of a chunk, P columns of the buffer, K ids kept a row.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from capgap.kernels.sparse_kl.rows import Rows, RowSettings
from capgap.kernels.sparse_kl.triton_kernel import sparse_rows

INTERPRETED = not isinstance(sparse_rows, triton.JITFunction)

_THREADS = 128  # for each row; with more threads, each would have too few registers for its part of the row
_THREADS_A_WARP = 32


def triton_rows(logits_NP: Tensor, rows: Rows, settings: RowSettings, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """Run the rows kernel that `rows.RowsKernel` describes, with one program for each row."""
    kl_N, ce_N = (torch.empty_like(rows.ckl_N, memory_format=torch.contiguous_format) for _ in range(2))
    num_rows, num_columns = logits_NP.shape
    constants, options = specialise(
        settings, want_gradient, logits_NP.element_size(), num_columns, rows.ids_NK.shape[1]
    )
    # the kernel assumes contiguous tensors, and would silently read wrong values from others
    ids_NK, p_NK, p_tail_N, labels_N, ckl_N, cce_N = (field.contiguous() for field in rows)
    # Triton launches on the current device, even if the tensors are on another one
    with torch.cuda.device(logits_NP.device) if logits_NP.is_cuda else nullcontext():
        sparse_rows[(num_rows,)](
            logits_NP,
            logits_NP.stride(0),
            ids_NK,
            p_NK,
            p_tail_N,
            labels_N,
            ckl_N,
            cce_N,
            kl_N,
            ce_N,
            settings.vocab_size,
            num_columns,
            ids_NK.shape[1],
            1 / settings.temperature,
            float(settings.beta),
            float(settings.softcap or 0.0),
            **constants,
            **options,
        )
    return kl_N, ce_N


def specialise(
    settings: RowSettings, want_gradient: bool, num_logit_bytes: int, num_columns: int, top_k: int
) -> tuple[dict[str, str | bool | int], dict[str, bool | int]]:
    """Return the constants for which a program is compiled, and the compiler's options.

    A thread has two loads of 128 bits in flight, or one if a second softmax or a softcap needs registers. More would
    spill registers on some architecture. The fusion of products and sums is set explicitly because Triton's default is
    about to change.
    """
    tempered, capped = settings.temperature != 1.0, settings.softcap is not None
    columns_a_thread = 8 if tempered or capped or num_logit_bytes == 4 else 16
    columns_a_load = 16 // num_logit_bytes
    num_block_columns = min(_THREADS * columns_a_thread, triton.next_power_of_2(num_columns))
    constants = {
        "DIVERGENCE": settings.divergence,
        "TEMPERED": tempered,
        "CAPPED": capped,
        "GRADIENT": want_gradient,
        "BLOCK_K": triton.next_power_of_2(max(1, top_k)),
        "BLOCK_V": num_block_columns,
        # at least 16, so that all vocabularies in a buffer with rows of a multiple of 16 share one program
        "BLOCK_REST": max(16, triton.next_power_of_2(num_columns - settings.vocab_size)),
        "LOAD_V": columns_a_load,
    }
    num_warps = max(1, num_block_columns // columns_a_thread // _THREADS_A_WARP)
    return constants, {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}
