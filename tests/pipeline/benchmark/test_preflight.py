"""What the benchmark stage would refuse is refused before anything of the run is made. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.benchmark.preflight import require_tasks
from capgap.schemas.errors import CapgapError
from capgap.schemas.run_file import RunFile

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

TASKS = Path(__file__).parents[2] / "assets" / "benchmarks"


def run_with(**benchmarks: Any) -> RunFile:
    values = {"name": "tiny", "out": "nowhere", "corpus": {}, "teacher": {"path": "somewhere"}, "train": {}}
    return RunFile.model_validate({**values, "student": {"model": {}}, "cache": {}, "benchmarks": benchmarks})


@pytest.mark.parametrize(
    ("benchmarks", "said"),
    [
        ({"tasks": {"gsm8l": {}}}, r"^benchmarks\.tasks: no such task; found gsm8l"),
        ({"tasks": {"humaneval": {}}}, r"humaneval runs programs .*set benchmarks\.allow_code_execution"),
        ({"tasks": {"paper": {"num_fewshot": 1}}}, r"^benchmarks\.tasks\.paper: a preset of several tasks has no"),
        ({"tasks": {"paper": {}, "mmlu": {}}}, "a task is asked for twice; found mmlu"),
        (
            {"tasks": {"animals": {}}, "include_path": str(TASKS / "nowhere")},
            r"^benchmarks\.include_path: there is no such folder; found .*/nowhere, expected a folder of tasks",
        ),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_made(benchmarks: dict[str, Any], said: str) -> None:
    with pytest.raises(CapgapError, match=said):
        require_tasks(run_with(**benchmarks))


def test_a_folder_that_would_run_code_is_refused_and_a_plain_one_is_taken(tmp_path: Path) -> None:
    require_tasks(run_with(tasks={"animals": {}}, include_path=str(TASKS)))
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: pandas\n")
    with pytest.raises(CapgapError, match=r"mine\.yaml: this task runs code"):
        require_tasks(run_with(tasks={"mine": {}}, include_path=str(tmp_path)))
