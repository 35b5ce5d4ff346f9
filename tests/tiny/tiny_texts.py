"""Short texts of numbers, no two alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def numbered_texts(count: int, first: str = "line {i} says", length: int = 40) -> list[str]:
    """Text i begins with `first`, then its square and its multiples follow."""
    return [
        f"{first.format(i=i)} {i * i} and then {' '.join(str(i * k) for k in range(length))}\n" for i in range(count)
    ]


def write_texts(folder: Path, texts: Sequence[str]) -> Path:
    """The folder, with a file of each text."""
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text)
    return folder
