"""Settings of the align stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capgap.schemas.base import Record
from capgap.schemas.run_corpus import BosRule


class AlignSettings(Record):
    """How a cache is turned into one for a student of another tokenizer."""

    tokenizer: str
    """Folder or Hugging Face id of the student's tokenizer, or of a model with it. It must be reversible: of bytes, or
    with byte fallback, and with a normaliser that changes nothing."""

    bos: BosRule = "auto"
    """Whether every document of the student begins with its beginning-of-sequence token; as `corpus.bos`."""

    seq_len: int | None = Field(None, ge=8)
    """Targets per sequence of the student; as many as the cache's where it is left out."""

    recording: Literal["sampled", "topk"] | None = None
    """Which recording of the cache says how far borders can be trusted; `topk` where it has that."""

    projected_top_k: int = Field(0, ge=0, le=255)
    """Of a `topk` cache: keep so many of the teacher's top-k tokens at chunks that are one token in both tokenizers, as
    far as the student's tokenizer has them, for `train.projected_weight`. Tokens that one tokenizer would go on with
    and the other would not, as it splits digits otherwise, are left to the tail. 0 keeps none."""

    min_border_probability: float = Field(0.9, ge=0, le=1)
    """A border is reliable where the teacher's probability of the token before it is at least this share of what it
    gives to that token and to longer ones which the student's vocabulary does not have. Chunks beside other borders are
    marked, and nothing is learnt from them. 0 keeps all."""
