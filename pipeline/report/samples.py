"""What teacher and students wrote after the same beginnings, side by side on the page."""

from __future__ import annotations

from dataclasses import dataclass

from capgap.schemas.results import EvalResults


@dataclass(frozen=True)
class ShownSample:
    """One beginning, and each continuation with who wrote it; the text's own comes first."""

    prompt: str
    continuations: tuple[tuple[str, str], ...]


def shown_samples(results: EvalResults) -> tuple[ShownSample, ...]:
    """The teacher's and, of each arm, its first seed's; `results.json` has all of them."""
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
