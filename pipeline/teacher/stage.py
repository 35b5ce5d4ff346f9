"""The teacher stage: check a given model, adapt it, or train a small one. All training uses cross-entropy alone.

For a model that is served elsewhere, only configuration and tokenizer are checked, if they are on this machine.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from capgap.pipeline.cache.label_loss import LABEL_LOSS, NUM_SEQUENCES
from capgap.pipeline.models.checks import check_given_model, corpus_tokenizer, fresh_model
from capgap.pipeline.models.configs import empty_model, load_config
from capgap.pipeline.models.load import MODEL_FOLDER, load_model, model_facts, save_model
from capgap.pipeline.models.tokenizers import chat_template_of, load_tokenizer, tokenizer_facts
from capgap.pipeline.stage.context import StageContext, StageInput, StageResult
from capgap.pipeline.stage.scalars import METRICS_NAME
from capgap.pipeline.store import ShardReader
from capgap.pipeline.teacher.vocabulary import extend_vocabulary
from capgap.pipeline.train.data import num_validation_sequences
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.fits import require_memory
from capgap.pipeline.train.metrics import read_rows
from capgap.pipeline.train.strategy import is_sharded
from capgap.pipeline.train.task import TrainingTask
from capgap.schemas.errors import InputError
from capgap.schemas.facts import CorpusFacts, ServedFacts
from capgap.schemas.manifest import ShardSet
from capgap.schemas.run_model import AdaptSettings, ModelShape
from capgap.schemas.run_optimization import OptimizationSettings


def run(context: StageContext) -> StageResult:
    """Train or adapt a teacher and write the folder `model`, or check a given model and return its facts.

    Raises:
        InputError, MismatchError: as `check_given_model`, or the corpus keeps no text for the teacher.
        MachineError: as `fit`.
    """
    settings = context.run.teacher
    if settings.model is not None:
        return _train(context, settings.model)
    if settings.path is None:
        assert settings.served is not None
        return _served(context, settings.served)
    if settings.adapt is not None:
        return _adapt(context, settings.path, settings.adapt)
    _, facts = check_given_model(
        settings.path,
        context.input("corpus"),
        "teacher.path",
        settings.trust_remote_code,
        is_served=settings.served is not None,
    )
    facts = facts.model_copy(update={"served": settings.served})
    return StageResult(facts=facts.model_dump(mode="json"), totals={"num_parameters": facts.num_parameters})


def _served(context: StageContext, served: str) -> StageResult:
    facts = ServedFacts(tokenizer=tokenizer_facts(corpus_tokenizer(context.input("corpus"))), served=served)
    return StageResult(facts=facts.model_dump(mode="json"))


def _train(context: StageContext, shape: ModelShape) -> StageResult:
    settings, corpus = context.run.teacher, context.input("corpus")
    text = _text(context, "teacher.model")
    model = fresh_model(shape, corpus, settings.seed)
    totals = _fit(context, model, settings.recipe, text, "teacher: train")
    return _saved(context, model, corpus_tokenizer(corpus), totals)


def _adapt(context: StageContext, given: str, settings: AdaptSettings) -> StageResult:
    corpus, trusted = context.input("corpus"), context.run.teacher.trust_remote_code
    path, _ = check_given_model(given, corpus, "teacher.path", trusted, to_be_adapted=True)
    text = _text(context, "teacher.adapt")
    dtype = torch.bfloat16 if settings.precision == "bf16-true" else torch.float32
    num_parts = context.ranks.world_size if is_sharded(settings, context.ranks) else 1
    empty = empty_model(load_config(path, trusted), trusted)
    require_memory(empty.to(dtype), settings, context.device, text.seq_len, num_parts)
    model = load_model(path, "cpu", dtype, trusted, to_compute=False)
    tokenizer = corpus_tokenizer(corpus)
    old = load_tokenizer(path, trusted)
    num_new = extend_vocabulary(model, old, tokenizer, settings.pad_to_multiple_of)
    totals = _fit(context, model, settings, text, "teacher: adapt")
    tokenizer.chat_template = chat_template_of(path) or tokenizer.chat_template
    return _saved(context, model, tokenizer, {"num_new_pieces": num_new} | totals)


def _text(context: StageContext, setting: str) -> ShardSet:
    sets = context.input("corpus").manifest.shard_sets
    if "teacher" not in sets:
        raise InputError(
            "the corpus keeps no text for a teacher to train on",
            where="corpus.teacher_fraction",
            found=context.run.corpus.teacher_fraction,
            expected=f"more than 0 with {setting}",
        )
    return sets["teacher"]


def _fit(
    context: StageContext, model: PreTrainedModel, settings: OptimizationSettings, text: ShardSet, title: str
) -> dict[str, Any]:
    corpus: StageInput = context.input("corpus")
    task = TrainingTask(
        title=title,
        settings=settings,
        training=ShardReader(corpus.path, text),
        heldout=ShardReader(corpus.path, corpus.manifest.shard_sets["heldout"]),
        alpha=0.0,
        temperature=1.0,
        seed=context.run.teacher.seed,
        device=context.device,
        folder=context.folder,
        ranks=context.ranks,
        context=CorpusFacts.model_validate(corpus.manifest.facts).context,
    )
    totals = fit(model, task)
    measured = [row["validation_loss"] for row in read_rows(context.folder / METRICS_NAME) if row["validation_loss"]]
    if not measured:
        return totals
    loss = totals["best_validation_loss"] if settings.output == "best" else float(measured[-1])
    return totals | {LABEL_LOSS: loss, NUM_SEQUENCES: num_validation_sequences(task, totals["num_steps"])}


def _saved(
    context: StageContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, totals: dict[str, Any]
) -> StageResult:
    if not context.ranks.is_first:
        return StageResult()
    save_model(model, tokenizer, context.folder / MODEL_FOLDER)
    facts = model_facts(model, tokenizer)
    return StageResult(facts=facts.model_dump(mode="json"), totals={"num_parameters": facts.num_parameters} | totals)
