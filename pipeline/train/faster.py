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


def compile_layers(model: PreTrainedModel, decoder: nn.Module, device: torch.device) -> None:
    """Let torch.compile make the kernels of each layer of a decoder at its first batch; parameters keep their names.

    Layers of one kind share what is compiled. What stands around them stays as it is: transformers makes the attention
    mask there, and leaves it out where rows are plainly causal only as long as it is not traced. With a mask in its
    place no flash attention would be used.

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
    for layer in layers_of(model, decoder) or [decoder]:
        layer.compile()


def layers_of(model: PreTrainedModel, part: nn.Module) -> list[nn.Module]:
    """The layers within a part of a model: what transformers keeps together on one device, or else the longest list."""
    names = set(model._no_split_modules or ())
    # FSDP2 puts a subclass of another name in the place of a module's class
    named = [one for one in part.modules() if names & {kind.__name__ for kind in type(one).__mro__}]
    if named:
        return named
    lists = [list(one) for one in part.modules() if isinstance(one, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _probe(numbers_N: torch.Tensor) -> torch.Tensor:
    return numbers_N.sin() + 1
