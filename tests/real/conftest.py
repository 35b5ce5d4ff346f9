"""Real language models: `make test-real` fetches 330 MB once, benchmarks/real_models.py says from where."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("real")


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """The folder of one of the models, by its name."""
    sys.path.insert(0, str(BENCHMARKS))
    from real_models import real_model

    return real_model
