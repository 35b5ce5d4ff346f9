"""The teacher inside vLLM, in this process: prefill only, every row captured on the worker."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from capgap.pipeline.cache.scoring import Recording, Request, Scored, unpack
from capgap.pipeline.cache.vllm_worker import RequestKey
from capgap.pipeline.models import load_config
from capgap.schemas.errors import InputError, MachineError

_LOG = logging.getLogger("capgap")

# Head and log-softmax run in float32 in both places; only the batch of the matrix product differs.
_GREEDY_TOLERANCE_NATS = 5e-3
_MIN_KV_CACHE_BYTES = 128 << 20


class VllmEngine:
    """One vLLM engine.

    Args:
        path: the teacher's folder or id.
        recording: what to keep.
        seq_len: L of every request.
        dtype: `auto` or a float type of the teacher's weights.
        batch_tokens: tokens that vLLM schedules at once.
        gpu_memory_fraction: share of the GPU's memory for weights and key-value cache.
        device: `cpu` or `cuda:0`.

    Raises:
        MachineError: vLLM is not installed, is of a version that cannot be captured, or cannot run the model here.
        InputError: the model's positions are fewer than `seq_len`.
    """

    def __init__(
        self,
        path: str,
        recording: Recording,
        seq_len: int,
        dtype: str,
        batch_tokens: int,
        gpu_memory_fraction: float,
        device: str,
    ) -> None:
        _require_vllm()
        _set_environment()
        import vllm

        _require_platform(device)
        _patch_front_end()
        config = load_config(path).get_text_config()
        if config.max_position_embeddings < seq_len:
            raise InputError(
                "the model takes shorter sequences than the corpus has",
                where=path,
                found=f"max_position_embeddings = {config.max_position_embeddings}",
                expected=f"at least corpus.seq_len = {seq_len}",
                fix="lower corpus.seq_len",
            )
        memory: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_fraction}
        if device == "cpu":
            _require_head_size(config, path)
            memory = {"kv_cache_memory_bytes": _kv_cache_bytes(config, batch_tokens, seq_len)}
        self._llm = vllm.LLM(
            model=path,
            dtype=_saved_dtype(config) if dtype == "auto" else dtype,
            max_model_len=seq_len + 1,
            max_num_batched_tokens=max(batch_tokens, seq_len + 1),
            max_num_seqs=max(1, min(1024, batch_tokens // 8)),
            enable_prefix_caching=False,
            enforce_eager=device == "cpu",
            skip_tokenizer_init=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            worker_extension_cls="capgap.pipeline.cache.vllm_worker.CaptureExtension",
            # with logits in bfloat16 half of all rows keep another set of ids
            hf_overrides={"head_dtype": "float32"},
            **memory,
        )
        self._recording = recording
        self._install(recording)
        self.name = f"vllm {vllm.__version__}"
        self.dtype = str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")
        self._params = vllm.SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0, logprobs=0
        )

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """As `Engine.score`.

        Raises:
            InputError: a request's rows are not finite, not exactly L, or not its own.
        """
        engine = self._llm.llm_engine
        for index, request in enumerate(requests):
            key = RequestKey(index, int(request.tokens_L1[-1]), request.digest)
            engine.add_request(key.encode(), {"prompt_token_ids": request.tokens_L1[:-1].tolist()}, self._params)
        found: dict[int, Scored] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    index = RequestKey.decode(output.request_id).index
                    found[index] = self._scored(requests[index], output)
        return [found[index] for index in range(len(requests))]

    def close(self) -> None:
        """As `Engine.close`."""
        self._llm.llm_engine.engine_core.shutdown()

    def _install(self, recording: Recording) -> None:
        try:
            runners = self._llm.collective_rpc("capgap_install", kwargs=dataclasses.asdict(recording))
        except RuntimeError as error:
            self.close()
            raise _unknown_vllm(str(error)) from None
        _LOG.debug("capture installed on model runner %s", runners[0])

    def _scored(self, request: Request, output: Any) -> Scored:
        where = f"sequence {request.digest.hex()[:12]}"
        rows, length = output.prompt_logprobs, len(request.tokens_L1) - 1
        if not isinstance(rows, _Rows) or len(rows.ids_LC) != length:
            found = len(rows.ids_LC) if isinstance(rows, _Rows) else "none"
            raise InputError("vLLM returned a wrong number of rows", where=where, found=found, expected=length)
        scored = unpack(self._recording, rows.ids_LC, rows.numbers_LW, where)
        _require_own_rows(output, scored, where)
        return scored


class _Rows:
    """What `RequestOutput.prompt_logprobs` holds: two arrays, and no Python object per logprob."""

    def __init__(self, tensors: Any) -> None:
        self.ids_LC: np.ndarray = tensors[0].numpy()
        self.numbers_LW: np.ndarray = tensors[1].numpy()


def _require_own_rows(output: Any, scored: Scored, where: str) -> None:
    """The greedy token that vLLM's sampler chose after the prompt must be the top of the last captured row."""
    completion = output.outputs[0]
    greedy = float(completion.logprobs[0][completion.token_ids[0]].logprob)
    top = float(scored.top_logprobs_L[-1])
    if abs(top - greedy) > _GREEDY_TOLERANCE_NATS:
        raise InputError(
            "the captured rows are not those of the request",
            where=where,
            found=f"a top logprob of {top:.4f} after the last token",
            expected=f"{greedy:.4f}, the logprob of the greedy token",
            fix="report this together with the version of vLLM; cache.engine: transformers is not concerned",
        )


