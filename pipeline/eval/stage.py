"""The eval stage: held-out losses of the teacher and of every student, and how near students come to the teacher.

Legend: S sequences, R resamples, L targets a sequence.

The teacher leaves the device before the first student enters it; only its logprobs of a few sequences stay, on disk.
Cost: one forward pass of every model over `eval.num_sequences` sequences, and `num_full_sequences` x L x vocabulary x 4
bytes of disk while it runs.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass

import torch

from capgap.pipeline.eval.arms import differences_over_seeds, paired_differences
from capgap.pipeline.eval.compare import Comparison
from capgap.pipeline.eval.heldout import first_sequences, num_labels
from capgap.pipeline.eval.intervals import Float64Array, bootstrap_interval, resample_weights
from capgap.pipeline.eval.measure import Visit, score
from capgap.pipeline.eval.spool import open_spool
from capgap.pipeline.models import load_model, model_path
from capgap.pipeline.progress import Meter, progress
from capgap.pipeline.scalars import EVAL_SCALARS, ScalarFile
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.workflow.context import Instance, StageContext, StageResult
from capgap.pipeline.workflow.folder import LOGS_FOLDER
from capgap.schemas.errors import MismatchError
from capgap.schemas.facts import CorpusFacts, ModelFacts
from capgap.schemas.records import Sequences
from capgap.schemas.results import RESULTS_NAME, TEACHER, AgainstTeacher, EvalResults, ModelResult


def run(context: StageContext) -> StageResult:
    """Measure every model and write `results.json`.

    Raises:
        InputError: the held-out split holds no labels, or a loss is not a number.
        MismatchError: a model's tokenizer is not the corpus's.
        MachineError: too little disk for the teacher's distributions.
    """
    settings = context.run.eval
    corpus = context.input("corpus")
    facts = CorpusFacts.model_validate(corpus.manifest.facts)
    sequences = first_sequences(corpus.path, corpus.manifest.shard_sets["heldout"], settings.num_sequences)
    num_full = min(settings.num_full_sequences, len(sequences))
    students = _students(context)
    for name in (TEACHER, *(student.name for student in students)):
        _check_tokenizer(context, name, facts)
    losses, nearness = _measure(context, sequences, num_full, students)
    results = _results(context, facts, sequences, num_full, students, losses, nearness)
    write_atomically(context.folder / RESULTS_NAME, results.model_dump_json(indent=2) + "\n")
    _say_scalars(context, results)
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


def _check_tokenizer(context: StageContext, name: str, corpus: CorpusFacts) -> None:
    found = ModelFacts.model_validate(context.input(name).manifest.facts).tokenizer.fingerprint
    if found != corpus.tokenizer.fingerprint:
        raise MismatchError(
            "the tokenizer is not the corpus's",
            where=name,
            found=found,
            expected=corpus.tokenizer.fingerprint,
            fix="make both from one tokenizer",
        )


def _measure(
    context: StageContext, sequences: Sequences, num_full: int, students: tuple[_Student, ...]
) -> tuple[dict[str, Float64Array], dict[str, AgainstTeacher]]:
    """Nats [S] of every model, and every student's nearness to the teacher, by name."""
    vocab_size = ModelFacts.model_validate(context.input(TEACHER).manifest.facts).tokenizer.vocab_size
    num_rows = int(num_labels(sequences)[:num_full].sum())
    nearness: dict[str, AgainstTeacher] = {}
    num_steps = len(sequences) * (1 + len(students))
    with (
        progress("eval", num_steps, "sequences") as meter,
        open_spool(context.folder, num_rows, vocab_size) as spool,
    ):
        losses = {TEACHER: _score_alone(context, TEACHER, sequences, vocab_size, spool.append, num_full, meter)}
        for student in students:
            comparison = Comparison(spool)
            losses[student.name] = _score_alone(
                context, student.name, sequences, vocab_size, comparison.add, num_full, meter
            )
            nearness[student.name] = comparison.result(student.name)
    return losses, nearness


def _score_alone(
    context: StageContext,
    name: str,
    sequences: Sequences,
    vocab_size: int,
    visit: Visit,
    num_full: int,
    meter: Meter,
) -> Float64Array:
    """Score with a model that is on the device for the length of this call only."""
    made_from = context.run.teacher if name == TEACHER else context.run.student
    model = load_model(model_path(context.input(name)), context.device, None, made_from.trust_remote_code)
    nats_S = score(
        model,
        sequences,
        name=name,
        vocab_size=vocab_size,
        batch_sequences=context.run.eval.batch_sequences,
        context=CorpusFacts.model_validate(context.input("corpus").manifest.facts).context,
        visit=visit,
        num_visited=num_full,
        meter=meter,
    )
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return nats_S


def _say_scalars(context: StageContext, results: EvalResults) -> None:
    for model in results.models:
        near = model.against_teacher
        figures: dict[str, float | None] = {"validation_loss": model.loss}
        figures |= {"heldout_kl": near.kl, "heldout_top1": near.top1} if near else {}
        ScalarFile(context.folder / LOGS_FOLDER / "tensorboard" / model.name, EVAL_SCALARS).add(0, figures)


def _results(
    context: StageContext,
    corpus: CorpusFacts,
    sequences: Sequences,
    num_full: int,
    students: tuple[_Student, ...],
    losses: dict[str, Float64Array],
    nearness: dict[str, AgainstTeacher],
) -> EvalResults:
    labels_S = num_labels(sequences)
    weights_RS = resample_weights(len(sequences), context.run.eval.num_bootstrap)
    heldout = corpus.splits["heldout"]
    tokens_per_byte = heldout.num_text_tokens / heldout.num_text_bytes

    def row(name: str, arm: str | None, seed: int | None) -> ModelResult:
        facts = ModelFacts.model_validate(context.input(name).manifest.facts)
        loss = float(losses[name].sum() / labels_S.sum())
        return ModelResult(
            name=name,
            arm=arm,
            seed=seed,
            num_parameters=facts.num_parameters,
            num_non_embedding_parameters=facts.num_non_embedding_parameters,
            loss=loss,
            loss_interval=bootstrap_interval(losses[name], labels_S, weights_RS),
            bits_per_byte=loss * tokens_per_byte / math.log(2),
            perplexity=math.exp(min(loss, 700.0)),
            against_teacher=nearness.get(name),
        )

    by_arm: dict[str, dict[int, Float64Array]] = {}
    for student in students:
        by_arm.setdefault(student.arm, {})[student.seed] = losses[student.name]
    paired = paired_differences(by_arm, labels_S, weights_RS)
    return EvalResults(
        num_sequences=len(sequences),
        num_labels=int(labels_S.sum()),
        num_full_sequences=num_full,
        num_full_labels=int(labels_S[:num_full].sum()),
        num_bootstrap=context.run.eval.num_bootstrap,
        models=(row(TEACHER, None, None), *(row(student.name, student.arm, student.seed) for student in students)),
        paired=paired,
        over_seeds=differences_over_seeds(paired),
    )
