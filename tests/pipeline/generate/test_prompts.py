"""The prompts of rounds."""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.generate.prompts import read_prompts


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "How much is 3 + 4?"}\n{"prompt": "And 5?"}\n')
    assert [prompt.text for prompt in read_prompts([str(path)])] == ["How much is 3 + 4?", "And 5?"]
