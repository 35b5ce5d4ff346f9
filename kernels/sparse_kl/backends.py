"""The choice of the rows kernel: Triton's on a GPU, torch's everywhere else."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from capgap.kernels.sparse_kl.rows import Backend, RowsKernel
from capgap.kernels.sparse_kl.torch_rows import torch_rows

_TRITON_IS_INSTALLED = find_spec("triton") is not None


def kernel_for(backend: Backend, device: torch.device, dtype: torch.dtype) -> RowsKernel:
    """Return the rows kernel of a backend for logits of a dtype on a device.

    Raises:
        ValueError: There is no such backend, or it does not support the device or the dtype.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: got {backend!r} on {device}, expected auto, torch or triton")
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        why = _why_no_triton(device, dtype)
        if why is None:
            from capgap.kernels.sparse_kl.triton_rows import triton_rows  # imported only if Triton is installed

            return triton_rows
        if backend == "triton":
            raise ValueError(f"backend: got 'triton' on {device} in {dtype}, expected auto or torch; {why}")
    return torch_rows


def _why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _TRITON_IS_INSTALLED:
        return "triton is not installed"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return "the Triton kernel is for float16, bfloat16 and float32"
    if device.type == "cuda" and torch.version.hip is not None:
        # threads read after a barrier what others have stored, and AMD's barrier does not wait for stores to memory
        return "the Triton kernel is for NVIDIA's GPUs; on AMD's its barriers do not order memory"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        old = f"the Triton kernel needs compute capability 8.0 or more, and this is {major}.{minor}"
        return None if major >= 8 else old
    from capgap.kernels.sparse_kl.triton_rows import INTERPRETED

    if device.type == "cpu" and INTERPRETED:
        return None
    return "the Triton kernel runs on a GPU, and under TRITON_INTERPRET=1 on a CPU"
