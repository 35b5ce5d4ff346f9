"""Checks, before the first step, that a training fits a device's memory and a model's number of positions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from capgap.pipeline.models.configs import max_positions
from capgap.schemas.errors import InputError, MachineError
from capgap.schemas.run_optimization import OptimizationSettings

_GIB = 2**30
_STATES_PER_PARAMETER = 2  # AdamW's running means of the gradient and of its square, in the weight's dtype
# Bytes of activations for each token, layer and unit of hidden size, in 16 bits, with an attention that stores no
# quadratic matrix (Korthikanti et al., arXiv 2205.05198). With checkpointing, only the inputs of the layers are kept.
_ACTIVATION_BYTES, _CHECKPOINTED_BYTES = 34, 2


def require_positions(model: PreTrainedModel, seq_len: int) -> None:
    """Raise InputError if sequences have more positions than the model."""
    limit = max_positions(model.config)
    if limit is not None and seq_len > limit:
        raise InputError(
            "the sequences are longer than the model takes",
            where=model.name_or_path or model.config.model_type,
            found=f"sequences of {seq_len} tokens, max_position_embeddings = {limit}",
            expected=f"at most {limit}",
            fix="lower corpus.seq_len, or take a model with more positions",
        )


def require_memory(
    model: PreTrainedModel, settings: OptimizationSettings, device: str, seq_len: int, num_parts: int = 1
) -> None:
    """Refuse a model whose weights, gradients and AdamW states alone take more memory than the device has free.

    Memory that the model already holds on the device counts as free. Activations are named in the error but never cause
    it, because they are only estimated.

    Args:
        model: The model, which may be on the meta device.
        settings: The settings of the training.
        device: The device of the training, such as `cpu` or `cuda:0`.
        seq_len: Number of tokens in a sequence, for the estimate of the activations.
        num_parts: Number of devices among which the parameters are divided.

    Raises:
        MachineError: The model does not fit. The error names the sum and its parts.
    """
    weights = sum(p.nbytes for p in model.parameters())
    # Parts that do not contribute to the logits, such as a vision tower, are not trained.
    parts = (model.get_decoder(), model.get_output_embeddings())
    trained = sum(p.nbytes for p in {p for part in parts for p in part.parameters()} if p.requires_grad)
    weights, trained, rounded = weights // num_parts, trained // num_parts, rounded_bytes(model, settings)
    needed, free = (
        weights + trained * (1 + _STATES_PER_PARAMETER) + rounded,
        free_bytes(device) + held_bytes(model, device),
    )
    if needed <= free:
        return
    activations = activation_bytes(model, settings, seq_len)
    raise MachineError(
        "the model does not fit into this device's memory",
        where=device,
        found=f"{_gib(free)} free",
        expected=f"at least {_gib(needed)}: {_gib(weights)} of weights, {_gib(trained)} of gradients, "
        f"{_gib(trained * _STATES_PER_PARAMETER)} of AdamW's states"
        + (f", {_gib(rounded)} of weights in few bits" if rounded else "")
        + f"; and about {_gib(activations)} of activations",
        fix="train a smaller model"
        + (", or with precision bf16-true" if settings.precision != "bf16-true" else ", or on a larger device"),
    )


def held_bytes(model: PreTrainedModel, device: str) -> int:
    """Return the bytes of the model's parameters that are on the device already."""
    return sum(p.nbytes for p in model.parameters() if p.device.type == torch.device(device).type)


def rounded_bytes(model: PreTrainedModel, settings: OptimizationSettings) -> int:
    """Return the bytes that low-bit layers keep for the backward pass: the rounded weights with which they compute.

    With activation checkpointing only the head keeps them; the other layers compute them again, one after the other.
    """
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    if settings.activation_checkpointing:
        layers = [layer for layer in layers if layer is model.get_output_embeddings()]
    return sum(layer.weight.nbytes for layer in layers if type(layer).forward is not nn.Linear.forward)


def activation_bytes(model: PreTrainedModel, settings: OptimizationSettings, seq_len: int) -> int:
    """Estimate the bytes of a micro-batch's activations."""
    config = model.config.get_text_config()
    each = _CHECKPOINTED_BYTES if settings.activation_checkpointing else _ACTIVATION_BYTES
    wide = 2 if settings.precision == "32-true" else 1
    return settings.micro_batch * seq_len * int(config.hidden_size) * int(config.num_hidden_layers) * each * wide


def free_bytes(device: str) -> int:
    """Return the number of bytes that a process could still allocate on the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min(available, *_container_bytes(Path("/sys/fs/cgroup")))


def _container_bytes(group: Path) -> list[int]:
    """Return the bytes that a container's memory limit leaves free, in a list of one; its file cache counts as free.

    The two sets of file names are those of cgroup v2 and v1. Without a limit the value is larger than any memory.
    """
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        paths = group / limit, group / used, (group / limit).parent / "memory.stat"
        if not all(path.is_file() for path in paths):
            continue
        most, now, stat = (path.read_text().strip() for path in paths)
        if most.isdigit():
            counts = dict(line.split() for line in stat.splitlines())
            return [max(int(most) - int(now) + int(counts.get(cache, 0)), 0)]
    return [2**63]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.3g} GiB"
