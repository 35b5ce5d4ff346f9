"""Two ways to spend less, on a device's memory or on its time, for the same gradients."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from capgap.schemas.errors import InputError, MachineError


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep the inputs of layers alone and compute the rest again in the backward pass.

    Raises:
        InputError: transformers cannot do so with this architecture.
    """
    if not model.supports_gradient_checkpointing:
        raise InputError(
            "this model cannot compute its activations again",
            where=model.name_or_path or model.config.model_type,
            found="train.activation_checkpointing",
            expected="an architecture that transformers can checkpoint",
            fix="leave train.activation_checkpointing out, and lower train.micro_batch_sequences",
        )
    # the reentrant kind drops the gradients of a layer whose input has none, and is not for compiled layers
    model.gradient_checkpointing_enable({"use_reentrant": False})


def compile_decoder(decoder: nn.Module, device: torch.device) -> None:
    """Let torch.compile make the decoder's kernels at its first batch; its parameters keep their names.

    Raises:
        MachineError: nothing can be compiled on this machine.
    """
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except RuntimeError as error:  # dynamo's own errors are such
        raise MachineError(
            "torch.compile does not work on this machine",
            where="train.compile",
            found=str(error).strip().partition("\n")[0],
            expected="a C++ compiler" if device.type == "cpu" else "a C compiler",
            fix="install g++, or leave train.compile out",
        ) from None
    decoder.compile()


def _probe(numbers_N: torch.Tensor) -> torch.Tensor:
    return numbers_N.sin() + 1
