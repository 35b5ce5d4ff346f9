"""How much each stage of a run has to do and what disk it takes: counted where the corpus is made, else estimated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from capgap.pipeline.corpus.split import SPLITS
from capgap.pipeline.models.bos import document_bos
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.plan.judging import answer_tokens
from capgap.pipeline.plan.measured import cache_bytes_per_token, corpus_bytes_per_token, text_bytes_per_token
from capgap.pipeline.plan.sizes import ModelSize, model_size, pruned_size
from capgap.pipeline.plan.text import bytes_per_token, text_bytes
from capgap.pipeline.workflow.state import StageState, State, reused_manifests
from capgap.schemas.errors import CapgapError
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.manifest import Manifest
from capgap.schemas.plan import Figure
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_optimization import OptimizationSettings

# A checkpoint holds weights and two moments in float32; two are kept while the third is written.
_CHECKPOINT_BYTES, _CHECKPOINTS = 12, 3
_CHECKPOINTS_WORDS = f"{_CHECKPOINTS} checkpoints of {_CHECKPOINT_BYTES} bytes a parameter"
_FLOAT32_BYTES = 4

_NOT_PLANNED = Figure(value=None, source="`capgap plan` does not know this stage")


@dataclass(frozen=True)
class RunWork:
    """What there is to do.

    Attributes:
        vocab_size: of the tokenizer; None where that cannot be read.
        teacher: its size.
        student: its size.
        split_tokens: by split of the corpus: teacher, student, heldout.
        cache_tokens: that the teacher scores.
        student_tokens: that one student trains on, epochs and all.
        teacher_tokens: that a teacher is trained on; 0 for a given one.
        eval_sequences: held-out sequences that each model is scored on.
    """

    run: RunFile
    vocab_size: float | None
    teacher: ModelSize
    student: ModelSize
    split_tokens: dict[str, Figure]
    cache_tokens: Figure
    student_tokens: Figure
    teacher_tokens: Figure
    eval_sequences: Figure

    @property
    def num_models(self) -> int:
        """That eval measures."""
        return self._measured_teachers + len(self.run.seeds) * len(self.run.arms)

    @property
    def _measured_teachers(self) -> int:
        return 0 if self.run.eval.teacher == "cache" else 1

    @property
    def num_cache_students(self) -> int:
        """That this run trains from the cache's targets."""
        learning = [arm for arm in self.run.arms if self.run.train_settings(arm).alpha > 0]
        return len(self.run.seeds) * len(learning)

    def tokens(self, stage: str) -> Figure:
        """Targets that one instance of the stage works on."""
        match stage:
            case "corpus":
                parts = list(self.split_tokens.values())
                total = _known_sum([part.value for part in parts])
                return Figure(value=total, source=parts[0].source)
            case "teacher":
                return self.teacher_tokens
            case "cache":
                return self.cache_tokens
            case "train":
                return self.student_tokens
            case "eval":
                sequences = self.eval_sequences
                each = self.run.corpus.seq_len * self.num_models
                value = None if sequences.value is None else sequences.value * each
                return Figure(value=value, source=f"{self.num_models} models")
            case "student" if self.run.student.prune is not None:
                return Figure(value=0, source="the passes that score the teacher's parts are not counted")
            case "answers":
                return answer_tokens(self.run)
            case "student" | "judge" | "report":
                return Figure(value=0, source="none")
            case "tune":
                return Figure(value=None, source="conversations are not counted before they are tokens")
            case _:
                return _NOT_PLANNED

    def disk_bytes(self, stage: str) -> Figure:
        """Of one finished folder."""
        match stage:
            case "corpus":
                return _times(corpus_bytes_per_token(self.vocab_size), self.tokens("corpus"))
            case "cache":
                return _times(cache_bytes_per_token(self.run.cache, self.vocab_size), self.cache_tokens)
            case "teacher" if self.run.teacher.optimization is None:
                return Figure(value=0, source="a given model stays where it is")
            case "teacher" | "student" | "train" | "tune":
                size = self.teacher if stage == "teacher" else self.student
                return Figure(value=size.saved_bytes, source=f"4 bytes a parameter, by {size.where}")
            case "eval" | "benchmark" | "answers" | "judge" | "report":
                return Figure(value=0, source="a page, a table or texts, not counted")
            case _:
                return _NOT_PLANNED

    def scratch_bytes(self, stage: str) -> Figure:
        """More that one instance takes while it works."""
        match stage:
            case "teacher" if self.run.teacher.optimization is None:
                return Figure(value=0, source="none")
            case "teacher" | "train" | "tune":
                size = self.teacher if stage == "teacher" else self.student
                value = None if size.total is None else size.total * _CHECKPOINT_BYTES * _CHECKPOINTS
                return Figure(value=value, source=_CHECKPOINTS_WORDS)
            case "eval":
                rows = self._measured_teachers * self.run.eval.num_full_sequences * self.run.corpus.seq_len
                value = None if self.vocab_size is None else rows * self.vocab_size * _FLOAT32_BYTES
                how = "the teacher's distributions, in float32"
                return Figure(value=value, source=how if value is not None else "needs the tokenizer")
            case "corpus" | "cache" | "student" | "benchmark" | "answers" | "judge" | "report":
                return Figure(value=0, source="none")
            case _:
                return _NOT_PLANNED

    def operations(self, stage: str) -> float | None:
        """Floating-point operations of one instance: 6 N D for a training, 2 N D for a forward pass."""
        teacher, student, tokens = self.teacher.total, self.student.total, self.tokens(stage).value
        if tokens is None:
            return None
        match stage:
            case "teacher":
                return None if teacher is None else 6 * teacher * tokens
            case "cache":
                return None if teacher is None else 2 * teacher * tokens
            case "train":
                return None if student is None else 6 * student * tokens
            case "eval" if teacher is not None and student is not None:
                teachers = self._measured_teachers
                return 2 * tokens / self.num_models * (teachers * teacher + (self.num_models - teachers) * student)
            case _:
                return None


