"""The tune stage: one trained student, or a given model, and conversations into a chat model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from capgap.pipeline.corpus.conversations import ChatFormat
from capgap.pipeline.models import (
    MODEL_FOLDER,
    load_config,
    load_model,
    max_positions,
    model_facts,
    model_path,
    save_model,
)
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.tokenizers import load_tokenizer, tokenizer_facts
from capgap.pipeline.train.data import heldout_batches
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.heldout import measure
from capgap.pipeline.train.loggers import require_loggers
from capgap.pipeline.train.metrics import METRICS_NAME, MetricsFile, read_rows
from capgap.pipeline.train.model_card import CARD_NAME
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.task import Task
from capgap.pipeline.tune.card import chat_card
from capgap.pipeline.tune.data import ChatRows, chat_rows, conversations, row_facts
from capgap.pipeline.tune.lora import Adapters, require_peft
from capgap.pipeline.tune.template import extend_vocabulary, with_template
from capgap.pipeline.workflow.context import Instance, StageContext, StageInput, StageResult
from capgap.pipeline.workflow.folder import WORK_FOLDER
from capgap.schemas.errors import InputError
from capgap.schemas.facts import ModelFacts, TokenizerFacts
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_tune import TuneSettings

ADAPTER_FOLDER = "adapter"
_BEFORE_NAME = "before.json"


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse data, templates and packages that cannot be used.

    Raises:
        InputError: a record is no conversation with an answer, or the chat template cannot be learnt from.
        MachineError: a package is not installed.
    """
    settings = _settings(run)
    require_loggers(settings.loggers)
    if settings.lora is not None:
        require_peft()
    path = _before(run, instance, inputs)
    _chat_tokenizer(settings, path)
    _require_positions(settings, path)
    for _ in conversations(settings):
        pass


def run(context: StageContext) -> StageResult:
    """Tune and write the folder `model`, and `adapter` beside it where adapters were trained.

    Raises:
        InputError, MachineError: as `check` and `fit`.
    """
    settings, seed = _settings(context.run), context.instance.seed
    assert seed is not None
    path = _before(context.run, context.instance, context.inputs)
    chat = _chat_tokenizer(settings, path)
    rows = chat_rows(context, chat.format, chat.facts)
    dtype = torch.bfloat16 if settings.precision == "bf16-true" else torch.float32
    model = load_model(path, "cpu", dtype, settings.trust_remote_code)
    extend_vocabulary(model, chat.old_size, chat.facts.vocab_size)
    adapters = None if settings.lora is None else Adapters(model, settings.lora, seed)
    task = _task(context, settings, rows, seed)
    before = _measured_before(model, task, chat.facts) if context.ranks.is_first else 0.0
    totals = fit(model, task)
    if not context.ranks.is_first:
        return StageResult()
    if adapters is not None:
        adapters.save(context.folder / ADAPTER_FOLDER, with_embedding=chat.facts.vocab_size > chat.old_size)
        model = adapters.merge()
    after = _loss(model, task, chat.facts)
    totals |= {"heldout_loss_before": before, "heldout_loss_after": after} | row_facts(rows)
    made = _save(model, chat, context.folder / MODEL_FOLDER)
    card = chat_card(context, settings, path, chat.name, chat.format.tokenizer, made, totals)
    (context.folder / MODEL_FOLDER / CARD_NAME).write_text(card)
    return StageResult(facts=made.model_dump(mode="json"), totals=totals, shard_sets=rows.shard_sets)


@dataclass(frozen=True)
class _Chat:
    """A tokenizer with its chat template.

    Attributes:
        format: it, seen to be one that can be learnt from.
        name: of the template.
        facts: of the tokenizer as it is now.
        old_size: of its vocabulary before marks were added.
    """

    format: ChatFormat
    name: str
    facts: TokenizerFacts
    old_size: int


def _chat_tokenizer(settings: TuneSettings, path: str) -> _Chat:
    tokenizer = load_tokenizer(path, settings.trust_remote_code)
    old_size = tokenizer_facts(tokenizer).vocab_size
    tokenizer, name = with_template(tokenizer, settings.chat_template)
    return _Chat(ChatFormat(tokenizer, name), name, tokenizer_facts(tokenizer), old_size)


def _settings(run: RunFile) -> TuneSettings:
    assert run.tune is not None
    return run.tune


def _before(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> str:
    """Folder or id of the model that is tuned."""
    given = _settings(run).path
    return given if given is not None else model_path(inputs[f"train/{instance.arm}/seed-{instance.seed}"])


def _require_positions(settings: TuneSettings, path: str) -> None:
    most = max_positions(load_config(path, settings.trust_remote_code))
    if most is not None and settings.max_len > most:
        raise InputError(
            "the rows are longer than the model takes",
            where=f"tune.max_len, for {path}",
            found=settings.max_len,
            expected=f"at most {most}, its positions",
            fix="lower tune.max_len",
        )


def _task(context: StageContext, settings: TuneSettings, rows: ChatRows, seed: int) -> Task:
    of = context.instance.name.removeprefix("tune/").replace("/", ", ").replace("-", " ")
    return Task(
        title=f"tune: {of}",
        settings=settings,
        training=ShardReader(context.folder, rows.shard_sets["train"]),
        heldout=ShardReader(context.folder, rows.shard_sets["heldout"]),
        alpha=0.0,
        temperature=1.0,
        seed=seed,
        device=context.device,
        folder=context.folder,
        ranks=context.ranks,
        # a row of one conversation is seen whole: padding comes behind it
        context="document" if settings.packing else "packed",
    )


def _measured_before(model: PreTrainedModel, task: Task, facts: TokenizerFacts) -> float:
    """The held-out loss before the first step, which is also a row of the metrics; measured once."""
    path = task.folder / WORK_FOLDER / _BEFORE_NAME
    if not path.is_file():
        write_atomically(path, json.dumps(_loss(model, task, facts)))
    before: float = json.loads(path.read_bytes())
    metrics = task.folder / METRICS_NAME
    if not any(row["step"] == "0" for row in read_rows(metrics)):
        MetricsFile(metrics, 0).add(step=0, num_tokens=0, validation_loss=before)
    return before


def _loss(model: PreTrainedModel, task: Task, facts: TokenizerFacts) -> float:
    """Mean over the held-out answers' tokens, nats."""
    needs_grad = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    module = DistillationModule(model.to(task.device), task.settings, 1, 0.0, 1.0, facts.vocab_size)
    loss = measure(module, heldout_batches(task)).loss
    model.to("cpu")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in needs_grad)
    return round(loss, 6)


def _save(model: PreTrainedModel, chat: _Chat, folder: Path) -> ModelFacts:
    tokenizer: PreTrainedTokenizerBase = chat.format.tokenizer
    # where a server stops an answer
    ends: list[int] = sorted({*chat.format.end_ids, *_end_ids(model.generation_config.eos_token_id)})
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    save_model(model, tokenizer, folder)
    return model_facts(model, tokenizer)


def _end_ids(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
