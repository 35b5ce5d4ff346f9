"""How much work and disk each stage of a run takes, counted where the corpus is made and estimated otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from capgap.pipeline.plan.judging import answer_tokens
from capgap.pipeline.plan.measured import cache_bytes_per_token, corpus_bytes_per_token
from capgap.pipeline.plan.sizes import (
    ModelSize,
    checkpoint_bytes,
    model_size,
    num_checkpoints,
    pruned_size,
    weight_bytes,
)
from capgap.pipeline.plan.tokens import cache_tokens, split_tokens, trained_tokens, vocab_size_of, written_tokens
from capgap.pipeline.stage.manifests import Finished, finished_stage
from capgap.pipeline.teacher.trained import training_tokens
from capgap.pipeline.workflow.state import StageState, State
from capgap.schemas.manifest import Manifest
from capgap.schemas.plan import Figure
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_optimization import OptimizationSettings
from capgap.schemas.run_sections import ReusableStage

_FLOAT32_BYTES = 4

_NOT_PLANNED = Figure(value=None, source="`capgap plan` does not know this stage")


@dataclass(frozen=True)
class RunWork:
    """What a run has to do.

    Attributes:
        run: The run file.
        vocab_size: Size of the tokenizer's vocabulary; None where the tokenizer cannot be read.
        teacher: Size of the teacher.
        student: Size of the student.
        split_tokens: Tokens of each split of the corpus: teacher, student, heldout.
        cache_tokens: Tokens that the teacher scores.
        student_tokens: Tokens that one student of each arm trains on in all its epochs.
        teacher_tokens: Tokens that the run trains its teacher on; 0 for a given teacher.
        teacher_training: Tokens that the teacher was or will be trained on from random weights; None where that is not
            known, as for a given teacher, adapted or not.
        eval_sequences: Number of held-out sequences that each model is scored on.
    """

    run: RunFile
    vocab_size: float | None
    teacher: ModelSize
    student: ModelSize
    split_tokens: dict[str, Figure]
    cache_tokens: Figure
    student_tokens: dict[str, Figure]
    teacher_tokens: Figure
    teacher_training: float | None
    eval_sequences: Figure

    @property
    def num_models(self) -> int:
        """Number of models that eval measures."""
        return self._measured_teachers + len(self.run.seeds) * len(self.run.arms)

    @property
    def _measured_teachers(self) -> int:
        return 1 if self.run.measures_teacher else 0

    @property
    def most_student_tokens(self) -> Figure:
        """Tokens of a student of the arm that trains longest."""
        return max(self.student_tokens.values(), key=lambda figure: figure.value or 0)

    @property
    def num_cache_students(self) -> int:
        """Number of students that this run trains from the cache's targets; 0 where it only makes shards."""
        if not self.run.makes("train"):
            return 0
        settings = [self.run.train_settings(arm) for arm in self.run.arms]
        learning = [one for one in settings if one.targets == "cache" and one.largest_alpha > 0]
        return len(self.run.seeds) * len(learning)

    def asks_the_teacher(self, arm: str | None) -> bool:
        """Return whether a training of that arm asks the teacher online."""
        return arm is not None and self.run.train_settings(arm).needs_teacher

    def training(self, stage: str, arm: str | None = None) -> OptimizationSettings | None:
        """Return the settings of the stage's training, those of the section without an arm; None if none is done."""
        match stage:
            case "teacher":
                return self.run.teacher.optimization
            case "train":
                return self.run.train if arm is None else self.run.train_settings(arm)
            case "tune":
                return self.run.tune
            case _:
                return None

    def num_devices(self, stage: str, arm: str | None = None) -> int:
        """Return the number of devices whose work a rate of the stage is: those of one engine, or of one training."""
        if stage == "cache":
            return self.run.cache.num_devices
        settings = self.training(stage, arm)
        return 1 if settings is None else settings.num_devices

    def tokens(self, stage: str, arm: str | None = None) -> Figure:
        """Return the tokens that one instance of the stage works on.

        For a training without an arm, they are those of the arm that trains longest.
        """
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
                return self.most_student_tokens if arm is None else self.student_tokens[arm]
            case "eval":
                sequences = self.eval_sequences
                each = self.run.corpus.seq_len * self.num_models
                value = None if sequences.value is None else sequences.value * each
                return Figure(value=value, source=f"{self.num_models} models")
            case "student" if self.run.student.prune is not None:
                return Figure(value=0, source="the passes that score the teacher's parts are not counted")
            case "answers":
                return answer_tokens(self.run)
            case "generate":
                return written_tokens(self.run)
            case "student" | "judge" | "report":
                return Figure(value=0, source="none")
            case "tune":
                return Figure(value=None, source="conversations are only counted when they are tokenized")
            case _:
                return _NOT_PLANNED

    def disk_bytes(self, stage: str, arm: str | None = None) -> Figure:
        """Return the bytes of one finished folder of the stage."""
        match stage:
            case "corpus":
                return _times(corpus_bytes_per_token(self.vocab_size), self.tokens("corpus"))
            case "cache":
                return _times(cache_bytes_per_token(self.run.cache, self.vocab_size), self.cache_tokens)
            case "generate":
                return _times(corpus_bytes_per_token(self.vocab_size), self.tokens("generate"))
            case "teacher" if self.run.teacher.optimization is None:
                return Figure(value=0, source="a given model stays where it is")
            case "teacher" | "student" | "train" | "tune":
                size = self.teacher if stage == "teacher" else self.student
                few = self.run.student.quantize if stage != "teacher" else None
                settings = self.training(stage, arm)
                each = size.weight_bytes if settings is None else weight_bytes(settings)
                value, how = None if size.total is None else size.total * each, f"{each} bytes a parameter"
                if few is not None and value is not None:
                    value += size.packed_bytes(few) or 0
                    how += f" and its {few.format} beside it"
                return Figure(value=value, source=f"{how}, by {size.where}")
            case "eval" | "benchmark" | "answers" | "judge" | "report":
                return Figure(value=0, source="a page, a table or texts, not counted")
            case _:
                return _NOT_PLANNED

    def scratch_bytes(self, stage: str, arm: str | None = None) -> Figure:
        """Return the further bytes of disk that one instance of the stage takes while it works."""
        match stage:
            case "train" if self.tokens(stage, arm).value == 0:
                return Figure(value=0, source="no step is taken")
            case "teacher" if self.run.teacher.optimization is None:
                return Figure(value=0, source="none")
            case "teacher" | "train" | "tune":
                size, settings = self.teacher if stage == "teacher" else self.student, self.training(stage, arm)
                assert settings is not None
                number, each = num_checkpoints(settings), checkpoint_bytes(settings)
                value = None if size.total is None else size.total * each * number
                return Figure(value=value, source=f"{number} checkpoints of {each} bytes a parameter")
            case "eval":
                rows = self._measured_teachers * self.run.eval.num_full_sequences * self.run.corpus.seq_len
                value = None if self.vocab_size is None else rows * self.vocab_size * _FLOAT32_BYTES
                how = "the teacher's distributions, in float32"
                return Figure(value=value, source=how if value is not None else "needs the tokenizer")
            case "corpus" | "cache" | "student" | "benchmark" | "answers" | "judge" | "report" | "generate":
                return Figure(value=0, source="none")
            case _:
                return _NOT_PLANNED

    def operations(self, stage: str, arm: str | None = None) -> float | None:
        """Return the floating-point operations of one instance: 6 N D for a training, 2 N D for a forward pass.

        None where they cannot be counted.
        """
        teacher, student, tokens = self.teacher.total, self.student.total, self.tokens(stage, arm).value
        if tokens is None:
            return None
        match stage:
            case "teacher":
                return None if teacher is None else 6 * teacher * tokens
            case "cache":
                return None if teacher is None else 2 * teacher * tokens
            case "train" if self.asks_the_teacher(arm):
                return None if student is None or teacher is None else (6 * student + 2 * teacher) * tokens
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
    """Return what the run has to do, as far as it can be known.

    Args:
        run: The run file.
        known: States of its instances, by name.
        stated_bytes_per_token: Bytes of text in a token, where the corpus is not made; None to measure it on a sample.
        splits: Tokens of the corpus's splits, where they are known from another run of the same corpus.

    Raises:
        InputError: A source of the corpus cannot be read.
    """
    corpus = finished("corpus", run, known)
    cache = finished("cache", run, known)
    # a finished cache stands for a corpus that the run does not have
    text = cache if corpus is None and "corpus" not in known else corpus
    vocab_size = vocab_size_of(run, text)
    splits = splits or split_tokens(run, text, vocab_size, stated_bytes_per_token)
    cached = cache_tokens(run, cache, splits["student"] if run.rounds is None else written_tokens(run))
    heldout = splits["heldout"]
    seq_len = run.corpus.seq_len if text is None else next(iter(text.shard_sets.values())).seq_len
    sequences = None if heldout.value is None else min(run.eval.num_sequences, heldout.value // seq_len)
    student = _made_student(known)
    optimization = run.teacher.optimization
    teacher_tokens = (
        Figure(value=0, source="a given model is only checked")
        if optimization is None
        else trained_tokens(optimization, splits["teacher"])
    )
    teacher = finished("teacher", run, known)
    return RunWork(
        run=run,
        vocab_size=vocab_size,
        teacher=_teacher_size(run, known, vocab_size),
        student=model_size(student, run.student.path, run.student.model, vocab_size)
        if run.student.prune is None
        else pruned_size(student, run.student.prune, run.teacher, vocab_size),
        split_tokens=splits,
        cache_tokens=cached,
        student_tokens={arm: trained_tokens(run.train_settings(arm), cached) for arm in run.arms},
        teacher_tokens=teacher_tokens,
        teacher_training=training_tokens(teacher)
        if teacher is not None
        else None
        if run.teacher.model is None
        else teacher_tokens.value,
        eval_sequences=Figure(value=sequences, source=heldout.source),
    )


def reused_stage(run: RunFile, stage: ReusableStage) -> Finished:
    """Return the folder or URL that the run reuses for a stage, with its manifest.

    Raises:
        InputError: It holds no such stage.
    """
    folder = run.reuse[stage]
    return finished_stage(
        stage, folder, "cannot be reused", f"reuse.{stage}: {folder}", f"the folder of a finished {stage} stage"
    )


def finished(stage: ReusableStage, run: RunFile, known: dict[str, StageState]) -> Manifest | None:
    """Return the manifest of a stage that is current or reused; None where it is neither."""
    if stage in run.reuse:
        return reused_stage(run, stage)[1]
    state = known.get(stage)  # the run may not make this stage
    return state.manifest if state is not None and state.state is State.CURRENT else None


def _made_student(known: dict[str, StageState]) -> Manifest | None:
    """Return the manifest of a student that is current, of any seed; None where there is none."""
    made = (one.manifest for one in known.values() if one.instance.stage == "student" and one.state is State.CURRENT)
    return next(made, None)


def _teacher_size(run: RunFile, known: dict[str, StageState], vocab_size: float | None) -> ModelSize:
    if run.teacher.served is not None and run.teacher.path is None:
        return ModelSize(None, None, f"not known here: {run.teacher.served} is served elsewhere")
    return model_size(finished("teacher", run, known), run.teacher.path, run.teacher.model, vocab_size)


def _times(each: Figure, number: Figure) -> Figure:
    value = None if each.value is None or number.value is None else each.value * number.value
    return Figure(value=value, source=each.source if number.value is not None else number.source)


def _known_sum(values: list[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)
