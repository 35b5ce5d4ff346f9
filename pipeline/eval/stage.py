"""The eval stage: held-out losses of the teacher and of every student, and how near students come to the teacher.

Legend: S sequences, L targets per sequence.

The teacher is removed from the device before the first student is loaded; only its logprobs of a few sequences stay, on
disk. Where the teacher is not measured, students are compared with the cache's targets of held-out sequences. Where the
run has no corpus either, these sequences are also the text of every other measurement, in the same pass. Cost: one
forward pass of every model over `eval.num_sequences` sequences and the cache's held-out sequences, and
`num_full_sequences` x L x vocabulary x 4 bytes of disk while it runs. Teacher and student are on the device together
only for `eval.speculative`, which is measured last.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from capgap.pipeline.eval.at_hand import (
    NO_TEACHER,
    OTHER_TOKENS,
    SERVED_TEACHER,
    require_teacher_if_wanted,
    why_missing,
)
from capgap.pipeline.eval.cached import CachedRows, CachedSums, cached_rows, score_on_cache
from capgap.pipeline.eval.calibration import CalibrationError
from capgap.pipeline.eval.compare import Comparison
from capgap.pipeline.eval.drafts import DraftJob, drafted, prompts_of, require_drafting
from capgap.pipeline.eval.heldout import first_sequences, labels_per_byte, num_labels
from capgap.pipeline.eval.intervals import Float64Array
from capgap.pipeline.eval.measure import Visit, score
from capgap.pipeline.eval.results import Measured, Text, results_of
from capgap.pipeline.eval.samples import Prompts
from capgap.pipeline.eval.samples import prompts_of as sample_prompts_of
from capgap.pipeline.eval.spool import open_spool
from capgap.pipeline.models.load import load_model, model_path
from capgap.pipeline.models.text import RunText
from capgap.pipeline.stage.context import Instance, StageContext, StageInput, StageResult
from capgap.pipeline.stage.folder import LOGS_FOLDER
from capgap.pipeline.stage.heartbeat import begin_phase
from capgap.pipeline.stage.progress import Meter, progress
from capgap.pipeline.stage.scalars import EVAL_SCALARS, ScalarFile
from capgap.pipeline.store.files import write_atomically
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import ModelFacts, TextFacts
from capgap.schemas.records import Sequences
from capgap.schemas.results import RESULTS_NAME, TEACHER, EvalResults
from capgap.schemas.run_eval import SpeculativeSettings
from capgap.schemas.run_file import RunFile

_LOG = logging.getLogger("capgap")


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse settings that ask for measurements which the run's inputs do not allow.

    Raises:
        InputError: The run has no corpus, and its cache no held-out sequences.
        SettingError: The settings need the teacher itself, and the run has none.
    """
    require_teacher_if_wanted(run.eval, inputs)
    RunText.among(inputs).heldout_shards()


