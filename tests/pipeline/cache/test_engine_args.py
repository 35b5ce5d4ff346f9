"""Arguments of vLLM's own: checked by name, winning where that is safe, refused where a row would be another."""

from __future__ import annotations

import pytest

from capgap.pipeline.cache.engine_args import require_engine_args, with_engine_args
from capgap.schemas.errors import SettingError
from capgap.schemas.run_cache import OPERATIONAL_ENGINE_ARGS, CacheSettings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quantisation": "fp8"}, "cache.engine_args.quantisation: .* did you mean quantization"),
        ({"max_num_batched_token": 1}, "did you mean max_num_batched_tokens"),
        (
            {"enable_prefix_caching": True},
            "would break exactness: a token that was computed before gets no row; found True; leave it out",
        ),
        ({"kv_sharing_fast_prefill": True}, "would break exactness"),
        ({"speculative_config": {"method": "ngram"}}, "would break exactness"),
        ({"logprobs_mode": "raw_logits"}, "would break exactness"),
        ({"tokenizer": "elsewhere"}, "expected corpus.tokenizer"),
        ({"dtype": "half"}, "expected cache.dtype"),
        ({"tensor_parallel_size": 2}, "expected cache.tensor_parallel"),
        ({"load_format": "pt"}, "may open pickled files"),
    ],
)
def test_what_breaks_a_row_or_is_unknown_is_refused_by_name(given: dict[str, object], words: str) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    with pytest.raises(SettingError, match=words):
        require_engine_args(given)


def test_what_users_give_is_known_to_the_installed_vllm() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    usual = {
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
        "hf_overrides": {"head_dtype": "model"},
        "revision": "main",
    }
    require_engine_args({**usual, **dict.fromkeys(OPERATIONAL_ENGINE_ARGS - {"load_format"}, 1)})
    require_engine_args({"load_format": "runai_streamer"})


def test_what_is_given_wins_and_overrides_of_the_configuration_are_added() -> None:
    own = {"max_num_seqs": 8, "enforce_eager": False, "hf_overrides": {"head_dtype": "float32"}}
    given = {"max_num_seqs": 2, "hf_overrides": {"rope_theta": 1e6}}
    expected = {
        "max_num_seqs": 2,
        "enforce_eager": False,
        "hf_overrides": {"head_dtype": "float32", "rope_theta": 1e6},
    }
    assert with_engine_args(own, given) == expected
    assert with_engine_args(own, {"hf_overrides": {"head_dtype": "model"}})["hf_overrides"] == {"head_dtype": "model"}


def test_only_what_can_change_a_row_decides_about_the_cache() -> None:
    plain = CacheSettings().decisive()
    assert CacheSettings(engine_args={"enforce_eager": True, "pipeline_parallel_size": 2}).decisive() == plain
    assert CacheSettings(engine_args={"kv_cache_dtype": "fp8"}).decisive() != plain


def test_devices_are_those_of_both_ways_to_share_a_model() -> None:
    assert CacheSettings(tensor_parallel=4, engine_args={"pipeline_parallel_size": 2}).num_devices == 8
    with pytest.raises(ValueError, match=r"pipeline_parallel_size: found 'two', expected 1 or more"):
        CacheSettings(engine_args={"pipeline_parallel_size": "two"})
    with pytest.raises(ValueError, match=r"cache.engine_args: found with engine transformers, expected vllm"):
        CacheSettings(engine="transformers", engine_args={"quantization": "fp8"})
