"""Trainings of a few steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capgap.pipeline.store import ShardReader
from capgap.pipeline.train.task import TrainingTask
from capgap.schemas.run_optimization import OptimizationSettings


def tiny_task(
    folder: Path, training: ShardReader, heldout: ShardReader, settings: Mapping[str, Any], **more: Any
) -> TrainingTask:
    """On the CPU, with all weight on the divergence unless asked otherwise."""
    given: dict[str, Any] = {"title": "train: test", "alpha": 1.0, "temperature": 1.0, "seed": 0, "device": "cpu"}
    return TrainingTask(
        settings=OptimizationSettings.model_validate(settings),
        training=training,
        heldout=heldout,
        folder=folder,
        **given | more,
    )
