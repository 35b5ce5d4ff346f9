"""Settings of `capgap import`: where another program's captures are, their layout, and the cache to make of them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.home import PATH
from capgap.schemas.run_cache import Profile
from capgap.schemas.run_corpus import ContextRule

CaptureFormat = Literal["parquet", "distillkit"]
"""`parquet`: columns of lists. `distillkit`: DistillKit's packed columns."""


class ColumnNames(Record):
    """Names of the columns of a Parquet file. All but `input_ids`, `ids` and `logprobs` may be missing in the file."""

    input_ids: str = "input_ids"
    """Column of the tokens of a row: list<int>."""

    ids: str = "ids"
    """Column of the ids that were stored for each target of a row: list<list<int>>."""

    logprobs: str = "logprobs"
    """Column of the logprobs of these ids, in nats: list<list<float>>."""

    tail: str = "tail"
    """Column of the probability of all other ids together: list<float>. If it is missing, 1 minus the probability of
    the stored ids."""

    label_logprobs: str = "label_logprobs"
    """Column of the logprob of the real next token, in nats: list<float>, null or NaN where it is unknown. If it is
    missing, the logprob is looked up among the stored ids."""

    loss_mask: str = "loss_mask"
    """Column of 1 where a token counts as a label: list<bool> or list<int>. If it is missing, all tokens count."""

    labels: str = "labels"
    """Column of the same mask in Hugging Face's form, the token where it counts and -100 where not: list<int>."""

    attention_mask: str = "attention_mask"
    """Column of 0 where a token is padding, which may stand at both ends of a row: list<int>."""

    starts: str = "starts"
    """Column of 1 where a token begins a document: list<bool> or list<int>. If it is missing, a row is one document."""


class ImportSettings(Record):
    """How captures of another program become a corpus and a cache."""

    sources: Annotated[tuple[str, ...], PATH]
    """Parquet files, folders or globs, read in this order, each file once. Files that `heldout` names too are held out.
    """

    heldout: Annotated[tuple[str, ...], PATH] = ()
    """Parquet files, folders or globs of held-out text. Left out, `heldout_fraction` of the rows is held out."""

    out: Annotated[str, PATH] = Field(json_schema_extra=OPERATIONAL)
    """Folder for the results. It receives the folders `corpus`, `cache` and, if the teacher is on this machine,
    `teacher`."""

    tokenizer: Annotated[str, PATH]
    """Folder or Hugging Face id of the captures' tokenizer. Teacher and students have the same one."""

    teacher: Annotated[str, PATH]
    """Folder or Hugging Face id of the model that gave the logprobs. A folder must hold the same tokenizer."""

    format: CaptureFormat = "parquet"
    """Layout of the captures. `parquet`: columns of lists. `distillkit`: DistillKit's packed columns."""

    compression_config: Annotated[str | None, PATH] = None
    """With `distillkit` only: path of DistillKit's `compression_config.yaml` for all captures. Left out, the file of
    that name beside each capture."""

    columns: ColumnNames = ColumnNames()
    """Names of the columns in the Parquet files."""

    offset: Literal[0, -1] = 0
    """Position of targets relative to tokens. 0: target i is the teacher's distribution after token i, for the next
    token. -1: target i is its distribution for token i itself, as in vLLM's own lists, whose first entry is empty."""

    context: ContextRule | None = None
    """What the teacher saw before a token. `document`: its own document alone, which is a row, or the part of a row
    between two of its `starts`; a sequence may hold several documents, and students must end attention between them.
    `packed`: the whole row, with one row per sequence, for any student. Left out, the rule that an export of capgap
    states, else `document` if every row is one document; rows of several documents need the setting."""

    seq_len: int | None = Field(None, ge=8)
    """Targets per sequence. Left out, as many as the longest row needs without its padding."""

    long_rows: Literal["refuse", "cut", "drop"] = "refuse"
    """What to do with a row longer than `seq_len` + 1 tokens. `refuse`: an error. `cut`: leave out its end. `drop`:
    leave it out. No row is split, because its later part would lack the context that the teacher saw."""

    heldout_fraction: float = Field(0.06, gt=0, lt=1)
    """Share of the rows that no model trains on, if `heldout` names none."""

    temperature: float = Field(1.0, gt=0)
    """Temperature at which the teacher's logprobs were computed."""

    top_k: int | None = Field(None, ge=1, le=65535)
    """Most probable tokens stored of each target; the others join the tail. Left out, the smallest number of ids that a
    labelled target of the first rows has, with an error if that would cut more than half of all ids. With profile
    `small`, which stores targets of different lengths, the largest number. A warning counts the later targets that are
    wider."""

    profile: Profile = "near-lossless"
    """How exactly logprobs are stored, with the values of `cache.profile`."""

    shard_sequences: int = Field(1024, ge=1)
    """Sequences in one shard, the unit of work, retry and verification."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sources:
            raise ValueError("sources: found none, expected at least one Parquet file, folder or glob")
        if self.format == "distillkit" and self.offset:
            raise ValueError("offset: found with format distillkit, expected only with parquet")
        if self.format == "parquet" and self.compression_config is not None:
            raise ValueError("compression_config: found with format parquet, expected only with distillkit")
        return self
