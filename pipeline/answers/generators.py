"""Generators that continue prompts, with vLLM or with transformers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from capgap.pipeline.answers.chat import Generated, Prompt
from capgap.pipeline.cache.vllm_start import (
    head_settings,
    llm_settings,
    memory_settings,
    require_platform,
    require_vllm,
    set_environment,
    silence_dumps,
    teacher_config,
)
from capgap.pipeline.cache.vllm_submission import finished_requests
from capgap.pipeline.models.load import load_model
from capgap.schemas.errors import CapgapError, InputError, MachineError

# Number of conversations that are answered in one batch.
BATCH_QUESTIONS = 32

_BATCH_TOKENS = 8192


Told = Callable[[float], None] | None


class Generator(Protocol):
    """Something that continues prompts."""

    def generate(self, prompts: Sequence[Prompt], told: Told = None) -> list[Generated]:
        """Return one continuation per prompt. The same prompts in one call always get the same continuations.

        `told` is called with 1 as soon as a prompt is continued.
        """

    def close(self) -> None:
        """Free the device's memory."""


class TransformersGenerator:
    """A generator that continues one prompt at a time with transformers.

    Args:
        path: folder or id of the model.
        stop_ids: ids that end an answer.
        device: `cpu` or a GPU's name.
        dtype: dtype of weights and activations; `auto` is the dtype of the saved weights.
        trust_remote_code: whether to run code that comes with the model.
        with_logprobs: whether to return the logprob of each token.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(
        self,
        path: str,
        stop_ids: Sequence[int],
        device: str,
        dtype: str,
        trust_remote_code: bool = False,
        with_logprobs: bool = False,
    ) -> None:
        self._path, self._stop_ids, self._device = path, list(stop_ids), device
        self._with_logprobs = with_logprobs
        chosen = None if dtype == "auto" else getattr(torch, dtype)
        self._model: Any = load_model(path, device, chosen, trust_remote_code)
        # the model's own generation_config.json must not change how answers are sampled
        self._model.generation_config = GenerationConfig()

    def generate(self, prompts: Sequence[Prompt], told: Told = None) -> list[Generated]:
        """Return one continuation per prompt.

        Raises:
            InputError: the model's logits are not finite.
        """
        made = []
        for prompt in prompts:
            made.append(self._continue(prompt))
            if told is not None:
                told(1)
        return made

    def close(self) -> None:
        """Drop the model, which frees the device's memory."""
        del self._model

    def _continue(self, prompt: Prompt) -> Generated:
        ids_1L = torch.tensor([prompt.ids], device=self._device)
        drawn = {"do_sample": True, "temperature": prompt.temperature, "top_p": prompt.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=prompt.max_tokens,
            eos_token_id=self._stop_ids or None,
            pad_token_id=self._stop_ids[0] if self._stop_ids else 0,
            return_dict_in_generate=True,
            output_logits=self._with_logprobs,
            **(drawn if prompt.temperature > 0 else {"do_sample": False}),
        )
        devices = [] if self._device == "cpu" else [self._device]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(prompt.seed)
            try:
                made = self._model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), generation_config=config)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise InputError(
                    "the model's answers cannot be sampled", where=self._path, found="logits that are not finite"
                ) from None
        ids = made.sequences[0, ids_1L.shape[1] :].tolist()
        logprobs: list[float] = []
        if self._with_logprobs:
            logprobs = [
                float(logits_1V[0].float().log_softmax(-1)[one])
                for logits_1V, one in zip(made.logits, ids, strict=True)
            ]
        return _generated(ids, self._stop_ids, logprobs)


