"""What one training is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.batch import Heat
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.workflow.ranks import Ranks
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
        device: `cpu` or `cuda:0`; of this rank.
        folder: of the stage; receives `metrics.csv`, and checkpoints below `work`.
        heat: by which the loader turns the stored targets into those of that temperature.
        objective: which divergence alpha weighs.
        ranks: which of the training's processes this is; the first alone writes to the folder.
        heldout_targets: the cache's held-out sequences, the first ones of `heldout`; None where it has none.
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
    ranks: Ranks = Ranks()  # noqa: RUF009  # frozen
    heldout_targets: ShardReader | None = None

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward pass of one rank: its whole share of a step where no size is set."""
        return self.settings.micro_batch_sequences or max(1, self.settings.batch_sequences // self.ranks.world_size)