def run(context: StageContext) -> StageResult:
    """Measure every model and write `results.json`.

    Raises:
        InputError: There are no held-out sequences, or they hold no labels; a loss is not a number; or the teacher is
            left out and the cache has no held-out sequences.
        MismatchError: A model's tokenizer is not the corpus's.
        MachineError: The disk has too little room for the teacher's distributions, or drafts cannot be measured in
            vLLM.
        SettingError: The settings need the teacher itself, and the run has none; or sequences are too short for the
            drafts.
    """
    check(context.run, context.instance, context.inputs)
    settings, run_text = context.run.eval, RunText.among(context.inputs)
    facts = run_text.facts
    cached = cached_rows(context.input("cache"), settings.num_sequences)
    if run_text.of_cache and cached is None:
        raise _in_quarantine(context)
    shards = run_text.heldout_shards(None if cached is None else cached.recording)
    sequences = first_sequences(run_text.made.location, shards, settings.num_sequences)
    students = _students(context)
    missing = why_missing(context)
    for name in (*(() if missing is not None else (TEACHER,)), *(student.name for student in students)):
        _check_tokenizer(context, name, facts)
        model_path(context.input(name))  # verify all models' digests before the first is measured
    if missing is not None:
        _require_other_means(context, missing, cached)
    prompts: tuple[tuple[int, ...], ...] = ()
    if settings.speculative is not None:
        require_drafting()
        prompts = prompts_of(sequences, settings.speculative)
    samples = None
    if settings.num_text_samples:
        tokenizer = run_text.tokenizer()
        samples = sample_prompts_of(sequences, facts.context, settings, tokenizer, facts.tokenizer.vocab_size)
    num_full = 0 if missing else settings.num_full_sequences
    evaluation = _Evaluation(context, facts, sequences, num_full, cached, samples)
    models = evaluation.measure(students)
    if settings.speculative is not None:
        for model in models[1:]:
            model.drafted = drafted(_job(context, model.name, prompts, settings.speculative))
    begin_phase("resamples the held-out sequences for intervals")
    results = results_of(models, evaluation.text, settings.num_bootstrap, missing)
    if samples is not None:
        written = {model.name: model.written for model in models if model.written is not None}
        results = results.model_copy(update={"samples": samples.samples(written)})
    write_atomically(context.folder / RESULTS_NAME, results.model_dump_json(indent=2) + "\n")
    _log_scalars(context, results)
    totals = {
        "models": len(results.models),
        "sequences": results.num_sequences,
        "labels": results.num_labels,
        "full_sequences": results.num_full_sequences,
    }
    return StageResult(totals=totals)


@dataclass(frozen=True)
class _Student:
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return Instance("train", self.arm, self.seed).name


def _students(context: StageContext) -> tuple[_Student, ...]:
    every = (_Student(arm, seed) for arm in context.run.arms for seed in context.run.seeds)
    return tuple(student for student in every if student.name in context.inputs)


def _check_tokenizer(context: StageContext, name: str, text: TextFacts) -> None:
    found = ModelFacts.model_validate(context.input(name).manifest.facts).tokenizer.fingerprint
    if found != text.tokenizer.fingerprint:
        raise MismatchError(
            "the tokenizer is not the corpus's",
            where=name,
            found=found,
            expected=text.tokenizer.fingerprint,
            fix="make both from one tokenizer",
        )


def _require_other_means(context: StageContext, missing: str, cached: CachedRows | None) -> None:
    if cached is None and context.run.eval.teacher == "cache":
        raise InputError(
            "the cache holds no held-out sequences to measure students on",
            where=context.input("cache").location,
            found="eval.teacher cache",
            expected="a cache with cache.num_heldout_sequences above 0",
            fix="set eval.teacher to live, or make the cache again with held-out sequences",
        )
    if missing in (NO_TEACHER, OTHER_TOKENS, SERVED_TEACHER) and cached is not None:
        _LOG.info("eval: students are compared with the teacher's distributions in the cache's held-out sequences")
        return
    stands_for_it = "the cache's held-out sequences stand for it" if cached else "students are compared with text alone"
    _LOG.warning("eval: the teacher itself is not measured: %s; %s", missing, stands_for_it)


def _in_quarantine(context: StageContext) -> InputError:
    return InputError(
        "held-out shards of the cache are in quarantine, and the run has no corpus to measure students on",
        where=context.input("cache").location,
        fix="make them again where the cache was made: run its cache stage",
    )


def _log_scalars(context: StageContext, results: EvalResults) -> None:
    for model in results.models:
        near = model.against_teacher
        figures: dict[str, float | None] = {"validation_loss": model.loss}
        figures |= {"heldout_kl": near.kl, "heldout_top1": near.top1} if near else {}
        ScalarFile(context.folder / LOGS_FOLDER / "tensorboard" / model.name, EVAL_SCALARS).add(0, figures)


