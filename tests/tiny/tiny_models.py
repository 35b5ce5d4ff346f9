"""Tiny models of fresh weights, which a configuration and a seed decide; made here for all tests.

Each `*_config` is the smallest model of its kind; every size can be given another value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from capgap.pipeline.corpus.tokenizer import train_tokenizer

PADDED_VOCAB_SIZE = 320  # of models beside a tokenizer of 300 ids: twenty rows of padding
VLLM_HEAD_DIM = 32  # the smallest that vLLM has on a CPU
SIZES: dict[str, Any] = {
    "vocab_size": PADDED_VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
DEEPER: dict[str, Any] = {"intermediate_size": 48, "num_hidden_layers": 2}

PRUNED_VOCAB_SIZE, PRUNED_SEQ_LEN = 60, 24
_PRUNABLE: dict[str, Any] = {
    "vocab_size": PRUNED_VOCAB_SIZE + 4,  # four rows of padding
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": PRUNED_SEQ_LEN,
    "initializer_range": 0.3,
}
PRUNABLE: dict[str, Any] = {
    "llama": LlamaConfig(**_PRUNABLE),
    "llama with biases": LlamaConfig(**_PRUNABLE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_PRUNABLE, sliding_window=8),
    "qwen2 tied": Qwen2Config(**_PRUNABLE, tie_word_embeddings=True),
    "qwen2 with windows": Qwen2Config(**_PRUNABLE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3 tied": Qwen3Config(**_PRUNABLE, head_dim=16, tie_word_embeddings=True),
}
"""One of each architecture that can be pruned."""


def llama_config(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES | sizes)


def gpt2_config(**sizes: Any) -> GPT2Config:
    """It has dropout, positions of its own and biases."""
    return GPT2Config(**{"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32} | sizes)


def mamba_config(**sizes: Any) -> MambaConfig:
    """It takes no positions: a token sees what stands before it in its row, whatever document that is of."""
    return MambaConfig(**{"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1} | sizes)


def tiny_model(config: Any, seed: int = 0, *, vector_noise: float = 0.0) -> PreTrainedModel:
    """A causal language model; torch's own random numbers go on as if it had not been made.

    With noise, biases and norms are not what they begin as.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        if vector_noise:
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data.add_(torch.randn_like(parameter) * vector_noise)
    return model


def tiny_llama(seed: int = 0, **sizes: Any) -> PreTrainedModel:
    return tiny_model(llama_config(**sizes), seed)


def tiny_vllm_llama(seed: int, max_positions: int) -> PreTrainedModel:
    """A teacher that vLLM takes on a CPU, and whose next tokens are far from equally likely."""
    return tiny_llama(seed, head_dim=VLLM_HEAD_DIM, max_position_embeddings=max_positions, initializer_range=0.2)


def save_model(folder: Path, model: PreTrainedModel | PreTrainedConfig, tokenizer: Any = None) -> str:
    """Model, or its configuration alone, and tokenizer in the folder; its path."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def prunable_model(name: str) -> PreTrainedModel:
    """One of `PRUNABLE`, with biases and norms that are not what they begin as."""
    return tiny_model(PRUNABLE[name], vector_noise=0.1).eval()


def tiny_tokenizer(text: str = "a text that is long enough to train a tokenizer on, ", vocab_size: int = 280) -> Any:
    return train_tokenizer([text * 20], vocab_size)
