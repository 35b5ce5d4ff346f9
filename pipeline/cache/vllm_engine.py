"""The teacher inside vLLM, in this process: prefill only, with every row captured on the worker.

Where capture does not know the version of vLLM, vLLM's public logprobs are used for `topk`. With `tensor_parallel`
above 1, each device has a worker process, which ends with this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from capgap.pipeline.cache.engine_args import require_engine_args, with_engine_args
from capgap.pipeline.cache.request_checks import require_kept, require_scorable
from capgap.pipeline.cache.scoring import Recording, Request, Scored
from capgap.pipeline.cache.vllm_captured import CapturedRequests, require_known_front_end, unknown_vllm
from capgap.pipeline.cache.vllm_public import PublicRequests, require_public
from capgap.pipeline.cache.vllm_start import (
    has_low_bit_head,
    head_settings,
    llm_settings,
    memory_settings,
    quantisation_of,
    require_platform,
    require_runs_on_cpu,
    require_vllm,
    saved_dtype,
    set_environment,
    silence_dumps,
    teacher_config,
)
from capgap.pipeline.cache.vllm_submission import Submission, finished_requests
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.heartbeat import begin_phase
from capgap.schemas.errors import InputError, MachineError

_MOST_AT_ONCE = 1024

# oneDNN says only the last of these when it has no memory for the code of a matrix product
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "No available memory",
    "could not create a primitive",
)


class VllmEngine:
    """An engine that scores requests with vLLM.

    Args:
        path: the teacher's folder or id.
        recording: what to keep of each row of logits.
        seq_len: the largest L of a request.
        dtype: `auto` or a float type of the teacher's weights.
        batch_tokens: number of tokens that vLLM schedules at once.
        gpu_memory_fraction: share of the GPU's memory for weights and key-value cache.
        device: `cpu` or `cuda:0`.
        tensor_parallel: number of devices that the teacher is spread over.
        capture: `worker`, `public`, or `auto`, which uses the public logprobs if this vLLM cannot be captured.
        trust_remote_code: whether to run code that comes with the teacher.
        engine_args: further arguments of `vllm.LLM`, which replace those that are chosen here.

    Attributes:
        runner: the generation of vLLM's model runner, `V1` or `V2`, or `public` where nothing is captured.

    Raises:
        MachineError: vLLM is not installed, has a version that cannot be captured, or cannot run the model here.
        InputError: the model has fewer positions than `seq_len`, incomplete weights, or a quantised head.
        SettingError: this vLLM cannot give what the recording keeps, or an argument of vLLM is not allowed.
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
        tensor_parallel: int = 1,
        capture: Literal["auto", "worker", "public"] = "auto",
        trust_remote_code: bool = False,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        require_kept(recording.top_k, recording.vocab_size)
        require_vllm()
        num_stages = int((engine_args or {}).get("pipeline_parallel_size", 1))
        num_workers = tensor_parallel * num_stages
        set_environment(device, num_workers)
        begin_phase("imports vLLM")
        require_engine_args(engine_args or {})
        import vllm

        require_platform(device)
        config = teacher_config(path, seq_len, device, trust_remote_code)
        self._seq_len, self._num_columns, self._capture = seq_len, int(config.get_text_config().vocab_size), capture
        if has_low_bit_head(config):
            raise InputError(
                "a head of few bits gives vLLM no logits in float32",
                where=path,
                found=f"a quantised head ({quantisation_of(config)})",
                expected="a head in 16 bits or more: rounded logits change which ids are kept",
                fix="set cache.engine to transformers, or make the cache with the model before its quantisation",
            )
        if device == "cpu":
            require_runs_on_cpu(config, saved_dtype(config) if dtype == "auto" else dtype, num_stages)
        if capture == "public":
            require_public(recording, self._num_columns, "cache.capture: public")
        settings = {
            **llm_settings(path, config, device, trust_remote_code, dtype),
            "max_model_len": seq_len + 1,
            "max_num_batched_tokens": batch_tokens,
            "enable_chunked_prefill": True,  # a step may be smaller than a sequence
            "max_num_seqs": max(1, min(_MOST_AT_ONCE, batch_tokens // 8)),
            "max_logprobs": -1,
            # capgap only prefills, so CUDA graphs of decoding steps would be captured for nothing
            "compilation_config": {"cudagraph_mode": "NONE"},
            "worker_extension_cls": "capgap.pipeline.cache.vllm_worker.CaptureExtension",
            # with logits in bfloat16 half of all rows keep another set of ids
            **head_settings(config),
            "tensor_parallel_size": tensor_parallel,
            **({"distributed_executor_backend": "mp"} if num_workers > 1 else {}),
            **memory_settings(
                config, device, batch_tokens, seq_len, gpu_memory_fraction, recording.chunk_rows, tensor_parallel
            ),
        }
        begin_phase("starts vLLM, which loads the teacher")
        with _one_line("the teacher could not be started", quantisation_of(config)):
            self._llm = vllm.LLM(**with_engine_args(settings, engine_args or {}))
        silence_dumps()
        self.dtype = str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")
        try:
            self._llm.collective_rpc("capgap_die_with", args=(os.getpid(),))
            self.record(recording)
        except BaseException:
            self.close()
            raise
        self.name = f"vllm {vllm.__version__}" + (", public logprobs" if self.runner == "public" else "")

    def record(self, recording: Recording) -> None:
        """Use this recording for all further requests.

        Raises:
            MachineError: this vLLM cannot be captured.
            SettingError: this vLLM cannot give what the recording keeps.
        """
        require_kept(recording.top_k, recording.vocab_size)
        self._vocab_size = recording.vocab_size
        self._way: CapturedRequests | PublicRequests
        why = "cache.capture: public"
        if self._capture != "public":
            try:
                require_known_front_end()
                (self.runner, *_) = self._llm.collective_rpc("capgap_install", kwargs=dataclasses.asdict(recording))
            except RuntimeError as error:
                if self._capture == "worker":
                    raise unknown_vllm(str(error)) from None
                why = str(unknown_vllm(str(error)))
            else:
                self._way = CapturedRequests(recording)
                return
        require_public(recording, self._num_columns, why)
        self._llm.collective_rpc("capgap_remove")
        if self._capture != "public":
            event("public_capture", f"slower, through vLLM's public logprobs, because {why}", logging.WARNING, why=why)
        self._way, self.runner = PublicRequests(recording), "public"

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Score all requests as one submission, and return the results in the order of the requests.

        Raises:
            InputError: a request cannot be scored, or its rows are not finite, not exactly L, or another request's.
            MachineError: the engine failed or ran out of memory.
        """
        require_scorable(requests, self._vocab_size, self._seq_len)
        return self._way.score(self._run, requests)

    def close(self) -> None:
        """Shut vLLM down, which frees the device's memory."""
        self._llm.llm_engine.engine_core.shutdown()

    def _run(self, submission: Submission) -> Iterator[tuple[int, Any]]:
        return finished_requests(self._llm, submission, lambda: _one_line("the engine failed"))


@contextlib.contextmanager
def _one_line(what: str, quantisation: str = "") -> Iterator[None]:
    """Turn an error inside vLLM into a MachineError of one line, which names the teacher's quantisation, if any."""
    try:
        yield
    except (MachineError, KeyboardInterrupt):
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(s in said for s in _OUT_OF_MEMORY)
        if quantisation and not exhausted:
            raise MachineError(
                f"{what}, which is quantised: {quantisation}",
                where="cache.engine: vllm",
                found=said[:300],
                fix="if this machine cannot run it, serve it from one that can (cache.engine: server), or use the "
                "checkpoint that is not quantised",
            ) from error
        raise MachineError(
            f"{what}: out of memory" if exhausted else what,
            where="cache.engine: vllm",
            found=said[:300],
            fix="lower cache.chunk_rows, cache.batch_tokens or corpus.seq_len, or change cache.gpu_memory_fraction"
            if exhausted
            else "set VLLM_LOGGING_LEVEL=INFO to see more; cache.engine: transformers is the slow way around vLLM",
        ) from error
