"""What an import is to make, determined before the first file is written: files, tokenizer, length, work orders."""

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
from capgap.pipeline.interchange.export_facts import ExportFacts, facts_of, require_same_facts
from capgap.pipeline.interchange.list_targets import ListTargets
from capgap.pipeline.interchange.parquet import Layout, TargetReader, list_captures, read_rows
from capgap.pipeline.interchange.shift import proven
from capgap.pipeline.interchange.survey import longest_row, start_within
from capgap.pipeline.models.bos import document_bos
from capgap.pipeline.models.tokenizers import load_tokenizer, tokenizer_facts
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.manifests import record_sources
from capgap.schemas.distillkit import DistillKitConfig
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import TokenizerFacts
from capgap.schemas.interchange import ImportSettings
from capgap.schemas.manifest import SourceEntry
from capgap.schemas.run_corpus import ContextRule

SPLITS = ("student", "heldout")


@dataclass(frozen=True)
class Plan:
    """Everything that decides what an import makes.

    Attributes:
        settings: The settings as given.
        files: Captures by split, `student` and `heldout`; one file may be in both.
        tokenizer: Tokenizer of the captures' tokens.
        facts: Facts of the tokenizer.
        seq_len: Number of targets of a sequence.
        context: What the teacher saw before a token.
        configs: How each file's targets are packed; empty where they are columns of lists.
        exports: What each file says of itself; None for a file that `capgap export` did not write.
    """

    settings: ImportSettings
    files: dict[str, list[Path]]
    tokenizer: PreTrainedTokenizerBase
    facts: TokenizerFacts
    seq_len: int
    context: ContextRule
    configs: dict[Path, DistillKitConfig]
    exports: dict[Path, ExportFacts | None]

    @cached_property
    def sources(self) -> tuple[SourceEntry, ...]:
        """Digests and sizes of the captures as they are now."""
        every = dict.fromkeys(path for paths in self.files.values() for path in paths)
        return record_sources(every)

    @cached_property
    def usual_bos_ids(self) -> tuple[int, ...]:
        """The ids that begin a document under `corpus.bos: auto`."""
        return document_bos(self.tokenizer, self.settings.tokenizer, "auto")

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The ids that may begin a document of the captures: the usual ones, or else the tokenizer's BOS token."""
        own = self.tokenizer.bos_token_id
        return self.usual_bos_ids or (() if own is None or own == self.facts.eos_id else (int(own),))

    @cached_property
    def corpus_settings(self) -> dict[str, Any]:
        """The settings that decide the corpus, which depend on the tokens alone."""
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
                "context": self.context,
                "seq_len": self.seq_len,
                "long_rows": settings.long_rows,
                "heldout_fraction": None if settings.heldout else settings.heldout_fraction,
                "shard_sequences": settings.shard_sequences,
            }
        }

    @cached_property
    def cache_settings(self) -> dict[str, Any]:
        """The settings that decide the cache, beside the corpus and the teacher."""
        settings, columns = self.settings, self.settings.columns
        return {
            "import": {
                "format": settings.format,
                "columns": {name: getattr(columns, name) for name in ("ids", "logprobs", "tail", "label_logprobs")},
                "compression": self._compression,
                "offset": settings.offset,
                "temperature": settings.temperature,
                "top_k": settings.top_k,
                "profile": settings.profile,
            }
        }

    def rows(self, split: str, with_targets: bool) -> Iterator[CapturedRow]:
        """Yield the rows of a split, in order; with targets, a file's rows are held back until proven aligned.

        Raises:
            InputError: A row cannot be read or is too long, or its alignment cannot be told.
            MismatchError: Targets predict another token than the one after them.
        """
        apart = bool(self.settings.heldout)
        for path in self.files[split]:
            layout = Layout(
                self.settings.columns,
                self.facts.vocab_size,
                self._targets(path) if with_targets else None,
                self._padding,
                self.bos_ids,
            )
            rows = read_rows(path, layout)
            rows = proven(rows, path, self.facts.vocab_size) if with_targets else rows
            chosen = rows if apart else (row for row in rows if self._split_of(row) == split)
            yield from self._of_length(chosen)

    @property
    def _compression(self) -> dict[str, Any] | None:
        """How the targets are packed: the distinct configurations, and which of them each file of a split has."""
        if not self.configs:
            return None
        ways = [config.model_dump(mode="json") for config in self.configs.values()]
        configs = [way for number, way in enumerate(ways) if way not in ways[:number]]
        way_of = dict(zip(self.configs, map(configs.index, ways), strict=True))
        return {
            "configs": configs,
            "config_of": {split: [way_of[path] for path in paths] for split, paths in self.files.items()},
        }

    @property
    def _padding(self) -> int | None:
        """The id that DistillKit appends to a row to capture a target for its last token; None where there is none."""
        pad = self.tokenizer.pad_token_id
        is_padding = self.settings.format == "distillkit" and pad is not None and pad != self.facts.eos_id
        return int(pad) if is_padding else None

    def _targets(self, path: Path) -> TargetReader:
        if self.settings.format == "distillkit":
            return DistillKitTargets(self.configs[path], self.facts.vocab_size)
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
    """Inspect the captures and the tokenizer, and plan the import.

    Raises:
        InputError: There are no captures, or no tokenizer; or it is not known what the teacher saw.
        MismatchError: The captures are an export whose facts differ from the settings.
    """
    files = _files(settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    facts = tokenizer_facts(tokenizer)
    every = list(dict.fromkeys(path for paths in files.values() for path in paths))
    for path in every:
        require_same_facts(path, settings, facts)
    exports = {path: facts_of(path) for path in every}
    context = _context(settings, exports)
    seq_len = settings.seq_len or max(longest_row(path, settings.columns) for path in every) - 1
    if seq_len < 8:
        raise InputError(
            "no row is long enough",
            where=", ".join(map(str, every[:3])),
            found=f"{max(seq_len, -1) + 1} tokens in the longest",
            expected="at least 9",
        )
    configs = {path: read_config(settings, path) for path in every} if settings.format == "distillkit" else {}
    return Plan(settings, files, tokenizer, facts, seq_len, context, configs, exports)


def _files(settings: ImportSettings) -> dict[str, list[Path]]:
    """Return the captures by split; a held-out file is never trained on, even if the sources name it too."""
    sources = list_captures(settings.sources)
    if not settings.heldout:
        return {"student": sources, "heldout": sources}
    heldout = list_captures(settings.heldout)
    apart = {path.resolve() for path in heldout}
    student = [path for path in sources if path.resolve() not in apart]
    if not student:
        raise InputError(
            "all captures are held out",
            where=", ".join(settings.sources),
            found=f"{len(sources)} files, each of which --heldout names too",
            expected="at least one to train on",
            fix="name others beside them, or leave --heldout out to hold out a share of the rows",
        )
    if len(student) < len(sources):
        num_heldout = len(sources) - len(student)
        text = f"import: {num_heldout} of {len(sources)} files are held out, and not trained on"
        event("import_heldout", text, num_heldout=num_heldout, num_files=len(sources))
    return {"student": student, "heldout": heldout}


def _context(settings: ImportSettings, exports: dict[Path, ExportFacts | None]) -> ContextRule:
    """Return the context rule: the setting, or that of the exports, or `document` where each row is one document."""
    if settings.context is not None:
        return settings.context
    contexts: dict[Path, ContextRule] = {path: "document" if of is None else of.context for path, of in exports.items()}
    first, context = next(iter(contexts.items()))
    for path, own in contexts.items():
        if own != context:
            raise MismatchError(
                "the captures are of two contexts",
                where=path,
                found=own,
                expected=f"{context}, as in {first}",
                fix="import them apart, each into a folder of its own, or set --context for files that do not state it",
            )
        where = None if exports[path] is not None else start_within(path, settings.columns)
        if where is not None:
            raise InputError(
                "what the teacher saw of a row with several documents is not known",
                where=where,
                found=f"the mark of a document in the column {settings.columns.starts!r}, and no --context",
                expected="--context document if it saw each document alone, --context packed if it saw the whole row",
                fix="set --context; or --columns.starts none, which leaves the marks out: rows are then seen whole",
            )
    return context
