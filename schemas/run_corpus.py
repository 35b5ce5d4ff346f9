"""Settings of the corpus stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.home import PATH

_MOST_SHARD_SEQUENCES, _SHARD_TOKENS = 1024, 2**21

ContextRule = Literal["packed", "document"]
"""What a model sees before a token: all earlier tokens of the packed sequence, or those of the same document alone."""


BosRule = Literal["auto", "never", "always"]
"""Whether every document begins with the beginning-of-sequence token."""


class ExtendVocabularySettings(Record):
    """Additional tokens for a given BPE tokenizer. The tokens that it has keep their ids and their meaning."""

    num_pieces: int = Field(ge=1)
    """Largest number of tokens to add."""

    sources: Annotated[tuple[str, ...] | None, PATH] = Field(None, min_length=1)
    """Text from which the new tokens are learnt, given like `corpus.sources` and read with the same `text_field`,
    `messages_field` and `on_bad_record`. Left out, the corpus's own text without its held-out part."""

    min_frequency: int = Field(2, ge=1)
    """Smallest number of times that two tokens must stand side by side in the text before they are merged into one."""


SplitName = Literal["teacher", "student", "heldout"]
"""The part of the text that trains the teacher, that trains the student, or that is held out from training."""


class SourceSettings(Record):
    """One source of a corpus that mixes several."""

    paths: Annotated[tuple[str, ...], PATH] = Field(min_length=1)
    """Files, folders, globs or URLs, as in `corpus.sources`."""

    weight: float | None = Field(None, gt=0)
    """Share of this source among all sources that have a weight, by bytes of text: weights 3 and 1 give three quarters
    and one quarter. The source that has too little text for its weight is used whole, the others in part; no text is
    repeated. A digest of each document decides whether it is used."""

    max_tokens: int | None = Field(None, ge=1)
    """Stop reading this source after this many tokens, at the end of the unit that reaches them."""

    text_field: str | None = None
    """Field or column of a record that holds the text. Left out, `corpus.text_field`."""


