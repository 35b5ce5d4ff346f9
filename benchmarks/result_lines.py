"""What a benchmark keeps of each training: a file of JSON lines, to which several processes may add."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Results:
    """A file of one JSON line a training.

    Attributes:
        lines: what is there; half a line at the end, which a killed process has left, is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        self.lines: list[Line] = [json.loads(line) for line in whole.splitlines()]

    def has(self, arm: str, seed: int, about: dict[str, Any]) -> bool:
        """Whether that training is there, on the same data and at the same sizes."""
        return any((one["arm"], one["seed"], one["about"]) == (arm, seed, about) for one in self.lines)

    def add(self, line: Line) -> None:
        """Append it."""
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def one_measurement(lines: Sequence[Line], *, but: str = "") -> list[Line]:
    """The lines about the same models, text, tokens and settings: those of which there are most.

    A new measurement takes the place of an older one when it has as many lines.

    Args:
        lines: of any measurements, in the order in which they were made.
        but: a part of what they are about that may differ among them.
    """
    abouts = [{name: value for name, value in line["about"].items() if name != but} for line in lines]
    most = max(reversed(abouts), key=abouts.count, default=None)
    return [line for line, about in zip(lines, abouts, strict=True) if about == most]
