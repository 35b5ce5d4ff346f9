"""What was measured, as `results.json` holds it.

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
    """One model, as it was measured.

    Attributes:
        name: of the instance that made it.
        arm: None for the teacher.
        seed: None for the teacher.
        facts: of the model.
        nats_S: loss of each sequence, summed over its labels.
        calibration: of the same labels.
        comparison: with the teacher's full distributions.
        cached: with what the cache holds.
        drafted: for the teacher.
        written: its continuations of held-out beginnings, as text.
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
    """What models were measured on.

    Attributes:
        labels_per_byte: of the text that is learnt.
        labels_S: of each held-out sequence.
        num_full: of these, compared with the teacher's full distributions.
        cached: the cache's held-out sequences; None without.
        cached_labels_S: of each of those.
    """

    labels_per_byte: float
    labels_S: Int64Array
    num_full: int
    cached: HeldoutCache | None = None
    cached_labels_S: Int64Array = field(default_factory=lambda: Int64Array(0))


def results_of(models: list[Measured], text: Text, num_bootstrap: int, teacher_missing: str | None) -> EvalResults:
    """Means, intervals and differences.

    Raises:
        InputError: a KL to the teacher is not a number.
    """
    return _Results(models, text, num_bootstrap).all(teacher_missing)


class _Results:
    """All models are resampled alike, so that intervals of differences are paired."""

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
        """The quantity of every student, summed over the labels of each sequence."""
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
