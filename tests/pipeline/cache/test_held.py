"""What the cache stage holds of the machine's memory is known before the teacher is started."""

from __future__ import annotations

import json
import logging
import tracemalloc

import numpy as np
import pytest
from pydantic_core import from_json

from capgap.pipeline.cache.held import held_bytes, held_shards, require_room
from capgap.pipeline.cache.scoring import Scored
from capgap.schemas.errors import MachineError
from capgap.schemas.run_cache import CacheSettings
from capgap.schemas.run_corpus import CorpusSettings


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [
        ({"num_samples": 50}, (50, 0, 0)),
        ({"recording": "topk", "top_k": 64, "extra_temperatures": (2.0, 4.0)}, (0, 64, 2)),
        ({"recording": "both", "num_samples": 12, "top_k": 8}, (12, 8, 0)),
    ],
)
def test_the_bytes_are_those_of_the_arrays_of_three_shards(settings: dict, shapes: tuple[int, int, int]) -> None:
    n, k, t = shapes
    row = Scored(
        samples_Ln=np.zeros((1, n), np.int32),
        ids_LK=np.zeros((1, k), np.int32),
        logprobs_LK=np.zeros((1, k), np.float32),
        tail_L=np.zeros(1 if k else 0, np.float32),
        log_tails_LT=np.zeros((1, t), np.float32),
        label_logprobs_L=np.zeros(1, np.float32),
        top_logprob=0.0,
    )
    arrays = sum(array.nbytes for array in vars(row).values() if isinstance(array, np.ndarray))
    tokens_starts_and_mask = 4 + 1 + 1
    assert held_bytes(CacheSettings.model_validate(settings), 1000, 100) == 3000 * (arrays + tokens_starts_and_mask)


def test_a_server_s_answers_take_no_more_than_is_stated() -> None:
    """Ids of six digits, each with a text of its own: as `rows_of` has them when it has read an answer."""
    seq_len, top_k = 200, 64
    entry = {
        str(100_000 + i): {"logprob": -1 / (i + 3), "rank": i, "decoded_token": f" {i:08}"} for i in range(top_k + 1)
    }
    answer = json.dumps({"choices": [{"prompt_logprobs": [None, *[entry] * seq_len]}]}).encode()
    tracemalloc.start()
    try:
        entries = from_json(answer, cache_strings="keys")["choices"][0]["prompt_logprobs"]
        ids = np.array([int(one) for entry in entries[1:] for one in entry], np.int64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    settings = {"engine": "server", "recording": "topk", "top_k": top_k}
    one, two = (
        held_bytes(CacheSettings.model_validate({**settings, "server": {"num_parallel": num}}), 0, seq_len)
        for num in (1, 2)
    )
    assert len(ids) == seq_len * (top_k + 1) and two == 2 * one
    assert 0.7 * one < len(answer) + peak <= one


def test_shards_that_the_machine_has_no_room_for_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "capgap"):
        require_room(CacheSettings(), 2048, 256)
    assert "up to 0.00 GB of targets are held at once, in shards of 2,048 tokens" in caplog.text
    with pytest.raises(MachineError, match=r"corpus\.shard_sequences: .* found 3 shards of 1,000,000,000,000 tokens"):
        require_room(CacheSettings(), 10**12, 256)
    with pytest.raises(MachineError, match=r"found 16 shards of 1,000,000,000,000 tokens at once, .*cache\.replicas"):
        require_room(CacheSettings(replicas=8), 10**12, 256, num_shards=16)


def test_shards_of_all_replicas_on_this_machine_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert held_shards(CacheSettings(), 100) == 3
    assert held_shards(CacheSettings(replicas=8), 100) == 16
    assert held_shards(CacheSettings(replicas=8), 5) == 10
    monkeypatch.setenv("RAY_ADDRESS", "node:6379")
    assert held_shards(CacheSettings(replicas=8), 100) == 2


@pytest.mark.parametrize(("seq_len", "expected"), [(512, 1024), (2048, 1024), (4096, 512), (32768, 64), (2**22, 1)])
def test_a_shard_of_the_default_holds_about_two_million_tokens_at_most(seq_len: int, expected: int) -> None:
    settings = CorpusSettings(sources=("builtin:python",), seq_len=seq_len)
    assert settings.sequences_per_shard == expected
    spelt_out = CorpusSettings(sources=("builtin:python",), seq_len=seq_len, shard_sequences=expected)
    assert settings.decisive() == spelt_out.decisive()
