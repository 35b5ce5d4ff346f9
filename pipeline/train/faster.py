"""Two ways to save a device's memory or time with the same gradients: activation checkpointing and compilation."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from capgap.schemas.errors import InputError, MachineError


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of the layers, and compute all other activations again in the backward pass.

    Raises:
        InputError: Transformers does not support this for the architecture.
    """
    if not model.supports_gradient_checkpointing:
        raise InputError(
            "this model does not support activation checkpointing",
            where=model.name_or_path or model.config.model_type,
            found="train.activation_checkpointing",
            expected="an architecture that transformers can checkpoint",
            fix="leave train.activation_checkpointing out, and lower train.micro_batch_sequences",
        )
    # Reentrant checkpointing loses the gradients of a layer whose input needs none, and cannot be compiled.
    model.gradient_checkpointing_enable({"use_reentrant": False})


def compile_layers(model: PreTrainedModel, decoder: nn.Module, device: torch.device) -> None:
    """Let torch.compile compile each layer of a decoder at its first batch; parameters keep their names.

    Layers of one kind share the compiled code. The code around the layers is not compiled: there transformers makes the
    attention mask, which it leaves out for plainly causal rows only as long as it is not traced. With an explicit mask,
    flash attention would not be used.

    Args:
        model: The model that contains the decoder.
        decoder: The part of the model whose layers are compiled.
        device: The device of the training.

    Raises:
        MachineError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except RuntimeError as error:  # the errors of dynamo are subclasses
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
    """Return the layers of a part of a model.

    They are the modules that transformers never splits across devices, or else those of the longest `ModuleList`.
    """
    names = set(model._no_split_modules or ())
    # FSDP2 replaces the class of a module by a subclass with another name, so base classes are compared too.
    named = [one for one in part.modules() if names & {kind.__name__ for kind in type(one).__mro__}]
    if named:
        return named
    lists = [list(one) for one in part.modules() if isinstance(one, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _probe(numbers_N: torch.Tensor) -> torch.Tensor:
    return numbers_N.sin() + 1
