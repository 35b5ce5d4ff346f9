"""Settings of any training: optimizer, batches, devices, what it writes down."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from capgap.schemas.base import OPERATIONAL, Record, below


class LoggerSettings(Record):
    """A logger of a training and its arguments."""

    class_path: str
    """Its name, or the path of a Lightning logger's class, as in `lightning.pytorch.loggers.CometLogger`."""

    init_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments; of a logger with a name they are laid over its own."""

    @classmethod
    def read(cls, given: str | dict[str, Any]) -> LoggerSettings:
        """An entry of `loggers`: a name alone, or with arguments.

        Raises:
            ValueError: it is neither.
        """
        return cls(class_path=given) if isinstance(given, str) else cls.model_validate(given)


class OptimizationSettings(Record):
    """AdamW with linear warm-up and decay."""

    learning_rate: float = Field(3e-3, gt=0)
    """Peak learning rate."""

    final_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """The last step's learning rate over the peak."""

    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""

    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of matrices; vectors are not decayed."""

    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of a step's gradient."""

    batch_sequences: int = Field(8, ge=1)
    """Sequences in one optimizer step."""

    micro_batch_sequences: int | None = Field(None, ge=1, json_schema_extra=OPERATIONAL)
    """Sequences in one forward pass; the whole batch where it is left out. Must divide `batch_sequences`."""

    num_epochs: int = Field(1, ge=1)
    """Passes over the data."""

    max_tokens: int | None = Field(None, ge=1)
    """Stop after this many targets, even within an epoch."""

    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    """Lightning's name of the arithmetic."""

    validate_every_steps: int = Field(200, ge=1)
    """Held-out loss is measured at this interval and at the end."""

    num_validation_sequences: int | None = Field(None, ge=1)
    """Held-out sequences behind that loss. Left out: 64, or as many fewer as keep all measurements of a short training
    together to a tenth of the sequences that it trains on, but 8."""

    checkpoint_every_steps: int = Field(200, ge=1, json_schema_extra=OPERATIONAL)
    """A killed training resumes from the last checkpoint, exactly."""

    on_corrupt: Literal["stop", "skip"] = Field("stop", json_schema_extra=OPERATIONAL)
    """At a damaged block of sequences: `stop`, or `skip` it, log it, and take others in their place. It decides nothing
    where the shards are sound, and a training that met damage can go on; more than 0.1 % damaged stops in any case."""

    decode: Literal["host", "device"] = Field("host", json_schema_extra=OPERATIONAL)
    """Where stored sequences become ids and probabilities: in threads of the `host`, or on the `device` that trains,
    which leaves the host a part of the work. Batches are the same, but for the rounding of float32."""

    log_every_steps: int = Field(10, ge=1, json_schema_extra=OPERATIONAL)
    """Interval of the rows in metrics.csv."""

    schedule: Literal["cosine", "wsd"] = "cosine"
    """How the learning rate moves after the warm-up: `cosine` falls to the end; `wsd` (arXiv 2404.06395) stays at the
    peak and falls over the last steps."""

    decay_fraction: float | None = Field(None, gt=0, le=1)
    """With `wsd` only: share of the steps over which the learning rate falls. 0.1 where left out."""

    decay_shape: Literal["exponential", "sqrt", "linear"] | None = None
    """With `wsd` only: `exponential`, of that paper; `sqrt`, one minus the square root of the way (arXiv 2405.18392);
    or `linear`. `exponential` where left out."""

    activation_checkpointing: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Keep each layer's input alone and compute the rest again in the backward pass: less memory, about a third more
    time, the same gradients."""

    compile: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Compile the student's layers with torch.compile: minutes before the first step, faster steps, the same gradients
    but for rounding. On a CPU it needs a C++ compiler."""

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
        """The share of the steps in which it falls, with `wsd`."""
        return 0.1 if self.decay_fraction is None else self.decay_fraction

    @property
    def decay(self) -> Literal["exponential", "sqrt", "linear"]:
        """Its shape, with `wsd`."""
        return self.decay_shape or "exponential"

    num_devices: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """GPUs of this machine that train one model together, a process each; on a CPU, processes. A step's sequences are
    divided among them. Under torchrun there are as many as it starts, on as many machines."""

    strategy: Literal["ddp", "fsdp2"] = Field("ddp", json_schema_extra=OPERATIONAL)
    """How several devices share the model: each holds all of it (`ddp`), or a part of every parameter, its gradient and
    its optimizer state (`fsdp2`). A checkpoint goes on under either, and on another number of devices."""

    keep_checkpoints: int = Field(2, ge=1, json_schema_extra=OPERATIONAL)
    """How many of the last checkpoints stay until the stage is finished; a damaged one is passed over for the one
    before it."""

    output: Literal["last", "best"] = "last"
    """Which weights the stage hands on: those of the `last` step, or the `best`, of the lowest held-out loss measured
    (`validate_every_steps`)."""

    loggers: tuple[str | dict[str, Any], ...] = Field(("tensorboard",), json_schema_extra=OPERATIONAL)
    """Who hears of these rows beside metrics.csv: `tensorboard`, `csv`, `wandb`, `mlflow`, or any Lightning logger as
    `{class_path: ..., init_args: {...}}`. Files are in the stage's folder `logs`; [] for none."""

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
        """Sequences in one forward pass."""
        return self.micro_batch_sequences or self.batch_sequences

    def meant(self) -> dict[str, Any]:
        """The decay of `wsd`, where it was left out."""
        if self.schedule != "wsd":
            return {}
        return {"decay_fraction": self.decay_share, "decay_shape": self.decay}
