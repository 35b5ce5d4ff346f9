"""Conversations that can be learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import save_model, tiny_llama
from transformers import AutoTokenizer

MAX_LEN = 48
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_chat_model(folder: Path, given: str, **sizes: Any) -> str:
    """A chat model of the given one's tokenizer, with special tokens behind all its ids that its template needs."""
    tokenizer = AutoTokenizer.from_pretrained(given)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHATML
    return save_model(folder, tiny_llama(3, eos_token_id=size + 1, **sizes), tokenizer)


def conversations(count: int = 60) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": f"it is {i}!"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": f"{i}."},
        ]
        for i in range(count)
    ]


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
