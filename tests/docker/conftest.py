from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[2] / "docker"


@pytest.fixture(scope="session")
def brought() -> Callable[[str], set[str]]:
    """What an image's base brings by itself, as the lock file lists it."""

    def found(image: str) -> set[str]:
        lines = (DOCKER / f"requirements-{image}.txt").read_text().splitlines()
        return {line[2:] for line in lines if re.fullmatch(r"# [a-z0-9][a-z0-9._-]*", line)}

    return found
