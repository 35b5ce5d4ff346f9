"""The tune stage: makes a chat model from conversations and one trained student or a given model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from capgap.pipeline.corpus.files import folders_in_words
from capgap.pipeline.models.checks import named
from capgap.pipeline.models.complete import require_complete
from capgap.pipeline.models.configs import load_config
from capgap.pipeline.models.load import MODEL_FOLDER, model_facts, model_path
from capgap.pipeline.models.trainable import is_quantised, load_to_train, require_trainable, save_trained
from capgap.pipeline.stage.context import CHAT_CACHE, Instance, StageContext, StageInput, StageResult
from capgap.pipeline.train.data import heldout_batches, num_validation_sequences, training_loader
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.heldout import measure
from capgap.pipeline.train.loggers import require_loggers
from capgap.pipeline.train.model_card import CARD_NAME
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.task import StudentSteps, TrainingTask
from capgap.pipeline.tune.card import chat_card
from capgap.pipeline.tune.data import bad_records, conversations
from capgap.pipeline.tune.lesson import Lesson, lesson_of
from capgap.pipeline.tune.lora import Adapters, require_peft
from capgap.pipeline.tune.template import extend_vocabulary
from capgap.schemas.errors import SettingError
from capgap.schemas.facts import ModelFacts
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_tune import TuneSettings

ADAPTER_FOLDER = "adapter"
_LOG = logging.getLogger("capgap")


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse conversations, templates, models and packages that cannot be used.

    Raises:
        InputError: A record is not a conversation with an answer, answers cannot be learnt with the chat template, or
            the weights of the given model are not complete.
        SettingError, MismatchError: A chat teacher's cache does not fit the model or the loss, a logger does not exist,
            or adapters are wanted for a model of few bits.
        MachineError: A package is not installed.
    """
    settings = _settings(run)
    require_loggers(settings.loggers)
    if settings.lora is not None:
        require_peft()
    if settings.path is not None:
        with named(f"tune.path: {settings.path}"):
            require_complete(settings.path, settings.trust_remote_code)
    _require_trainable(run, instance, inputs)
    lesson_of(settings, _before(run, instance, inputs), _cache_in(inputs))
    if settings.sources:
        for line in folders_in_words(settings.sources):
            _LOG.info("tune: %s", line)
        bad = bad_records(settings, num_named=0)  # bad records are named later, when the rows are made
        for _ in conversations(settings, bad):
            pass
        bad.finish()


def run(context: StageContext) -> StageResult:
    """Tune the model and write the folder `model`, with `adapter` beside it if adapters were trained.

    Raises:
        CapgapError: The inputs cannot be used, as in `check`, or the training fails, as in `fit`.
    """
    settings, seed = _settings(context.run), context.instance.seed
    assert seed is not None
    path = _before(context.run, context.instance, context.inputs)
    lesson = lesson_of(settings, path, _cache_in(context.inputs))
    learnt_from, rows = lesson.task_arguments(context, settings)
    dtype = torch.bfloat16 if settings.precision == "bf16-true" else torch.float32
    model = load_to_train(path, dtype, settings.trust_remote_code)
    extend_vocabulary(model, lesson.old_size, lesson.facts.vocab_size)
    adapters = None if settings.lora is None else Adapters(model, settings.lora, seed)
    task = TrainingTask(
        title=f"tune: {', '.join(part.replace('-', ' ') for part in context.instance.name.split('/')[1:])}",
        settings=settings,
        seed=seed,
        device=context.device,
        folder=context.folder,
        ranks=context.ranks,
        steps=StudentSteps(settings.trust_remote_code, lesson.old_size, lesson.facts.vocab_size, settings.lora),
        also_before=True,
        **learnt_from,
    )
    totals = fit(model, task)
    if not context.ranks.is_first:
        return StageResult()
    if adapters is not None:
        adapters.save(context.folder / ADAPTER_FOLDER, with_embedding=lesson.facts.vocab_size > lesson.old_size)
        model = adapters.merge()
    totals |= {
        "heldout_loss_before": totals["first_validation_loss"],
        "heldout_loss_after": _loss(model, task),
    } | rows.totals
    low_bit = is_quantised(load_config(path, settings.trust_remote_code))
    made = _save(model, lesson, context.folder, low_bit)
    card = chat_card(context, settings, path, lesson, made, totals)
    (context.folder / MODEL_FOLDER / CARD_NAME).write_text(card)
    return StageResult(facts=made.model_dump(mode="json"), totals=totals, shard_sets=rows.shard_sets)


def _settings(run: RunFile) -> TuneSettings:
    assert run.tune is not None
    return run.tune


def _before(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> str:
    """Return the folder or id of the model that is tuned."""
    given = _settings(run).path
    return (
        given if given is not None else model_path(inputs[f"train/{instance.arm}/seed-{instance.seed}"], to_train=True)
    )


def _require_trainable(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    settings, path = _settings(run), _before(run, instance, inputs)
    where = f"tune.path: {path}" if settings.path is not None else path
    config = require_trainable(path, where, settings.trust_remote_code)
    if is_quantised(config) and settings.lora is not None:
        raise SettingError(
            "adapters are not merged into weights of few bits",
            where="tune.lora",
            found=f"adapters for {path}, whose layers compute with few bits",
            expected="a model of 16 bits or more",
            fix="leave tune.lora out to tune the weights themselves, which then stay in few bits",
        )


def _cache_in(inputs: Mapping[str, StageInput]) -> StageInput | None:
    return inputs.get(CHAT_CACHE, inputs.get("cache"))


def _loss(model: PreTrainedModel, task: TrainingTask) -> float:
    """Return the mean cross-entropy over the tokens of held-out answers, in nats/token."""
    size = task.training.codec.vocab_size
    module = DistillationModule(
        model.to(task.device), task.settings, 1, task.alpha, task.temperature, size, task.objective
    )
    # These are the same sequences that the training measures at its end.
    num_sequences = num_validation_sequences(task, training_loader(task).num_steps)
    loss = measure(module, heldout_batches(task, num_sequences)).loss
    model.to("cpu")
    return round(loss, 6)


def _save(model: PreTrainedModel, lesson: Lesson, folder: Path, low_bit: bool) -> ModelFacts:
    tokenizer = lesson.format.tokenizer
    # A server stops an answer at these tokens.
    ends = sorted({*lesson.format.end_ids, *_end_ids(model.generation_config.eos_token_id)})
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    save_trained(model, tokenizer, folder, low_bit)
    return model_facts(model, tokenizer)


def _end_ids(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
