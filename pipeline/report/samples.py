"""Selects the text samples of the page: continuations of the same beginnings by the teacher and by students."""

from __future__ import annotations

from dataclasses import dataclass

from capgap.schemas.results import EvalResults


@dataclass(frozen=True)
class ShownSample:
    """One beginning of a held-out text with its continuations.

    Attributes:
        prompt: The beginning.
        continuations: Pairs of author and text; the first is the continuation in the held-out text itself.
    """

    prompt: str
    continuations: tuple[tuple[str, str], ...]


def shown_samples(results: EvalResults) -> tuple[ShownSample, ...]:
    """Return the samples of the teacher and of the first seed of each arm; `results.json` holds those of all seeds."""
    models = [model for model in results.models if model.arm is None or model == results.of_arm(model.arm)[0]]
    return tuple(
        ShownSample(
            sample.prompt,
            (
                ("the text itself", sample.truth),
                *(
                    (model.arm or "teacher", sample.continuations[model.name])
                    for model in models
                    if model.name in sample.continuations
                ),
            ),
        )
        for sample in results.samples
    )
