"""The train stage: trains one student, for one arm and one seed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import torch

from capgap.pipeline.generate.answers_file import WriterLogprobs
from capgap.pipeline.models.configs import load_config
from capgap.pipeline.models.load import MODEL_FOLDER, model_facts, model_path
from capgap.pipeline.models.text import RunText
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.models.trainable import empty_to_train, is_quantised, load_to_train, save_trained
from capgap.pipeline.stage.context import Instance, StageContext, StageInput, StageResult, text_of_cache
from capgap.pipeline.stage.scalars import METRICS_NAME
from capgap.pipeline.store import ShardReader
from capgap.pipeline.train.caches import chosen_caches, require_fit, with_replay
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.fits import require_memory
from capgap.pipeline.train.loggers import require_loggers
from capgap.pipeline.train.model_card import CARD_NAME, model_card
from capgap.pipeline.train.objective import objective_of
from capgap.pipeline.train.online_teacher import online_teacher
from capgap.pipeline.train.strategy import is_sharded
from capgap.pipeline.train.task import StudentSteps, TrainingTask
from capgap.schemas.errors import MismatchError, SettingError
from capgap.schemas.facts import heldout_set
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_train import TrainSettings

_LOG = logging.getLogger("capgap")
# The totals of an arm with `max_tokens: 0`, whose student is measured beside the others without training.
_UNTRAINED = {"num_steps": 0, "num_tokens": 0, "num_epochs": 0.0}


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse inputs that do not fit together or do not support the settings.

    Raises:
        MismatchError: Caches, corpus, teacher and student do not belong together, or a recording lacks what the loss
            needs.
        SettingError: A cache lacks the recording or the temperature, caches do not fit into rows of one length, a
            logger does not exist, or the teacher is to be asked online and the run has none.
        InputError: A cache is empty, smaller than a step, or has longer sequences than the student takes; neither the
            cache nor a corpus has held-out sequences; or a logger's package is not installed.
        CorruptError: A file of the student, or of an online teacher, has changed since it was written.
    """
    assert instance.arm is not None
    settings = with_replay(run, instance)
    if "corpus" in inputs:
        _require_same_corpus(inputs["cache"], inputs["corpus"])
    caches = chosen_caches(settings, inputs)
    require_fit(settings, caches, inputs[f"student/seed-{instance.seed}"])
    RunText.among(inputs).heldout_shards(caches[None].recording)
    require_loggers(settings.loggers)
    if settings.needs_teacher:
        _require_same_teacher(inputs["cache"], inputs.get("teacher"))
        model_path(inputs["teacher"])
    # The student's files are checked here so that a finished training is not deleted for one that cannot begin.
    model_path(inputs[f"student/seed-{instance.seed}"], to_train=True)


