"""Every YAML block of README and docs is a run file or a grid, or sections of one; vLLM knows what it is given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from capgap.pipeline.cache.engine_args import require_engine_args
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.run_file import RunFile

ROOT = Path(__file__).parents[2]


def _blocks() -> Iterator[Any]:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)):
            yield pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")


@pytest.mark.parametrize("block", _blocks())
def test_settings_that_are_shown_are_settings(block: str) -> None:
    shown = yaml.safe_load(block)
    kind = RunFile if set(shown) <= set(RunFile.model_fields) else LawGrid
    for name, value in shown.items():
        TypeAdapter(kind.model_fields[name].rebuild_annotation()).validate_python(value)
    given = shown.get("cache", {}).get("engine_args")
    if given:
        pytest.importorskip("vllm", reason="vLLM is not installed")
        require_engine_args(given)


def test_the_page_of_teachers_shows_the_arguments_that_it_names() -> None:
    page = (ROOT / "docs" / "how-to" / "teachers.md").read_text()
    for name in ("quantization", "kv_cache_dtype", "hf_overrides", "enable_expert_parallel", "pipeline_parallel_size"):
        assert f"{name}:" in page
