"""The random state of a training, mainly for dropout: a resumed training draws the numbers of an undisturbed one."""

from __future__ import annotations

import hashlib
import random
from typing import Any, cast

import numpy as np
import torch


def seed_process(*key: int) -> None:
    """Seed the generators of torch, numpy and Python with a hash of the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """Return the states of the generators as tensors and plain values, including that of the GPU this process uses."""
    kind, words, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(words.astype(np.int64)), *rest),
        "python": random.getstate(),
        # CUDA is not initialized for a training on a CPU: that would take memory of a GPU that others may be using.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the generators' states that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
