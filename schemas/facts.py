"""What travels in a manifest from stage to stage, so that nothing is typed twice."""

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
    """Digest of all that decides which ids a text gets: vocabulary, merges, normaliser, pre-tokenizer, added tokens,
    and what the post-processor puts around a text. What special tokens are called is not in it."""

    vocab_size: int
    """One more than the highest id: the real vocabulary."""

    eos_id: int
    """The id that ends a document."""


class SourceCounts(Record):
    """What a split has of one source."""

    num_documents: int = 0
    """Documents that begin in the split's sequences."""

    num_text_bytes: int = 0
    """UTF-8 bytes of their text."""

    num_text_tokens: int = 0
    """Their tokens, ends included and beginnings not, before packing."""

    num_labels: int = 0
    """Those of them that count as labels."""


class SplitFacts(Record):
    """One split of the corpus."""

    num_documents: int
    """Documents that begin in its sequences; what is counted of them is counted whole."""

    num_text_bytes: int
    """UTF-8 bytes of their text."""

    num_text_tokens: int
    """Tokens of their text, document ends included and beginnings not, before packing."""

    by_source: dict[str, SourceCounts] = Field(default_factory=dict)
    """The same by source, named as in the run file; empty for an import."""

    by_length: tuple[int, ...] = ()
    """How many documents have a length, in tokens, with so many binary digits: entry i counts those of 2^(i-1) up to
    2^i - 1 tokens. Enough to draw the lengths of any corpus; empty for an import."""


class TextFacts(Record):
    """What a corpus and every cache made of it say of the text."""

    tokenizer: TokenizerFacts
    """The tokenizer in the folder `tokenizer`."""

    context: ContextRule
    """`packed`: a model sees the whole packed sequence, across documents. `document`: each document by itself. Students
    must keep the rule under which their cache was made."""

    bos_ids: tuple[int, ...] = ()
    """What every document begins with, and the rest of one that is split; never a label. Empty where nothing stands
    there, and where conversations begin as their chat template says."""

    turn_end_ids: tuple[int, ...] = ()
    """With which of them the chat template ends an answer; empty for text, and where a template does not tell."""

    splits: dict[str, SplitFacts]
    """teacher, student, heldout: of the corpus, also where a cache holds less of it."""

    text_sources: tuple[str, ...]
    """Where the text came from, as the run file named it."""

    whole_conversations: bool
    """Whether the sequences are of whole conversations, packed so that none is cut."""

    has_conversations: bool = False
    """Whether records were read as conversations, whole ones or such as may be cut; false for an import."""


class CorpusFacts(TextFacts):
    """What the corpus stage hands on."""


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

    max_positions: int | None
    """Longest sequence that the model takes; None where nothing bounds it."""

    path: str
    """The folder `model` of the stage, or the folder or id that was given."""

    served: str | None = None
    """The name by which a server knows it, where `path` is but its configuration and tokenizer."""


class ServedFacts(Record):
    """What the teacher stage hands on in their place where nothing but a server's name for the model is known."""

    tokenizer: TokenizerFacts
    """The corpus's, which the server's is held against when it is asked."""

    served: str
    """The name by which the server knows it."""


class RecordingFacts(Record):
    """One recording of a cache; its shard set has the recording's name."""

    num_ids: int
    """Samples a token (`sampled`) or ids kept a token (`topk`)."""

    profile: Profile | None = None
    """How exactly `topk` logprobs are stored; None for `sampled`, whose counts are exact."""

    temperatures: tuple[float, ...]
    """Temperatures at which a student can train, rising; for `sampled` the one that was sampled at."""


def heldout_set(recording: RecordingName) -> str:
    """The name of a recording's shard set of held-out sequences; a cache without them has no such set."""
    return f"heldout-{recording}"


class ShardFacts(Record):
    """What a cache that is being made knows of one finished shard: written last, after the shard's files."""

    sha256: dict[RecordingName, str]
    """Digests of the shard's files, by recording."""

    engine: str
    """Engine and its version."""

    dtype: str
    """The dtype of the teacher's weights and activations."""

    machine: str = ""
    """The GPU, or the processor with its number of threads: where two agree, sums are taken in the same order."""

    num_targets: int
    """Targets in the shard."""

    num_labels: int
    """Those of them whose next token counts as a label."""

    label_loss: float
    """Sum over the labels of minus the teacher's logprob of them, nats."""


