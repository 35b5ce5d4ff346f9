"""metrics.csv across a kill."""

from __future__ import annotations

import csv
from pathlib import Path

from capgap.pipeline.train.metrics import MetricsFile


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_past_the_checkpoint_and_a_torn_row_are_dropped(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    for step in (5, 10, 15):
        file.add(step=step, train_loss=1.5, tokens_per_s=100.0)
    with path.open("a") as torn:
        torn.write("20,0.5,3")
    MetricsFile(path, 10).add(step=15, train_loss=1.25, tokens_per_s=90.0)
    assert [(row["step"], row["train_loss"]) for row in _rows(path)] == [("5", "1.5"), ("10", "1.5"), ("15", "1.25")]


def test_a_fresh_training_forgets_what_an_earlier_one_logged(tmp_path) -> None:
    MetricsFile(tmp_path / "metrics.csv", 0).add(step=5, tokens_per_s=1.0)
    MetricsFile(tmp_path / "metrics.csv", 0)
    assert _rows(tmp_path / "metrics.csv") == []