class VllmGenerator:
    """A generator that continues all prompts of a call in parallel, with vLLM in this process.

    Args:
        path: folder or id of the model.
        stop_ids: ids that end an answer.
        length: largest number of tokens of a prompt and its answer together.
        device: `cpu` or a GPU's name.
        dtype: dtype of weights and activations; `auto` is the dtype of the saved weights.
        gpu_memory_fraction: share of a GPU's memory that vLLM may claim.
        trust_remote_code: whether to run code that comes with the model.
        section: section of the run file that asks for answers, for errors.
        num_at_once: number of answers that are generated in parallel.
        with_logprobs: whether to return the logprob of each token; the head then computes in float32.
        num_devices: number of devices that the model is spread over.

    Raises:
        MachineError: vLLM is not installed, or cannot run the model here.
    """

    def __init__(
        self,
        path: str,
        stop_ids: Sequence[int],
        length: int,
        device: str,
        dtype: str,
        gpu_memory_fraction: float,
        trust_remote_code: bool = False,
        section: str = "judge.answers",
        num_at_once: int = BATCH_QUESTIONS,
        with_logprobs: bool = False,
        num_devices: int = 1,
    ) -> None:
        self._section, self._with_logprobs = section, with_logprobs
        setting = f"{section}.engine"
        require_vllm(setting)
        set_environment(device, num_devices)
        import vllm

        require_platform(device, setting)
        config = teacher_config(path, length, device, trust_remote_code, setting)
        self._stop_ids = list(stop_ids)
        more: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_fraction}
        if device == "cpu":
            more = memory_settings(config, device, _BATCH_TOKENS, length, gpu_memory_fraction, 1, 1)
        if with_logprobs:
            # the same settings as in the cache, so that the logprobs of both come from the same arithmetic
            more |= head_settings(config)
        if num_devices > 1:
            more |= {"tensor_parallel_size": num_devices, "distributed_executor_backend": "mp"}
            more["worker_extension_cls"] = "capgap.pipeline.cache.vllm_worker.CaptureExtension"
        with _one_line("the model could not be started", section):
            self._llm = vllm.LLM(
                **llm_settings(path, config, device, trust_remote_code, dtype),
                max_model_len=length,
                max_num_seqs=num_at_once,
                # Each chunk of a prompt would advance the random numbers of its answer, which a CPU cannot undo.
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(_BATCH_TOKENS, length, num_at_once),
                seed=0,
                **more,
            )
        silence_dumps()
        if num_devices > 1:
            self._llm.collective_rpc("capgap_die_with", args=(os.getpid(),))

    def generate(self, prompts: Sequence[Prompt], told: Told = None) -> list[Generated]:
        """Return one continuation per prompt.

        Raises:
            MachineError: the engine fails or runs out of memory.
        """
        import vllm

        params = [
            vllm.SamplingParams(
                temperature=prompt.temperature,
                top_p=prompt.top_p,
                seed=prompt.seed,
                max_tokens=prompt.max_tokens,
                stop_token_ids=self._stop_ids,
                detokenize=False,
                # 0 returns the logprob of the sampled token only
                logprobs=0 if self._with_logprobs else None,
                output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            )
            for prompt in prompts
        ]
        submission = [(str(place), list(prompt.ids), params[place]) for place, prompt in enumerate(prompts)]
        made: dict[int, Generated] = {}
        for place, output in finished_requests(
            self._llm, submission, lambda: _one_line("the engine failed", self._section)
        ):
            made[place] = self._generated(output.outputs[0])
            if told is not None:
                told(1)
        return [made[place] for place in range(len(prompts))]

    def close(self) -> None:
        """Shut vLLM down, which frees the device's memory."""
        self._llm.llm_engine.engine_core.shutdown()

    def _generated(self, output: Any) -> Generated:
        ids = list(output.token_ids)
        found = output.logprobs if self._with_logprobs else ()
        return _generated(
            ids, self._stop_ids, [float(each[one].logprob) for each, one in zip(found, ids, strict=bool(found))]
        )


def _generated(ids: Sequence[int], stop_ids: Sequence[int], logprobs: Sequence[float]) -> Generated:
    ended = bool(ids) and ids[-1] in stop_ids
    kept = ids[:-1] if ended else ids
    return Generated(tuple(kept), "stop" if ended else "length", ids[-1] if ended else None, tuple(logprobs))


@contextlib.contextmanager
def _one_line(what: str, section: str) -> Iterator[None]:
    """Turn an error inside vLLM into a MachineError of one line."""
    try:
        yield
    except CapgapError:
        raise
    except Exception as error:
        raise MachineError(
            what,
            where=f"{section}.engine: vllm",
            found=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            fix=f"set VLLM_LOGGING_LEVEL=INFO to see more, change {section}.gpu_memory_fraction, or make answers "
            f"shorter; {section}.engine: transformers is the slow way around vLLM",
        ) from error
