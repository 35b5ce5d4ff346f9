"""Settings of `capgap import`: where another program's captures lie, how they are laid out, what to make of them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.run_cache import Profile
from capgap.schemas.run_corpus import ContextRule

CaptureFormat = Literal["parquet", "distillkit"]
"""`parquet`: columns of lists. `distillkit`: DistillKit's packed columns."""


class ColumnNames(Record):
    """The columns of a Parquet file, by what they hold; those that are absent by default may be absent."""

    input_ids: str = "input_ids"
    """The tokens of a row: list<int>."""

    ids: str = "ids"
    """The ids that were kept for each target of a row: list<list<int>>."""

    logprobs: str = "logprobs"
    """Their logprobs, nats: list<list<float>>."""

    tail: str = "tail"
    """The probability of all other ids together: list<float>; what is left of 1 where there is no such column."""

    label_logprobs: str = "label_logprobs"
    """The logprob of the real next token: list<float>, null or NaN where unknown; found among the ids where there is no
    such column."""

    loss_mask: str = "loss_mask"
    """1 where a token counts as a label: list<bool> or list<int>; all do where there is no such column."""

    labels: str = "labels"
    """The same as Hugging Face has it: the token itself, and -100 where it does not count: list<int>."""

    attention_mask: str = "attention_mask"
    """0 where a token is padding, at a row's ends: list<int>."""

    starts: str = "starts"
    """1 where a token begins a document: list<bool> or list<int>; a row's first one alone where there is no such
    column."""


class ImportSettings(Record):
    """How captures of another program become a corpus and a cache."""

    sources: tuple[str, ...]
    """Parquet files, folders or globs, read in this order, each file once; what `heldout` names too is held out."""

    heldout: tuple[str, ...] = ()
    """The same for held-out text; a share of the rows where it is left out."""

    out: str = Field(json_schema_extra=OPERATIONAL)
    """Folder that receives the folders `corpus`, `cache` and, where the teacher is on this machine, `teacher`."""

    tokenizer: str
    """A Hugging Face folder or id: the tokenizer of the tokens, and of teacher and students."""

    teacher: str
    """Folder or id of the model that gave the logprobs. A folder must hold that very tokenizer."""

    format: CaptureFormat = "parquet"
    """How the captures are laid out."""

    compression_config: str | None = None
    """DistillKit's own file, for all captures; of each the `compression_config.yaml` beside it where it is left out."""

    columns: ColumnNames = ColumnNames()
    """What the columns are called."""

    offset: Literal[0, -1] = 0
    """Which token the first target of a row follows. 0: target i is what the teacher expects after token i. -1: target
    i is what it expected of token i itself, as in vLLM's own lists, whose first entry is empty."""

    context: ContextRule | None = None
    """What the teacher saw before a token. `document`: its own document alone, which is a row, or what stands in a row
    from one of its `starts` to the next; a sequence may hold several, and students must end attention between them.
    `packed`: the whole row, whatever begins in it, with one row a sequence, for any student. Where it is left out, what
    an export of capgap says of itself, and `document` for rows of one document each; rows of several need it."""

    seq_len: int | None = Field(None, ge=8)
    """Targets per sequence; as many as the longest row needs, padding left out, where it is left out."""

    long_rows: Literal["refuse", "cut", "drop"] = "refuse"
    """What happens to a row of more than `seq_len` + 1 tokens: an error, only its beginning is taken, or it is left
    out. No row is split: the teacher saw all of it."""

    heldout_fraction: float = Field(0.06, gt=0, lt=1)
    """Share of the rows that nobody trains on, where `heldout` names none."""

    temperature: float = Field(1.0, gt=0)
    """The temperature at which the teacher's logprobs were taken."""

    top_k: int | None = Field(None, ge=1, le=65535)
    """Top-k tokens kept of each target; what is cut joins the tail. Where it is left out, as many as the narrowest
    target of the first rows has whose label counts; an error if more than half of all ids would be cut. Profile `small`
    keeps as many as the widest of them has, and of a narrower target what it has. A warning counts the later targets
    that are wider."""

    profile: Profile = "near-lossless"
    """How exactly logprobs are stored, as `cache.profile`."""

    shard_sequences: int = Field(1024, ge=1)
    """Sequences in one shard."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sources:
            raise ValueError("sources: found none, expected at least one Parquet file, folder or glob")
        if self.format == "distillkit" and self.offset:
            raise ValueError("offset: found with format distillkit, expected only with parquet")
        if self.format == "parquet" and self.compression_config is not None:
            raise ValueError("compression_config: found with format parquet, expected only with distillkit")
        return self
