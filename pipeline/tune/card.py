"""Writes the model card (README.md) of a tuned model: its origin, its conversations, its prompt format, its figures."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from capgap.pipeline.models.chat_template import ChatTemplate
from capgap.pipeline.stage.context import StageContext
from capgap.pipeline.train.model_card import divergence_in_words, escaped, is_id
from capgap.pipeline.tune.lesson import Lesson
from capgap.schemas.facts import ModelFacts
from capgap.schemas.run_tune import TuneSettings

_EXAMPLE = (
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who are you?"},
)


def chat_card(
    context: StageContext,
    settings: TuneSettings,
    before: str,
    lesson: Lesson,
    facts: ModelFacts,
    totals: Mapping[str, Any],
) -> str:
    """Return the text of the model card.

    Args:
        context: The context of the tune stage.
        settings: The settings of the tune stage.
        before: Folder or id of the model that was tuned.
        lesson: The tokenizer with its chat template, and the conversations.
        facts: The facts about the tuned model.
        totals: The totals of the stage.
    """
    name = f"{context.run.name}-{context.instance.name.replace('/', '-')}"
    lora = settings.lora
    lines = {
        "model before": before,
        "conversations": _data(settings, totals),
        "chat template": lesson.template,
        "weights": "all"
        if lora is None
        else f"adapters of rank {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, merged",
        "loss": _loss(settings, lesson),
        "optimization": f"{totals['num_steps']:,} steps of {settings.batch_sequences} rows ({totals['num_epochs']:g} "
        f"epochs), peak learning rate {settings.learning_rate:g}, {settings.precision}, seed {context.instance.seed}",
        "parameters": f"{facts.num_parameters:,} ({facts.num_non_embedding_parameters:,} without embedding and head)",
        "held-out answers before": f"{totals['heldout_loss_before']:.6g} nats/token",
        "held-out answers after": f"{totals['heldout_loss_after']:.6g} nats/token",
        "made by": f"capgap {version('capgap')}",
    }
    tokenizer = lesson.format.tokenizer
    template = ChatTemplate(tokenizer, "the model's chat template")
    example = template.render(list(_EXAMPLE), [], "the example of the model card", asks=True)
    inputs = [
        f"| {role} | `{made.manifest.identity}` | `{made.manifest.content}` |" for role, made in context.inputs.items()
    ]
    made_of = ["", "## Made of", "", "| input | identity | content |", "|---|---|---|", *inputs] if inputs else []
    return "\n".join(
        [
            "---",
            _head(name, before, totals),
            "---",
            "",
            f"# {name}",
            "",
            "A chat model. Only the assistant's answers were learnt.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {escaped(value)} |" for key, value in lines.items()),
            "",
            "## How it is asked",
            "",
            "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` gives, for a question after an "
            "answer:",
            "",
            *(f"    {line}" for line in example.split("\n")),
            *made_of,
            "",
        ]
    )


def _data(settings: TuneSettings, totals: Mapping[str, Any]) -> str:
    if settings.cache is not None:
        return f"{totals['num_train_rows']:,} rows of the cache {settings.cache}"
    read = f"{totals['num_train_conversations']:,} with {totals['num_train_answers']:,} answers"
    dropped = totals.get("num_train_dropped_answers", 0)
    left_out = f"; {dropped:,} answers do not end within {settings.max_len:,} tokens and were left out"
    return f"{', '.join(settings.sources)}: {read}{left_out if dropped else ''}"


def _loss(settings: TuneSettings, lesson: Lesson) -> str:
    plain = "cross-entropy with the tokens of the answers"
    if lesson.cache is None:
        return plain
    loss, chosen = settings.loss_settings(), lesson.cache.chosen
    divergence = divergence_in_words(loss, chosen.recording, chosen.temperature)
    kl = f"{loss.alpha:g} x {divergence} from the chat teacher ({chosen.recording})"
    return kl if loss.alpha == 1 else f"{kl} + {1 - loss.alpha:g} x {plain}"


def _head(name: str, before: str, totals: Mapping[str, Any]) -> str:
    result = EvalResult(
        task_type="text-generation",
        dataset_type="held-out",
        dataset_name="held-out conversations",
        metric_type="heldout_loss",
        metric_value=totals["heldout_loss_after"],
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["capgap", "conversational"],
        base_model=before if is_id(before) else None,
        model_name=name,
        eval_results=[result],
    )
    return str(data.to_yaml())
