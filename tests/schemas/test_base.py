from __future__ import annotations

import pytest
from pydantic import ValidationError

from capgap.schemas.judge_results import Reply
from capgap.schemas.run_file import RunFile

BASE = {"name": "tried", "out": "out", "corpus": {}, "teacher": {"model": {}}, "student": {"model": {}}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": [1 << 63]}, "seeds: found an integer of 64 bits"),
        ({"seeds": [0, -(10**5000)]}, "seeds: found an integer of 16610 bits"),
        (
            {"corpus": {"seq_len": 10**30}},
            "corpus.seq_len: found an integer of 100 bits, expected at most 63 and a sign",
        ),
        ({"out": "a\0b"}, r"out: found 'a\\x00b', expected text without the character zero"),
        ({"corpus": {"sources": ["a.txt", "a\0.txt"]}}, "sources: found .* without the character zero"),
        ({"cache": {"engine_args": {"x": 10**30}}}, "cache.engine_args.x: found an integer of 100 bits"),
        ({"cache": {"engine_args": {"hf_overrides": {"a": ["x\0y"]}}}}, "cache.engine_args.hf_overrides.a: found 'x"),
        ({"train": {"loggers": [{"class_path": "csv", "init_args": {"a\0": 1}}]}}, "train.loggers.init_args: found 'a"),
    ],
)
def test_what_64_bits_or_a_path_cannot_hold_is_no_setting(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunFile.model_validate(BASE | settings)


def test_what_a_model_wrote_may_hold_any_character() -> None:
    assert Reply(text="a\0b", num_tokens=1, finish="stop").text == "a\0b"


def test_the_largest_integer_is_one() -> None:
    assert RunFile.model_validate(BASE | {"seeds": [(1 << 63) - 1]}).seeds == ((1 << 63) - 1,)
