"""The train stage: one student, one arm, one seed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from capgap.pipeline.model_checks import require_packed
from capgap.pipeline.models import MODEL_FOLDER, load_model, model_facts, model_path, save_model
from capgap.pipeline.store import ShardReader, heat_of
from capgap.pipeline.tokenizers import chat_template_of, load_tokenizer
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.loggers import require_loggers
from capgap.pipeline.train.metrics import METRICS_NAME
from capgap.pipeline.train.model_card import CARD_NAME, model_card
from capgap.pipeline.train.objective import objective_of
from capgap.pipeline.train.task import Task
from capgap.pipeline.workflow.context import Instance, StageContext, StageInput, StageResult
from capgap.schemas.errors import MismatchError, SettingError
from capgap.schemas.facts import CacheFacts, ModelFacts, heldout_set
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_model import TrainSettings

_LOG = logging.getLogger("capgap")


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse what does not fit together.

    Raises:
        MismatchError: cache, corpus and student do not belong together, or the recording has not what the loss needs.
        SettingError: the cache lacks the recording or the temperature, or was scored under a rule that no student
            can be trained under; or there is no such logger.
        InputError: a logger's package is not installed.
    """
    assert instance.arm is not None
    cache = inputs["cache"]
    facts, settings = CacheFacts.model_validate(cache.manifest.facts), run.train_settings(instance.arm)
    _require_same_corpus(cache, inputs["corpus"])
    _require_same_tokenizer(facts, inputs[f"student/seed-{instance.seed}"])
    require_packed(facts.context)
    recording, _ = choose(facts, settings)
    objective_of(settings, recording, cache.location)
    require_loggers(settings.loggers)


def run(context: StageContext) -> StageResult:
    """Train and write the folder `model`.

    Raises:
        MismatchError, SettingError: as `check`.
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
    heldout = cache.manifest.shard_sets.get(heldout_set(recording))
    if heldout is None and settings.alpha > 0:
        _LOG.info("%s: the cache has no held-out sequences: nearness to the teacher is not measured", instance.name)
    path = model_path(student)
    # a bfloat16 student is trained on float32 weights unless the run file says otherwise
    model = load_model(path, "cpu", torch.bfloat16 if settings.precision == "bf16-true" else torch.float32)
    task = Task(
        title=f"train: {instance.arm}, seed {instance.seed}",
        settings=settings,
        training=reader,
        heldout=ShardReader(corpus.path, corpus.manifest.shard_sets["heldout"]),
        alpha=settings.alpha,
        temperature=temperature,
        heat=heat_of(reader.codec, facts.temperature, temperature),
        seed=instance.seed,
        device=context.device,
        folder=context.folder,
        objective=objective,
        heldout_targets=None if heldout is None else ShardReader(cache.location, heldout),
    )
    totals = fit(model, task)
    tokenizer = _with_chat_template(load_tokenizer(path), _teacher_path(cache))
    folder = context.folder / MODEL_FOLDER
    save_model(model, tokenizer, folder)
    made = model_facts(model, tokenizer)
    card = model_card(context, settings, recording, temperature, made, totals, context.folder / METRICS_NAME)
    (folder / CARD_NAME).write_text(card)
    return StageResult(facts=made.model_dump(mode="json"), totals=totals)


def _with_chat_template(tokenizer: PreTrainedTokenizerBase, teacher: str) -> PreTrainedTokenizerBase:
    """The student's tokenizer; where it has no chat template, with the teacher's, if that is on this machine."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chat_template_of(teacher)
    return tokenizer


def _teacher_path(cache: StageInput) -> str:
    """Folder or id of the teacher that made the cache."""
    given: str | None = cache.manifest.resolved["teacher"]["path"]
    return given or str(Path(cache.manifest.inputs["teacher"].path) / MODEL_FOLDER)


def choose(cache: CacheFacts, settings: TrainSettings) -> tuple[RecordingName, float]:
    """Recording and temperature to train with.

    Raises:
        SettingError: the cache does not have them, or has several and none is named.
    """
    known = sorted(cache.recordings)
    recording = settings.recording
    if recording is None and settings.alpha == 0:
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
