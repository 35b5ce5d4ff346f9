"""Check that a given model is complete: compare the headers of its files with the empty model of its configuration.

    safetensors headers --transformers' own renamings--> names and shapes --against--> the model on the device `meta`

transformers fills missing weights with random numbers, and vLLM leaves them uninitialized; both go on. This check finds
them before a weight is read. Only transformers knows which names a checkpoint may have, so its own loading does the
comparison, with tensors that have a shape but no data.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from capgap.pipeline.models.configs import empty_model, load_config
from capgap.pipeline.models.weight_files import TensorHeader, are_equal, read_headers
from capgap.schemas.errors import InputError

_LOG = logging.getLogger("capgap")

_MOST_NAMED = 3
# quantisation methods whose files always hold some tensor of a type that is not in _FLOATS
_PACKING = ("bitsandbytes", "gptq", "awq", "fp8", "fbgemm_fp8", "mxfp4")
_FLOATS = ("F64", "F32", "F16", "BF16")

# Marks that wrappers put into the names of tensors, and the wrapper.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT, whose adapters are not merged",
    "module.": "DataParallel",
}
# Parts of a checkpoint that the language model does not need: encoders of images and audio, heads of reward models,
# layers that predict further tokens, and constants that older versions saved like weights.
_BESIDE = re.compile(
    r"(^|\.)(vision\w*|visual|audio\w*|image\w*|speech\w*|\w*projector|embed_vision|embed_audio|v_head|score|mtp\w*)\.|"
    r"(rotary_emb\.inv_freq|\.masked_bias|attn\.bias|\.position_ids|num_batches_tracked)$"
)


def require_complete(path: str, trust_remote_code: bool = False, config: Any = None) -> None:
    """Raise unless a model's files hold every weight, complete and in the right shape, without reading any weights.

    Only two tied weights that are both in the files are read, to compare them.

    Args:
        path: the model's folder or id.
        trust_remote_code: whether to run code that comes with the model.
        config: the model's configuration if it is loaded already, else None.

    Raises:
        InputError: a file is missing, a Git LFS pointer, cut off or damaged; tensors are missing, unexpected or have
            other shapes; or the model does not exist.
        MachineError: the network fails.
    """
    config = load_config(path, trust_remote_code) if config is None else config
    headers = read_headers(path)
    model = empty_model(config, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        _require_quantised(config.quantization_config, headers, path)
        missing, other = _quantised(model, headers), list[str]()
        unexpected = {name for name in headers if _wrapper(name, model) is not None}
    else:
        missing, unexpected, other = _compared(model, headers)
    beside = {name for name in unexpected if _BESIDE.search(name)}
    unexpected -= beside
    if missing or unexpected or other:
        raise _refusal(path, model, missing, unexpected, other)
    for name, source in model.all_tied_weights_keys.items():
        if name in headers and source in headers and not are_equal(path, name, source):
            raise InputError(
                "config.json ties two weights, but the files hold different values for them",
                where=path,
                found=f"{name} differs from {source}",
                expected="equal values",
                fix=f"set tie_word_embeddings to false in config.json, or remove {name} from the files",
            )
    if beside:
        _LOG.info("%s: %d tensors beside the language model are left out: %s", path, len(beside), _some(beside))


def _require_quantised(settings: Any, headers: Mapping[str, TensorHeader], path: str) -> None:
    """Raise InputError for weights that were dequantised while their configuration still declares a quantisation."""
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = getattr(method, "value", method)
    if method in _PACKING and all(one.dtype in _FLOATS for one in headers.values()):
        raise InputError(
            "the weights are not quantised, though config.json says so",
            where=path,
            found=f"quant_method {method}, and tensors of {', '.join(sorted({one.dtype for one in headers.values()}))}",
            expected="tensors of fewer bits",
            fix="take quantization_config out of config.json, or download the quantised weights again",
        )


def _compared(model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> tuple[set[str], set[str], list[str]]:
    """Return the missing names, the unexpected names, and a text for each tensor of another shape or type."""
    state = {name: torch.empty(one.shape, device="meta") for name, one in headers.items()}
    # recorded before the loading, which replaces the model's parameters by the tensors
    types = {name: parameter.is_floating_point() for name, parameter in model.named_parameters()}
    how = LoadStateDictConfig(
        ignore_mismatched_sizes=True,
        device_map={"": "meta"},
        dtype=torch.float32,
        weight_mapping=get_model_conversion_mapping(model),
    )
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        found, _ = convert_and_load_state_dict_in_model(model, state, how)
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(found)
    finally:
        logging.getLogger("transformers").setLevel(level)
    other = [f"{name} {_shape(own)}, not {_shape(wanted)}" for name, own, wanted in sorted(found.mismatched_keys)]
    other += [
        f"{name} of type {one.dtype}, without a quantization_config"
        for name, one in headers.items()
        if types.get(name) and one.dtype not in _FLOATS
    ]
    return set(found.missing_keys), set(found.unexpected_keys), other


def _quantised(model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> set[str]:
    """Return the weights without any tensor; the tensors of a quantised weight have other names in the same module."""
    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    there: set[str] = set()
    for name in headers:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        there.update(_parents(name), _parents(renamed))
    tied = model.all_tied_weights_keys
    # the experts of a mixture are one tensor in the model, and separate modules in files
    return {
        name
        for name, _ in model.named_parameters()
        if name not in tied and name not in there and name.rpartition(".")[0] not in there
    }


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _wrapper(name: str, model: PreTrainedModel) -> str | None:
    """Return the mark that a wrapper put into a tensor's name; None if there is none or a module has that name."""
    for mark in _WRAPPERS:
        if (mark in name and mark != "module.") or name.startswith(mark):
            return None if mark.split(".")[0] in dict(model.named_children()) else mark
    return None


def _refusal(
    path: str, model: PreTrainedModel, missing: set[str], unexpected: set[str], other: list[str]
) -> InputError:
    found = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape or type", other))
        if names
    ]
    fix = "give all files of the model, or the config.json that belongs to them"
    mark = next((mark for name in sorted(unexpected) if (mark := _wrapper(name, model))), None)
    if mark is not None:
        fix = f"save the model without its wrapper: {mark!r} in the names is put there by {_WRAPPERS[mark]}"
    elif (common := _common_prefix(missing - set(model.all_tied_weights_keys), unexpected)) is not None:
        fix = f"take the prefix {common!r} out of the tensors' names"
    return InputError(
        "the weights are not those of the model that config.json describes",
        where=path,
        found="; ".join(found),
        expected=f"every tensor of {type(model).__name__}, and no other",
        fix=fix,
    )


def _common_prefix(missing: set[str], unexpected: set[str]) -> str | None:
    """Return the prefix with which every missing name is among the unexpected names; None if there is none."""
    if not missing:
        return None
    first = min(missing)
    # only what stands before one of the missing names can be the prefix of all: a mixture of experts has many names
    prefixes = sorted(name.removesuffix(first) for name in unexpected if name.endswith(f".{first}"))
    return next((prefix for prefix in prefixes if all(prefix + one in unexpected for one in missing)), None)


def _some(names: Collection[str]) -> str:
    chosen = sorted(names)
    more = f" and {len(chosen) - _MOST_NAMED} more" if len(chosen) > _MOST_NAMED else ""
    return ", ".join(chosen[:_MOST_NAMED]) + more


def _shape(sizes: Any) -> str:
    return "x".join(map(str, sizes)) or "a single number"
