"""The description of one training: its data, settings and device."""

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
from capgap.schemas.run_tune import LoraSettings


@dataclass(frozen=True)
class CacheSource:
    """A cache that a training reads.

    Attributes:
        reader: The reader of the cache's shards.
        weight: The cache's share of the steps, relative to the weights of the others.
        context: The context rule under which the teacher scored.
        target_temperature: The temperature to which the loader converts stored targets; None leaves them unchanged.
        writer_logprobs: Gives the logprobs with which a student sampled the text, if the loss needs them.
    """

    reader: ShardReader
    weight: float = 1.0
    context: ContextRule = "packed"
    target_temperature: TargetTemperature | None = None
    writer_logprobs: WriterLogprobs | None = None


@dataclass(frozen=True)
class StudentSteps:
    """How a training's model was made from its folder. A replay of a kept batch repeats these steps.

    Attributes:
        trust_remote_code: Whether Python code that comes with the model is run.
        old_size: Size of the vocabulary before tokens for roles were added.
        new_size: Size of the vocabulary with these tokens.
        lora: The settings of the adapters; None where all weights are trained.
        not_repeated: A further step that a replay cannot repeat, in words; empty where there is none.
    """

    trust_remote_code: bool = False
    old_size: int = 0
    new_size: int = 0
    lora: LoraSettings | None = None
    not_repeated: str = ""


@dataclass(frozen=True)
class TrainingTask:
    """The data of one training, and the way it is trained.

    Attributes:
        title: The title shown at the progress bar.
        settings: The settings of the optimization.
        training: The shards to train on.
        heldout: The shards on which the held-out loss is measured; their targets are not read.
        alpha: Weight of the KL to the targets in the first step; 0 for shards without targets.
        temperature: The temperature of the targets.
        seed: The seed of the data order and of random numbers.
        device: The device of this rank, `cpu` or such as `cuda:0`.
        folder: The folder of the stage, which receives `metrics.csv`, and checkpoints below `work`.
        target_temperature: The temperature to which the loader converts stored targets; None leaves them unchanged.
        objective: The divergence that alpha weighs, and the weights of rows.
        ranks: The rank of this process and the number of ranks; only rank 0 writes to the folder.
        heldout_targets: The cache's held-out sequences, which are the first ones of `heldout`; None without them.
        context: The context rule of `training` and `heldout`.
        row_len: Number of targets in a row of a batch; None makes each sequence a row.
        weight: The share of `training` in the steps, relative to the weights of `others`.
        others: Further caches to train on, by name.
        teacher: The model on the device whose whole distributions replace the shards' targets, or None.
        writer_logprobs: Gives the logprobs with which the text of `training` was sampled, if the loss needs them.
        heldout_logprobs: Gives the same for the text of `heldout_targets`, if a student of the run wrote it.
        steps: How the model was made from its folder.
        also_before: Whether held-out sequences are measured before the first step also without targets for them.
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
    steps: StudentSteps = StudentSteps()
    also_before: bool = False

    @property
    def micro_batch(self) -> int:
        """Number of sequences in one forward pass of one rank; by default the rank's whole share of a step."""
        return self.settings.micro_batch_sequences or max(1, self.settings.batch_sequences // self.ranks.world_size)

    @property
    def accumulate(self) -> int:
        """Number of micro-batches in a step on each rank."""
        return self.settings.batch_sequences // (self.micro_batch * self.ranks.world_size)

    @property
    def checkpoint_folder(self) -> Path:
        """The folder of checkpoints, which exists as long as the training is unfinished."""
        return self.folder / WORK_FOLDER / "checkpoints"

    @property
    def measures_before(self) -> bool:
        """Whether held-out sequences are measured before the first step too, as is usual where they have targets."""
        return self.also_before or (self.alpha > 0 and self.heldout_targets is not None)

    @property
    def several_in_a_row(self) -> bool:
        """Whether rows hold several sequences or documents, and attention must not reach from one to another."""
        rules = {self.context, *(source.context for source in self.others.values())}
        return self.row_len is not None or "document" in rules

    @property
    def longest_row(self) -> int:
        """Number of tokens in the longest row."""
        return self.row_len or self.training.shard_set.seq_len
