"""The teacher stage: check a given model, or train a small one with plain cross-entropy."""

from __future__ import annotations

from capgap.pipeline.model_checks import check_given_model, corpus_tokenizer, fresh_model
from capgap.pipeline.models import MODEL_FOLDER, model_facts, save_model
from capgap.pipeline.store import ShardReader
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.task import Task
from capgap.pipeline.workflow.context import StageContext, StageResult
from capgap.schemas.errors import InputError
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.run_model import ModelShape


def run(context: StageContext) -> StageResult:
    """Write the folder `model`, or the facts of the model that was given.

    Raises:
        InputError, MismatchError: as `check_given_model`; or the corpus keeps no text for the teacher.
    """
    settings = context.run.teacher
    if settings.path is not None:
        _, facts = check_given_model(settings.path, context.input("corpus"), "teacher.path", settings.trust_remote_code)
        return StageResult(facts=facts.model_dump(mode="json"), totals={"num_parameters": facts.num_parameters})
    assert settings.model is not None
    return _train(context, settings.model)


def _train(context: StageContext, shape: ModelShape) -> StageResult:
    settings, corpus = context.run.teacher, context.input("corpus")
    sets = corpus.manifest.shard_sets
    if "teacher" not in sets:
        raise InputError(
            "the corpus keeps no text for a teacher to train on",
            where="corpus.teacher_fraction",
            found=context.run.corpus.teacher_fraction,
            expected="more than 0 with teacher.model",
        )
    model = fresh_model(shape, corpus, settings.seed)
    task = Task(
        title="teacher: train",
        settings=settings.recipe,
        training=ShardReader(corpus.path, sets["teacher"]),
        heldout=ShardReader(corpus.path, sets["heldout"]),
        alpha=0.0,
        temperature=1.0,
        seed=settings.seed,
        device=context.device,
        folder=context.folder,
        ranks=context.ranks,
        context=CorpusFacts.model_validate(corpus.manifest.facts).context,
    )
    totals = fit(model, task)
    if not context.ranks.is_first:
        return StageResult()
    tokenizer = corpus_tokenizer(corpus)
    save_model(model, tokenizer, context.folder / MODEL_FOLDER)
    facts = model_facts(model, tokenizer)
    return StageResult(facts=facts.model_dump(mode="json"), totals={"num_parameters": facts.num_parameters} | totals)
