"""Turn what was measured into the content of `results.json`.

Legend: S sequences, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from capgap.pipeline.eval.arms import Losses, differences_over_seeds, paired_differences
from capgap.pipeline.eval.cached import CachedSums
from capgap.pipeline.eval.calibration import CalibrationError
from capgap.pipeline.eval.compare import Comparison
from capgap.pipeline.eval.intervals import Float64Array, Int64Array, bootstrap_interval, resample_weights
from capgap.schemas.facts import ModelFacts
from capgap.schemas.results import (
    Drafted,
    EvalResults,
    HeldoutCache,
    ModelResult,
    PairedDifference,
    Quantity,
)
from capgap.schemas.run_cache import RecordingName

_QUANTITIES: dict[RecordingName, Quantity] = {
    "topk": "cached_kl",
    "sampled": "cached_teacher_ce",
    "chunks": "cached_chunk_kl",
}


@dataclass
class Measured:
    """What was measured of one model.

    Attributes:
        name: Name of the instance that made the model.
        arm: Arm of the student; None for the teacher.
        seed: Seed of the student; None for the teacher.
        facts: Facts of the model's manifest.
        nats_S: Loss of each sequence, summed over its labels, in nats [S].
        calibration: Calibration at the same labels.
        comparison: Comparison with the teacher's full distributions; None where they were not measured.
        cached: Comparison with the cache's targets; None where it was not made.
        drafted: Counts of the drafts that the teacher accepted; None where they were not measured.
        written: Continuations of the held-out prompts, as text; None where none were written.
    """

    name: str
    arm: str | None
    seed: int | None
    facts: ModelFacts
    nats_S: Float64Array
    calibration: CalibrationError
    comparison: Comparison | None = None
    cached: CachedSums | None = None
    drafted: Drafted | None = None
    written: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Text:
    """The text that the models were measured on.

    Attributes:
        labels_per_byte: Number of labels per UTF-8 byte of their text.
        labels_S: Number of labels of each held-out sequence [S].
        num_full: Number of the first sequences that are compared with the teacher's full distributions.
        cached: Description of the cache's held-out sequences; None where it has none.
        cached_labels_S: Number of labels of each of the cache's held-out sequences.
    """

    labels_per_byte: float
    labels_S: Int64Array
    num_full: int
    cached: HeldoutCache | None = None
    cached_labels_S: Int64Array = field(default_factory=lambda: Int64Array(0))


def results_of(models: list[Measured], text: Text, num_bootstrap: int, teacher_missing: str | None) -> EvalResults:
    """Return the means of all models, their intervals, and the differences between arms.

    Args:
        models: What was measured of each model.
        text: The text that they were measured on.
        num_bootstrap: Number of the bootstrap's resamples.
        teacher_missing: Why the teacher was not measured, in words; None where it was.

    Raises:
        InputError: A KL to the teacher is not a number.
    """
    return _Results(models, text, num_bootstrap).all(teacher_missing)


class _Results:
    """Computes the results; all models are resampled with the same weights, so intervals of differences are paired."""

    def __init__(self, models: list[Measured], text: Text, num_bootstrap: int) -> None:
        self._models, self._text, self._num_bootstrap = models, text, num_bootstrap
        self._weights_RS = resample_weights(len(text.labels_S), num_bootstrap)
        self._full_labels_S = text.labels_S[: text.num_full]
        self._full_weights_RS = resample_weights(text.num_full, num_bootstrap) if text.num_full else None
        if text.cached is not None:
            self._cached_weights_RS = resample_weights(len(text.cached_labels_S), num_bootstrap)

    def all(self, teacher_missing: str | None) -> EvalResults:
        text = self._text
        paired = paired_differences(self._by_arm("loss"), text.labels_S, self._weights_RS)
        nearness = self._nearness()
        return EvalResults(
            num_sequences=len(text.labels_S),
            num_labels=int(text.labels_S.sum()),
            num_full_sequences=text.num_full,
            num_full_labels=int(self._full_labels_S.sum()),
            num_bootstrap=self._num_bootstrap,
            models=tuple(self._row(model) for model in self._models),
            paired=paired,
            over_seeds=differences_over_seeds(paired),
            paired_nearness=nearness,
            nearness_over_seeds=differences_over_seeds(nearness),
            cached=text.cached,
            teacher_missing=teacher_missing,
        )

    def _row(self, model: Measured) -> ModelResult:
        labels_S = self._text.labels_S
        loss = float(model.nats_S.sum() / labels_S.sum())
        ece, ece_interval = model.calibration.error(labels_S, self._weights_RS)
        near = None
        if model.comparison is not None:
            near = model.comparison.result(model.name, self._full_labels_S, self._full_weights_RS)
        against_cache = None
        if model.cached is not None and self._text.cached is not None:
            against_cache = model.cached.result(
                self._text.cached.recording, self._text.cached_labels_S, self._cached_weights_RS
            )
        return ModelResult(
            name=model.name,
            arm=model.arm,
            seed=model.seed,
            num_parameters=model.facts.num_parameters,
            num_non_embedding_parameters=model.facts.num_non_embedding_parameters,
            loss=loss,
            loss_interval=bootstrap_interval(model.nats_S, labels_S, self._weights_RS),
            bits_per_byte=loss * self._text.labels_per_byte / math.log(2),
            perplexity=math.exp(min(loss, 700.0)),
            against_teacher=near,
            ece=ece,
            ece_interval=ece_interval,
            reliability=model.calibration.reliability(),
            against_cache=against_cache,
            drafted=model.drafted,
        )

    def _nearness(self) -> tuple[PairedDifference, ...]:
        found: tuple[PairedDifference, ...] = ()
        if self._full_weights_RS is not None:
            found += paired_differences(self._by_arm("kl"), self._full_labels_S, self._full_weights_RS, "kl")
        if self._text.cached is not None:
            quantity = _QUANTITIES[self._text.cached.recording]
            by_arm = self._by_arm(quantity)
            found += paired_differences(by_arm, self._text.cached_labels_S, self._cached_weights_RS, quantity)
        return found

    def _by_arm(self, quantity: Quantity) -> Losses:
        """Return the quantity of every student, summed over the labels of each sequence."""
        found: dict[str, dict[int, Float64Array]] = {}
        for model in self._models:
            if model.arm is None or model.seed is None:
                continue
            if quantity == "loss":
                sums_S = model.nats_S
            elif quantity == "kl":
                assert model.comparison is not None
                sums_S = model.comparison.kl_of_sequences(self._full_labels_S)
            else:
                assert model.cached is not None
                sums_S = model.cached.apart_S
            found.setdefault(model.arm, {})[model.seed] = sums_S
        return found
