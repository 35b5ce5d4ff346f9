"""The chat template of a tuned model."""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.tune.template import with_template


def test_a_byte_order_mark_is_no_part_of_a_given_template(tmp_path: Path) -> None:
    path = tmp_path / "given.jinja"
    path.write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}")
    tokenizer, name = with_template(train_tokenizer(["some text"] * 3, 300), str(path))
    assert tokenizer.chat_template == "{{ messages[0].content }}" and name == f"the chat template {path}"
