"""Makes one unit of a text: all answers to some prompts are written side by side, and become one shard.

    prompts --ask--> engine --> answers --best fit--> rows --> shard and answers file --> record

On one kind of machine, a unit depends only on its prompts and the writer: the engine gets the same requests, each with
a seed of its own. So any process may make it, any number of times. It is finished when its record,
`work/units/000000.json`, exists and its files have the digests that the record names. The record is removed before a
file is touched, and written after all files are whole.

Legend: B rows, L targets per row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from capgap.pipeline.answers.chat import Prompt
from capgap.pipeline.answers.generators import Generator, TransformersGenerator, VllmGenerator
from capgap.pipeline.corpus.pack import Encoded
from capgap.pipeline.corpus.sources import Document
from capgap.pipeline.corpus.whole import best_fit, in_whole_rows
from capgap.pipeline.generate.answers_file import SUFFIX, Written, write_answers
from capgap.pipeline.generate.asking import Asking, SampledAnswer
from capgap.pipeline.generate.prompts import PromptRecord, Split
from capgap.pipeline.generate.unit_record import TextCounts, TextRecord
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.progress import advance_within
from capgap.pipeline.stage.unit_notes import UnitNotes
from capgap.pipeline.store import Block, ShardWriter, split_blocks
from capgap.pipeline.store.codec import SEQUENCES, Codec
from capgap.pipeline.store.files import sha256_of
from capgap.pipeline.store.sidecars import read_sidecar, write_sidecar
from capgap.schemas.facts import TokenizerFacts
from capgap.schemas.manifest import ShardEntry, ShardSet
from capgap.schemas.run_rounds import RoundsSettings

UNITS_FOLDER = "units"
# number of answers that vLLM writes side by side
_AT_ONCE = 256
_RUN_TOKENS = 4


@dataclass(frozen=True)
class TextUnit:
    """The prompts that a unit answers.

    Attributes:
        split: the split whose shard the unit makes.
        number: number of the shard in the split.
        prompts: places of the unit's prompts among all prompts.
    """

    split: Split
    number: int
    prompts: tuple[int, ...]


@dataclass(frozen=True)
class TextJob:
    """Everything that a process must know to make units of one text; it can be pickled and sent to any machine.

    Attributes:
        settings: the settings of the rounds.
        prompts: all prompts.
        each_unit: the prompts of every unit.
        writer: folder or id of the model that writes.
        seeds: the beginning of the text from which the seed of each answer is derived.
        folder: the folder of the text.
        work: the stage's work folder.
        seq_len: number of targets per row.
        room: the largest number of tokens of a prompt and its answer together.
        tokenizer: the facts of the corpus's tokenizer.
        bos_ids: ids with which a text begins.
        device: `cpu` or `cuda:0`.
        num_devices: number of devices over which the writer is spread.
        trust_remote_code: whether to run code that comes with the writer.
    """

    settings: RoundsSettings
    prompts: tuple[PromptRecord, ...]
    each_unit: tuple[TextUnit, ...]
    writer: str
    seeds: str
    folder: Path
    work: Path
    seq_len: int
    room: int
    tokenizer: TokenizerFacts
    bos_ids: tuple[int, ...]
    device: str
    num_devices: int
    trust_remote_code: bool

    @property
    def units(self) -> UnitNotes:
        """The notes of finished units in the work folder."""
        return UnitNotes(self.folder, self.work, UNITS_FOLDER, len(self.each_unit))

    def num_prompts(self, units: Iterable[int]) -> int:
        """Return the number of prompts of the given units."""
        return sum(len(self.each_unit[unit].prompts) for unit in units)

    def shards_of(self, split: Split) -> ShardWriter:
        """Return the writer of the shards of a split."""
        codec = Codec(SEQUENCES, self.seq_len, self.tokenizer.vocab_size)
        return ShardWriter(self.folder, self.work / "shards", split, codec)

    def shard_set(self, split: Split, shards: list[ShardEntry]) -> ShardSet:
        """Return the manifest's description of the shards of a split."""
        return self.shards_of(split).shard_set(shards)

    def record(self, unit: int) -> TextRecord | None:
        """Return the record of a unit, or None if it is not finished; its files are not checked."""
        return read_sidecar(self.units.path(unit), TextRecord)


