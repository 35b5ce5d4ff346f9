"""Conversations that can be learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_LEN = 48
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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
