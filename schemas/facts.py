"""What travels in a manifest from stage to stage, so that nothing is typed twice."""

from __future__ import annotations

from typing import Literal

from capgap.schemas.base import Record
from capgap.schemas.run_cache import Profile


class TokenizerFacts(Record):
    """The identity of a tokenizer."""

    fingerprint: str
    """Digest of the full map from token to id and of the special tokens."""

    vocab_size: int
    """One more than the highest id: the real vocabulary."""

    eos_id: int
    """The id that ends a document."""


class SplitFacts(Record):
    """One split of the corpus."""

    num_documents: int
    """Documents in the split."""

    num_text_bytes: int
    """UTF-8 bytes of their text."""

    num_text_tokens: int
    """Tokens of their text, document ends included, before packing."""


class CorpusFacts(Record):
    """What the corpus stage hands on."""

    tokenizer: TokenizerFacts
    """The tokenizer in the folder `tokenizer`."""

    context: Literal["packed"] = "packed"
    """`packed`: a model sees the whole packed sequence, across documents. Teacher and student alike."""

    splits: dict[str, SplitFacts]
    """teacher, student, heldout."""


class ModelFacts(Record):
    """What every stage that makes a model hands on. The model is the folder `model`."""

    tokenizer: TokenizerFacts
    """The tokenizer beside the weights."""

    num_parameters: int
    """All of them, tied ones once."""

    num_non_embedding_parameters: int
    """Without embedding and head."""

    padded_vocab_size: int
    """Rows of the embedding; rows past the real vocabulary are padding."""

    max_positions: int
    """Longest sequence that the model takes."""

    path: str
    """The folder `model` of the stage, or the folder or id that was given."""


class CacheFacts(Record):
    """What the cache stage hands on."""

    tokenizer: TokenizerFacts
    """Of corpus and teacher."""

    context: Literal["packed"]
    """The corpus's; students must keep it."""

    recording: Literal["sampled", "topk"]
    """How distributions are kept."""

    num_ids: int
    """Draws a token (`sampled`) or ids kept a token (`topk`)."""

    profile: Profile | None = None
    """How exactly `topk` logprobs are stored; None for `sampled`, whose counts are exact."""

    temperature: float
    """At which the teacher was recorded; the only one at which a student can train."""

    padded_vocab_size: int
    """Of the teacher."""

    engine: str
    """Engine and its version."""

    dtype: str
    """Of the teacher's weights and activations."""

    mean_label_loss: float
    """Mean of minus the teacher's logprob of the real next token, nats."""
