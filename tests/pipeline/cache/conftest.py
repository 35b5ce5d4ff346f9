"""Tiny real teachers, and sequences for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from capgap.pipeline.cache.scoring import Recording, Request

VOCAB_SIZE = 300
PADDED_VOCAB_SIZE = 320
SEQ_LEN = 48


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a Llama, by default with grouped heads and 20 padding rows behind its vocabulary."""

    def make(
        tied: bool = False,
        max_positions: int = SEQ_LEN,
        head_dim: int = 32,
        num_columns: int = PADDED_VOCAB_SIZE,
        num_kv_heads: int = 2,
        broken_id: int | None = None,
    ) -> str:
        folder: Path = tmp_path_factory.mktemp("teacher")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            config = LlamaConfig(
                vocab_size=num_columns,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=num_kv_heads,
                head_dim=head_dim,  # 32 is the smallest that vLLM has on a CPU
                max_position_embeddings=max_positions,
                initializer_range=0.2,  # the likeliest id has a probability of 0.1 on average, of up to 0.55
                tie_word_embeddings=tied,
            )
            model = LlamaForCausalLM(config)
            if broken_id is not None:
                model.model.embed_tokens.weight.data[broken_id] = torch.nan
            model.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def recording() -> Callable[..., Recording]:
    def make(
        kind: str = "topk",
        num_ids: int = 16,
        temperature: float = 1.0,
        chunk_rows: int = 1024,
        seed: int = 0,
        vocab_size: int = VOCAB_SIZE,
    ) -> Recording:
        return Recording(kind, num_ids, temperature, seed, vocab_size, chunk_rows)

    return make


@pytest.fixture(scope="session")
def requests_of() -> Callable[..., list[Request]]:
    def make(num_sequences: int, vocab_size: int = VOCAB_SIZE) -> list[Request]:
        rng = np.random.default_rng(11)
        return [Request(rng.integers(0, vocab_size, SEQ_LEN + 1, dtype=np.int32)) for _ in range(num_sequences)]

    return make
