"""The train stage: one student, one arm, one seed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from capgap.pipeline.model_checks import require_packed
from capgap.pipeline.models import MODEL_FOLDER, load_model, model_facts, model_path, save_model
from capgap.pipeline.store import ShardReader, heat_of
from capgap.pipeline.tokenizers import load_tokenizer
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.objective import objective_of
from capgap.pipeline.train.online_teacher import online_teacher
from capgap.pipeline.train.task import Task
from capgap.pipeline.workflow.context import Instance, StageContext, StageInput, StageResult
from capgap.schemas.errors import MismatchError, SettingError
from capgap.schemas.facts import CacheFacts, ModelFacts
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_model import TrainSettings


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse what does not fit together.

    Raises:
        MismatchError: cache, corpus and student do not belong together, or the recording has not what the loss needs.
        SettingError: the cache lacks the recording or the temperature, or was scored under a rule that no student
            can be trained under.
    """
    assert instance.arm is not None
    cache = inputs["cache"]
    facts, settings = CacheFacts.model_validate(cache.manifest.facts), run.train_settings(instance.arm)
    _require_same_corpus(cache, inputs["corpus"])
    _require_same_tokenizer(facts, inputs[f"student/seed-{instance.seed}"])
    require_packed(facts.context)
    recording, _ = choose(facts, settings)
    objective_of(settings, recording, cache.location)
    if settings.needs_teacher:
        _require_same_teacher(cache, inputs["teacher"])


def run(context: StageContext) -> StageResult:
    """Train and write the folder `model`.

    Raises:
        MismatchError, SettingError: as `check`.
        MachineError: the teacher is to take part, and does not fit on the device beside the student.
        InputError: as `fit`.
    """
    check(context.run, context.instance, context.inputs)
    instance, corpus, cache = context.instance, context.input("corpus"), context.input("cache")
    assert instance.arm is not None and instance.seed is not None
    student = context.input(f"student/seed-{instance.seed}")
    facts = CacheFacts.model_validate(cache.manifest.facts)
    settings = context.run.train_settings(instance.arm)
    recording, temperature = choose(facts, settings)
    objective = objective_of(settings, recording, cache.location)
    reader = ShardReader(cache.location, cache.manifest.shard_sets[recording])
    path = model_path(student)
    teacher = online_teacher(context, facts, settings) if settings.needs_teacher else None
    # a bfloat16 student is trained on float32 weights unless the run file says otherwise
    model = load_model(path, "cpu", torch.bfloat16 if settings.precision == "bf16-true" else torch.float32)
    task = Task(
        title=f"train: {instance.arm}, seed {instance.seed}",
        settings=settings,
        training=reader,
        heldout=ShardReader(corpus.path, corpus.manifest.shard_sets["heldout"]),
        alpha=settings.alpha,
        temperature=temperature,
        heat=None if settings.needs_teacher else heat_of(reader.codec, facts.temperature, temperature),
        seed=instance.seed,
        device=context.device,
        folder=context.folder,
        objective=objective,
        teacher=teacher,
    )
    totals = fit(model, task)
    tokenizer = load_tokenizer(path)
    save_model(model, tokenizer, context.folder / MODEL_FOLDER)
    return StageResult(facts=model_facts(model, tokenizer).model_dump(mode="json"), totals=totals)


def choose(cache: CacheFacts, settings: TrainSettings) -> tuple[RecordingName, float]:
    """Recording and temperature to train with.

    Raises:
        SettingError: the cache does not have them, or has several and none is named.
    """
    known = sorted(cache.recordings)
    recording = settings.recording
    if recording is None and (settings.alpha == 0 or settings.needs_teacher):
        # the text is the same beside either
        recording = known[0]
    if recording is None and len(known) == 1:
        recording = known[0]
    if recording is None or recording not in cache.recordings:
        raise SettingError(
            "the cache has several recordings" if recording is None else "the cache has no such recording",
            where="train.recording",
            found="none named" if recording is None else recording,
            expected=f"{'one of ' if len(known) > 1 else ''}{', '.join(known)}",
            fix=f"set train.recording{'' if len(known) > 1 else ', or leave it out'}",
        )
    temperature = cache.temperature if settings.temperature is None else settings.temperature
    if settings.needs_teacher:
        return recording, temperature
    temperatures = cache.recordings[recording].temperatures
    if settings.alpha > 0 and temperature not in temperatures:
        raise SettingError(
            f"the cache's recording {recording} has no targets at this temperature",
            where="train.temperature",
            found=f"{temperature:g}",
            expected=f"{'one of ' if len(temperatures) > 1 else ''}{', '.join(f'{one:g}' for one in temperatures)}",
            fix="leave it out, or make a topk cache with it in cache.extra_temperatures",
        )
    return recording, temperature if settings.alpha > 0 else cache.temperature


def _require_same_corpus(cache: StageInput, corpus: StageInput) -> None:
    made_from = cache.manifest.inputs["corpus"]
    if made_from.identity != corpus.manifest.identity:
        raise MismatchError(
            "the cache was made from another corpus",
            where=cache.location,
            found=f"corpus {made_from.identity[:12]} ({made_from.path})",
            expected=f"{corpus.manifest.identity[:12]} ({corpus.path})",
            fix="reuse that corpus too (reuse.corpus), or make a cache of this one",
        )


def _require_same_teacher(cache: StageInput, teacher: StageInput) -> None:
    made_by = cache.manifest.inputs["teacher"]
    if made_by.identity != teacher.manifest.identity:
        raise MismatchError(
            "the cache was made by another teacher than the one that is asked online",
            where=cache.location,
            found=f"teacher {made_by.identity[:12]} ({made_by.path})",
            expected=f"{teacher.manifest.identity[:12]} ({teacher.path})",
            fix="reuse that teacher too (reuse.teacher), or make a cache by this one",
        )


def _require_same_tokenizer(cache: CacheFacts, student: StageInput) -> None:
    found = ModelFacts.model_validate(student.manifest.facts)
    if found.tokenizer.fingerprint != cache.tokenizer.fingerprint:
        raise MismatchError(
            "cache and student have different tokenizers",
            where=student.path,
            found=f"fingerprint {found.tokenizer.fingerprint[:12]}",
            expected=f"{cache.tokenizer.fingerprint[:12]}, the cache's",
            fix="train a student of the cache's tokenizer, or make a cache of this corpus",
        )
