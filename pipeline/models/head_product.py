"""The product of hidden states with an output head, summed in float32 whatever the head's dtype is.

Logits that are rounded to bfloat16 change the kept ids of about half of all rows, so neither a cache nor an evaluation
may be made from them. The product of two 16-bit numbers is exact in float32, so only the sums need float32. A GPU
does this in one matrix product. Elsewhere the head is converted one block of columns at a time, so that no float32 copy
of the whole head is ever in memory.

Legend: N rows, H hidden, V columns of the head.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from capgap.kernels.sparse_kl.chunks import has_wide_products

# Elements of a block that is converted to float32, which are 16 MiB.
_BLOCK_ELEMENTS = 2**22


def float32_logits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Return the logits [..., V] of hidden states [..., H] in float32, or in float64 if the weights are float64.

    It is meant for inference: gradients are not supported.

    Args:
        hidden_NH: hidden states [..., H] of any floating-point dtype.
        weight_VH: the head's weights in their own dtype.
        bias_V: the head's bias in the same dtype; None where it has none.
    """
    if weight_VH.dtype not in (torch.bfloat16, torch.float16):
        return linear(hidden_NH.to(weight_VH.dtype), weight_VH, bias_V)
    rows_NH = hidden_NH.flatten(0, -2)
    if has_wide_products(weight_VH.device) and hidden_NH.dtype == weight_VH.dtype:
        logits_NV = torch.mm(rows_NH, weight_VH.t(), out_dtype=torch.float32)
    else:
        logits_NV = _block_by_block(rows_NH.float(), weight_VH)
    if bias_V is not None:
        logits_NV += bias_V
    return logits_NV.view(*hidden_NH.shape[:-1], len(weight_VH))


def head_logits(head: nn.Linear, hidden_NH: Tensor) -> Tensor:
    """Return `float32_logits` of a head; an unpacked low-bit head with rounded activations rounds its input first."""
    scheme = getattr(head, "quantization_scheme", None)
    if scheme is not None and scheme.input_activations is not None:
        from compressed_tensors.quantization.lifecycle.forward import forward_quantize

        from capgap.pipeline.models.low_bit import eager_on

        with eager_on(hidden_NH.device):
            # the library gives each token its own scale only if the input has a dimension for sequences
            rows_N1H = hidden_NH.float().reshape(-1, 1, hidden_NH.shape[-1])
            rounded_N1H = forward_quantize(head, rows_N1H, "input", scheme.input_activations)
            hidden_NH = rounded_N1H.reshape(hidden_NH.shape)
    return float32_logits(hidden_NH, head.weight, getattr(head, "bias", None))


def operands(head: nn.Linear, hidden_BLH: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states and the weight [V, H] that a head multiplies; a low-bit head gives rounded ones."""
    rounding = getattr(head, "operands", None)
    return (hidden_BLH, head.weight) if rounding is None else rounding(hidden_BLH)


def sum_head_in_float32(model: nn.Module) -> None:
    """Make a model's output head return logits in float32 from now on; its weights, tied or not, do not change."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, nn.Linear) and head.weight.dtype in (torch.bfloat16, torch.float16):
        product = partial(head_logits, head)
        head.forward = product  # type: ignore[method-assign]


def _block_by_block(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
    logits_NV = hidden_NH.new_empty(len(hidden_NH), len(weight_VH))
    num_columns = max(1, _BLOCK_ELEMENTS // weight_VH.shape[1])
    for start in range(0, len(weight_VH), num_columns):
        part = slice(start, start + num_columns)
        logits_NV[:, part] = hidden_NH @ weight_VH[part].float().t()
    return logits_NV