class CorpusSettings(Record):
    """Which text is used, how it becomes tokens, and which parts of it train the teacher, the student, or neither."""

    sources: Annotated[tuple[str, ...], PATH] = ("builtin:python",)
    """Files, folders, globs or URLs of the text. URLs begin with s3://, gs://, hf://datasets/, https:// and so on. A
    .txt, .md, .rst or .py file is one document; .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow and .feather hold
    one document per record. All but the last three may also end in .gz, .bz2, .xz or .zst. In a folder, hidden files,
    licences and dataset cards are skipped. `builtin:python` is the source and help text of Python's standard library,
    for trials."""

    mixture: dict[str, SourceSettings] = Field(default_factory=dict)
    """Several sources by name, instead of `sources`. Each has `paths`, and may have a `weight` or `max_tokens`, and its
    own `text_field`. The corpus interleaves the units of all sources from its beginning to its end."""

    text_field: str = "text"
    """Field or column of a record that holds the text."""

    messages_field: str | None = Field(None, min_length=1)
    """Field of a record that holds a conversation. Left out, records are plain text. `auto` finds the conversation in
    each record: in the first of `messages`, `conversations` and `conversation`, else as a question (`prompt`,
    `instruction`, `question` or `query`) with an answer (`completion`, `output`, `response`, `answer` or `chosen`).
    Turns may have the form of OpenAI, ShareGPT or MiniChat, or be plain texts that begin with the user's; `tools`,
    `system` and `history` beside them are used. The tokenizer's chat template turns a conversation into tokens. Only
    the assistant's tokens are learnt and measured, so the template must mark them with `{% generation %}`."""

    on_bad_record: Literal["stop", "skip"] = Field("stop", json_schema_extra=OPERATIONAL)
    """What to do with a record that cannot be used: one without text, invalid JSON, an empty answer, a conversation
    that the chat template refuses. `stop` ends the stage. `skip` leaves the record out, counts it and logs the first
    20."""

    max_bad_fraction: float = Field(0.01, gt=0, lt=1, json_schema_extra=OPERATIONAL)
    """With `on_bad_record: skip`: largest share of the records that may be bad. More is an error."""

    on_damaged_file: Literal["stop", "skip"] = Field("stop", json_schema_extra=OPERATIONAL)
    """What to do with a file of records that cannot be read to its end, or that was removed or changed after the
    sources were listed. `stop` ends the stage. `skip` leaves out the rest of the unit after the damage, and all that
    the unit has of a file that was removed or changed; it counts the loss and logs the file."""

    whole_conversations: bool = False
    """Fill each sequence with whole conversations, and with padding that does not count, as `tune` needs them. Needs
    `messages_field` and `context: document`. A conversation longer than a sequence is cut after its last answer that
    fits. The template need not mark answers if they can be found without marks. If false, conversations are joined like
    texts and cut where a sequence ends."""

    tokenizer: Annotated[str | None, PATH] = None
    """Folder or Hugging Face id of the tokenizer. Left out, a byte-level BPE tokenizer is trained (`vocab_size`)."""

    vocab_size: int | None = Field(None, ge=300, le=1 << 24)
    """Number of tokens of the tokenizer that is trained on the text when no `tokenizer` is given. Left out, 4096."""

    extend_vocabulary: ExtendVocabularySettings | None = None
    """Add tokens for new text to the given BPE tokenizer by continuing its BPE training (arXiv 2512.03989). A given
    teacher then needs `teacher.adapt`, to learn the new tokens."""

    bos: BosRule = "auto"
    """Whether every document begins with the tokenizer's beginning-of-sequence (BOS) token, which is read and never
    learnt. `auto`: if the tokenizer's post-processor or `add_bos_token` adds one, or, if its files do not say (as those
    made from GGUF), if the model's family (`config.json` beside the tokenizer) is known to be trained with one. Except
    with `always`, the chat template decides how a conversation begins. When a document is split over several sequences,
    each of its later parts begins with the token too."""

    seq_len: int = Field(256, ge=8)
    """Targets per sequence, which is the context length in training. A packed sequence has one token more."""

    long_documents: Literal["split", "drop", "refuse"] = "split"
    """What to do with a document longer than a sequence: `split` it over several sequences, `drop` and count it, or
    `refuse` it with an error."""

    context: ContextRule = "packed"
    """What a model sees before a token, in scoring, training and eval. `packed`: all earlier tokens of the
    sequence, across documents. `document`: its own document alone, with positions from 0; the student's architecture
    must support that within a packed sequence. With both, the target after a document's last token is the first token
    of the next document."""

    teacher_fraction: float = Field(0.7, ge=0, lt=1)
    """Share of the documents that trains the teacher and not the student. Set it to 0 for a given teacher."""

    heldout_fraction: float = Field(0.06, gt=0, lt=1)
    """Share of the documents that no model trains on. The student trains on what is left."""

    shard_sequences: int | None = Field(None, ge=1)
    """Sequences in one shard, the unit of work, retry and verification. Left out, 1024, or fewer if `seq_len` is above
    2048, so that a shard holds about two million tokens."""

    max_tokens: dict[SplitName, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Stop each split after this many tokens, at the end of the shard that reaches them, for example
    `{student: 1000000000}`. If every split with a share has a limit, the sources are not read any further."""

    dedup: Literal["unit", "all"] = "unit"
    """Where to look for exact repetitions of a text, of which the first is kept: within its `unit`, or in `all`
    sources, which are then read twice. With both, a repeated text never reaches two splits. With `all`, a text past
    `max_tokens` counts as a first copy too. Two conversations are equal if the same is said in them; ids, times and
    weights of the messages do not count."""

    unit_bytes: int = Field(64 << 20, ge=1)
    """Bytes of the sources in one unit of work. Each unit is read, packed and written by itself; a killed stage resumes
    with the units that are missing, and workers and slices share the units. Files of lines are cut at line ends and
    Parquet files between row groups; any other file is one unit. No sequence spans two units."""

    workers: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """Processes that make units at the same time, on this machine or on the Ray cluster that RAY_ADDRESS names. The
    corpus is the same for any number."""

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
        """Every source with its name. Without a mixture, the name is the source's entry in `sources`."""
        if self.mixture:
            return list(self.mixture.items())
        return [(source, SourceSettings(paths=(source,))) for source in self.sources]

    @property
    def paths(self) -> tuple[str, ...]:
        """The files, folders, globs and URLs of all sources."""
        return tuple(path for _, source in self.named_sources for path in source.paths)

    @property
    def trained_vocab_size(self) -> int:
        """Number of tokens of the tokenizer that is trained if none is given."""
        return self.vocab_size if self.vocab_size is not None else 4096

    @property
    def sequences_per_shard(self) -> int:
        """Number of sequences in one shard; by default a shard holds at most about two million tokens."""
        if self.shard_sequences is not None:
            return self.shard_sequences
        return min(_MOST_SHARD_SEQUENCES, max(1, _SHARD_TOKENS // self.seq_len))

    def meant(self) -> dict[str, Any]:
        """Return the number of sequences in a shard and, if a tokenizer is trained, the size of its vocabulary."""
        vocabulary = {} if self.tokenizer else {"vocab_size": self.trained_vocab_size}
        return {"shard_sequences": self.sequences_per_shard} | vocabulary
