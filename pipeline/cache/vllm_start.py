"""Checks and settings before vLLM starts: the package, the platform, the model's sizes, and room for a chunk of logits.

A chunk takes `chunk_rows` x columns of the head x 18 bytes of memory, and 8 bytes more per logit where the head is
spread over several devices. Measured values are 8 to 16.4 bytes per logit: the logits, their probabilities, and one or
two more copies in float32 at a temperature other than 1, or where more than a sixteenth of the columns is padding. The
8 further bytes are the logits of each device and the logits gathered from all devices.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from typing import Any

from capgap.pipeline.models.complete import require_complete
from capgap.pipeline.models.configs import load_config
from capgap.pipeline.stage.device import cpu_has, warn_of_slow_products
from capgap.pipeline.store.extras import adding
from capgap.schemas.errors import InputError, MachineError

VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Linux's names of the instruction sets that add products of 8-bit integers in 32 bits."""

_MIN_KV_CACHE_BYTES = 128 << 20
_BYTES_PER_LOGIT = 18
_BYTES_PER_GATHERED_LOGIT = 8


def require_vllm(setting: str = "cache.engine") -> None:
    """Raise MachineError where vLLM is not installed; the error names `setting` as the setting that asks for vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise MachineError(
            "vLLM is not installed",
            where=f"{setting}: vllm",
            fix=f"run `make venv` in a clone, or on a machine with a GPU {adding('teacher')}; "
            f"or set {setting} to transformers, which is slower",
        )


def leave_cores_unbound() -> None:
    """Tell vLLM not to bind threads to cores: by default it binds all engines of a machine to the same cores."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def set_environment(device: str, num_workers: int) -> None:
    """Set the environment variables that vLLM reads at its import, and silence its start-up notices.

    Args:
        device: `cpu` or `cuda:0`.
        num_workers: number of worker processes that share one teacher.
    """
    if device == "cpu" and num_workers > 1:
        # vLLM's default binding of workers to cores needs one memory node per worker
        leave_cores_unbound()
    # in this process, so that no engine process can outlive it; the workers on further devices end with this process
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # a user of capgap can do nothing about these start-up notices
    logging.getLogger("torch._library").setLevel(logging.ERROR)
    # on a CPU it says that Triton has no backend there and that the first generation of the model runner is used
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="vllm")
    # vLLM generates one token after a request of L tokens, but never computes that token's position
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")


def silence_dumps() -> None:
    """Stop vLLM from logging a whole batch before an error. Call it after vLLM has set up its loggers."""
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)


def require_platform(device: str, setting: str = "cache.engine") -> None:
    """Raise MachineError where vLLM was built for another kind of device than `device`, which the stage has leased."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != (device == "cpu"):
        raise MachineError(
            "the installed vLLM was built for another kind of device",
            where=f"{setting}: vllm",
            found=f"a build for {current_platform.device_name}",
            expected=f"one for {device}",
            fix=f"change device, or set {setting} to transformers",
        )


def teacher_config(
    path: str, seq_len: int, device: str, trust_remote_code: bool = False, setting: str = "cache.engine"
) -> Any:
    """Load the teacher's configuration, and check that vLLM can run the teacher on this machine.

    Raises:
        InputError: the teacher has fewer positions than `seq_len`, or its weights are not complete.
        MachineError: vLLM does not support the size of its attention heads or the format of its weights on this
            machine, or a package that vLLM needs is missing.
    """
    config = load_config(path, trust_remote_code)
    # vLLM itself would leave missing weights of a linear layer uninitialized, without an error
    require_complete(path, trust_remote_code, config)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < seq_len:
        raise InputError(
            "the model takes shorter sequences than the corpus has",
            where=path,
            found=f"max_position_embeddings = {positions}",
            expected=f"at least corpus.seq_len = {seq_len}",
            fix="lower corpus.seq_len",
        )
    if getattr(config, "vision_config", None) is not None and importlib.util.find_spec("torchvision") is None:
        raise MachineError(
            "vLLM imports torchvision for a model with vision, although only text is scored",
            where=path,
            found="no torchvision",
            fix=f"install a torchvision that was built for this torch, or set {setting} to transformers",
        )
    if device == "cpu":
        _require_head_size(config, path, setting)
        _require_products(config, path, setting)
    return config


def require_runs_on_cpu(config: Any, dtype: Any, num_stages: int) -> None:
    """Raise MachineError for settings with which vLLM's build for CPUs starts and then fails or crashes.

    A dtype that is only slow on this CPU gives a warning.

    Args:
        config: the teacher's whole configuration.
        dtype: dtype that the teacher is to run in.
        num_stages: number of pipeline stages, the groups of devices that the layers are divided among.
    """
    if num_stages > 1:
        raise MachineError(
            "vLLM has no pipeline parallelism on CPUs",
            where="cache.engine_args.pipeline_parallel_size",
            found=num_stages,
            expected="1 on a CPU",
            fix="use cache.tensor_parallel, or a GPU",
        )
    # vLLM's integer product needs bfloat16 for the tensors that are not quantised; float16 even crashes the process
    if _has_integer_activations(config) and str(dtype).removeprefix("torch.") != "bfloat16":
        raise MachineError(
            "vLLM multiplies int8 on a CPU in bfloat16 alone",
            where="cache.dtype",
            found=str(dtype).removeprefix("torch."),
            expected="bfloat16",
            fix="set cache.dtype to bfloat16",
        )
    warn_of_slow_products("vLLM", "cpu", str(dtype).removeprefix("torch."), "set cache.dtype to float32")


def quantisation_of(config: Any) -> str:
    """Return the name of a checkpoint's quantisation, for messages; empty if it is not quantised."""
    settings = quantisation_settings(config)
    names = dict.fromkeys(str(settings[key]) for key in ("quant_method", "format", "quant_algo") if settings.get(key))
    return ", ".join(names)


