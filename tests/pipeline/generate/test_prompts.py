"""Which prompts a round has, and how their files are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capgap.pipeline.generate.prompts import PromptRecord, read_prompts, split_prompts
from capgap.schemas.run_rounds import RoundsSettings

PROMPTS = [PromptRecord(f"prompts.jsonl:{number}", (), f"prompt {number}") for number in range(40)]


@pytest.mark.parametrize("wanted", [1, 7, 20, 30, 40, 1000, None])
def test_no_round_has_a_prompt_twice_and_rounds_go_on_where_the_one_before_stopped(wanted: int | None) -> None:
    settings = RoundsSettings.model_validate({"prompts": ["prompts.jsonl"], "prompts_per_round": wanted})
    (every,) = (split_prompts(PROMPTS, settings.model_copy(update={"prompts_per_round": None}), 0)["student"],)
    each = [split_prompts(PROMPTS, settings, number)["student"] for number in range(5)]
    for chosen in each:
        assert len(set(chosen)) == len(chosen) == min(wanted or len(every), len(every))
    taken = [place for chosen in each for place in chosen]
    assert taken == (every * 5)[: len(taken)]


def test_a_line_ends_at_a_line_feed_alone_and_a_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four"
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False), json.dumps({"prompt": "b"})]
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8", newline="")
    assert [prompt.text for prompt in read_prompts([str(path)])] == [text, "b"]


def test_prompts_with_other_tools_are_others(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "3 + 4?"}]
    tools = [
        [],
        [{"type": "function", "function": {"name": "add"}}],
        [{"type": "function", "function": {"name": "sum"}}],
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"messages": messages, "tools": some}) + "\n" for some in tools))
    prompts = read_prompts([str(path)])
    assert [list(prompt.tools) for prompt in prompts] == tools
    assert len({prompt.digest for prompt in prompts}) == 3
