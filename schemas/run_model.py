"""Settings of the stages that make and train models: teacher, student, train."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.run_cache import RecordingName

_OF_THE_SCHEDULE = ("schedule", "decay_fraction", "decay_shape")


class ModelShape(Record):
    """A Llama-shaped model with fresh weights; its vocabulary comes from the corpus."""

    hidden_size: int = Field(192, ge=8)
    """Width."""

    num_layers: int = Field(4, ge=1)
    """Depth."""

    num_heads: int = Field(6, ge=1)
    """Query heads; must divide `hidden_size`."""

    num_key_value_heads: int | None = Field(None, ge=1)
    """Key and value heads; as many as query heads where it is left out."""

    intermediate_size: int = Field(512, ge=8)
    """Width of the feed-forward layers."""

    tie_word_embeddings: bool = True
    """One matrix for embedding and head."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size: found {self.hidden_size}, expected a multiple of 2 x num_heads = {2 * self.num_heads}"
            )
        if self.num_heads % (self.num_key_value_heads or self.num_heads):
            raise ValueError(
                f"num_key_value_heads: found {self.num_key_value_heads}, expected a divisor of {self.num_heads}"
            )
        return self


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
    """Of matrices; vectors are not decayed."""

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

    num_validation_sequences: int = Field(64, ge=1)
    """Held-out sequences behind that loss."""

    checkpoint_every_steps: int = Field(200, ge=1, json_schema_extra=OPERATIONAL)
    """A killed training resumes from the last checkpoint, exactly."""

    on_corrupt: Literal["stop", "skip"] = Field("stop", json_schema_extra=OPERATIONAL)
    """At a damaged block of sequences: `stop`, or `skip` it, say so, and take others in their place. It decides nothing
    where the shards are sound, and a training that met damage can go on; more than 0.1 % damaged stops in any case."""

    decode: Literal["host", "device"] = Field("host", json_schema_extra=OPERATIONAL)
    """Where stored sequences become ids and probabilities: in threads of the `host`, or on the `device` that trains,
    which leaves the host a part of the work. Batches are the same, but for the rounding of float32."""

    log_every_steps: int = Field(10, ge=1, json_schema_extra=OPERATIONAL)
    """Interval of the rows in metrics.csv."""

    schedule: Literal["cosine", "wsd"] = "cosine"
    """Of the learning rate after the warm-up: `cosine` falls to the end; `wsd` (arXiv 2404.06395) stays at the peak and
    falls over the last steps."""

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
        """Of the steps, with `wsd`."""
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
        for one in loggers:
            LoggerSettings.read(one)
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

    def decisive(self) -> dict[str, Any]:
        """As for every record, with the decay spelt out under `wsd`, and nothing of what was not chosen.

        Models that were trained before there was a choice are found again.
        """
        values = super().decisive()
        if self.output == "last":
            del values["output"]
        if self.schedule == "wsd":
            return values | {"decay_fraction": self.decay_share, "decay_shape": self.decay}
        return {name: value for name, value in values.items() if name not in _OF_THE_SCHEDULE}


class FurtherCache(Record):
    """A cache that a student learns from beside the run's own."""

    path: str | None = Field(None, json_schema_extra=OPERATIONAL)
    """Folder or URL of a finished cache, of any corpus and teacher with the student's tokenizer; what decides is what
    lies there. Left out, it is the run's own cache, to mix its recordings."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Its share of the micro-batches, beside the other caches' weights and `own_weight`."""

    recording: RecordingName | None = None
    """Which of its recordings to learn from; needed where it has both."""


