"""A benchmark's results: a file with one JSON line per training, to which several processes may append."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Results:
    """A file with one JSON line per training.

    Attributes:
        lines: The lines of the file; an unfinished last line, which a killed process has left, is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        self.lines: list[Line] = [json.loads(line) for line in whole.splitlines()]

    def has(self, arm: str, seed: int, about: dict[str, Any]) -> bool:
        """Return whether the file has that training with the same data and settings."""
        return any((one["arm"], one["seed"], one["about"]) == (arm, seed, about) for one in self.lines)

    def add(self, line: Line) -> None:
        """Append a line to the file."""
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def one_measurement(lines: Sequence[Line], *, but: str = "") -> list[Line]:
    """Return the lines of the largest measurement, which all have the same models, text, tokens and settings.

    A new measurement replaces an older one when it has as many lines.

    Args:
        lines: Lines of any measurements, in the order in which they were made.
        but: Name of a setting in `about` that may differ within a measurement.
    """
    abouts = [{name: value for name, value in line["about"].items() if name != but} for line in lines]
    most = max(reversed(abouts), key=abouts.count, default=None)
    return [line for line, about in zip(lines, abouts, strict=True) if about == most]
