"""Charts of compute against quality: the run's models by held-out loss, published models by six benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from capgap.pipeline.pages.charts import Chart, draw_frontier, legend
from capgap.pipeline.pages.numbers import human_count
from capgap.pipeline.pages.svg import INK, SERIES, draw
from capgap.pipeline.plan.published_models import MODELS, SHOTS, SOURCE, PublishedModel, not_dominated
from capgap.pipeline.report.charts import arm_look
from capgap.pipeline.report.frontier import STATED, CostedModel, RunFrontier

_SMALL = 8  # font size of the names beside marks, in points


def frontier_charts(frontier: RunFrontier, arms: Sequence[str]) -> tuple[Chart, ...]:
    """Draw the run's own models; return no chart where no model's cost is known."""
    placed = [model for model in frontier.models if model.flops is not None]
    return (_own(frontier, placed, tuple(arms)),) if placed else ()


def published_chart(frontier: RunFrontier, arms: Sequence[str]) -> Chart:
    """Draw published models, and the run's own models if they were measured on the same six benchmarks."""
    own = [model for model in frontier.models if model.flops is not None and model.scores]
    return _published(frontier, own, tuple(arms))


def _own(frontier: RunFrontier, placed: Sequence[CostedModel], arms: tuple[str, ...]) -> Chart:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for model in placed:
            _mark(axes, model, model.loss, arms)
        best = [(m.flops, m.loss) for name in frontier.by_loss for m in placed if m.name == name and m.flops]
        draw_frontier(axes, best, "held-out loss, nats/token")
        legend(figure, axes)

    absent = [f"{model.name}: {model.unknown}" for model in frontier.models if model.flops is None]
    listed = "; ".join(f"{model.name} {model.loss:.4f} at {model.flops:.3g}" for model in placed)
    return Chart(
        name="frontier",
        title="Compute and held-out loss",
        caption=f"{STATED} Lower and further left is better; the line joins the models that no other beats."
        + (f" Not drawn: {'; '.join(absent)}." if absent else ""),
        svg=draw("frontier", f"Held-out loss against floating-point operations: {listed}", 3.4, paint),
        headings=("model", "parameters", "tokens", "operations", "with teacher's training", "loss", "not beaten"),
        rows=tuple(
            (
                model.name,
                human_count(model.num_parameters),
                "-" if model.tokens is None else f"{model.tokens:,}",
                _operations(model.flops),
                _operations(model.flops_with_teacher),
                f"{model.loss:.4f}",
                "-" if model.flops is None else "yes" if model.name in frontier.by_loss else "no",
            )
            for model in frontier.models
        ),
    )


def _published(frontier: RunFrontier, measured: Sequence[CostedModel], arms: tuple[str, ...]) -> Chart:
    best = not_dominated()

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(
            [model.flops for model in MODELS],
            [model.mean for model in MODELS],
            "o",
            color=SERIES[0],
            markersize=5,
            label="published",
        )
        for model in MODELS:
            side: dict[str, Any] = {"xytext": (-4, 3), "ha": "right"} if _is_crowded(model) else {"xytext": (4, 3)}
            place = (model.flops, model.mean)
            axes.annotate(model.name, place, textcoords="offset points", fontsize=_SMALL, color=INK, **side)
        for own in measured:
            _mark(axes, own, own.mean_score, arms)
        axes.margins(x=0.18)
        draw_frontier(axes, ((model.flops, model.mean) for model in best), "mean of six benchmarks, %")
        legend(figure, axes)

    doubts = " ".join(f"{model.name}: {model.doubt}." for model in MODELS if model.doubt)
    whose = (
        "This run's models were measured on the same six and are drawn too; the line joins published models only."
        if measured
        else "This run's models are not drawn: they were not measured on these six."
    )
    listed = "; ".join(f"{model.name} {model.mean:.1f} at {model.flops:.3g}" for model in MODELS)
    return Chart(
        name="published",
        title="What others published",
        caption=f"{SOURCE}: compute as printed, and the mean of its six benchmarks, whose metrics it does not name. "
        f"The line joins the models that no other beats. {whose} {doubts}",
        svg=draw("published", f"Mean of six benchmarks against floating-point operations: {listed}", 4.2, paint),
        headings=("model", "operations", *SHOTS, "mean", "not beaten"),
        rows=(
            *(_published_row(model, best) for model in sorted(MODELS, key=lambda one: one.flops)),
            *(
                (
                    f"{own.name} (this run)",
                    _operations(own.flops),
                    *(f"{score:.2f}" for score in own.scores),
                    f"{own.mean_score:.1f}",
                    "yes" if own.name in frontier.by_score else "no",
                )
                for own in measured
            ),
        ),
    )


def _published_row(model: PublishedModel, best: Sequence[PublishedModel]) -> tuple[str, ...]:
    scores = (f"{score:.2f}" for score in model.scores)
    return model.name, _operations(model.flops), *scores, f"{model.mean:.1f}", "yes" if model in best else "no"


def _is_crowded(model: PublishedModel) -> bool:
    """Return whether the model's name would overlap a mark to its right."""
    return any(1 < one.flops / model.flops < 2.5 and abs(one.mean - model.mean) < 2 for one in MODELS)


def _mark(axes: Any, model: CostedModel, quality: float | None, arms: tuple[str, ...]) -> None:
    look = arm_look(model.name if model.name in arms else None, arms)
    axes.plot(
        [model.flops],
        [quality],
        marker=look["marker"],
        color=look["color"],
        markersize=7,
        linestyle="none",
        label=model.name,
    )


def _operations(flops: float | None) -> str:
    return "-" if flops is None else f"{flops:.3g}"