class TrainSettings(OptimizationSettings):
    """How a student learns from a cache, or from several."""

    alpha: float = Field(1.0, ge=0, le=1)
    """Weight of the KL to the teacher; cross-entropy with the text has weight 1 - alpha. 0 is cross-entropy alone."""

    recording: RecordingName | None = None
    """Which recording of the cache to learn from; needed where it has both."""

    temperature: float | None = Field(None, gt=0)
    """At which teacher and student are compared, the cache's where it is left out: `cache.temperature`, or for `topk`
    also one of `cache.extra_temperatures`."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """What is called KL here: `forward_kl`, KL(teacher || student); `reverse_kl`; or `jsd`, the generalised
    Jensen-Shannon divergence. A `sampled` cache supports `forward_kl` only."""

    jsd_beta: float | None = Field(None, gt=0, lt=1)
    """With `jsd` only: weight of KL(teacher || mixture), and the teacher's share of the mixture. 0.5 where left out."""

    tail: Literal["drop", "renorm", "ghost", "label"] | None = None
    """What becomes of the teacher's probability outside the kept ids: `drop` leaves it out, `renorm` scales the kept
    ids up to 1, `ghost` compares it with the student's as one, `label` adds it to the real next token. Left out, it is
    `ghost` for a `topk` cache and `drop` for a `sampled` one, which has no tail."""

    final_alpha: float | None = Field(None, ge=0, le=1)
    """`alpha` of the last step; the first has `alpha`. Constant where left out."""

    alpha_schedule: Literal["linear", "cosine"] | None = None
    """With `final_alpha` only: how `alpha` gets there, in equal parts (`linear`) or slowly at both ends (`cosine`).
    `linear` where left out."""

    token_weights: Literal["equal", "entropy"] = "equal"
    """What a token counts in the mean: `equal`; or `entropy`, as many nats as the teacher is uncertain there, so that
    its hard tokens lead (teacher entropy as a measure of importance: arXiv 2602.01395, 2605.01732). Needs a `topk`
    cache. Tokens that the loss mask leaves out never count."""

    router_loss_weight: float = Field(0.0, ge=0)
    """Of a mixture of experts' load-balancing loss (arXiv 2101.03961), added to the loss; the student's own
    `router_aux_loss_coef` is not read."""

    @model_validator(mode="after")
    def _check_alpha_schedule(self) -> Self:
        if self.alpha_schedule is not None and self.final_alpha is None:
            raise ValueError(f"alpha_schedule: found {self.alpha_schedule} alone, expected it with final_alpha")
        return self

    @property
    def alpha_shape(self) -> Literal["linear", "cosine"]:
        """How alpha moves."""
        return self.alpha_schedule or "linear"

    @property
    def needs_targets(self) -> bool:
        """Whether the cache's targets count in any step."""
        return self.targets == "cache" and self.largest_alpha > 0

    @property
    def largest_alpha(self) -> float:
        """Of all steps."""
        return max(self.alpha, self.final_alpha or 0.0)

    caches: dict[str, FurtherCache] = Field(default_factory=dict)
    """Further caches by a name of yours, for example `code: {path: s3://bucket/code/cache, weight: 2}`. Each
    micro-batch is of one cache, all at one temperature. The run's own is read `num_epochs` times, the others as often
    as the mix takes."""

    own_weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The share of the run's own cache beside `caches`."""

    row_len: int | None = Field(None, ge=8)
    """Targets in a row of a batch: as many whole sequences as fit stand in it one after the other, with positions of
    their own and no sight of one another, and padding without weight. Needed where caches differ in `seq_len`. A
    sequence a row where it is left out."""

    @model_validator(mode="after")
    def _check_caches(self) -> Self:
        for name in self.caches:
            if not name or "/" in name or name != name.strip():
                raise ValueError(f"caches: found the name {name!r}, expected a word")
        if not self.caches and self.own_weight != 1:
            raise ValueError(f"own_weight: found {self.own_weight:g} without caches, expected it beside others")
        return self

    targets: Literal["cache", "online"] = "cache"
    """Where the teacher's distributions come from: the `cache`; or, `online`, the teacher of the run, which then stands
    on the device beside the student and gives its whole distribution for each token of the same sequences: the
    undistorted baseline, for models that fit there together."""

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if self.targets == "online" and self.tail is not None:
            raise ValueError(f"tail: found {self.tail} with targets online, expected none; there is no tail")
        return self

    @model_validator(mode="after")
    def _check_beta(self) -> Self:
        if self.jsd_beta is not None and self.divergence != "jsd":
            raise ValueError(f"jsd_beta: found {self.jsd_beta} with divergence {self.divergence}, expected it with jsd")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself takes part; cross-entropy alone asks for nobody's distribution."""
        return self.targets == "online" and self.largest_alpha > 0

    @property
    def beta(self) -> float:
        """Of `jsd`."""
        return 0.5 if self.jsd_beta is None else self.jsd_beta

    def decisive(self) -> dict[str, Any]:
        """As for every record, with the beta of `jsd` spelt out, and nothing of the choice where none was made.

        Students that were trained before there was a choice are found again. Beside other caches a micro-batch is the
        unit of the mix, so that its size decides.
        """
        values = super().decisive() | ({"jsd_beta": self.beta} if self.divergence == "jsd" else {})
        values |= {"alpha_schedule": self.alpha_shape} if self.final_alpha is not None else {}
        values["caches"] = {name: cache.decisive() for name, cache in self.caches.items()}
        if self.caches:
            values["micro_batch_sequences"] = self.micro_batch
        defaults: dict[str, Any] = {"divergence": "forward_kl", "jsd_beta": None, "tail": None}
        defaults |= {"final_alpha": None, "alpha_schedule": None, "token_weights": "equal", "router_loss_weight": 0.0}
        defaults |= {"caches": {}, "own_weight": 1.0, "row_len": None, "targets": "cache"}
        return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


