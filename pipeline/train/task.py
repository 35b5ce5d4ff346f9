"""What one training is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.batch import Heat
from capgap.pipeline.train.objective import Objective
from capgap.schemas.run_model import OptimizationSettings


@dataclass(frozen=True)
class Task:
    """What to train on, and how.

    Attributes:
        title: shown at the progress bar.
        settings: of the optimization.
        training: shards to train on.
        heldout: shards to measure the held-out loss on.
        alpha: weight of the KL to the targets; 0 for shards without targets.
        temperature: of the targets.
        seed: of the data order.
        device: `cpu` or `cuda:0`.
        folder: of the stage; receives `metrics.csv`, and checkpoints below `work`.
        heat: by which the loader turns the stored targets into those of that temperature.
        objective: which divergence alpha weighs.
        teacher: on the device, where its whole distributions take the place of the shards' targets.
    """

    title: str
    settings: OptimizationSettings
    training: ShardReader
    heldout: ShardReader
    alpha: float
    temperature: float
    seed: int
    device: str
    folder: Path
    heat: Heat | None = None
    objective: Objective = Objective()  # noqa: RUF009  # frozen
    teacher: PreTrainedModel | None = None
