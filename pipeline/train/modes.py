"""A model in evaluation mode for as long as it is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each part is in the mode that it was in, which may not be the model's."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, was_training in modes.items():
            part.training = was_training
