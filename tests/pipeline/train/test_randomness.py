"""The generators of torch, numpy and Python, put back where they stood."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from capgap.pipeline.train.randomness import random_state, seed_process, set_random_state


def _draws() -> list[float]:
    # a normal deviate leaves its twin in numpy's and in Python's generator
    drawn = [torch.rand(()).item(), np.random.normal(), np.random.rand(), random.random(), random.gauss(0, 1)]
    return [float(value) for value in drawn]


def test_a_state_that_was_saved_draws_the_same_again() -> None:
    seed_process(1)
    _draws()
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = [_draws() for _ in range(3)]
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert [_draws() for _ in range(3)] == expected


def test_a_key_decides_what_is_drawn_and_ranks_draw_differently() -> None:
    found = []
    for key in ((0, 0, 2, 0), (0, 1, 2, 0), (0, 0, 2, 10), (1, 0, 2, 0), (0, 0, 2, 0)):
        seed_process(*key)
        found.append(tuple(_draws()))
    assert found[0] == found[-1]
    assert all(len(set(column)) == 4 for column in zip(*found[:-1], strict=True))
