"""What continues prompts: vLLM, or transformers where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from capgap.pipeline.answers.chat import Generated, Prompt
from capgap.pipeline.cache.vllm_start import (
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

_SETTING = "judge.answers.engine"

# Conversations that are answered at once.
BATCH_QUESTIONS = 32

_BATCH_TOKENS = 8192


class Generator(Protocol):
    """Continues prompts."""

    def generate(self, prompts: Sequence[Prompt]) -> list[Generated]:
        """One continuation a prompt. Equal prompts beside equal others are continued alike."""

    def close(self) -> None:
        """Leave the device."""


class TransformersGenerator:
    """One prompt at a time.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(
        self, path: str, stop_ids: Sequence[int], device: str, dtype: str, trust_remote_code: bool = False
    ) -> None:
        self._path, self._stop_ids, self._device = path, list(stop_ids), device
        chosen = None if dtype == "auto" else getattr(torch, dtype)
        self._model: Any = load_model(path, device, chosen, trust_remote_code)
        # what the folder says of sampling is not what was asked for
        self._model.generation_config = GenerationConfig()

    def generate(self, prompts: Sequence[Prompt]) -> list[Generated]:
        """As `Generator.generate`.

        Raises:
            InputError: logits are not finite.
        """
        return [self._continue(prompt) for prompt in prompts]

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
            **(drawn if prompt.temperature > 0 else {"do_sample": False}),
        )
        devices = [] if self._device == "cpu" else [self._device]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(prompt.seed)
            try:
                made_1M = self._model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), generation_config=config)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise InputError(
                    "what it answers cannot be sampled", where=self._path, found="logits that are not finite"
                ) from None
        ids = made_1M[0, ids_1L.shape[1] :].tolist()
        ended = bool(ids) and ids[-1] in self._stop_ids
        return Generated(tuple(ids[:-1] if ended else ids), "stop" if ended else "length")


class VllmGenerator:
    """All prompts of a call side by side, in this process.

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
    ) -> None:
        require_vllm(_SETTING)
        set_environment(device, 1)
        import vllm

        require_platform(device, _SETTING)
        config = teacher_config(path, length, device, trust_remote_code, _SETTING)
        self._stop_ids = list(stop_ids)
        if device == "cpu":
            memory = memory_settings(config, device, _BATCH_TOKENS, length, gpu_memory_fraction, 1, 1)
        else:
            memory = {"gpu_memory_utilization": gpu_memory_fraction}
        with _one_line("the model could not be started"):
            self._llm = vllm.LLM(
                **llm_settings(path, config, device, trust_remote_code, dtype),
                max_model_len=length,
                max_num_seqs=BATCH_QUESTIONS,
                seed=0,
                **memory,
            )
        silence_dumps()

    def generate(self, prompts: Sequence[Prompt]) -> list[Generated]:
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
            )
            for prompt in prompts
        ]
        with _one_line("the engine failed"):
            made = self._llm.generate(
                [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts], params, use_tqdm=False
            )
        return [self._generated(output.outputs[0]) for output in made]

    def close(self) -> None:
        """As `Generator.close`."""
        self._llm.llm_engine.engine_core.shutdown()

    def _generated(self, output: Any) -> Generated:
        ids = list(output.token_ids)
        if ids and ids[-1] in self._stop_ids:
            return Generated(tuple(ids[:-1]), "stop")
        return Generated(tuple(ids), "stop" if output.finish_reason == "stop" else "length")


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """A fault within vLLM, said in one line."""
    try:
        yield
    except CapgapError:
        raise
    except Exception as error:
        raise MachineError(
            what,
            where=f"{_SETTING}: vllm",
            found=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            fix="set VLLM_LOGGING_LEVEL=INFO to see more, change judge.answers.gpu_memory_fraction, or lower "
            f"judge.answers.max_tokens; {_SETTING}: transformers is the slow way around vLLM",
        ) from error
