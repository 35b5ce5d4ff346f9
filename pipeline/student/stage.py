"""The student stage: the model as it is before the first step of training."""

from __future__ import annotations

from capgap.pipeline.model_checks import check_given_model, corpus_tokenizer, fresh_model
from capgap.pipeline.models import MODEL_FOLDER, load_model, model_facts, save_model
from capgap.pipeline.tokenizers import chat_template_of
from capgap.pipeline.train.heads import served_head
from capgap.pipeline.workflow.context import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write the folder `model`.

    Raises:
        InputError, MismatchError: as `check_given_model` and `served_head`.
    """
    settings, corpus = context.run.student, context.input("corpus")
    tokenizer = corpus_tokenizer(corpus)
    if settings.model is not None:
        assert context.instance.seed is not None
        model = fresh_model(settings.model, corpus, context.instance.seed)
    else:
        assert settings.path is not None
        path, facts = check_given_model(settings.path, corpus, "student.path", settings.trust_remote_code)
        model = load_model(path, "cpu", None, settings.trust_remote_code)
        served_head(model, facts.tokenizer.vocab_size)  # refused here rather than by the first training
        tokenizer.chat_template = chat_template_of(path) or tokenizer.chat_template
    save_model(model, tokenizer, context.folder / MODEL_FOLDER)
    facts = model_facts(model, tokenizer)
    return StageResult(
        facts=facts.model_dump(mode="json"),
        totals={
            "num_parameters": facts.num_parameters,
            "num_non_embedding_parameters": facts.num_non_embedding_parameters,
        },
    )
