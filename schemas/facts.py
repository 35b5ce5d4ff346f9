"""Facts that stages write into their manifests and later stages read, so that users never have to repeat them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from capgap.schemas.base import Record
from capgap.schemas.run_cache import Profile, RecordingName
from capgap.schemas.run_corpus import ContextRule


class TokenizerFacts(Record):
    """The identity of a tokenizer."""

    fingerprint: str
    """Digest of everything that decides which ids a text gets: vocabulary, merges, normaliser, pre-tokenizer, added
    tokens, and the tokens that the post-processor adds to a text. The roles of special tokens do not count."""

    vocab_size: int
    """One more than the highest id: the size of the real vocabulary."""

    eos_id: int
    """The id that ends a document."""


class SourceCounts(Record):
    """How much text of one source a split holds."""

    num_documents: int = 0
    """Documents that begin in the split's sequences."""

    num_text_bytes: int = 0
    """UTF-8 bytes of these documents."""

    num_text_tokens: int = 0
    """Tokens of these documents before packing, with the ids that end documents and without those that begin them."""

    num_labels: int = 0
    """Tokens of these documents that count as labels."""


class SplitFacts(Record):
    """One split of the corpus."""

    num_documents: int
    """Documents that begin in the split's sequences. Each is counted whole in the numbers below."""

    num_text_bytes: int
    """UTF-8 bytes of these documents."""

    num_text_tokens: int
    """Tokens of these documents before packing, with the ids that end documents and without those that begin them."""

    by_source: dict[str, SourceCounts] = Field(default_factory=dict)
    """The same counts for each source, named as in the run file; empty for an import."""

    by_length: tuple[int, ...] = ()
    """Histogram of the documents' lengths: entry i is the number of documents of 2^(i-1) to 2^i - 1 tokens. Empty for
    an import."""


class TextFacts(Record):
    """Facts about the text that a corpus and every cache made from it hold."""

    tokenizer: TokenizerFacts
    """The tokenizer in the folder `tokenizer`."""

    context: ContextRule
    """`packed`: a model sees the whole packed sequence, across documents. `document`: each document by itself. Students
    must keep the rule under which their cache was made."""

    bos_ids: tuple[int, ...] = ()
    """Ids with which every document, and every later part of a split document, begins; they are never labels. Empty if
    there are none, or if the chat template decides how conversations begin."""

    turn_end_ids: tuple[int, ...] = ()
    """Ids with which the chat template ends an answer; empty for plain text, or if the template does not show them."""

    splits: dict[str, SplitFacts]
    """The splits `teacher`, `student` and `heldout` of the corpus, even if a cache holds only a part of them."""

    text_sources: tuple[str, ...]
    """Sources of the text, as the run file names them."""

    whole_conversations: bool
    """Whether the sequences hold whole conversations, packed so that none is cut."""

    has_conversations: bool = False
    """Whether records were read as conversations, whether whole or cut; false for an import."""


class CorpusFacts(TextFacts):
    """The facts in the manifest of a corpus stage."""


class ModelFacts(Record):
    """The facts in the manifest of every stage that makes a model, which is in the folder `model`."""

    tokenizer: TokenizerFacts
    """The tokenizer beside the weights."""

    num_parameters: int
    """Number of all parameters; tied ones count once."""

    num_non_embedding_parameters: int
    """Number of parameters without embedding and head."""

    padded_vocab_size: int
    """Rows of the embedding; rows past the real vocabulary are padding."""

    max_positions: int | None
    """Length of the longest sequence that the model supports, in tokens; None if there is no limit."""

    path: str
    """The folder `model` of the stage, or the folder or id that was given."""

    served: str | None = None
    """Name of the model at a server, if `path` holds only its configuration and tokenizer; else None."""


class ServedFacts(Record):
    """The facts in the manifest of a teacher whose configuration is not known, but only its name at a server."""

    tokenizer: TokenizerFacts
    """The corpus's tokenizer. It is compared with the server's when the cache is made."""

    served: str
    """Name of the teacher at the server."""


class RecordingFacts(Record):
    """One recording of a cache; its shard set has the recording's name."""

    num_ids: int
    """Samples per token (`sampled`) or ids stored per token (`topk`)."""

    profile: Profile | None = None
    """How exactly `topk` logprobs are stored; None for `sampled`, whose counts are exact."""

    temperatures: tuple[float, ...]
    """Temperatures at which a student can train, ascending; for `sampled` only the temperature of the samples."""


def heldout_set(recording: RecordingName) -> str:
    """Return the name of a recording's shard set of held-out sequences; a cache without them has no such set."""
    return f"heldout-{recording}"


class ShardFacts(Record):
    """Facts about one finished shard of an unfinished cache, written after the shard's files."""

    sha256: dict[RecordingName, str]
    """SHA-256 digests of the shard's files, by recording."""

    engine: str
    """Engine that scored the shard, with its version."""

    dtype: str
    """The dtype of the teacher's weights and activations."""

    machine: str = ""
    """The GPU, or the processor with its number of threads. Two machines with the same value add numbers in the same
    order, so that their logprobs are equal."""

    num_targets: int
    """Number of targets in the shard."""

    num_labels: int
    """Number of targets whose next token counts as a label."""

    label_loss: float
    """Sum over the labels of minus the teacher's logprob, in nats."""


