"""What an import is to make, found out before the first file is written: files, tokenizer, length, work orders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from capgap.pipeline.interchange.captures import CapturedRow
from capgap.pipeline.interchange.distillkit import DistillKitTargets, read_config
from capgap.pipeline.interchange.export_facts import require_same_facts
from capgap.pipeline.interchange.parquet import (
    Layout,
    ListTargets,
    TargetReader,
    batches_of,
    list_captures,
    open_file,
    read_rows,
)
from capgap.pipeline.interchange.ragged import lists_of
from capgap.pipeline.interchange.shift import proven
from capgap.pipeline.models.bos import document_bos
from capgap.pipeline.models.tokenizers import load_tokenizer, tokenizer_facts
from capgap.pipeline.stage.manifests import record_sources
from capgap.schemas.errors import InputError
from capgap.schemas.facts import TokenizerFacts
from capgap.schemas.interchange import ImportSettings
from capgap.schemas.manifest import SourceEntry

SPLITS = ("student", "heldout")


@dataclass(frozen=True)
class Plan:
    """Everything that decides what an import makes.

    Attributes:
        settings: as given.
        files: captures by split, `student` and `heldout`; one file may be of both.
        tokenizer: of the tokens.
        facts: of it.
        seq_len: targets a sequence.
    """

    settings: ImportSettings
    files: dict[str, list[Path]]
    tokenizer: PreTrainedTokenizerBase
    facts: TokenizerFacts
    seq_len: int

    @cached_property
    def sources(self) -> tuple[SourceEntry, ...]:
        """The captures as they are now."""
        every = dict.fromkeys(path for paths in self.files.values() for path in paths)
        return record_sources(every)

    @cached_property
    def usual_bos_ids(self) -> tuple[int, ...]:
        """What would begin a document of a corpus, by `corpus.bos: auto`."""
        return document_bos(self.tokenizer, self.settings.tokenizer, "auto")

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """What begins a document of the captures, if anything does: as usual, or its token of that name."""
        own = self.tokenizer.bos_token_id
        return self.usual_bos_ids or (() if own is None or own == self.facts.eos_id else (int(own),))

    @cached_property
    def corpus_settings(self) -> dict[str, Any]:
        """What decides the corpus: the tokens alone."""
        settings, columns = self.settings, self.settings.columns
        digests = {entry.path: entry.sha256 for entry in self.sources}
        return {
            "import": {
                "format": settings.format,
                "columns": {
                    name: getattr(columns, name)
                    for name in ("input_ids", "loss_mask", "labels", "attention_mask", "starts")
                },
                "sources": {split: [digests[str(path)] for path in paths] for split, paths in self.files.items()},
                "tokenizer": self.facts.fingerprint,
                "context": settings.context,
                "seq_len": self.seq_len,
                "long_rows": settings.long_rows,
                "heldout_fraction": None if settings.heldout else settings.heldout_fraction,
                "shard_sequences": settings.shard_sequences,
            }
        }

    @cached_property
    def cache_settings(self) -> dict[str, Any]:
        """What decides the cache, beside the corpus and the teacher."""
        settings, columns = self.settings, self.settings.columns
        return {
            "import": {
                "format": settings.format,
                "columns": {name: getattr(columns, name) for name in ("ids", "logprobs", "tail", "label_logprobs")},
                "compression": None if self._config is None else self._config.model_dump(mode="json"),
                "offset": settings.offset,
                "temperature": settings.temperature,
                "top_k": settings.top_k,
                "profile": settings.profile,
            }
        }

    def rows(self, split: str, with_targets: bool) -> Iterator[CapturedRow]:
        """The rows of a split, in order; with targets, each file's are held back until they are proven aligned.

        Raises:
            InputError, MismatchError: as `read_rows` and `proven`; or a row is too long.
        """
        apart = bool(self.settings.heldout)
        for path in self.files[split]:
            layout = Layout(
                self.settings.columns,
                self.facts.vocab_size,
                self._targets() if with_targets else None,
                self._padding,
                self.bos_ids,
            )
            rows = read_rows(path, layout)
            rows = proven(rows, path, self.facts.vocab_size) if with_targets else rows
            chosen = rows if apart else (row for row in rows if self._split_of(row) == split)
            yield from self._of_length(chosen)

    @cached_property
    def _config(self) -> Any:
        return read_config(self.settings, self.files["student"][0]) if self.settings.format == "distillkit" else None

    @property
    def _padding(self) -> int | None:
        """DistillKit puts one such token behind a row, to be told what is expected after the last one of text."""
        pad = self.tokenizer.pad_token_id
        is_padding = self.settings.format == "distillkit" and pad is not None and pad != self.facts.eos_id
        return int(pad) if is_padding else None

    def _targets(self) -> TargetReader:
        if self._config is not None:
            return DistillKitTargets(self._config, self.facts.vocab_size)
        return ListTargets(self.settings.columns, self.facts.vocab_size, self.settings.offset)

    def _split_of(self, row: CapturedRow) -> str:
        digest = hashlib.blake2b(np.ascontiguousarray(row.tokens_M, "<i4").tobytes(), digest_size=8).digest()
        return "heldout" if int.from_bytes(digest, "big") / 2**64 < self.settings.heldout_fraction else "student"

    def _of_length(self, rows: Iterable[CapturedRow]) -> Iterator[CapturedRow]:
        longest = self.seq_len + 1
        for row in rows:
            if len(row) <= longest:
                yield row
            elif self.settings.long_rows == "cut":
                cut = slice(0, longest)
                yield replace(row, tokens_M=row.tokens_M[cut], starts_M=row.starts_M[cut], mask_M=row.mask_M[cut])
            elif self.settings.long_rows == "refuse":
                raise InputError(
                    "the row is longer than a sequence",
                    where=row.where,
                    found=f"{len(row)} tokens",
                    expected=f"at most {longest}",
                    fix="raise --seq_len, or set --long_rows to cut or drop",
                )


def plan(settings: ImportSettings) -> Plan:
    """Look at the captures and at the tokenizer.

    Raises:
        InputError: there are no captures, or no tokenizer.
        MismatchError: the captures are an export that says otherwise than the settings.
    """
    files = {"student": list_captures(settings.sources)}
    files["heldout"] = list_captures(settings.heldout) if settings.heldout else files["student"]
    tokenizer = load_tokenizer(settings.tokenizer)
    facts = tokenizer_facts(tokenizer)
    every = list(dict.fromkeys(path for paths in files.values() for path in paths))
    for path in every:
        require_same_facts(path, settings, facts)
    seq_len = settings.seq_len or max(longest_row(path, settings.columns.input_ids) for path in every) - 1
    if seq_len < 8:
        raise InputError(
            "no row is long enough",
            where=", ".join(map(str, every[:3])),
            found=f"{max(seq_len, -1) + 1} tokens in the longest",
            expected="at least 9",
        )
    return Plan(settings, files, tokenizer, facts, seq_len)


def longest_row(path: Path, column: str) -> int:
    """Tokens of a file's longest row, its padding included; 0 where there is none.

    Raises:
        InputError: the file is damaged, or the column is not one of lists.
    """
    file = open_file(path)
    if column not in file.schema_arrow.names:
        return 0
    batches = batches_of(file, path, [column])
    return max(
        (int(lists_of(batch.column(0), 1, np.int64, str(path)).sizes_R.max(initial=0)) for batch in batches), default=0
    )
