"""Settings of the tune stage: conversations, how they become tokens, and how a model learns from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.home import PATH
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_optimization import OptimizationSettings
from capgap.schemas.run_train import TrainSettings

_OF_A_CACHE = ("alpha", "recording", "temperature", "divergence", "jsd_beta", "tail")
_OF_SOURCES = (
    "sources",
    "messages_field",
    "on_bad_record",
    "max_bad_fraction",
    "chat_template",
    "max_len",
    "heldout_fraction",
    "packing",
)

OWN_CACHE = "own"
"""The value of `tune.cache` that means the run's own cache."""


class LoraSettings(Record):
    """Low-rank adapters (LoRA, arXiv 2106.09685), trained instead of all weights. They need the extra `lora`."""

    r: int = Field(8, ge=1)
    """Rank of the adapters. A higher rank can learn more and takes more memory."""

    alpha: float = Field(16.0, gt=0)
    """Scale of the adapters: their product is multiplied by alpha / r."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped in training."""

    target_modules: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the linear layers that get adapters, for example `[q_proj, v_proj]`. Left out, every linear layer but
    the head, which never gets one because the fused loss reads its plain weight."""


class TuneSettings(OptimizationSettings):
    """How a trained student is tuned on conversations. A sequence is a row of whole conversations."""

    path: Annotated[str | None, PATH] = None
    """Folder or Hugging Face id of a model to tune, once per seed, instead of the run's trained students."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model at `path`. That code can do anything that you can, so set this only
    if you trust its author."""

    sources: Annotated[tuple[str, ...], PATH] = ()
    """Files, folders or globs of conversations to learn from. They have the file types of `corpus.sources`."""

    messages_field: str = Field("auto", min_length=1)
    """Field of a record that holds the conversation, in any form that `corpus.messages_field` takes. `auto` finds it by
    the record's own fields. A record may also be a list of turns itself."""

    on_bad_record: Literal["stop", "skip"] = Field("stop", json_schema_extra=OPERATIONAL)
    """What to do with a record that cannot be used: `stop` with an error, or `skip` it, and count and log it."""

    max_bad_fraction: float = Field(0.01, gt=0, lt=1, json_schema_extra=OPERATIONAL)
    """With `on_bad_record: skip`: largest share of the records that may be bad. More is an error."""

    chat_template: Annotated[str | None, PATH] = None
    """Chat template that turns conversations into tokens. `own`: the tokenizer's. `roles`: a simple template that marks
    roles by special tokens, which are added to the tokenizer. Or the path of a Jinja file. Left out, `own`, or `roles`
    if the tokenizer has none."""

    max_len: int = Field(2048, ge=8)
    """Targets in a row. A longer conversation is cut after its last answer that fits; the rest is not learnt from."""

    heldout_fraction: float = Field(0.01, gt=0, lt=1)
    """Share of the conversations that are held out: the loss is measured on them and they are not learnt from."""

    packing: bool = True
    """Put as many whole conversations into a row as fit, without attention between them. `false`: one conversation per
    row, for models whose attention cannot be restricted to one conversation."""

    cache: Annotated[str | None, PATH] = Field(None, json_schema_extra=OPERATIONAL)
    """Learn from a cache instead of `sources`: a chat teacher's distributions over whole conversations, made with
    `corpus.messages_field` and `corpus.whole_conversations`. `own` is the run's own cache; or folder or URL of a
    finished one. The cache found there decides the result, not its address."""

    alpha: float | None = Field(None, ge=0, le=1)
    """With `cache` only: weight of the KL to the teacher; cross-entropy with the answers has weight 1 - alpha. Left
    out, 1."""

    recording: RecordingName | None = None
    """With `cache` only: which recording of the cache to learn from; needed if the cache has both."""

    temperature: float | None = Field(None, gt=0)
    """With `cache` only: temperature at which teacher and student are compared, as `train.temperature`."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] | None = None
    """With `cache` only: divergence of the loss, as `train.divergence`. Left out, `forward_kl`."""

    jsd_beta: float | None = Field(None, gt=0, lt=1)
    """With `cache` and `jsd` only: weight of KL(teacher || mixture), as `train.jsd_beta`. Left out, 0.5."""

    tail: Literal["drop", "renorm", "ghost", "label"] | None = None
    """With `cache` only: how the loss treats the teacher's probability outside the stored tokens, as `train.tail`."""

    lora: LoraSettings | None = None
    """Train low-rank adapters instead of all weights. They are merged into the tuned model, and saved beside it too."""

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate. Adapters (`lora`) usually need a higher one, for example 2e-4."""

    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0 to its peak."""

    num_epochs: int = Field(3, ge=1)
    """Passes over the conversations."""

    batch_sequences: int = Field(32, ge=1)
    """Rows in one optimizer step."""

    @model_validator(mode="after")
    def _check_what_is_learnt_from(self) -> Self:
        if bool(self.sources) == (self.cache is not None):
            found = "both" if self.sources else "neither"
            raise ValueError(f"tune: found {found} of sources and cache, expected one of them")
        others, missing = (_OF_A_CACHE, "cache") if self.cache is None else (_OF_SOURCES, "sources")
        for name in others:
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"tune.{name}: found without tune.{missing}, expected it only with tune.{missing}")
        if self.trust_remote_code and self.path is None:
            raise ValueError("tune.trust_remote_code: found true without tune.path, expected it only with tune.path")
        self.loss_settings()
        return self

    def loss_settings(self) -> TrainSettings:
        """Return these settings as settings of the train stage. Without a cache the loss is cross-entropy alone."""
        own = OptimizationSettings.model_fields
        values = {name: getattr(self, name) for name in own if name in self.model_fields_set}
        values |= {name: getattr(self, name) for name in ("learning_rate", "warmup_fraction", "num_epochs")}
        values |= {"batch_sequences": self.batch_sequences}
        values |= {name: getattr(self, name) for name in _OF_A_CACHE if getattr(self, name) is not None}
        return TrainSettings.model_validate({"alpha": 0.0 if self.cache is None else 1.0} | values)

    def meant(self) -> dict[str, Any]:
        """Return the effective settings of the loss, with their defaults, if a cache is learnt from."""
        if self.cache is None:
            return super().meant()
        loss = self.loss_settings().decisive()
        return super().meant() | {name: loss[name] for name in _OF_A_CACHE}
