"""Settings of the align stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from capgap.schemas.base import Record
from capgap.schemas.home import PATH
from capgap.schemas.run_corpus import BosRule


class AlignSettings(Record):
    """How a cache is converted for students whose tokenizer differs from the teacher's. The text is cut into chunks,
    the smallest spans that begin and end with a token in both tokenizers."""

    tokenizer: Annotated[str, PATH]
    """Folder or Hugging Face id of the student's tokenizer or model. The tokenizer must be reversible: byte-level or
    with byte fallback, and with a normaliser that does not change the text."""

    bos: BosRule = "auto"
    """Whether documents begin with the student's BOS token. Its values mean the same as those of `corpus.bos`."""

    seq_len: int | None = Field(None, ge=8)
    """Targets per sequence of the student. Left out, the cache's."""

    recording: Literal["sampled", "topk"] | None = None
    """Recording of the cache by which chunk borders are checked (`min_border_probability`). Left out, `topk` if the
    cache has it."""

    projected_top_k: int = Field(0, ge=0, le=255)
    """With a `topk` cache: keep this many of the teacher's top-k tokens, as tokens of the student, at chunks that are
    one token in both tokenizers, for `train.projected_weight`. Tokens that the student lacks, or that it would continue
    differently (a tokenizer may split numbers into digits, for example), join the tail. 0 keeps none."""

    min_border_probability: float = Field(0.9, ge=0, le=1)
    """Smallest probability with which a chunk ends at its border. It is the teacher's probability of the token before
    the border, over that of this token and all longer tokens that begin with it and that the student lacks. Students do
    not learn from chunks at other borders. A lower value keeps more chunks, with more bias; 0 keeps all."""
