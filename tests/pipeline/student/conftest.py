"""Tiny models, and text for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_models import PRUNABLE, prunable_model
from tiny_models import PRUNED_SEQ_LEN as SEQ_LEN
from tiny_models import PRUNED_VOCAB_SIZE as VOCAB_SIZE
from transformers import PreTrainedModel

from capgap.pipeline.store import Batch


@pytest.fixture(scope="session", params=sorted(PRUNABLE))
def teacher(request: pytest.FixtureRequest) -> PreTrainedModel:
    return prunable_model(request.param)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return prunable_model("llama")


@pytest.fixture(scope="session")
def make_batches() -> Callable[..., Iterator[Batch]]:
    """Eight random sequences, some of whose labels do not count, `size` at a time."""

    def make(size: int = 4) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(VOCAB_SIZE, (8, SEQ_LEN + 1), generator=generator)
        labels = tokens[:, 1:].masked_fill(torch.rand((8, SEQ_LEN), generator=generator) < 0.3, -100)
        for start in range(0, 8, size):
            yield Batch(tokens[start : start + size, :-1], labels[start : start + size])

    return make
