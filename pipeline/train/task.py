"""What one training is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from capgap.pipeline.stage.folder import WORK_FOLDER
from capgap.pipeline.stage.ranks import Ranks
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.batch import TargetTemperature
from capgap.pipeline.store.loader_settings import WriterLogprobs
from capgap.pipeline.train.objective import Objective
from capgap.schemas.run_corpus import ContextRule
from capgap.schemas.run_optimization import OptimizationSettings


@dataclass(frozen=True)
class CacheSource:
    """A cache that is read beside the task's own.

    Attributes:
        reader: of its shards.
        weight: its share of the steps.
        context: the rule under which its teacher scored.
        target_temperature: of the targets that the loader hands out; None for that of the stored ones.
        writer_logprobs: by which its text was sampled, where the loss asks for them.
    """

    reader: ShardReader
    weight: float = 1.0
    context: ContextRule = "packed"
    target_temperature: TargetTemperature | None = None
    writer_logprobs: WriterLogprobs | None = None


@dataclass(frozen=True)
class TrainingTask:
    """What to train on, and how.

    Attributes:
        title: shown at the progress bar.
        settings: of the optimization.
        training: shards to train on.
        heldout: shards to measure the held-out loss on; of targets in them nothing is read.
        alpha: weight of the KL to the targets; 0 for shards without targets.
        temperature: of the targets.
        seed: of the data order.
        device: `cpu` or `cuda:0`; of this rank.
        folder: of the stage; receives `metrics.csv`, and checkpoints below `work`.
        target_temperature: what the loader turns stored targets into; None leaves them as they are.
        objective: which divergence alpha weighs.
        ranks: which of the training's processes this is; the first alone writes to the folder.
        heldout_targets: the cache's held-out sequences, the first ones of `heldout`; None where it has none.
        context: what a model sees before a token of `training` and of `heldout`.
        row_len: targets in a row of a batch; None for a sequence a row.
        weight: share of `training` in the micro-batches, where there are others.
        others: caches to train on as well, by name.
        teacher: on the device, where its whole distributions take the place of the shards' targets.
        writer_logprobs: by which the text of `training` was sampled, where the loss asks for them.
        heldout_logprobs: by which that of `heldout_targets` was, where a student of the run wrote it.
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
    target_temperature: TargetTemperature | None = None
    objective: Objective = Objective()  # noqa: RUF009  # frozen
    ranks: Ranks = Ranks()  # noqa: RUF009  # frozen
    heldout_targets: ShardReader | None = None
    context: ContextRule = "packed"
    row_len: int | None = None
    weight: float = 1.0
    others: Mapping[str, CacheSource] = field(default_factory=dict)
    teacher: PreTrainedModel | None = None
    writer_logprobs: WriterLogprobs | None = None
    heldout_logprobs: WriterLogprobs | None = None

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward pass of one rank: its whole share of a step where no size is set."""
        return self.settings.micro_batch_sequences or max(1, self.settings.batch_sequences // self.ranks.world_size)

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.settings.batch_sequences // (self.micro_batch * self.ranks.world_size)

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints are, as long as the training is unfinished."""
        return self.folder / WORK_FOLDER / "checkpoints"

    @property
    def measures_before(self) -> bool:
        """Whether held-out sequences are measured before the first step too: where there is a teacher's answer."""
        return self.alpha > 0 and self.heldout_targets is not None

    @property
    def several_in_a_row(self) -> bool:
        """Whether rows hold sequences or documents that must not see one another."""
        rules = {self.context, *(source.context for source in self.others.values())}
        return self.row_len is not None or "document" in rules

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row."""
        return self.row_len or self.training.shard_set.seq_len
