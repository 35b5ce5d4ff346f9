"""What others published of the best teacher's size, as functions of sizes and tokens.

Sizes are parameters. The laws stand here and nowhere else: `capgap plan`, `law advise`, the law's page and the report
take them from this table. Neither is used in a fit: each is shown beside the measurement, with what it was measured on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

NEAR = 0.005
"""Nats/token within which predicted losses count as equally good."""

LARGEST_RATIO = 10
"""Teacher over student up to which distillation is advised: the student should have about a tenth of its teacher's
parameters at least (pre-training distillation, arXiv 2410.16215; read in a secondary source)."""

LOOKED_AT = (0.1, 1000.0)
"""Teacher over student: where the best teacher of the distillation scaling law is looked for."""

_NUM_STEPS = 200  # steps of a first look, for the valley that is then followed to its bottom
_STEP = 1e-3  # inwards from an end, of a logarithm: where the loss does not fall over it, the end is lowest
_NUM_HALVINGS = 60  # halvings of an interval of logarithms: to the last digit of a double


@dataclass(frozen=True)
class PublishedLaw:
    """A law and where it comes from.

    Attributes:
        name: as it is called here.
        source: paper.
        validity: what it was measured on, in words.
        min_student, max_student: parameters.
        max_teacher: parameters.
        min_tokens, max_tokens: that the student is trained on; None where the source has no such variable.
    """

    name: str
    source: str
    validity: str
    min_student: float
    max_student: float
    max_teacher: float
    min_tokens: float | None = None
    max_tokens: float | None = None

    def covers(self, student: float, tokens: float, teachers: Sequence[float]) -> bool:
        """Whether a student of this size and training, and teachers of these, lie within what was measured."""
        return (
            self.min_student <= student <= self.max_student
            and all(teacher <= self.max_teacher for teacher in teachers)
            and (self.min_tokens is None or tokens >= self.min_tokens)
            and (self.max_tokens is None or tokens <= self.max_tokens)
        )


@dataclass(frozen=True)
class GivenTeacher:
    """A teacher that could be chosen.

    Attributes:
        name: for people.
        size: parameters.
        tokens: that it was trained on; None where nobody knows.
    """

    name: str
    size: float
    tokens: float | None = None


CAPACITY_GAP = PublishedLaw(
    name="law of capacity gap",
    source="Zhang et al., Towards the Law of Capacity Gap in Distilling Language Models, ACL 2025, arXiv:2311.07052",
    validity="students pruned from their own teacher (GPT-2 and Pythia of 70M to 2.8B; one check at 3B with LLaMA-2 of "
    "7B, 13B and 70B): as much a law of how far to prune as of which teacher to choose; does not depend on tokens",
    min_student=28e6,
    max_student=3.02e9,
    max_teacher=70e9,
)
"""Its students are 0.4 of their teachers."""

DISTILLATION_SCALING = PublishedLaw(
    name="distillation scaling law",
    source="Busbridge et al., Distillation Scaling Laws, ICML 2025, arXiv:2502.08606",
    validity="students with fresh weights, models of 143M to 12.6B parameters without embedding, 4B to 512B tokens of "
    "C4, KL alone; of its coefficients alpha, beta, alpha', beta' and d1 were confirmed in a second source, the others "
    "were not",
    min_student=143e6,
    max_student=12.6e9,
    max_teacher=12.6e9,
    min_tokens=4e9,
    max_tokens=512e9,
)

GAP_SLOPE = 2.498
GAP_INTERCEPT = -11.498e6
"""Parameters."""

CHINCHILLA_TOKENS_PER_PARAMETER = 20.0
"""How long a teacher is taken to have trained where nothing is known."""


def gap_best_teacher(student: float) -> float | None:
    """Best teacher for a student of this size: 2.498 S - 11.498M; None where that is smaller than the student."""
    best = GAP_SLOPE * student + GAP_INTERCEPT
    return best if best >= student else None


def supervised_loss(size: float, tokens: float) -> float:
    """Nats/token of a model trained on text alone: E + (A / N^alpha + B / D^beta)^gamma."""
    return float(1.220 + (3355 / size**0.408 + 18186 / tokens**0.431) ** 0.452)


def distilled_loss(student: float, tokens: float, teacher_loss: float, alone: float | None = None) -> float:
    """Nats/token of a student whose teacher has this loss.

    L_T + L_T^-c0 (1 + (L_T / (L_S d1))^(1/f1))^(-c1 f1) (A' / N^alpha' + B' / D^beta')^gamma', where L_S is what the
    student reaches alone: as measured, or by `supervised_loss` where it is left out.
    """
    alone = supervised_loss(student, tokens) if alone is None else alone
    gap = (1 + (teacher_loss / (alone * 1.315)) ** (1 / 0.090)) ** (-522.61 * 0.090)
    own = (2243 / student**0.321 + 24181 / tokens**0.637) ** 0.764
    return float(teacher_loss + teacher_loss**-2.549 * gap * own)


@dataclass(frozen=True)
class ScalingBest:
    """Where the distillation scaling law has its lowest loss, as teacher over student.

    Attributes:
        ratio: of the best teacher; None where the loss is lowest at an end of `LOOKED_AT`, which is no optimum.
        end: that end.
        within: the least and the largest ratio whose loss is within `NEAR` of the lowest; an end of `LOOKED_AT` stands
            for "there and perhaps beyond".
    """

    ratio: float | None
    end: Literal["smallest", "largest"] | None
    within: tuple[float, float]


def scaling_best_teacher(student: float, tokens: float, tokens_per_parameter: float) -> ScalingBest:
    """The best teacher of a student, among teachers that were trained on so many tokens a parameter."""

    def loss(log_ratio: float) -> float:
        size = student * math.exp(log_ratio)
        return distilled_loss(student, tokens, supervised_loss(size, tokens_per_parameter * size))

    first, last = map(math.log, LOOKED_AT)
    step = (last - first) / _NUM_STEPS
    lowest = min(range(_NUM_STEPS + 1), key=lambda i: loss(first + i * step))
    bottom = _bottom(loss, first + max(lowest - 1, 0) * step, first + min(lowest + 1, _NUM_STEPS) * step)
    limit = loss(bottom) + NEAR
    within = (
        LOOKED_AT[0] if loss(first) <= limit else math.exp(_crossing(loss, limit, bottom, first)),
        LOOKED_AT[1] if loss(last) <= limit else math.exp(_crossing(loss, limit, bottom, last)),
    )
    if loss(first) <= loss(first + _STEP):
        return ScalingBest(None, "smallest", within)
    if loss(last) <= loss(last - _STEP):
        return ScalingBest(None, "largest", within)
    return ScalingBest(math.exp(bottom), None, within)


def warning_of_ratio(student: float, teachers: Sequence[GivenTeacher]) -> str | None:
    """A warning that names the teachers more than `LARGEST_RATIO` times as large as the student; None without any."""
    large = [f"{one.name} ({one.size / student:.3g} x)" for one in teachers if one.size > LARGEST_RATIO * student]
    if not large:
        return None
    return (
        f"more than {LARGEST_RATIO} x the student: {', '.join(large)}; a study of pre-training distillation advises "
        "students of at least a tenth of their teacher (arXiv 2410.16215)"
    )


def _bottom(loss: Callable[[float], float], low: float, high: float) -> float:
    """The lowest place of a valley, by thirds of the interval."""
    for _ in range(2 * _NUM_HALVINGS):
        third = (high - low) / 3
        if loss(low + third) <= loss(high - third):
            high -= third
        else:
            low += third
    return (low + high) / 2


def _crossing(loss: Callable[[float], float], limit: float, inside: float, outside: float) -> float:
    """Where the loss passes the limit on the way from a place below it to one above it."""
    for _ in range(_NUM_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if loss(middle) <= limit else (inside, middle)
    return inside