def quantisation_settings(config: Any) -> dict[str, Any]:
    """Return the `quantization_config` of `config.json`; empty if the checkpoint is not quantised."""
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else dict(found.to_dict())


def head_settings(config: Any) -> dict[str, Any]:
    """Return the arguments with which vLLM computes logits in float32.

    They are empty for a quantised head, whose logits vLLM computes in the model's dtype only.
    """
    return {} if has_low_bit_head(config) else {"hf_overrides": {"head_dtype": "float32"}}


def has_low_bit_head(config: Any) -> bool:
    """Return whether the head is quantised, by the settings of compressed-tensors or GPTQ."""
    settings = quantisation_settings(config)
    groups = [one for one in (settings.get("config_groups") or {}).values() if isinstance(one, dict)]
    return bool(settings.get("lm_head")) or any("lm_head" in str(target) for one in groups for target in one["targets"])


def has_packed_weights(config: Any) -> bool:
    """Return whether several low-bit integers are packed into one number, as in compressed-tensors, GPTQ and AWQ."""
    settings = quantisation_settings(config)
    groups = [one for one in (settings.get("config_groups") or {}).values() if isinstance(one, dict)]
    formats = {settings.get("format"), *(one.get("format") for one in groups)}
    return "pack-quantized" in formats or settings.get("quant_method") in ("gptq", "awq")


def _has_integer_activations(config: Any) -> bool:
    groups = quantisation_settings(config).get("config_groups") or {}
    activations = [one.get("input_activations") or {} for one in groups.values() if isinstance(one, dict)]
    return any(one.get("type") == "int" for one in activations)


