"""Settings of the corpus stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record

_MOST_SHARD_SEQUENCES, _SHARD_TOKENS = 1024, 2**21

ContextRule = Literal["packed", "document"]
"""What a model sees before a token: all of the packed sequence, or its own document alone."""


BosRule = Literal["auto", "never", "always"]
"""Whether a document begins with the token that begins texts."""


class ExtendVocabularySettings(Record):
    """Further pieces for a given BPE tokenizer; its own keep their ids and their meaning."""

    num_pieces: int = Field(ge=1)
    """New pieces at most."""

    sources: tuple[str, ...] | None = Field(None, min_length=1)
    """Text that they are learnt from, as `corpus.sources`, with the same `text_field`, `messages_field` and
    `on_bad_record`; the corpus's own, without what is held out, where it is left out."""

    min_frequency: int = Field(2, ge=1)
    """A piece is made only where its two halves stand side by side at least that often."""


SplitName = Literal["teacher", "student", "heldout"]
"""Who sees a part of the text: the teacher that is trained, the student, or nobody before the end."""


class SourceSettings(Record):
    """One of several texts that a corpus is mixed of."""

    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders, globs or URLs, as in `corpus.sources`."""

    weight: float | None = Field(None, gt=0)
    """How much text there is of it beside the others that have a weight, in bytes: 3 and 1 make three quarters and a
    quarter. The text that is short for its weight is taken whole, and of the others a part; none is repeated. Which
    documents are taken follows from their text alone."""

    max_tokens: int | None = Field(None, ge=1)
    """Tokens that are taken of it at most, up to the end of a unit."""

    text_field: str | None = None
    """The field or column that holds its text; `corpus.text_field` where it is left out."""


class CorpusSettings(Record):
    """Which text, how it becomes tokens, and who may see which part of it."""

    sources: tuple[str, ...] = ("builtin:python",)
    """Files, folders, globs or URLs (s3://, gs://, hf://datasets/, https:// and so on): .txt .md .rst .py (a document
    each); .jsonl .ndjson .json .csv .tsv .parquet .arrow .feather (a document a record); with .gz .bz2 .xz .zst behind
    any but the last three. Of a folder, hidden files, licences and dataset cards are left out. `builtin:python` is the
    text that every CPython carries."""

    mixture: dict[str, SourceSettings] = Field(default_factory=dict)
    """In the place of `sources`: several of them by name, each with `paths`, a `weight` or `max_tokens`, and a
    `text_field` of its own. Units of all of them follow one another from the beginning to the end."""

    text_field: str = "text"
    """The field or column of a record that holds the text."""

    messages_field: str | None = Field(None, min_length=1)
    """The field of a record that holds a conversation; left out, records are text. `auto`: each record's own fields say
    where it is, the first of `messages`, `conversations` and `conversation`, or else a question (`prompt`,
    `instruction`, `question` or `query`) and its answer (`completion`, `output`, `response`, `answer` or `chosen`).
    Turns may have OpenAI's form, ShareGPT's or MiniChat's, or be texts, the user's first; `tools`, `system` and
    `history` beside them are used. The tokenizer's chat template turns it into tokens, those that the assistant says
    are learnt and measured, and the others only read; the template must mark them, with `{% generation %}`."""

    on_bad_record: Literal["stop", "skip"] = Field("stop", json_schema_extra=OPERATIONAL)
    """What happens where a record cannot be used: no text in it, not JSON, an answer without a word, a conversation
    that the chat template refuses. `skip` leaves it out, counts it, and names the first twenty."""

    max_bad_fraction: float = Field(0.01, gt=0, lt=1, json_schema_extra=OPERATIONAL)
    """With `skip`: share of the records that may be bad. More is an error."""

    on_damaged_file: Literal["stop", "skip"] = Field("stop", json_schema_extra=OPERATIONAL)
    """What happens where a file of records cannot be read to its end, or is gone or changed since the sources were
    listed. `skip` leaves out what comes after the damage in that unit, and all that the unit has of a file that is gone
    or changed; it counts it, and names the file."""

    whole_conversations: bool = False
    """With `messages_field` and context `document`: a sequence holds whole conversations, and padding that does not
    count, and a longer one is cut after the last answer that ends within. The template need not mark answers where they
    can be told without. Otherwise conversations are joined like texts, and cut where a sequence ends."""

    tokenizer: str | None = None
    """A Hugging Face folder or id. Leave it out to train a byte-level BPE tokenizer of `vocab_size` entries."""

    vocab_size: int | None = Field(None, ge=300, le=1 << 24)
    """Entries of a tokenizer trained on the text; 4096 where neither this nor `tokenizer` is given."""

    extend_vocabulary: ExtendVocabularySettings | None = None
    """Extends the given tokenizer by pieces of new text (a BPE one whose learning is continued: arXiv 2512.03989). A
    given teacher then needs `teacher.adapt`."""

    bos: BosRule = "auto"
    """Whether every document begins with the tokenizer's beginning-of-sequence token, which is read and never learnt.
    `auto`: where the tokenizer's post-processor or `add_bos_token` puts one; and where its files say nothing of it, as
    those made of GGUF, if the model's family (`config.json` beside the tokenizer) is known to be trained with one. A
    conversation begins as its chat template says, but with `always`. The rest of a document that is split over
    sequences begins with it too."""

    seq_len: int = Field(256, ge=8)
    """Targets per sequence. A packed sequence has one token more."""

    long_documents: Literal["split", "drop", "refuse"] = "split"
    """What happens to a document longer than a sequence: split over several, left out and counted, or an error."""

    context: ContextRule = "packed"
    """What a model sees before a token, when it scores, trains and is measured. `packed`: all of the sequence, across
    documents. `document`: its own document alone, from position 0, which a student's architecture must be able to do
    within a packed sequence. After a document's last token the target is the next document's first in either case."""

    teacher_fraction: float = Field(0.7, ge=0, lt=1)
    """Share of the documents that trains the teacher and that the student never sees. 0 for a given teacher."""

    heldout_fraction: float = Field(0.06, gt=0, lt=1)
    """Share of the documents that nobody trains on. The rest is the student's."""

    shard_sequences: int | None = Field(None, ge=1)
    """Sequences in one shard, the unit of work, retry and verification. Where it is left out, 1024, and of sequences
    longer than 2048 as many as make two million tokens."""

    max_tokens: dict[SplitName, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Tokens of a split at most, for example `{student: 1000000000}`, in whole shards: what is not needed is not
    tokenized. Where each split with a share has a limit, the sources are read no further than that."""

    dedup: Literal["unit", "all"] = "unit"
    """How far a text is looked for that was there before, letter for letter: in its unit, or in all of the sources,
    which are read once more for that. A repeated text never reaches two splits in either case. With `all`, a text past
    `max_tokens` counts as a first copy too. Conversations are the same where the same is said in them, whatever ids,
    times and weights stand beside it."""

    unit_bytes: int = Field(64 << 20, ge=1)
    """Bytes of the sources that are read, packed and written by themselves: the unit of work in which the stage goes on
    after a kill, and which workers and slices share. Files of lines are cut at line ends and Parquet between row
    groups; any other file is in one unit. No sequence goes over the end of a unit."""

    workers: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """Processes that make units at the same time: on this machine, or on the Ray cluster that RAY_ADDRESS names. The
    result is the same whatever their number."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = [name for name, one in self.mixture.items() if one.weight is not None and one.max_tokens is not None]
        if both:
            raise ValueError(f"corpus.mixture.{both[0]}: found weight and max_tokens, expected one of them")
        if self.mixture and "sources" in self.model_fields_set and self.sources != ("builtin:python",):
            raise ValueError("corpus.mixture: found beside corpus.sources, expected one of them")
        if not self.sources:
            raise ValueError("corpus.sources: found none, expected at least one file, folder, glob or builtin:python")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError(
                "corpus.vocab_size: found beside corpus.tokenizer, expected one of them; "
                "a given tokenizer brings its own size"
            )
        if self.messages_field is not None and self.tokenizer is None:
            raise ValueError(
                "corpus.messages_field: found without corpus.tokenizer, expected one that brings a chat template"
            )
        if self.whole_conversations and (
            self.messages_field is None or self.context != "document" or self.long_documents != "split"
        ):
            raise ValueError(
                f"corpus.whole_conversations: found with messages_field {self.messages_field}, context {self.context} "
                f"and long_documents {self.long_documents}, expected it with a messages_field and context document; "
                "leave long_documents out"
            )
        if self.extend_vocabulary is not None and self.tokenizer is None:
            raise ValueError(
                "corpus.extend_vocabulary: found without corpus.tokenizer, expected one to extend; "
                "the size of one that is trained is corpus.vocab_size"
            )
        if self.teacher_fraction + self.heldout_fraction >= 1:
            raise ValueError(
                "corpus.teacher_fraction + corpus.heldout_fraction: found "
                f"{self.teacher_fraction + self.heldout_fraction:g}, expected less than 1; "
                "nothing is left for the student"
            )
        return self

    @property
    def named_sources(self) -> list[tuple[str, SourceSettings]]:
        """Every source with its name, which is what stands in the list where there is no mixture."""
        if self.mixture:
            return list(self.mixture.items())
        return [(source, SourceSettings(paths=(source,))) for source in self.sources]

    @property
    def paths(self) -> tuple[str, ...]:
        """Files, folders, globs and URLs of all sources."""
        return tuple(path for _, source in self.named_sources for path in source.paths)

    @property
    def trained_vocab_size(self) -> int:
        """Entries of the tokenizer that is trained where none is given."""
        return self.vocab_size if self.vocab_size is not None else 4096

    @property
    def sequences_per_shard(self) -> int:
        """Sequences in one shard; a shard of the default holds at most about two million tokens."""
        if self.shard_sequences is not None:
            return self.shard_sequences
        return min(_MOST_SHARD_SEQUENCES, max(1, _SHARD_TOKENS // self.seq_len))

    def meant(self) -> dict[str, Any]:
        """The vocabulary's size, where a tokenizer is trained, and the size of a shard."""
        vocabulary = {} if self.tokenizer else {"vocab_size": self.trained_vocab_size}
        return {"shard_sequences": self.sequences_per_shard} | vocabulary
