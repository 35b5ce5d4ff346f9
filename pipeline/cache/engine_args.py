"""Checks of `cache.engine_args`, the arguments of vLLM in a run file, by name and before anything is made.

An argument that capgap has a setting for is refused with the name of that setting, and an argument that would change
the content of a row is refused with the reason.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from capgap.schemas.errors import SettingError

_SETTING = "cache.engine_args"

_OWN_SETTINGS = {
    "model": "teacher.path",
    "tokenizer": "corpus.tokenizer",
    "dtype": "cache.dtype",
    "tensor_parallel_size": "cache.tensor_parallel",
    "data_parallel_size": "cache.replicas",
    "gpu_memory_utilization": "cache.gpu_memory_fraction",
    "max_num_batched_tokens": "cache.batch_tokens",
    "trust_remote_code": "teacher.trust_remote_code",
    "max_model_len": "corpus.seq_len",
    "hf_token": "the environment variable HF_TOKEN",
}
"""Arguments of vLLM that capgap has a setting for, and the setting."""

_IDS = "capgap hands token ids in and takes rows out, without vLLM's tokenizer"
_CACHED = "a token that was computed before gets no row"
_OWN = "a cache keeps the teacher's own distribution"
_TEXT = "only a model that continues text has rows"
_ALIGNMENT = "rows of tokens that are only drafted would come between"
_BREAKING = {
    "skip_tokenizer_init": _IDS,
    "tokenizer_mode": _IDS,
    "enable_prefix_caching": _CACHED,
    "enable_mamba_shared_prefix_checkpoint": _CACHED,
    "kv_sharing_fast_prefill": "a token of the prompt gets no row of its own",
    "speculative_config": _ALIGNMENT,
    "spec_method": _ALIGNMENT,
    "spec_model": _ALIGNMENT,
    "spec_tokens": _ALIGNMENT,
    "logprobs_mode": _OWN,
    "max_logprobs": "a cache keeps as many as cache.top_k",
    "logits_processors": _OWN,
    "worker_extension_cls": "rows are captured by an extension of capgap's own",
    "runner": _TEXT,
    "convert": _TEXT,
    "pooler_config": _TEXT,
    "mm_encoder_only": _TEXT,
    "enable_prompt_embeds": _IDS,
    "tokens_only": _IDS,
    "enable_sleep_mode": "nobody would wake the engine",
    "data_parallel_rank": "cache.replicas are engines of their own, each with all of its shards",
}
"""Arguments of vLLM that would make a cache's rows wrong or incomplete, and the reason."""

_LOAD_FORMATS = (
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
    "runai_streamer_sharded",
    "bitsandbytes",
)
"""Values of `load_format` that never open a pickled file."""


def require_engine_args(given: Mapping[str, Any]) -> None:
    """Refuse arguments that the installed vLLM does not know, or that would break what a cache promises.

    Raises:
        SettingError: an argument is unknown, capgap's own, or breaks exactness.
    """
    if not given:
        return
    from vllm import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name, value in given.items():
        where = f"{_SETTING}.{name}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]}?" if near else None
            raise SettingError("this vLLM has no such argument", where=where, found=value, fix=fix)
        if name in _OWN_SETTINGS:
            raise SettingError(
                "capgap has a setting for it",
                where=where,
                found=value,
                expected=_OWN_SETTINGS[name],
                fix="use that setting",
            )
        if name in _BREAKING:
            raise SettingError(
                f"would break exactness: {_BREAKING[name]}", where=where, found=value, fix="leave it out"
            )
        if name == "load_format" and value not in _LOAD_FORMATS:
            raise SettingError(
                "may open pickled files", where=where, found=value, expected=f"one of {', '.join(_LOAD_FORMATS)}"
            )


def with_engine_args(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`: capgap's own, replaced by the run file's; `hf_overrides` are merged."""
    own, others = dict(settings.get("hf_overrides", {})), dict(given)
    overrides = others.pop("hf_overrides", {})
    return {**settings, **others, "hf_overrides": own | overrides}