def run(context: StageContext) -> StageResult:
    """Train a student and write the folder `model`, with `high_precision` beside it for a student of few bits.

    Raises:
        MismatchError, SettingError, InputError, CorruptError: `check` or `fit` refuses the inputs.
        MachineError: The student does not fit into the device's memory, alone or beside an online teacher, or
            torch.compile does not work.
    """
    check(context.run, context.instance, context.inputs)
    instance, text = context.instance, RunText.among(context.inputs)
    assert instance.arm is not None and instance.seed is not None
    student = context.input(f"student/seed-{instance.seed}")
    settings = with_replay(context.run, instance)
    caches = chosen_caches(settings, context.inputs)
    own = caches[None]
    source = own.source()
    heldout = context.input("cache").manifest.shard_sets.get(heldout_set(own.recording)) if own.has_targets else None
    if heldout is None and settings.needs_targets:
        _LOG.info("%s: the cache has no held-out sequences: nearness to the teacher is not measured", instance.name)
    path = model_path(student, to_train=True)
    # A student stored in bfloat16 is trained with float32 weights unless the run file says otherwise.
    dtype = torch.bfloat16 if settings.precision == "bf16-true" else torch.float32
    num_parts = context.ranks.world_size if is_sharded(settings, context.ranks) else 1
    trusted = context.run.student.trust_remote_code
    empty = empty_to_train(path, trusted)
    require_memory(empty.to(dtype), settings, context.device, own.shards.seq_len, num_parts)
    model = load_to_train(path, dtype, trusted)
    task = TrainingTask(
        title=f"train: {instance.arm}, seed {instance.seed}{_round(instance)}",
        settings=settings,
        training=source.reader,
        heldout=text.heldout(own.recording),
        alpha=settings.alpha,
        temperature=own.temperature,
        target_temperature=source.target_temperature,
        seed=instance.seed,
        device=context.device,
        folder=context.folder,
        objective=objective_of(settings, own.recording, own.location),
        ranks=context.ranks,
        heldout_targets=None if heldout is None else ShardReader(own.location, heldout),
        context=source.context,
        row_len=settings.row_len,
        weight=source.weight,
        others={
            name: dataclasses.replace(cache.source(), writer_logprobs=_writer_logprobs(context, settings, name))
            for name, cache in caches.items()
            if name is not None
        },
        teacher=online_teacher(context, own.facts, settings, model) if settings.needs_teacher else None,
        writer_logprobs=_writer_logprobs(context, settings, None),
        heldout_logprobs=_logprobs(context, None, "heldout"),
        steps=StudentSteps(trust_remote_code=trusted),
    )
    totals = fit(model, task) if settings.max_tokens != 0 else _UNTRAINED
    if not context.ranks.is_first:
        return StageResult()
    of_text = RunText(context.input("cache")).tokenizer()
    tokenizer = load_tokenizer(path, trusted)
    # The chat template is the student's own if it has one; the cache's may be that of the teacher.
    tokenizer.chat_template = tokenizer.chat_template or of_text.chat_template
    folder = context.folder / MODEL_FOLDER
    save_trained(model, tokenizer, context.folder, is_quantised(load_config(path, trusted)))
    made = model_facts(model, of_text)
    card = model_card(context, settings, own.recording, own.temperature, made, totals, context.folder / METRICS_NAME)
    (folder / CARD_NAME).write_text(card)
    return StageResult(facts=made.model_dump(mode="json"), totals=totals)


def _writer_logprobs(context: StageContext, settings: TrainSettings, cache: str | None) -> WriterLogprobs | None:
    """Return the writer's logprobs of a cache's text, or None if the loss needs none or no student wrote the text.

    Args:
        context: The context of the train stage.
        settings: The settings of the training.
        cache: The cache's name in the mix; None for the run's own cache.
    """
    asks = settings.needs_targets and settings.divergence == "policy_gradient"
    return _logprobs(context, cache, "student") if asks else None


def _logprobs(context: StageContext, cache: str | None, split: str) -> WriterLogprobs | None:
    text = context.inputs.get(text_of_cache(cache))
    shards = None if text is None else text.manifest.shard_sets.get(split)
    return None if text is None or shards is None else WriterLogprobs(text.path, shards)


def _round(instance: Instance) -> str:
    return "" if instance.round is None else f", round {instance.round}"


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


def _require_same_teacher(cache: StageInput, teacher: StageInput | None) -> None:
    if teacher is None:
        raise SettingError(
            "the teacher is to be asked online, and this run has none",
            where="train.targets",
            found="online",
            expected="cache, where a finished cache stands for the teacher",
            fix="learn from the cache (targets: cache), or name teacher and corpus in the run file",
        )
    made_by = cache.manifest.inputs["teacher"]
    if made_by.identity != teacher.manifest.identity:
        raise MismatchError(
            "the cache was made by another teacher than the one that is asked online",
            where=cache.location,
            found=f"teacher {made_by.identity[:12]} ({made_by.path})",
            expected=f"{teacher.manifest.identity[:12]} ({teacher.path})",
            fix="reuse that teacher too (reuse.teacher), or make a cache by this one",
        )