class TeacherSettings(Record):
    """A given teacher (`path`), or the recipe of a small one (`model` and `training`)."""

    path: str | None = None
    """A Hugging Face folder or id."""

    model: ModelShape | None = None
    """Shape of a teacher to train on the teacher's part of the corpus."""

    training: OptimizationSettings | None = None
    """How that teacher is trained."""

    seed: int = Field(0, ge=0)
    """Seed of its weights and data order."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model at `path`. Whoever wrote it may do anything that you may."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _exactly_one("teacher", self.path, self.model)
        _code_of_a_path("teacher", self.path, self.trust_remote_code)
        if self.path is not None and self.training is not None:
            raise ValueError("teacher.training: found beside teacher.path, expected only with teacher.model")
        return self

    @property
    def recipe(self) -> OptimizationSettings:
        """How a teacher with fresh weights is trained."""
        return self.training if self.training is not None else OptimizationSettings()

    def decisive(self) -> dict[str, Any]:
        """As for every record, with the recipe spelt out where it was left out."""
        values = _without_code(super().decisive())
        return values | ({} if self.path else {"training": self.recipe.decisive()})


class StudentSettings(Record):
    """Where the student's first weights come from."""

    path: str | None = None
    """A Hugging Face folder or id to start from."""

    model: ModelShape | None = None
    """Shape of a student with fresh weights."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model at `path`. Whoever wrote it may do anything that you may."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _exactly_one("student", self.path, self.model)
        _code_of_a_path("student", self.path, self.trust_remote_code)
        return self

    def decisive(self) -> dict[str, Any]:
        """As for every record, and nothing of code where none is trusted."""
        return _without_code(super().decisive())


def _exactly_one(stage: str, path: str | None, model: ModelShape | None) -> None:
    if (path is None) == (model is None):
        found = "neither" if path is None else "both"
        raise ValueError(f"{stage}: found {found} of path and model, expected one of them")


def _code_of_a_path(stage: str, path: str | None, trusted: bool) -> None:
    if trusted and path is None:
        raise ValueError(f"{stage}.trust_remote_code: found true with {stage}.model, expected it with {stage}.path")


def _without_code(values: dict[str, Any]) -> dict[str, Any]:
    """Models that were given before code could be trusted are found again."""
    return {name: value for name, value in values.items() if name != "trust_remote_code" or value}