def llm_settings(path: str, config: Any, device: str, trust_remote_code: bool, dtype: str = "auto") -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` that all of capgap's vLLM engines have in common.

    Args:
        path: the model's folder or id.
        config: the model's whole configuration.
        device: `cpu` or a GPU's name.
        trust_remote_code: whether to run code that comes with the model.
        dtype: dtype of weights and activations; `auto` is the dtype of the saved weights.
    """
    return {
        "model": path,
        "trust_remote_code": trust_remote_code,
        "load_format": "safetensors",  # never opens a pickled file
        "dtype": saved_dtype(config) if dtype == "auto" else dtype,
        "enable_prefix_caching": False,  # a token that was computed before would get no row
        "enforce_eager": device == "cpu",
        "skip_tokenizer_init": True,
        "language_model_only": True,  # only the language part of a multimodal model
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def saved_dtype(config: Any) -> Any:
    """Return the dtype that the configuration names for the language model, or else for the whole model.

    vLLM's own `auto` rounds float32 to bfloat16, so the cache would hold another teacher than the one eval measures.
    """
    return config.get_text_config().dtype or config.dtype or "auto"


def chunk_bytes(num_columns: int, chunk_rows: int, tensor_parallel: int) -> int:
    """Return an upper bound on the bytes that capture adds to a device's peak: all copies of one chunk's logits."""
    per_logit = _BYTES_PER_LOGIT + (_BYTES_PER_GATHERED_LOGIT if tensor_parallel > 1 else 0)
    return num_columns * chunk_rows * per_logit


def memory_settings(
    config: Any,
    device: str,
    batch_tokens: int,
    seq_len: int,
    gpu_memory_fraction: float,
    chunk_rows: int,
    tensor_parallel: int,
) -> dict[str, Any]:
    """Return vLLM's arguments about memory.

    Raises:
        MachineError: the memory of the GPU that vLLM leaves free does not hold a chunk of logits.
    """
    if device == "cpu":
        return {"kv_cache_memory_bytes": _kv_cache_bytes(config.get_text_config(), batch_tokens, seq_len)}
    from vllm.platforms import current_platform

    num_columns = int(config.get_text_config().vocab_size)
    total_bytes = current_platform.get_device_total_memory()
    require_room(total_bytes, gpu_memory_fraction, chunk_bytes(num_columns, chunk_rows, tensor_parallel), chunk_rows)
    return {"gpu_memory_utilization": gpu_memory_fraction}


def require_room(total_bytes: int, gpu_memory_fraction: float, needed_bytes: int, chunk_rows: int) -> None:
    """Raise MachineError where `needed_bytes` do not fit beside the share of a GPU that vLLM claims."""
    left_bytes = int(total_bytes * (1 - gpu_memory_fraction))
    if needed_bytes > left_bytes:
        fitting = max(1, chunk_rows * left_bytes // needed_bytes)
        raise MachineError(
            "no room for the logits of a chunk",
            where="cache.chunk_rows",
            found=f"{chunk_rows} rows, which take {needed_bytes / 2**30:.2f} GiB",
            expected=f"at most the {left_bytes / 2**30:.2f} GiB that cache.gpu_memory_fraction leaves",
            fix=f"lower cache.chunk_rows to {fitting}, or lower cache.gpu_memory_fraction",
        )


def _require_products(config: Any, path: str, setting: str) -> None:
    # vLLM's build for processors with only AVX2 lacks `cpu_gemm_wna16`, and would fail during the first forward pass
    if has_packed_weights(config) and not cpu_has("avx512f"):
        raise MachineError(
            "vLLM has no product with packed weights of few bits for this processor",
            where=path,
            found=f"{quantisation_of(config)}, and no AVX-512",
            fix=f"set {setting} to transformers, or take a machine with AVX-512 or a GPU",
        )
    # without VNNI, oneDNN adds two products of 8 bits in 16 bits, which saturate: the logits are silently wrong
    if _has_integer_activations(config) and not cpu_has(*VNNI):
        raise MachineError(
            "vLLM multiplies int8 wrongly on this processor",
            where=path,
            found=f"{quantisation_of(config)}, and no VNNI: sums of products are cut off at 16 bits",
            fix=f"set {setting} to transformers, or take a machine with VNNI or a GPU",
        )


def _require_head_size(config: Any, path: str, setting: str) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, possible = _head_size(config.get_text_config()), CPUAttentionBackend.get_supported_head_sizes()
    if size is not None and size not in possible:
        raise MachineError(
            "vLLM cannot run this model on a CPU",
            where=path,
            found=f"attention heads of size {size}",
            expected=f"one of {', '.join(map(str, possible))}",
            fix=f"set {setting} to transformers",
        )


def _head_size(config: Any) -> int | None:
    """Return the size of an attention head; None for a model without attention, such as Mamba."""
    num_heads: int | None = getattr(config, "num_attention_heads", None)
    if num_heads is None:
        return None
    latent: int | None = getattr(config, "qk_nope_head_dim", None)
    if latent is not None:
        # DeepSeek's latent attention: its `head_dim` is only the rotated part of a head
        return latent + int(config.qk_rope_head_dim)
    size: int = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return size


def _kv_cache_bytes(config: Any, batch_tokens: int, seq_len: int) -> int:
    """Return the bytes of a cache for twice the tokens of a step: a sequence leaves once its last token is scored."""
    size = _head_size(config)
    if size is None:
        return _MIN_KV_CACHE_BYTES
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token: int = 2 * config.num_hidden_layers * heads * size * 4
    return max(_MIN_KV_CACHE_BYTES, per_token * 2 * (batch_tokens + seq_len))