def _require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise MachineError(
            "vLLM is not installed",
            where="cache.engine: vllm",
            fix="run `make venv`, or `pip install capgap[teacher]` on a machine with a GPU; "
            "or set cache.engine to transformers, which is slower",
        )


def _require_platform(device: str) -> None:
    """vLLM runs where it was built for; the stage holds the lease on `device` and on nothing else."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != (device == "cpu"):
        raise MachineError(
            "the installed vLLM runs elsewhere",
            where="cache.engine: vllm",
            found=f"a build for {current_platform.device_name}",
            expected=f"one for {device}",
            fix="change device, or set cache.engine to transformers",
        )


def _saved_dtype(config: Any) -> Any:
    """vLLM's own `auto` rounds float32 to bfloat16: the cache would hold another teacher than the one eval measures."""
    return config.dtype if config.dtype is not None else "auto"


def _require_head_size(config: Any, path: str) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, possible = _head_size(config), CPUAttentionBackend.get_supported_head_sizes()
    if size not in possible:
        raise MachineError(
            "vLLM cannot run this model on a CPU",
            where=path,
            found=f"attention heads of size {size}",
            expected=f"one of {', '.join(map(str, possible))}",
            fix="set cache.engine to transformers",
        )


def _head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _set_environment() -> None:
    # in process: no engine process that could outlive this one
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # start-up notices that a user of capgap cannot act on
    logging.getLogger("torch._library").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="vllm")
    # a request of L tokens generates one more, whose position is never computed
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")


def _patch_front_end() -> None:
    from vllm.v1.engine.logprobs import LogprobsProcessor

    method = LogprobsProcessor._update_prompt_logprobs
    if method is _keep_rows:
        return
    found = list(inspect.signature(method).parameters)
    if found != ["self", "prompt_logprobs_tensors"]:
        raise _unknown_vllm(f"front end: found {found}, expected ['self', 'prompt_logprobs_tensors']")
    LogprobsProcessor._update_prompt_logprobs = _keep_rows


def _keep_rows(self: Any, prompt_logprobs_tensors: Any) -> None:
    self.prompt_logprobs = _Rows(prompt_logprobs_tensors)


def _unknown_vllm(why: str) -> MachineError:
    import vllm

    return MachineError(
        "this vLLM cannot be captured",
        where=f"vllm {vllm.__version__}",
        found=why,
        expected="vLLM 0.30 to 0.33",
        fix="install one of these, or set cache.engine to transformers",
    )


def _kv_cache_bytes(config: Any, batch_tokens: int, seq_len: int) -> int:
    """Room for twice the tokens of a step: a sequence leaves as soon as its last token is scored."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token: int = 2 * config.num_hidden_layers * heads * _head_size(config) * 4
    return max(_MIN_KV_CACHE_BYTES, per_token * 2 * (batch_tokens + seq_len))
