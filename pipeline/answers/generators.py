"""What continues prompts: vLLM, or transformers where there is none."""

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
from capgap.pipeline.models.load import load_model
from capgap.schemas.errors import CapgapError, InputError, MachineError

# Conversations that are answered at once.
BATCH_QUESTIONS = 32

_BATCH_TOKENS = 8192


Told = Callable[[float], None] | None


class Generator(Protocol):
    """Continues prompts."""

    def generate(self, prompts: Sequence[Prompt], told: Told = None) -> list[Generated]:
        """One continuation a prompt. Equal prompts beside equal others are continued alike.

        `told` hears of continued prompts, where they are continued one after the other.
        """

    def close(self) -> None:
        """Leave the device."""


class TransformersGenerator:
    """One prompt at a time.

    Args:
        path: folder or id of the model.
        stop_ids: at which an answer ends.
        device: `cpu` or a GPU's name.
        dtype: of weights and activations; `auto` as they were saved.
        trust_remote_code: run code that comes with the model.
        with_logprobs: hand out the logprob of each token too.

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
        # what the folder says of sampling is not what was asked for
        self._model.generation_config = GenerationConfig()

    def generate(self, prompts: Sequence[Prompt], told: Told = None) -> list[Generated]:
        """As `Generator.generate`.

        Raises:
            InputError: logits are not finite.
        """
        made = []
        for prompt in prompts:
            made.append(self._continue(prompt))
            if told is not None:
                told(1)
        return made

    def close(self) -> None:
        """As `Generator.close`."""
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
                    "what it answers cannot be sampled", where=self._path, found="logits that are not finite"
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
    """All prompts of a call side by side, in this process.

    Args:
        path: folder or id of the model.
        stop_ids: at which an answer ends.
        length: tokens of a prompt and its answer at most.
        device: `cpu` or a GPU's name.
        dtype: of weights and activations; `auto` as they were saved.
        gpu_memory_fraction: share of a GPU's memory that vLLM may claim.
        trust_remote_code: run code that comes with the model.
        section: of the run file, that asks for it.
        num_at_once: answers that are written side by side.
        with_logprobs: hand out the logprob of each token too; the head then computes in float32.
        num_devices: that the model is spread over.

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
            # as the cache has it: the logprobs of both are then those of one arithmetic
            more |= head_settings(config)
        if num_devices > 1:
            more |= {"tensor_parallel_size": num_devices, "distributed_executor_backend": "mp"}
            more["worker_extension_cls"] = "capgap.pipeline.cache.vllm_worker.CaptureExtension"
        with _one_line("the model could not be started", section):
            self._llm = vllm.LLM(
                **llm_settings(path, config, device, trust_remote_code, dtype),
                max_model_len=length,
                max_num_seqs=num_at_once,
                # A prompt that is read in parts moves its answer's random numbers on, and a CPU's cannot be moved back.
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(_BATCH_TOKENS, length, num_at_once),
                seed=0,
                **more,
            )
        silence_dumps()
        if num_devices > 1:
            self._llm.collective_rpc("capgap_die_with", args=(os.getpid(),))

    def generate(self, prompts: Sequence[Prompt], told: Told = None) -> list[Generated]:
        """As `Generator.generate`.

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
                # the sampled token's alone
                logprobs=0 if self._with_logprobs else None,
            )
            for prompt in prompts
        ]
        with _one_line("the engine failed", self._section):
            made = self._llm.generate(
                [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts], params, use_tqdm=False
            )
        return [self._generated(output.outputs[0]) for output in made]

    def close(self) -> None:
        """As `Generator.close`."""
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
    """A fault within vLLM, said in one line."""
    try:
        yield
    except CapgapError:
        raise
    except Exception as error:
        raise MachineError(
            what,
            where=f"{section}.engine: vllm",
            found=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            fix=f"set VLLM_LOGGING_LEVEL=INFO to see more, change {section}.gpu_memory_fraction, or let answers be "
            f"shorter; {section}.engine: transformers is the slow way around vLLM",
        ) from error
