"""Settings that every training has: optimizer, batches, devices, checkpoints and loggers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from capgap.schemas.base import OPERATIONAL, Record, below
from capgap.schemas.home import PATH


class LoggerSettings(Record):
    """A logger of a training and its arguments."""

    class_path: str
    """Short name of a known logger, or import path of a Lightning logger's class, for example
    `lightning.pytorch.loggers.CometLogger`."""

    init_args: Annotated[dict[str, JsonValue], PATH] = Field(default_factory=dict)
    """Arguments of the logger. For a logger given by its short name, they override capgap's own arguments."""

    @classmethod
    def read(cls, given: str | dict[str, Any]) -> LoggerSettings:
        """Read an entry of `loggers`, which is a name or a mapping with `class_path` and `init_args`.

        Raises:
            ValueError: the entry is neither.
        """
        return cls(class_path=given) if isinstance(given, str) else cls.model_validate(given)


class OptimizationSettings(Record):
    """AdamW with a linear warm-up and a decay of the learning rate."""

    learning_rate: float = Field(3e-3, gt=0)
    """Peak learning rate."""

    final_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate of the last step, as a share of the peak."""

    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0 to its peak."""

    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of matrices. Vectors, such as norms and biases, are not decayed."""

    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of a step's gradient. A larger gradient is scaled down to it."""

    batch_sequences: int = Field(8, ge=1)
    """Sequences in one optimizer step, over all devices together."""

    micro_batch_sequences: int | None = Field(None, ge=1, json_schema_extra=OPERATIONAL)
    """Sequences in one forward pass; must divide `batch_sequences`. Lower it if the device runs out of memory: the
    gradient stays that of the whole batch. Left out, `batch_sequences`."""

    num_epochs: int = Field(1, ge=1)
    """Passes over the data."""

    max_tokens: int | None = Field(None, ge=1)
    """Stop after this many targets, even within an epoch."""

    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    """Precision, by Lightning's names. `32-true`: float32. `bf16-mixed`: float32 weights and bfloat16 arithmetic, usual
    on GPUs. `bf16-true`: bfloat16 weights and optimizer states too, which takes half the memory."""

    validate_every_steps: int = Field(200, ge=1)
    """Steps between two measurements of the held-out loss, which is also measured at the end."""

    num_validation_sequences: int | None = Field(None, ge=1)
    """Held-out sequences on which that loss is measured. Left out, 64, or in a short training so few (at least 8) that
    all measurements together read at most a tenth of the sequences that it trains on."""

    checkpoint_every_steps: int = Field(200, ge=1, json_schema_extra=OPERATIONAL)
    """Steps between two checkpoints. A killed training resumes exactly from the last one."""

    on_corrupt: Literal["stop", "skip"] = Field("stop", json_schema_extra=OPERATIONAL)
    """What to do at a damaged block of sequences: `stop`, or `skip` it, log it and train on other sequences instead. If
    more than 0.1 % is damaged, training stops in any case. Sound shards give the same result with both."""

    decode: Literal["host", "device"] = Field("host", json_schema_extra=OPERATIONAL)
    """Where stored targets are decoded into ids and probabilities: in threads of the `host`, or on the training
    `device`, for hosts that are too slow to feed it. Batches are equal up to float32 rounding."""

    log_every_steps: int = Field(10, ge=1, json_schema_extra=OPERATIONAL)
    """Steps between two rows of metrics.csv."""

    schedule: Literal["cosine", "wsd"] = "cosine"
    """How the learning rate changes after the warm-up. `cosine`: it falls until the last step. `wsd` (warm-up, stable,
    decay; arXiv 2404.06395): it stays at the peak and falls over the last steps."""

    decay_fraction: float | None = Field(None, gt=0, le=1)
    """With `wsd` only: share of the steps over which the learning rate falls. Left out, 0.1."""

    decay_shape: Literal["exponential", "sqrt", "linear"] | None = None
    """With `wsd` only: shape of the decay: `exponential` (arXiv 2404.06395), `sqrt` (one minus the square root of the
    decay's progress, arXiv 2405.18392) or `linear`. Left out, `exponential`."""

    activation_checkpointing: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Store only each layer's input and recompute the rest in the backward pass. It takes less memory and about a third
    more time, with the same gradients."""

    compile: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Compile the student's layers with torch.compile: it takes minutes before the first step and makes steps faster,
    with the same gradients up to rounding. On a CPU it needs a C++ compiler."""

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        for name in ("decay_fraction", "decay_shape"):
            if self.schedule != "wsd" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: found {getattr(self, name)} with schedule {self.schedule}, expected it with wsd"
                )
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_share > 1:
            raise ValueError(
                f"warmup_fraction + decay_fraction: found {self.warmup_fraction + self.decay_share:g}, "
                "expected at most 1"
            )
        if self.schedule == "wsd" and self.decay == "exponential" and self.final_learning_rate_ratio == 0:
            raise ValueError(
                "final_learning_rate_ratio: found 0 with decay_shape exponential, expected more than 0; "
                "take decay_shape sqrt or linear"
            )
        return self

    @property
    def decay_share(self) -> float:
        """Share of the steps over which the learning rate falls with `wsd`: `decay_fraction`, with its default."""
        return 0.1 if self.decay_fraction is None else self.decay_fraction

    @property
    def decay(self) -> Literal["exponential", "sqrt", "linear"]:
        """Shape of the decay with `wsd`: `decay_shape`, with its default."""
        return self.decay_shape or "exponential"

    num_devices: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """GPUs of this machine that train one model together, with one process each; on a CPU, the number of processes.
    They share the sequences of each step. Under torchrun, the processes that it starts are used instead, on all
    machines."""

    strategy: Literal["ddp", "fsdp2"] = Field("ddp", json_schema_extra=OPERATIONAL)
    """How several devices share the model. `ddp`: each holds all of it. `fsdp2`: each holds a part of every parameter,
    gradient and optimizer state, for models that do not fit on one. A checkpoint can be resumed with either, and on
    another number of devices."""

    keep_checkpoints: int = Field(2, ge=1, json_schema_extra=OPERATIONAL)
    """Number of last checkpoints kept until the stage is finished. If one is damaged, the one before it is used."""

    output: Literal["last", "best"] = "last"
    """Which weights become the stage's model: those of the `last` step, or the `best`, at which the lowest held-out
    loss was measured (`validate_every_steps`)."""

    loggers: tuple[str | dict[str, Any], ...] = Field(("tensorboard",), json_schema_extra=OPERATIONAL)
    """Loggers that receive the metrics in addition to metrics.csv: `tensorboard`, `csv`, `wandb`, `mlflow`, or any
    Lightning logger as `{class_path: ..., init_args: {...}}`. They write into the stage's folder `logs`. [] means
    none."""

    @field_validator("loggers")
    @classmethod
    def _check_loggers(cls, loggers: tuple[str | dict[str, Any], ...]) -> tuple[str | dict[str, Any], ...]:
        for number, one in enumerate(loggers):
            try:
                LoggerSettings.read(one)
            except ValidationError as error:
                raise below(error, number) from None
        return loggers

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        if self.batch_sequences % (self.micro_batch_sequences or self.batch_sequences):
            raise ValueError(
                f"micro_batch_sequences: found {self.micro_batch_sequences}, "
                f"expected a divisor of batch_sequences = {self.batch_sequences}"
            )
        return self

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward pass: `micro_batch_sequences`, with its default."""
        return self.micro_batch_sequences or self.batch_sequences

    def meant(self) -> dict[str, Any]:
        """Return the decay of `wsd`, with its defaults."""
        if self.schedule != "wsd":
            return {}
        return {"decay_fraction": self.decay_share, "decay_shape": self.decay}