class CrossCheck(Record):
    """Difference between the logprobs of vLLM and of transformers for some labels, and its bound."""

    skipped: str | None = None
    """Why they were not compared, in words; the other fields then have no value. None if they were compared."""

    num_labels: int = 0
    """Number of labels that were compared."""

    dtype: str = ""
    """The dtype of the cache."""

    rms_nats: float | None = None
    """Root mean square of the difference between vLLM in the cache's dtype and transformers in float32, in nats."""

    own_rms_nats: float | None = None
    """Root mean square of the difference between transformers in the cache's dtype and in float32, in nats: the effect
    of rounding alone, which is 0 for float32."""

    allowed_nats: float | None = None
    """Largest `rms_nats` that rounding explains. Above it, eval and pruning use another model than the cache does."""

    @property
    def differs(self) -> bool:
        """Whether vLLM and transformers compute different models."""
        # written as "not <=", so that NaN counts as a difference
        return self.skipped is None and not (self.rms_nats or 0.0) <= (self.allowed_nats or 0.0)

    @property
    def sentence(self) -> str:
        """The result of the comparison as a sentence."""
        if self.skipped is not None:
            return f"vLLM was not held against transformers: {self.skipped}"
        return (
            f"vLLM in {self.dtype} is {self.rms_nats:.2g} nats from transformers in float32 (rms of "
            f"{self.num_labels:,} labels), transformers in {self.dtype} {self.own_rms_nats:.2g}, allowed are "
            f"{self.allowed_nats:.2g}" + (": eval and pruning look at another model than the cache does" * self.differs)
        )


class AlignedFacts(Record):
    """Facts about an aligned cache and the original cache from which the stage `align` made it."""

    tokenizer: TokenizerFacts
    """The teacher's tokenizer. The `tokenizer` of the cache's own facts is the student's."""

    teacher: str
    """Folder, id or name of the teacher, as the original cache gives it."""

    num_teacher_tokens: int
    """Number of targets of the original cache that students train on, in the teacher's tokens."""

    recording: RecordingName
    """The recording of the original cache by which chunk borders were checked."""

    num_chunks: int
    """Number of chunks of the text that students train on."""

    num_kept_chunks: int
    """Number of these chunks that students learn from."""

    num_unreliable_chunks: int
    """Number of chunks left out because a border is unreliable. Other chunks are left out because the teacher's logprob
    is not known, or because a sequence of the student ends within them."""

    num_projected: int
    """Number of targets students train on that also hold the teacher's top-k tokens, as tokens of the student."""

    projected_mass: float
    """The teacher's probability of those top-k tokens, summed over these targets; the rest is the tail."""

    heldout_nats: float
    """Minus the teacher's logprob of the kept chunks of held-out text, summed, in nats."""

    heldout_bytes: int
    """Bytes of text in the kept chunks of held-out text."""

    def projected_sentence(self, num_tokens: int) -> str:
        """Say in a sentence what share of `num_tokens` targets is projected, and how much probability these hold."""
        share, mass = self.num_projected / max(1, num_tokens), self.projected_mass / max(1, self.num_projected)
        return f"{100 * share:.1f} % of the targets have projected top-k tokens, which hold {100 * mass:.1f} % of each"

    @property
    def teacher_bits_per_byte(self) -> float | None:
        """The teacher's bits per byte on the kept chunks of held-out text; None if there are none."""
        return self.heldout_nats / self.heldout_bytes / math.log(2) if self.heldout_bytes else None


class CacheFacts(TextFacts):
    """The facts in the manifest of a cache: all that training, eval and report need to know of corpus and teacher."""

    temperature: float
    """Temperature of all stored logprobs, at which the teacher was recorded."""

    recordings: dict[RecordingName, RecordingFacts]
    """The recordings of the cache, by name."""

    padded_vocab_size: int
    """Size of the teacher's vocabulary, with its padding."""

    num_teacher_parameters: int | None
    """Number of all the teacher's parameters; tied ones count once. None if its configuration is not on this machine,
    which can happen for an import or a teacher that a server runs."""

    served: str | None = None
    """Name of the teacher at the server that scored; None if no server did."""

    engines: tuple[str, ...]
    """Every engine that scored a shard, with its version, sorted."""

    dtypes: tuple[str, ...]
    """Dtypes of the teacher's weights and activations, sorted; several only if shards were scored differently."""

    mean_label_loss: float | None
    """Mean over the labels of minus the teacher's logprob, in nats. None if there are no labels or some logprobs are
    not known, as in an imported cache, which knows only those of stored ids. Training does not need them."""

    cross_check: CrossCheck | None = None
    """Comparison of vLLM with transformers; None if vLLM did not score the cache, if `cache.cross_check` is `never`, or
    for an import."""

    aligned: AlignedFacts | None = None
    """Facts about the alignment; None for a cache in the teacher's own tokens."""

    scored: tuple[ShardFacts, ...] = ()
    """How each shard was scored, in order, so that lost shards alone can be made again. Empty for an import."""


def teacher_facts(facts: Mapping[str, Any]) -> ModelFacts | ServedFacts:
    """Read the facts of a teacher's manifest."""
    kind = ModelFacts if "num_parameters" in facts else ServedFacts
    return kind.model_validate(facts)


def text_facts(stage: str, facts: Mapping[str, Any]) -> TextFacts:
    """Read the facts about the text from the manifest of a corpus, or of a cache that is used in its place.

    Args:
        stage: `corpus` or `cache`; `cache` also for stages whose result is read as a cache.
        facts: the facts of the stage's manifest.
    """
    kind = CacheFacts if stage == "cache" else CorpusFacts
    return kind.model_validate(facts)