class CrossCheck(Record):
    """How far vLLM's logprobs of some labels are from transformers', beside what rounding does within transformers."""

    skipped: str | None = None
    """Why they were not compared; None where they were. No further field has a value otherwise."""

    num_labels: int = 0
    """Labels that were compared."""

    dtype: str = ""
    """The dtype of the cache."""

    rms_nats: float | None = None
    """Root mean square of the differences of vLLM in the cache's dtype from transformers in float32."""

    own_rms_nats: float | None = None
    """The same of transformers in the cache's dtype: rounding alone; 0 in float32."""

    allowed_nats: float | None = None
    """What `rms_nats` may be; above it eval and pruning look at another model than the cache does."""

    @property
    def differs(self) -> bool:
        """Whether vLLM and transformers compute different models."""
        # not a number differs
        return self.skipped is None and not (self.rms_nats or 0.0) <= (self.allowed_nats or 0.0)

    @property
    def sentence(self) -> str:
        """For people."""
        if self.skipped is not None:
            return f"vLLM was not held against transformers: {self.skipped}"
        return (
            f"vLLM in {self.dtype} is {self.rms_nats:.2g} nats from transformers in float32 (rms of "
            f"{self.num_labels:,} labels), transformers in {self.dtype} {self.own_rms_nats:.2g}, allowed are "
            f"{self.allowed_nats:.2g}" + (": eval and pruning look at another model than the cache does" * self.differs)
        )


class AlignedFacts(Record):
    """What `align` says of the cache that it made of another one."""

    tokenizer: TokenizerFacts
    """The teacher's; that of the facts around it is the student's."""

    teacher: str
    """The teacher's folder, id or name, as the other cache has it."""

    num_teacher_tokens: int
    """Targets that it scored for students to train on."""

    recording: RecordingName
    """Of the other cache, which says how far borders can be trusted."""

    num_chunks: int
    """Chunks of the text that students train on."""

    num_kept_chunks: int
    """Those of them to learn from."""

    num_unreliable_chunks: int
    """Those that a border makes unreliable; of the others that are not kept, the teacher's logprob is not known, or a
    sequence of the student ends within."""

    num_projected: int
    """Targets that have the teacher's top-k tokens as the student's, of the text that students train on."""

    projected_mass: float
    """The teacher's probability of those tokens, summed over these targets; the rest is the tail."""

    heldout_nats: float
    """Minus the teacher's logprob of the kept chunks of held-out text."""

    heldout_bytes: int
    """Bytes of text in those."""

    def projected_sentence(self, num_tokens: int) -> str:
        """How many of so many targets have a projected distribution, and how much of one is no tail."""
        share, mass = self.num_projected / max(1, num_tokens), self.projected_mass / max(1, self.num_projected)
        return f"{100 * share:.1f} % of the targets have projected top-k tokens, which hold {100 * mass:.1f} % of each"

    @property
    def teacher_bits_per_byte(self) -> float | None:
        """The teacher's, of the kept chunks of held-out text; None where there are none."""
        return self.heldout_nats / self.heldout_bytes / math.log(2) if self.heldout_bytes else None


class CacheFacts(TextFacts):
    """What the cache stage hands on: all that a training, its evaluation and its report need of corpus and teacher."""

    temperature: float
    """The temperature of all logprobs that are stored: the one at which the teacher was recorded."""

    recordings: dict[RecordingName, RecordingFacts]
    """What was kept, by name."""

    padded_vocab_size: int
    """The teacher's, padding included."""

    num_teacher_parameters: int | None
    """All of the teacher's, tied ones once; None where its configuration is not on this machine, as an import's may be
    and that of a teacher of which but a server's name for it is known."""

    served: str | None = None
    """The name by which a server knows the teacher; None for one that no server was asked about."""

    engines: tuple[str, ...]
    """Every engine, with its version, that scored a shard, sorted."""

    dtypes: tuple[str, ...]
    """Dtypes of the teacher's weights and activations, sorted; several only where shards were scored differently."""

    mean_label_loss: float | None
    """Mean over the labels that count of minus the teacher's logprob of them, nats. None where there are none, or some
    are not known, which makes no difference to a training: an imported cache knows those of the ids that it keeps."""

    cross_check: CrossCheck | None = None
    """vLLM held against transformers; None where it did not score the cache, where nobody wanted to know
    (`cache.cross_check`), and of an import."""

    aligned: AlignedFacts | None = None
    """None for a cache in the teacher's own tokens."""

    scored: tuple[ShardFacts, ...] = ()
    """Who scored each shard, in order: a cache that loses shards makes those again and no others. Empty if imported."""


def teacher_facts(facts: Mapping[str, Any]) -> ModelFacts | ServedFacts:
    """What the manifest of a teacher says of it."""
    kind = ModelFacts if "num_parameters" in facts else ServedFacts
    return kind.model_validate(facts)


def text_facts(stage: str, facts: Mapping[str, Any]) -> TextFacts:
    """What a finished corpus, or a cache that stands for it, says of the text.

    Args:
        stage: `corpus`, or `cache` for what is read as one.
        facts: of its manifest.
    """
    kind = CacheFacts if stage == "cache" else CorpusFacts
    return kind.model_validate(facts)
