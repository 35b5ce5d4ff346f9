"""What must hold before vLLM is started: the package, the platform, the model's sizes, and room for a chunk of logits.

Memory of a chunk: `chunk_rows` x columns of the head x 18 bytes, and 8 more where the head is spread over several
devices. Measured are 8 to 16.4: the logits, their probabilities, and at a temperature or with padding columns one or
two more copies in float32. The 8 are the logits of each device and those of all of them, gathered.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from typing import Any

from capgap.pipeline.models.complete import require_complete
from capgap.pipeline.models.configs import load_config
from capgap.schemas.errors import InputError, MachineError

_MIN_KV_CACHE_BYTES = 128 << 20
_BYTES_PER_LOGIT = 18
_BYTES_PER_GATHERED_LOGIT = 8


def require_vllm(setting: str = "cache.engine") -> None:
    """Raise MachineError where vLLM is not installed; `setting` is the one that asks for it."""
    if importlib.util.find_spec("vllm") is None:
        raise MachineError(
            "vLLM is not installed",
            where=f"{setting}: vllm",
            fix="run `make venv`, or `pip install capgap[teacher]` on a machine with a GPU; "
            f"or set {setting} to transformers, which is slower",
        )


def set_environment(device: str, tensor_parallel: int) -> None:
    """What vLLM reads from the environment when it is imported."""
    if device == "cpu" and tensor_parallel > 1:
        # its own way of binding workers to cores asks for one memory node each
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # in process: no engine process that could outlive this one; a worker on each further device ends with this process
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # start-up notices that a user of capgap cannot act on
    logging.getLogger("torch._library").setLevel(logging.ERROR)
    # on a CPU: that Triton has no backend for it, so the first generation of the model runner is used
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="vllm")
    # a request of L tokens generates one more, whose position is never computed
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")


def silence_dumps() -> None:
    """No pages of a whole batch before the line that names a fault; to be called once vLLM has set its loggers up."""
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)


def require_platform(device: str, setting: str = "cache.engine") -> None:
    """Raise MachineError where vLLM was built for another device than the one that the stage has leased."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != (device == "cpu"):
        raise MachineError(
            "the installed vLLM runs elsewhere",
            where=f"{setting}: vllm",
            found=f"a build for {current_platform.device_name}",
            expected=f"one for {device}",
            fix=f"change device, or set {setting} to transformers",
        )


def teacher_config(
    path: str, seq_len: int, device: str, trust_remote_code: bool = False, setting: str = "cache.engine"
) -> Any:
    """The configuration of the teacher's language model.

    Raises:
        InputError: its positions are fewer than `seq_len`, or its weights are not complete.
        MachineError: vLLM has no attention of its shape here.
    """
    whole = load_config(path, trust_remote_code)
    # vLLM itself leaves what is missing of a linear layer as the memory was
    require_complete(path, trust_remote_code, whole)
    config = whole.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < seq_len:
        raise InputError(
            "the model takes shorter sequences than the corpus has",
            where=path,
            found=f"max_position_embeddings = {positions}",
            expected=f"at least corpus.seq_len = {seq_len}",
            fix="lower corpus.seq_len",
        )
    if device == "cpu":
        _require_head_size(config, path, setting)
    return config


def saved_dtype(config: Any) -> Any:
    """vLLM's own `auto` rounds float32 to bfloat16: the cache would hold another teacher than the one eval measures."""
    return config.dtype if config.dtype is not None else "auto"


def chunk_bytes(config: Any, chunk_rows: int, tensor_parallel: int) -> int:
    """What capture adds to a device's peak: a bound on all copies of the logits of one chunk."""
    per_logit = _BYTES_PER_LOGIT + (_BYTES_PER_GATHERED_LOGIT if tensor_parallel > 1 else 0)
    return int(config.vocab_size) * chunk_rows * per_logit


def memory_settings(
    config: Any,
    device: str,
    batch_tokens: int,
    seq_len: int,
    gpu_memory_fraction: float,
    chunk_rows: int,
    tensor_parallel: int,
) -> dict[str, Any]:
    """vLLM's arguments about memory.

    Raises:
        MachineError: what vLLM leaves of a GPU does not hold a chunk of logits.
    """
    if device == "cpu":
        return {"kv_cache_memory_bytes": _kv_cache_bytes(config, batch_tokens, seq_len)}
    from vllm.platforms import current_platform

    total_bytes = current_platform.get_device_total_memory()
    require_room(total_bytes, gpu_memory_fraction, chunk_bytes(config, chunk_rows, tensor_parallel), chunk_rows)
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


def _require_head_size(config: Any, path: str, setting: str) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, possible = _head_size(config), CPUAttentionBackend.get_supported_head_sizes()
    if size not in possible:
        raise MachineError(
            "vLLM cannot run this model on a CPU",
            where=path,
            found=f"attention heads of size {size}",
            expected=f"one of {', '.join(map(str, possible))}",
            fix=f"set {setting} to transformers",
        )


def _head_size(config: Any) -> int:
    latent: int | None = getattr(config, "qk_nope_head_dim", None)
    if latent is not None:
        # of DeepSeek's latent attention, whose configuration calls the rotated part of a head its size
        return latent + int(config.qk_rope_head_dim)
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _kv_cache_bytes(config: Any, batch_tokens: int, seq_len: int) -> int:
    """Room for twice the tokens of a step: a sequence leaves as soon as its last token is scored."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token: int = 2 * config.num_hidden_layers * heads * _head_size(config) * 4
    return max(_MIN_KV_CACHE_BYTES, per_token * 2 * (batch_tokens + seq_len))