def work_of(
    run: RunFile,
    known: dict[str, StageState],
    stated_bytes_per_token: float | None,
    splits: dict[str, Figure] | None = None,
) -> RunWork:
    """What the run has to do, as far as it can be known.

    Args:
        run: the run file.
        known: states of its instances.
        stated_bytes_per_token: of text, where the corpus is not made; measured on a sample where it is not given.
        splits: tokens of the corpus's splits, where another run of the same corpus was looked at.

    Raises:
        InputError: a source of the corpus cannot be read.
    """
    corpus = finished("corpus", run, known)
    cache = finished("cache", run, known)
    vocab_size = vocab_size_of(run, corpus)
    splits = splits or _split_tokens(run, corpus, vocab_size, stated_bytes_per_token)
    cached = _cache_tokens(run, cache, splits["student"])
    arms = [_trained_tokens(run.train_settings(arm), cached) for arm in run.arms]
    heldout = splits["heldout"]
    sequences = None if heldout.value is None else min(run.eval.num_sequences, heldout.value // run.corpus.seq_len)
    students = [state.manifest for state in known.values() if state.instance.stage == "student"]
    optimization = run.teacher.optimization
    return RunWork(
        run=run,
        vocab_size=vocab_size,
        teacher=model_size(finished("teacher", run, known), run.teacher.path, run.teacher.model, vocab_size),
        student=model_size(next(iter(students), None), run.student.path, run.student.model, vocab_size)
        if run.student.prune is None
        else pruned_size(next(iter(students), None), run.student.prune, run.teacher, vocab_size),
        split_tokens=splits,
        cache_tokens=cached,
        student_tokens=max(arms, key=lambda figure: figure.value or 0),
        teacher_tokens=Figure(value=0, source="a given model is only checked")
        if optimization is None
        else _trained_tokens(optimization, splits["teacher"]),
        eval_sequences=Figure(value=sequences, source=heldout.source),
    )


def finished(stage: str, run: RunFile, known: dict[str, StageState]) -> Manifest | None:
    """The manifest of a stage that is current or reused."""
    if stage in run.reuse:
        return next(manifest for name, (_, manifest) in reused_manifests(run).items() if name == stage)
    state = known.get(stage)  # nobody may need it
    return state.manifest if state is not None and state.state is State.CURRENT else None


def vocab_size_of(run: RunFile, corpus: Manifest | None) -> float | None:
    """Of the corpus, or of the tokenizer that it is to have; None where that cannot be read."""
    if corpus is not None:
        return CorpusFacts.model_validate(corpus.facts).tokenizer.vocab_size
    if run.corpus.tokenizer is None:
        return run.corpus.trained_vocab_size
    more = run.corpus.extend_vocabulary
    try:
        return len(load_tokenizer(run.corpus.tokenizer)) + (0 if more is None else more.num_pieces)
    except CapgapError:
        return None


def _split_tokens(
    run: RunFile, corpus: Manifest | None, vocab_size: float | None, stated_bytes_per_token: float | None
) -> dict[str, Figure]:
    if corpus is not None:
        counted = {name: part.num_tokens for name, part in corpus.shard_sets.items()}
        return {name: Figure(value=counted.get(name, 0), source="the corpus") for name in SPLITS}
    settings = run.corpus
    text = text_bytes(settings.sources, settings.text_field)
    per_token = _bytes_per_token(run, vocab_size, stated_bytes_per_token)
    if per_token.value is None:
        return dict.fromkeys(SPLITS, per_token)
    assert text.value is not None
    total, source = text.value / per_token.value, f"estimated: {text.source}; {per_token.source}"
    fractions = {"teacher": settings.teacher_fraction, "heldout": settings.heldout_fraction}
    fractions["student"] = 1 - sum(fractions.values())
    return {name: Figure(value=total * share, source=source) for name, share in fractions.items()}


def _bytes_per_token(run: RunFile, vocab_size: float | None, stated: float | None) -> Figure:
    settings = run.corpus
    if stated is not None:
        return Figure(value=stated, source=f"{stated:g} bytes of text a token, stated")
    if settings.tokenizer is None:
        return text_bytes_per_token(vocab_size)
    try:
        tokenizer = load_tokenizer(settings.tokenizer)
    except CapgapError as error:
        return Figure(value=None, source=f"give --text-bytes-per-token, or the tokenizer: {error}")
    num_around = len(document_bos(tokenizer, settings.tokenizer, settings.bos)) + 1
    return bytes_per_token(tokenizer, settings.sources, settings.text_field, num_around)


def _cache_tokens(run: RunFile, cache: Manifest | None, student: Figure) -> Figure:
    if cache is not None:
        return Figure(value=next(iter(cache.shard_sets.values())).num_tokens, source="the cache")
    if student.value is None or run.cache.max_tokens is None:
        return student
    shard = run.corpus.shard_sequences * run.corpus.seq_len
    return Figure(value=min(student.value, math.ceil(run.cache.max_tokens / shard) * shard), source=student.source)


def _trained_tokens(settings: OptimizationSettings, data: Figure) -> Figure:
    if data.value is None:
        return data
    value = data.value * settings.num_epochs
    return Figure(value=min(value, settings.max_tokens or value), source=data.source)


def _times(each: Figure, number: Figure) -> Figure:
    value = None if each.value is None or number.value is None else each.value * number.value
    return Figure(value=value, source=each.source if number.value is not None else number.source)


def _known_sum(values: list[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)