class TextMaker:
    """Makes and checks units of a job; the writer is started with the first unit that is made."""

    def __init__(self, job: TextJob) -> None:
        self.job = job
        self._generator: Generator | None = None
        (job.work / UNITS_FOLDER).mkdir(parents=True, exist_ok=True)

    def require_whole(self, unit: int) -> bool:
        """Return whether a unit is finished and all its files are whole; if not, remove its record."""
        record = self.job.record(unit)
        files = [] if record is None else [record.answers, *([record.shard.file] if record.shard else [])]
        paths = [self.job.folder / file.path for file in files]
        is_whole = record is not None and all(
            path.is_file() and sha256_of(path) == file.sha256 for path, file in zip(paths, files, strict=True)
        )
        if not is_whole:
            self.job.units.path(unit).unlink(missing_ok=True)
        return is_whole

    def make(self, number: int) -> TextRecord:
        """Make a unit, and replace whatever exists of it.

        Raises:
            InputError: the chat template refuses a prompt, or the writer cannot be loaded.
            MachineError: vLLM fails.
            OSError: the disk is full, or the folder cannot be written.
        """
        job, unit = self.job, self.job.each_unit[number]
        job.units.path(number).unlink(missing_ok=True)
        asked, num_too_long = self._asked(unit)
        # the engine counts answers and the progress counts prompts, each of which may have several answers
        share = len(unit.prompts) / max(len(asked), 1)
        prompts = [prompt for _, _, prompt in asked]
        made = self._started().generate(prompts, lambda count: advance_within(share * count)) if asked else []
        written: list[Written] = []
        kept: list[tuple[Prompt, SampledAnswer]] = []
        for (place, sample, prompt), generated in zip(asked, made, strict=True):
            answer = self._asking.answer(generated)
            finish = self._finish(answer)
            record, right = job.prompts[place], None
            if record.references:
                right = bool(answer.text) and self._is_right(answer.text, record.references)
            if finish in ("stop", "length"):
                kept.append((prompt, answer))
            written.append(Written(place, sample, -1, -1, finish, right, answer.text, answer.logprobs))
        shard, written = self._write(unit, kept, written)
        file = write_answers(job.folder / f"{unit.split}-{unit.number:06d}{SUFFIX}", written)
        num_text_bytes = sum(self._asking.num_text_bytes([*prompt.ids, *answer.ids]) for prompt, answer in kept)
        counts = _counts(written, kept, len(unit.prompts), num_too_long, num_text_bytes)
        found = TextRecord(shard=shard, answers=file, counts=counts)
        write_sidecar(job.units.path(number), found)
        return found

    def start(self) -> None:
        """Start the writer now, instead of with the first unit; errors are those of the engine."""
        self._started()

    def close(self) -> None:
        """Stop the writer, which frees its device."""
        if self._generator is not None:
            self._generator.close()
            self._generator = None

    @cached_property
    def _asking(self) -> Asking:
        job = self.job
        tokenizer = load_tokenizer(job.writer, job.trust_remote_code)
        return Asking(tokenizer, job.writer, job.settings, job.bos_ids, any(one.messages for one in job.prompts))

    def _started(self) -> Generator:
        if self._generator is None:
            self._generator = self._start()
        return self._generator

    def _start(self) -> Generator:
        job, stops = self.job, self._asking.stop_ids
        if job.settings.engine == "transformers":
            return TransformersGenerator(
                job.writer, stops, job.device, job.settings.dtype, job.trust_remote_code, with_logprobs=True
            )
        return VllmGenerator(
            job.writer,
            stops,
            job.room,
            job.device,
            job.settings.dtype,
            job.settings.gpu_memory_fraction,
            job.trust_remote_code,
            section="rounds",
            num_at_once=_AT_ONCE,
            with_logprobs=True,
            num_devices=job.num_devices,
        )

    def _asked(self, unit: TextUnit) -> tuple[list[tuple[int, int, Prompt]], int]:
        """Return the requests of a unit with their prompts' places and samples, and the number of too long prompts."""
        num_samples = self.job.settings.num_samples if unit.split == "student" else 1
        asked: list[tuple[int, int, Prompt]] = []
        num_too_long = 0
        for place in unit.prompts:
            ids = self._asking.ids(self.job.prompts[place])
            room = self.job.room - len(ids)
            if room < 1 or not ids:
                num_too_long += 1
                continue
            for sample in range(num_samples):
                asked.append((place, sample, self._asking.request(ids, room, f"{self.job.seeds} {place} {sample}")))
        return asked, num_too_long

    def _finish(self, answer: SampledAnswer) -> Literal["stop", "length", "empty", "unknown"]:
        if any(one >= self.job.tokenizer.vocab_size for one in answer.ids):
            return "unknown"
        if not answer.text.strip():
            return "empty"
        return "stop" if answer.ended else "length"

    def _is_right(self, text: str, references: Sequence[str]) -> bool:
        pattern = self.job.settings.answer_pattern
        if pattern is not None:
            matches = re.findall(pattern, text)
            if not matches:
                return False
            text = matches[-1]
        return text.strip() in {reference.strip() for reference in references}

    def _write(
        self, unit: TextUnit, kept: list[tuple[Prompt, SampledAnswer]], written: list[Written]
    ) -> tuple[ShardEntry | None, list[Written]]:
        """Write the shard of the kept answers, and return it and all answers with their places in it."""
        if not kept:
            return None, written
        seq_len = self.job.seq_len
        rows = [_encoded(prompt, answer) for prompt, answer in kept]
        sequences = in_whole_rows(rows, seq_len, self.job.tokenizer.eos_id)
        shard = self.job.shards_of(unit.split).write(unit.number, [Block(part) for part in split_blocks(sequences)])
        places: dict[int, tuple[int, int]] = {}
        for number, row in enumerate(best_fit([len(one.ids) for one in rows], seq_len + 1)):
            first = 0
            for index in row:
                places[index] = (number, first + len(kept[index][0].ids))
                first += len(rows[index].ids)
        placed, index = [], 0
        for one in written:
            if one.finish in ("stop", "length"):
                row_number, first = places[index]
                placed.append(Written(**{**vars(one), "row": row_number, "first": first}))
                index += 1
            else:
                placed.append(one)
        return shard, placed