def _job(
    context: StageContext, student: str, prompts: tuple[tuple[int, ...], ...], settings: SpeculativeSettings
) -> DraftJob:
    return DraftJob(
        teacher=model_path(context.input(TEACHER)),
        student=model_path(context.input(student)),
        prompts=prompts,
        settings=settings,
        device=context.device,
        trust_remote_code=context.run.teacher.trust_remote_code,
    )


class _Evaluation:
    """Measures models, and keeps what is the same for all of them."""

    def __init__(
        self,
        context: StageContext,
        facts: TextFacts,
        sequences: Sequences,
        num_full: int,
        cached: CachedRows | None,
        samples: Prompts | None,
    ) -> None:
        self._context, self._facts, self._sequences, self._cached = context, facts, sequences, cached
        self._samples, text = samples, RunText.among(context.inputs)
        # one pass measures text and cache together, unless the text is also compared with the teacher itself
        self._text_is_cached = text.of_cache and not num_full
        self._vocab_size = facts.tokenizer.vocab_size
        self._batch = context.run.eval.batch_sequences
        self.text = Text(
            labels_per_byte(facts, sequences, text.tokenizer),
            num_labels(sequences),
            min(num_full, len(sequences)),
            *(() if cached is None else cached.described()),
        )

    def measure(self, students: tuple[_Student, ...]) -> list[Measured]:
        """Measure every model, one on the device at a time; the teacher comes first, if it is measured."""
        num_full = self.text.num_full
        num_cached = 0 if self.text.cached is None else self.text.cached.num_sequences
        num_text = len(self._sequences) * (bool(num_full) + len(students) * (not self._text_is_cached))
        num_steps = num_text + num_cached * len(students)
        with (
            progress("eval", num_steps, "sequences") as meter,
            open_spool(self._context.folder, int(self.text.labels_S[:num_full].sum()), self._vocab_size) as spool,
        ):
            models = []
            if num_full:
                models.append(self._measure(TEACHER, None, None, spool.append, meter))
            for student in students:
                comparison = Comparison(spool) if num_full else None
                visit = None if comparison is None else comparison.add
                found = self._measure(student.name, student.arm, student.seed, visit, meter)
                found.comparison = comparison
                models.append(found)
        return models

    def _measure(self, name: str, arm: str | None, seed: int | None, visit: Visit | None, meter: Meter) -> Measured:
        made_from = self._context.run.teacher if name == TEACHER else self._context.run.student
        facts = ModelFacts.model_validate(self._context.input(name).manifest.facts)
        calibration = CalibrationError(len(self._sequences))
        model = load_model(
            model_path(self._context.input(name)), self._context.device, "fast", made_from.trust_remote_code
        )
        nats_S, cached = self._scored(model, name, arm is not None, visit, calibration, meter)
        written = None if self._samples is None else self._samples.write(model, name)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Measured(name, arm, seed, facts, nats_S, calibration, cached=cached, written=written)

    def _scored(
        self,
        model: PreTrainedModel,
        name: str,
        is_student: bool,
        visit: Visit | None,
        calibration: CalibrationError,
        meter: Meter,
    ) -> tuple[Float64Array, CachedSums | None]:
        """Return the loss of each sequence [S] and, for a student, its comparison with the cache's targets."""
        on_cache = partial(
            score_on_cache,
            model,
            name=name,
            vocab_size=self._vocab_size,
            batch_sequences=self._batch,
            meter=meter,
        )
        if self._text_is_cached and self._cached is not None:
            cached = on_cache(self._cached, calibration=calibration)
            return cached.nats_S, cached
        nats_S = score(
            model,
            self._sequences,
            name=name,
            vocab_size=self._vocab_size,
            batch_sequences=self._batch,
            context=self._facts.context,
            visit=visit,
            num_visited=self.text.num_full,
            calibration=calibration,
            meter=meter,
        )
        return nats_S, on_cache(self._cached) if self._cached is not None and is_student else None
