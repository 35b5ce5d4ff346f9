"""Tiny real models, and sequences for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from capgap.schemas.records import Sequences

VOCAB_SIZE = 128


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    def make(seed: int = 0, rows: int = VOCAB_SIZE, tied: bool = True) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,  # sharp enough that models differ visibly
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def make_sequences() -> Callable[..., Sequences]:
    def make(num_sequences: int = 6, seq_len: int = 24, masked: bool = True) -> Sequences:
        rng = np.random.default_rng(7)
        shape = (num_sequences, seq_len + 1)
        starts_BL1 = np.zeros(shape, np.bool_)
        starts_BL1[:, 0] = True
        mask_BL1 = rng.random(shape) < 0.8 if masked else np.ones(shape, np.bool_)
        mask_BL1[:, 0] = False
        return Sequences(rng.integers(0, VOCAB_SIZE, shape, dtype=np.int32), starts_BL1, mask_BL1)

    return make
