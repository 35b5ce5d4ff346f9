"""Writes the model card (README.md) of a trained student: its settings, its inputs and its held-out figures.

The card begins with the YAML block that the Hugging Face hub reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from capgap.pipeline.stage.context import StageContext, StageInput
from capgap.pipeline.train.metrics import read_rows
from capgap.schemas.facts import CacheFacts, ModelFacts
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_train import TrainSettings

CARD_NAME = "README.md"
_UNTRAINED = "none: untrained"

_FIGURES = {
    "validation_loss": ("cross-entropy with the text", "nats/token"),
    "heldout_kl": ("divergence from the teacher, as trained by", "nats/token"),
    "heldout_teacher_ce": ("cross-entropy with the teacher's samples: KL and the teacher's entropy", "nats/token"),
    "heldout_top1": ("top-1 agreement with the teacher", ""),
}


def model_card(
    context: StageContext,
    settings: TrainSettings,
    recording: RecordingName,
    temperature: float,
    facts: ModelFacts,
    totals: Mapping[str, Any],
    metrics: Path,
) -> str:
    """Return the text of the model card.

    Args:
        context: The context of the train stage.
        settings: The settings of the arm.
        recording: The recording that the student learnt from.
        temperature: The temperature at which teacher and student were compared.
        facts: The facts about the student.
        totals: The totals of the training.
        metrics: The training's metrics.csv, whose last held-out figures are shown in the card.
    """
    cache, name = context.input("cache"), f"{context.run.name}-{context.instance.arm}-seed-{context.instance.seed}"
    cached = CacheFacts.model_validate(cache.manifest.facts)
    figures = heldout_figures(metrics)
    lines = {
        "teacher": _teacher(cache),
        "student before": _student(context),
        "corpus": f"{', '.join(cached.text_sources)}, {totals['num_tokens']:,} tokens trained on "
        f"({totals['num_epochs']:g} epochs)",
        "recording": _learnt_from(settings, cached, recording, temperature),
        "loss": _loss(settings, recording, temperature),
        "optimization": _UNTRAINED
        if settings.max_tokens == 0
        else f"{totals['num_steps']:,} steps of {settings.batch_sequences} sequences, peak learning rate "
        f"{settings.learning_rate:g}, {settings.precision}, seed {context.instance.seed}",
        "parameters": f"{facts.num_parameters:,} ({facts.num_non_embedding_parameters:,} without embedding and head)",
        "made by": f"capgap {version('capgap')}",
    }
    shown = [f"| {_FIGURES[key][0]} | {f'{value:.6g} {_FIGURES[key][1]}'.strip()} |" for key, value in figures.items()]
    inputs = [
        f"| {role} | `{made.manifest.identity}` | `{made.manifest.content}` |" for role, made in context.inputs.items()
    ]
    return "\n".join(
        [
            "---",
            _head(context, name, figures),
            "---",
            "",
            f"# {name}",
            "",
            f"A causal language model, {_what(settings)}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {escaped(value)} |" for key, value in lines.items()),
            "",
            "## Held-out text, at the end of the training",
            "",
            "| | |",
            "|---|---|",
            *shown,
            "",
            "## Made of",
            "",
            "Digests of what each input was to be (identity) and of its files (content), as in their `manifest.json`.",
            "",
            "| input | identity | content |",
            "|---|---|---|",
            *inputs,
            "",
        ]
    )


def heldout_figures(metrics: Path) -> dict[str, float]:
    """Return the last held-out figures in a metrics.csv, by column."""
    measured = [row for row in read_rows(metrics) if row["validation_loss"]]
    return {name: float(measured[-1][name]) for name in _FIGURES if measured and measured[-1][name]}


def _head(context: StageContext, name: str, figures: Mapping[str, float]) -> str:
    # A base model on the hub is an id of the hub; a local folder would mean nothing there.
    given = (context.run.student.path, _given_teacher(context.input("cache")))
    bases = [path for path in given if path is not None and is_id(path)]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"held-out text of {context.run.name}",
            metric_type=key,
            metric_value=value,
        )
        for key, value in figures.items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["capgap", "knowledge-distillation"],
        base_model=bases or None,
        model_name=name,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _teacher(cache: StageInput) -> str:
    cached = CacheFacts.model_validate(cache.manifest.facts)
    if cached.aligned is not None:
        return f"{cached.aligned.teacher}, of another tokenizer, scored by {', '.join(cached.engines)}"
    made = cache.manifest.inputs["teacher"]
    name = _given_teacher(cache) or cached.served or made.path
    if cache.manifest.resolved.get("teacher", {}).get("adapt"):
        name += ", adapted"
    return f"{name}, scored by {', '.join(cached.engines)} in {', '.join(cached.dtypes)}"


def _given_teacher(cache: StageInput) -> str | None:
    path: str | None = cache.manifest.resolved.get("teacher", {}).get("path")
    return path


def _student(context: StageContext) -> str:
    given = context.run.student
    if given.prune is not None:
        origin = "the teacher, pruned"
    else:
        origin = given.path if given.path is not None else "fresh weights"
    return origin if given.quantize is None else f"{origin}, in {given.quantize.format}"


def _what(settings: TrainSettings) -> str:
    if settings.max_tokens == 0:
        return "untrained: as the student was before the other arms were trained"
    if settings.needs_teacher:
        return "distilled from the distributions of a teacher that stood beside it"
    return "distilled from a teacher's cached distributions" if settings.needs_targets else "trained on text alone"


def _learnt_from(settings: TrainSettings, cached: CacheFacts, recording: RecordingName, temperature: float) -> str:
    if settings.max_tokens == 0:
        return _UNTRAINED
    if settings.needs_teacher:
        return f"none: the teacher's whole distributions, at temperature {temperature:g}, context {cached.context}"
    return _recording(cached, recording, temperature) if settings.needs_targets else "none: cross-entropy alone"


def _recording(cached: CacheFacts, recording: RecordingName, temperature: float) -> str:
    kept = cached.recordings[recording]
    if recording == "chunks":
        return f"chunks of text, at temperature {temperature:g}, context {cached.context}; the teacher has other tokens"
    what = f"{kept.num_ids} samples" if recording == "sampled" else f"top {kept.num_ids} ({kept.profile})"
    return f"{recording}: {what} a token, at temperature {temperature:g}, context {cached.context}"


def _loss(settings: TrainSettings, recording: RecordingName, temperature: float) -> str:
    if settings.max_tokens == 0:
        return _UNTRAINED
    terms = [_weighed(settings, recording, temperature)]
    if settings.counted_projected_weight > 0:
        terms.append(f"{settings.projected_weight:g} x {settings.divergence} of projected targets, at temperature 1")
    if settings.router_loss_weight > 0:
        terms.append(f"{settings.router_loss_weight:g} x the router's load-balancing loss")
    weights = "; tokens are weighted by the teacher's entropy" if settings.token_weights == "entropy" else ""
    return " + ".join(terms) + weights


def _weighed(settings: TrainSettings, recording: RecordingName, temperature: float) -> str:
    """Return the divergence and the cross-entropy with their weights."""
    if settings.largest_alpha == 0:
        return "cross-entropy"
    divergence = divergence_in_words(settings, recording, temperature)
    if settings.final_alpha not in (None, settings.alpha):
        way = f"alpha from {settings.alpha:g} to {settings.final_alpha:g}, {settings.alpha_shape}"
        return f"alpha x {divergence} + (1 - alpha) x cross-entropy ({way})"
    kl = f"{settings.alpha:g} x {divergence}"
    return kl if settings.alpha == 1 else f"{kl} + {1 - settings.alpha:g} x cross-entropy"


def divergence_in_words(settings: TrainSettings, recording: RecordingName, temperature: float) -> str:
    """Return what alpha weighs: the divergence with its settings, times the factor that the temperature gives it.

    Args:
        settings: The settings of the training.
        recording: The recording that the student learnt from.
        temperature: The temperature at which teacher and student were compared.
    """
    if settings.divergence == "policy_gradient":  # always at temperature 1
        return f"policy_gradient (ratio_clip {settings.clip:g}; forward_kl for text that the teacher wrote)"
    factor = f"{temperature:g}" if recording == "chunks" else f"{temperature:g}^2"
    tail = f", tail {settings.tail}" if settings.tail else ""
    beta = f" (beta {settings.beta:g})" if settings.divergence == "jsd" else ""
    return f"{factor} x {settings.divergence}{beta}{tail}"


def is_id(path: str) -> bool:
    """Return whether `path` looks like a model's id on the hub, and no local folder has that name."""
    return not path.startswith((".", "~", "/")) and path.count("/") <= 1 and not Path(path).exists()


def escaped(value: str) -> str:
    """Return a text in the form that a cell of a Markdown table needs."""
    return value.replace("|", "\\|").replace("\n", " ")
