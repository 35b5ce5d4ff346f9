from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capgap.pipeline.train.metrics import read_rows
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.context import Instance
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

TUNE = Instance("tune", seed=0)


@pytest.fixture(scope="module")
def tuned(make_run: Callable[..., RunFile], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("tuned")
    return out / "tune" / "seed-0", carry_out(make_run(out), TUNE)


def test_the_held_out_loss_falls_and_stands_in_totals_and_metrics(tuned: tuple[Path, Manifest]) -> None:
    folder, manifest = tuned
    measured = [float(row["validation_loss"]) for row in read_rows(folder / "metrics.csv") if row["validation_loss"]]
    assert manifest.totals["heldout_loss_before"] == measured[0] > 5
    assert manifest.totals["heldout_loss_after"] == pytest.approx(measured[-1], abs=1e-4)
    assert measured[-1] < 3.5
