"""Put the plan of a run together: work, rates, hours, disk, and the published laws' predictions."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from capgap.pipeline.cache.held import held_bytes
from capgap.pipeline.corpus.split import kept_for_nobody
from capgap.pipeline.plan.break_even import break_even
from capgap.pipeline.plan.judging import judge_requests
from capgap.pipeline.plan.predictions import gap_prediction, scaling_prediction
from capgap.pipeline.plan.published import GivenTeacher
from capgap.pipeline.plan.rates import Stated, rate_of, unlike_notes
from capgap.pipeline.plan.room import nearest_folder
from capgap.pipeline.plan.sizes import weight_bytes
from capgap.pipeline.plan.work import RunWork, finished, work_of
from capgap.pipeline.stage.manifests import each_manifest_once
from capgap.pipeline.workflow.state import StageState, State, states
from capgap.schemas.facts import CacheFacts
from capgap.schemas.law_prediction import Prediction
from capgap.schemas.manifest import Manifest
from capgap.schemas.plan import Figure, RunPlan, StagePlan
from capgap.schemas.run_file import RunFile

# Nats/token above `teacher.home_loss` from which text counts as far from the teacher's own; the project's own choice.
_FAR_NATS = 0.2


def make_plan(
    run: RunFile,
    stated: Stated,
    *,
    text_bytes_per_token: float | None = None,
) -> RunPlan:
    """Return what the rest of the run will take: the work of its stages that are not finished.

    Args:
        run: The run file.
        stated: Speeds that the user states.
        text_bytes_per_token: Bytes of text in a token, where the corpus is not made; None to measure it on a sample.

    Raises:
        InputError: A source of the corpus, or a reused folder, cannot be read.
        CorruptError: A manifest cannot be understood.
    """
    with each_manifest_once():
        return _make_plan(run, stated, text_bytes_per_token)


def _make_plan(run: RunFile, stated: Stated, text_bytes_per_token: float | None) -> RunPlan:
    known = states(run)
    work = work_of(run, known, text_bytes_per_token)
    stages = [_stage_plan(state, work, stated) for state in known.values()]
    stages += [_reused(stage, work) for stage in run.reuse]
    open_stages = [stage for stage in stages if stage.state not in ("current", "reused")]
    notes = []
    if run.reuse:
        notes.append(f"reused: {', '.join(run.reuse)}")
    kept = kept_for_nobody(run, work.split_tokens["teacher"].value)
    if kept is not None:
        notes.append(kept)
    if run.cache.replicas > 1:
        notes.append(f"the cache's device hours are those of all {run.cache.replicas} replicas together")
    if run.judge is not None:
        notes.append(f"the judge is asked {judge_requests(run):,} times, if each of its replies can be read")
    if "cache" in known and known["cache"].state is not State.CURRENT:
        held = held_bytes(run.cache, run.corpus.sequences_per_shard * run.corpus.seq_len, run.corpus.seq_len)
        notes.append(f"the cache stage holds up to {held / 1e9:.2f} GB of targets in memory for each engine")
    notes += unlike_notes(run, stated.like, {state.instance.stage for state in known.values()})
    notes += _memory_at_few_bits(work)
    notes += far_from_home(run.teacher.home_loss, finished("cache", run, known))
    if not all(figure.value is not None for stage in stages for figure in (stage.tokens,)):
        notes.append("some numbers of tokens are not known; what depends on them is left out")
    return RunPlan(
        name=run.name,
        teacher_parameters=work.teacher.figure,
        student_parameters=work.student.figure,
        stages=tuple(stages),
        needed_bytes=_needed(open_stages),
        free_bytes=shutil.disk_usage(nearest_folder(Path(run.out))).free,
        device_hours=_total((s.instance, s.device_hours) for s in open_stages),
        num_students=work.num_cache_students,
        break_even=break_even(work, rate_of("cache", work, stated), stated.online_teacher_tokens_per_s),
        laws=_laws(work),
        notes=tuple(notes),
    )


def _memory_at_few_bits(work: RunWork) -> list[str]:
    """Return a note on the memory that the training of a quantised student takes in addition to its activations."""
    run, size = work.run, work.student
    if run.student.quantize is None or not run.makes("train") or size.total is None or size.outside_embedding is None:
        return []
    width = weight_bytes(run.train)
    trained = 4 * width * size.total
    head = (size.total - size.outside_embedding) / (1 if size.tied else 2) if run.student.quantize.head else 0
    rounded = width * (head + (0 if run.train.activation_checkpointing else size.outside_embedding))
    return [
        f"a training at {run.student.quantize.format} holds {trained / 1e9:.2f} GB of weights, gradients and AdamW's "
        f"states, {rounded / 1e9:.2f} GB of rounded weights, and its activations; it rounds all weights in every pass, "
        "which its operations do not count"
    ]


def far_from_home(home_loss: float | None, cache: Manifest | None) -> list[str]:
    """Return a note if the teacher's loss on the corpus is far above its loss on text of its own kind.

    Some difference between kinds of text is usual, so a difference up to `_FAR_NATS` gives no note.

    Args:
        home_loss: The run file's `teacher.home_loss`, in nats/token; None where it is not known.
        cache: Manifest of the finished cache, which has the loss on the corpus; None where there is none.
    """
    if home_loss is None or cache is None:
        return []
    found = CacheFacts.model_validate(cache.facts).mean_label_loss
    if found is None or found <= home_loss + _FAR_NATS:
        return []
    return [
        f"the teacher's loss on this corpus is {found:.3f} nats/token, {found - home_loss:.3f} above the {home_loss:g} "
        "of teacher.home_loss: its distributions may teach little here; teacher.adapt trains it on such text first"
    ]


def _laws(work: RunWork) -> tuple[Prediction, ...]:
    """Return the published laws' predictions for the run's two models, each with sizes counted as in its paper."""
    student, teacher, tokens = work.student, work.teacher, work.most_student_tokens.value
    if student.total is None or student.outside_embedding is None or not tokens:
        return ()
    trained = work.teacher_training or None
    whole, inner = (
        [] if size is None else [GivenTeacher("the run's teacher", size, trained)]
        for size in (teacher.total, teacher.outside_embedding)
    )
    return (
        gap_prediction(student.total, tokens, whole),
        scaling_prediction(student.outside_embedding, tokens, inner),
    )


def _stage_plan(state: StageState, work: RunWork, stated: Stated) -> StagePlan:
    stage, arm = state.instance.stage, state.instance.arm
    rate, tokens = rate_of(stage, work, stated, arm), work.tokens(stage, arm)
    if state.state is State.CURRENT:
        hours = Figure(value=0, source="finished")
    elif tokens.value == 0 or stage == "corpus":
        hours = Figure(value=0, source="no model is run")
    elif rate.value is None or tokens.value is None:
        hours = Figure(value=None, source=rate.source if rate.value is None else tokens.source)
    else:
        hours = Figure(value=tokens.value / rate.value * work.num_devices(stage, arm) / 3600, source=rate.source)
    return StagePlan(
        instance=state.instance.name,
        state=str(state.state),
        tokens=tokens,
        disk_bytes=work.disk_bytes(stage, arm),
        scratch_bytes=work.scratch_bytes(stage, arm),
        tokens_per_s=rate,
        device_hours=hours,
    )


def _reused(stage: str, work: RunWork) -> StagePlan:
    nothing = Figure(value=0, source="reused")
    return StagePlan(
        instance=stage,
        state="reused",
        tokens=work.tokens(stage),
        disk_bytes=nothing,
        scratch_bytes=nothing,
        tokens_per_s=Figure(value=None, source="reused"),
        device_hours=nothing,
    )


def _needed(open_stages: list[StagePlan]) -> Figure:
    kept = _total((stage.instance, stage.disk_bytes) for stage in open_stages)
    scratch = _total((f"the scratch of {stage.instance}", stage.scratch_bytes) for stage in open_stages)
    if kept.value is None or scratch.value is None:
        return kept if kept.value is None else scratch
    # stages run one after another, so only the largest scratch is needed
    largest = max((stage.scratch_bytes.value or 0 for stage in open_stages), default=0)
    return Figure(value=kept.value + largest, source="finished folders, and the largest scratch of one stage")


def _total(figures: Iterable[tuple[str, Figure]]) -> Figure:
    found = list(figures)
    unknown = [name for name, figure in found if figure.value is None]
    if unknown:
        return Figure(value=None, source=f"not known for {', '.join(unknown)}")
    return Figure(value=sum(figure.value or 0 for _, figure in found), source="all stages that are not current")
