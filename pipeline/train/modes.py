"""Puts a model into evaluation mode for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode, and restore the mode of each submodule afterwards, since modes may differ."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, was_training in modes.items():
            part.training = was_training
