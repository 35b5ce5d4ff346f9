"""The train stage: one student, one arm, one seed."""

from __future__ import annotations

import torch

from capgap.pipeline.cache.stage import TARGETS
from capgap.pipeline.models import MODEL_FOLDER, load_model, model_facts, model_path, save_model
from capgap.pipeline.store import ShardReader
from capgap.pipeline.tokenizers import load_tokenizer
from capgap.pipeline.train.fit import Task, fit
from capgap.pipeline.train.objective import objective_of
from capgap.pipeline.workflow.context import StageContext, StageInput, StageResult
from capgap.schemas.errors import MismatchError
from capgap.schemas.facts import CacheFacts, ModelFacts


def run(context: StageContext) -> StageResult:
    """Train and write the folder `model`.

    Raises:
        MismatchError: cache, corpus and student do not belong together, or the cache has not what the loss needs.
        InputError: as `fit`.
    """
    instance, corpus, cache = context.instance, context.input("corpus"), context.input("cache")
    assert instance.arm is not None and instance.seed is not None
    student = context.input(f"student/seed-{instance.seed}")
    facts = CacheFacts.model_validate(cache.manifest.facts)
    _require_same_corpus(cache, corpus)
    _require_same_tokenizer(facts, student)
    settings = context.run.train_settings(instance.arm)
    objective = objective_of(settings, facts, cache.location)
    path = model_path(student)
    # a bfloat16 student is trained on float32 weights unless the run file says otherwise
    model = load_model(path, "cpu", torch.bfloat16 if settings.precision == "bf16-true" else torch.float32)
    task = Task(
        title=f"train: {instance.arm}, seed {instance.seed}",
        settings=settings,
        training=ShardReader(cache.location, cache.manifest.shard_sets[TARGETS]),
        heldout=ShardReader(corpus.path, corpus.manifest.shard_sets["heldout"]),
        alpha=settings.alpha,
        temperature=facts.temperature,
        seed=instance.seed,
        device=context.device,
        folder=context.folder,
        objective=objective,
    )
    totals = fit(model, task)
    tokenizer = load_tokenizer(path)
    save_model(model, tokenizer, context.folder / MODEL_FOLDER)
    return StageResult(facts=model_facts(model, tokenizer).model_dump(mode="json"), totals=totals)


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
