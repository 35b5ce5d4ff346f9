"""The record of a finished unit of a text: its files, and figures of its answers."""

from __future__ import annotations

from typing import Self

from capgap.schemas.base import Entry
from capgap.schemas.manifest import FileEntry, ShardEntry


class TextCounts(Entry):
    """Figures of a number of answers, as counts and sums."""

    num_prompts: int = 0
    """Number of prompts to be answered."""

    num_too_long: int = 0
    """Number of prompts that are left out because they leave no room for an answer."""

    num_answers: int = 0
    """Number of answers that are kept."""

    num_empty: int = 0
    """Number of answers that are left out because they hold no text."""

    num_unknown: int = 0
    """Number of answers that are left out because they hold an id that is no token: it pads the vocabulary."""

    num_cut: int = 0
    """Number of kept answers that reached their largest length before they ended."""

    num_prompt_tokens: int = 0
    """Number of tokens of the prompts, counted for each kept answer."""

    num_answer_tokens: int = 0
    """Number of tokens of the kept answers, including the tokens that end them."""

    num_text_bytes: int = 0
    """UTF-8 bytes of the kept answers and their prompts, including the text of special tokens."""

    logprob: float = 0.0
    """Sum over the tokens of the kept answers of the writer's own logprob, nats."""

    repetition: float = 0.0
    """Sum over the kept answers of the share of their runs of four tokens that occur earlier in the answer."""

    num_graded: int = 0
    """Number of answers whose prompt has a reference, including answers that are left out."""

    num_right: int = 0
    """Number of these answers that are right."""

    def plus(self, other: Self) -> Self:
        """Return the sums of both."""
        return self.model_copy(update={name: value + getattr(other, name) for name, value in self})


class TextRecord(Entry):
    """The files of a finished unit, and figures of its answers."""

    shard: ShardEntry | None
    """The shard with the unit's rows; None if no answer is kept."""

    answers: FileEntry
    """The file beside the shard with each answer's place, its logprobs and how it ended."""

    counts: TextCounts
    """Figures of the unit's answers."""
