"""Settings of the tune stage: conversations, how they become tokens, and how a model learns from them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record
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
"""The run's own, as `tune.cache`."""


class LoraSettings(Record):
    """Low-rank adapters (arXiv 2106.09685) in place of all weights; needs the extra `lora`."""

    r: int = Field(8, ge=1)
    """Rank."""

    alpha: float = Field(16.0, gt=0)
    """The adapters' product is multiplied by alpha / r."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped in training."""

    target_modules: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the linear layers that are adapted, for example `[q_proj, v_proj]`; every one but the head where it is
    left out. The head is never adapted: the fused loss takes it plain."""


class TuneSettings(OptimizationSettings):
    """How a trained student is tuned on conversations. A sequence is a row of whole conversations."""

    path: str | None = None
    """A Hugging Face folder or id to tune in place of the run's trained students, once per seed."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model at `path`. Whoever wrote it may do anything that you may."""

    sources: tuple[str, ...] = ()
    """Conversations: files, folders or globs of records, of the kinds that `corpus.sources` takes."""

    messages_field: str = Field("auto", min_length=1)
    """The field of a record that holds the conversation, in any of the forms that `corpus.messages_field` takes;
    `auto`: the record's own fields say where it is. A record may also be a list of turns itself."""

    on_bad_record: Literal["stop", "skip"] = Field("stop", json_schema_extra=OPERATIONAL)
    """What happens where a record cannot be used, as in `corpus`."""

    max_bad_fraction: float = Field(0.01, gt=0, lt=1, json_schema_extra=OPERATIONAL)
    """With `skip`: share of the records that may be bad. More is an error."""

    chat_template: str | None = None
    """`own`: the tokenizer's. `roles`: a simple one whose marks of roles are special tokens, which are added to the
    tokenizer. Or the path of a Jinja file. Left out: `own`, or `roles` where the tokenizer has none."""

    max_len: int = Field(2048, ge=8)
    """Targets in a row. A longer conversation is cut after the last answer that ends within; an answer that does not is
    never learnt from."""

    heldout_fraction: float = Field(0.01, gt=0, lt=1)
    """Share of the conversations that is only measured."""

    packing: bool = True
    """As many whole conversations in a row as fit, none of which sees another. `false`: one a row, for models whose
    attention cannot be told where a conversation ends."""

    cache: str | None = Field(None, json_schema_extra=OPERATIONAL)
    """In place of `sources`: a chat teacher's distributions after each token of whole conversations, which
    `corpus.messages_field` and `corpus.whole_conversations` make. `own`, the run's own cache; or folder or URL of a
    finished one, of which decides what lies there."""

    alpha: float | None = Field(None, ge=0, le=1)
    """With `cache` only: weight of the KL to the teacher, beside cross-entropy with the answers; 1 where left out."""

    recording: RecordingName | None = None
    """With `cache` only: which of its recordings to learn from; needed where it has both."""

    temperature: float | None = Field(None, gt=0)
    """With `cache` only: at which teacher and student are compared, as in `train`."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] | None = None
    """With `cache` only: as in `train`; `forward_kl` where left out."""

    jsd_beta: float | None = Field(None, gt=0, lt=1)
    """With `cache` and `jsd` only: as in `train`."""

    tail: Literal["drop", "renorm", "ghost", "label"] | None = None
    """With `cache` only: as in `train`."""

    lora: LoraSettings | None = None
    """Train adapters rather than all weights; the tuned model has them merged, and they are saved beside it."""

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate."""

    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""

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
                raise ValueError(f"tune.{name}: found without tune.{missing}, expected it beside that")
        if self.trust_remote_code and self.path is None:
            raise ValueError("tune.trust_remote_code: found true without tune.path, expected it beside that")
        self.loss_settings()
        return self

    def loss_settings(self) -> TrainSettings:
        """The same training as the train stage's settings say it; without a cache, cross-entropy alone."""
        own = OptimizationSettings.model_fields
        values = {name: getattr(self, name) for name in own if name in self.model_fields_set}
        values |= {name: getattr(self, name) for name in ("learning_rate", "warmup_fraction", "num_epochs")}
        values |= {"batch_sequences": self.batch_sequences}
        values |= {name: getattr(self, name) for name in _OF_A_CACHE if getattr(self, name) is not None}
        return TrainSettings.model_validate({"alpha": 0.0 if self.cache is None else 1.0} | values)

    def meant(self) -> dict[str, Any]:
        """What the loss means where it was left out."""
        if self.cache is None:
            return super().meant()
        loss = self.loss_settings().decisive()
        return super().meant() | {name: loss[name] for name in _OF_A_CACHE}
