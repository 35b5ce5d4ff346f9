from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from capgap.pipeline.store import LoaderSettings
from capgap.schemas.errors import SettingError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_sequences": 0}, "batch_sequences: cannot be used; found 0, expected a whole number, at least 1"),
        ({"batch_sequences": -8}, "batch_sequences: cannot be used; found -8"),
        ({"batch_sequences": 8.0}, "batch_sequences: cannot be used; found 8.0"),
        ({"batch_sequences": True}, "batch_sequences: cannot be used; found True"),
        ({"seed": "0"}, "seed: cannot be used; found '0', expected a whole number"),
        ({"num_epochs": 0}, "num_epochs: cannot be used; found 0"),
        ({"max_tokens": 0}, "max_tokens: cannot be used; found 0, expected a whole number, at least 1, or None"),
        ({"micro_batch": 0}, "micro_batch: cannot be used; found 0"),
        ({"world_size": 0}, "world_size: cannot be used; found 0"),
        ({"rank": -1, "world_size": 2}, "rank: cannot be used; found -1"),
        ({"rank": 4, "world_size": 4}, "rank: there is no such rank; found 4 of world_size 4, expected 0 to 3"),
        ({"row_len": 0}, "row_len: cannot be used; found 0"),
        ({"lanes": 0}, "lanes: cannot be used; found 0"),
        ({"threads": -1}, "threads: cannot be used; found -1, expected a whole number, at least 0"),
        ({"threads": None}, "threads: cannot be used; found None"),
        ({"ahead": 0}, "ahead: cannot be used; found 0"),
        ({"max_block_bytes": -1}, "max_block_bytes: cannot be used; found -1"),
        ({"on_corrupt": "Skip"}, "on_corrupt: there is no such choice; found 'Skip', expected one of stop, skip"),
        ({"context": "whole"}, "context: there is no such choice; found 'whole', expected one of packed, document"),
        ({"decode_on": "gpu"}, "decode_on: there is no such kind of device; found 'gpu', expected"),
        ({"decode_on": "cpu", "writer_logprobs": lambda shard, row: np.zeros(1)}, "decode_on: a device does not read"),
    ],
)
def test_what_a_loader_cannot_do_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=f"^{re.escape(message)}"):
        LoaderSettings(**({"batch_sequences": 8, "seed": 0} | given))


def test_the_least_of_everything_and_numpy_s_numbers_are_taken() -> None:
    settings = LoaderSettings(np.int64(1), np.int64(3), threads=0, ahead=1, max_block_bytes=0, decode_on="cpu")
    assert (settings.rank_sequences, settings.round_sequences) == (1, 1)
    assert LoaderSettings(8, -1, rank=3, world_size=4, decode_on=torch.device("cpu")).rank_sequences == 2