def _encoded(prompt: Prompt, answer: SampledAnswer) -> Encoded:
    mask = [False] * len(prompt.ids) + [True] * len(answer.ids)
    return Encoded(Document("", answer.text), [*prompt.ids, *answer.ids], mask)


def _counts(
    written: Sequence[Written],
    kept: Sequence[tuple[Prompt, SampledAnswer]],
    num_prompts: int,
    num_too_long: int,
    num_text_bytes: int,
) -> TextCounts:
    graded = [one.right for one in written if one.right is not None]
    finishes = [one.finish for one in written]
    return TextCounts(
        num_prompts=num_prompts,
        num_too_long=num_too_long,
        num_answers=len(kept),
        num_empty=finishes.count("empty"),
        num_unknown=finishes.count("unknown"),
        num_cut=finishes.count("length"),
        num_prompt_tokens=sum(len(prompt.ids) for prompt, _ in kept),
        num_answer_tokens=sum(len(answer.ids) for _, answer in kept),
        num_text_bytes=num_text_bytes,
        logprob=sum(sum(answer.logprobs) for _, answer in kept),
        repetition=sum(_repetition(answer.ids) for _, answer in kept),
        num_graded=len(graded),
        num_right=sum(graded),
    )


def _repetition(ids: Sequence[int]) -> float:
    """Return the share of an answer's runs of four tokens that occur earlier in it."""
    runs = [tuple(ids[i : i + _RUN_TOKENS]) for i in range(len(ids) - _RUN_TOKENS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
