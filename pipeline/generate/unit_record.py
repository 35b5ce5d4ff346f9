"""What is known of one unit of a text that is being written: its files, and what its answers are like."""

from __future__ import annotations

from typing import Self

from capgap.schemas.base import Entry
from capgap.schemas.manifest import FileEntry, ShardEntry


class TextCounts(Entry):
    """What a number of answers are like, as sums."""

    num_prompts: int = 0
    """Prompts that were to be answered."""

    num_too_long: int = 0
    """Prompts that leave no room for an answer; left out."""

    num_answers: int = 0
    """Answers that are kept."""

    num_empty: int = 0
    """Answers that ended before they began; left out."""

    num_unknown: int = 0
    """Answers with an id that pads the vocabulary; left out."""

    num_cut: int = 0
    """Answers that had not ended when they reached their longest length; kept."""

    num_prompt_tokens: int = 0
    """Of the kept answers' prompts."""

    num_answer_tokens: int = 0
    """Of the kept answers, the tokens that end them included."""

    num_text_bytes: int = 0
    """UTF-8 bytes of the kept answers and their prompts, special tokens as they are written: of the same text as the
    tokens."""

    logprob: float = 0.0
    """Sum over the answers' tokens of the writer's own logprob, nats."""

    repetition: float = 0.0
    """Sum over answers of the share of their runs of four tokens that stood in the answer before."""

    num_graded: int = 0
    """Answers whose right answer is known, those that are left out included."""

    num_right: int = 0
    """Those of them that are right."""

    def plus(self, other: Self) -> Self:
        """The sums of both."""
        return self.model_copy(update={name: value + getattr(other, name) for name, value in self})


class TextRecord(Entry):
    """A finished unit."""

    shard: ShardEntry | None
    """Its rows; None where no answer was kept."""

    answers: FileEntry
    """What stands beside the shard: each answer's place, its logprobs and how it ended."""

    counts: TextCounts
    """What its answers are like."""
