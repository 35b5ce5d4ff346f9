"""One table of names, whoever measures."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from capgap.pipeline.stage.scalars import CACHE_SCALARS, EVAL_SCALARS, TRAINING_SCALARS, ScalarFile
from capgap.pipeline.train.metrics import COLUMNS
from capgap.pipeline.train.staleness import RatioFigures

ROOT = Path(__file__).parents[3]


def test_tensorboard_reads_what_several_processes_said_one_after_the_other(tmp_path: Path) -> None:
    ScalarFile(tmp_path, CACHE_SCALARS).add(1, {"tokens_per_s": 100.0, "memory_bytes": None})
    again = ScalarFile(tmp_path, CACHE_SCALARS)
    again.add(2, {"tokens_per_s": 200.0})
    again.add(3, {"tokens_per_s": 300.0})
    assert len(list(tmp_path.iterdir())) == 2
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Tags()["scalars"] == ["tokens_per_s"]
    assert [(event.step, event.value) for event in found.Scalars("tokens_per_s")] == [(1, 100), (2, 200), (3, 300)]


def test_a_name_that_no_table_has_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="tokens_per_second"):
        ScalarFile(tmp_path, CACHE_SCALARS).add(1, {"tokens_per_second": 1.0})


def test_a_disk_that_takes_nothing_stops_no_stage(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("no folder")
    ScalarFile(tmp_path / "logs" / "tensorboard", EVAL_SCALARS).add(0, {"validation_loss": 1.0})
    assert (tmp_path / "logs").read_text() == "no folder"


def test_a_name_means_one_thing_in_every_stage() -> None:
    assert ("step", *TRAINING_SCALARS) == COLUMNS
    assert EVAL_SCALARS.items() <= TRAINING_SCALARS.items()
    shared = CACHE_SCALARS.keys() & TRAINING_SCALARS.keys()
    assert shared == {"num_tokens", "tokens_per_s", "memory_bytes"}


def test_every_row_of_a_training_is_made_of_names_in_the_table() -> None:
    """What callbacks add to metrics.csv and hand to loggers; a stage that logs past them is not found here."""
    # what is added as `**ratio`
    rows: list[set[str | None]] = [{f"ratio_{field.name}" for field in fields(RatioFigures)}]
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("_file.add", "metrics.add")):
                rows.append({keyword.arg for keyword in node.keywords if keyword.arg is not None})
            if isinstance(node, ast.Call) and re.search(r"(^|\.)(log|log_dict|add_scalar)$", ast.unparse(node.func)):
                assert not ast.unparse(node.func).startswith(("self.log", "module.log")), f"{path} logs past the table"
    assert len(rows) >= 3
    assert set().union(*rows) <= set(COLUMNS)


def test_the_table_is_in_the_documents() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    for name in {*TRAINING_SCALARS, *CACHE_SCALARS, *EVAL_SCALARS}:
        assert f"`{name}`" in text
