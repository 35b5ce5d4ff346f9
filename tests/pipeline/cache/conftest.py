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
    """The folder of a Llama with grouped heads and 20 padding rows behind its vocabulary."""

    def make(tied: bool = False, max_positions: int = SEQ_LEN, head_dim: int = 32) -> str:
        folder: Path = tmp_path_factory.mktemp("teacher")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            config = LlamaConfig(
                vocab_size=PADDED_VOCAB_SIZE,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=head_dim,  # 32 is the smallest that vLLM has on a CPU
                max_position_embeddings=max_positions,
                initializer_range=0.2,  # the likeliest id has a probability of 0.1 on average, of up to 0.55
                tie_word_embeddings=tied,
            )
            LlamaForCausalLM(config).save_pretrained(folder)
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
def requests_of() -> Callable[[int], list[Request]]:
    def make(num_sequences: int) -> list[Request]:
        rng = np.random.default_rng(11)
        return [Request(rng.integers(0, VOCAB_SIZE, SEQ_LEN + 1, dtype=np.int32)) for _ in range(num_sequences)]

    return make
