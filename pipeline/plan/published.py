"""Published laws of the best teacher's size, as functions of sizes and tokens.

Sizes are numbers of parameters. The laws are defined only here: `capgap plan`, `law advise`, the law's page and the
report take them from this module. None is used in a fit: each is shown beside the measurement, with its own range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

NEAR = 0.005
"""Predicted losses that differ by at most this, in nats/token, count as equally good."""

LARGEST_RATIO = 10
"""Largest ratio of teacher to student size at which distillation is advised: the student should have at least about a
tenth of its teacher's parameters (pre-training distillation, arXiv 2410.16215; read in a secondary source)."""

LOOKED_AT = (0.1, 1000.0)
"""Range of ratios of teacher to student size in which the distillation scaling law's best teacher is searched."""

_NUM_STEPS = 200  # steps of a coarse search for the valley whose minimum is then refined
_STEP = 1e-3  # step of the log ratio from an end inwards: where the loss does not fall over it, the end is lowest
_NUM_HALVINGS = 60  # halvings of an interval of log ratios, which reach the precision of a double


@dataclass(frozen=True)
class PublishedLaw:
    """A law, its source, and the range that it was measured on.

    Attributes:
        name: The law's name in this project.
        source: The paper.
        validity: What it was measured on, in words.
        min_student, max_student: Smallest and largest student, in parameters.
        min_teacher, max_teacher: Smallest and largest teacher, in parameters.
        min_tokens, max_tokens: Fewest and most tokens that a student was trained on; None where the law does not depend
            on tokens.
    """

    name: str
    source: str
    validity: str
    min_student: float
    max_student: float
    min_teacher: float
    max_teacher: float
    min_tokens: float | None = None
    max_tokens: float | None = None

    def covers(self, student: float, tokens: float, teachers: Sequence[float]) -> bool:
        """Return whether the student's size, its tokens and the teachers' sizes lie within the measured range."""
        return (
            self.min_student <= student <= self.max_student
            and all(self.min_teacher <= teacher <= self.max_teacher for teacher in teachers)
            and (self.min_tokens is None or tokens >= self.min_tokens)
            and (self.max_tokens is None or tokens <= self.max_tokens)
        )


@dataclass(frozen=True)
class GivenTeacher:
    """A teacher that could be chosen.

    Attributes:
        name: Name that is shown to users.
        size: Number of parameters.
        tokens: Number of tokens that it was trained on; None where it is not known.
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
    min_teacher=70e6,
    max_teacher=70e9,
)
"""At the law's best size, a student has about 0.4 of its teacher's parameters."""

DISTILLATION_SCALING = PublishedLaw(
    name="distillation scaling law",
    source="Busbridge et al., Distillation Scaling Laws, ICML 2025, arXiv:2502.08606",
    validity="students with fresh weights, models of 143M to 12.6B parameters without embedding, 4B to 512B tokens of "
    "C4, KL alone; of its coefficients alpha, beta, alpha', beta' and d1 were confirmed in a second source, the others "
    "were not",
    min_student=143e6,
    max_student=12.6e9,
    min_teacher=143e6,
    max_teacher=12.6e9,
    min_tokens=4e9,
    max_tokens=512e9,
)

GAP_SLOPE = 2.498
GAP_INTERCEPT = -11.498e6
"""Slope and intercept of the law of capacity gap; the intercept is in parameters."""

CHINCHILLA_TOKENS_PER_PARAMETER = 20.0
"""Tokens per parameter that a teacher is assumed to be trained on where nothing is known."""


def gap_best_teacher(student: float) -> float | None:
    """Return the best teacher's size for a student of size S: 2.498 S - 11.498M; None where that is below S."""
    best = GAP_SLOPE * student + GAP_INTERCEPT
    return best if best >= student else None


def supervised_loss(size: float, tokens: float) -> float:
    """Return the loss, in nats/token, of a model trained on text alone: E + (A / N^alpha + B / D^beta)^gamma."""
    return float(1.220 + (3355 / size**0.408 + 18186 / tokens**0.431) ** 0.452)


def distilled_loss(student: float, tokens: float, teacher_loss: float, alone: float | None = None) -> float:
    """Return the loss, in nats/token, of a student whose teacher has the loss L_T = `teacher_loss`.

    L_T + L_T^-c0 (1 + (L_T / (L_S d1))^(1/f1))^(-c1 f1) (A' / N^alpha' + B' / D^beta')^gamma', where L_S is the loss of
    the student without a teacher: `alone`, or `supervised_loss` where that is None.
    """
    alone = supervised_loss(student, tokens) if alone is None else alone
    gap = (1 + (teacher_loss / (alone * 1.315)) ** (1 / 0.090)) ** (-522.61 * 0.090)
    own = (2243 / student**0.321 + 24181 / tokens**0.637) ** 0.764
    return float(teacher_loss + teacher_loss**-2.549 * gap * own)


@dataclass(frozen=True)
class ScalingBest:
    """The ratio of teacher to student size at which the distillation scaling law has its lowest loss.

    Attributes:
        ratio: The best ratio; None where the loss is lowest at an end of `LOOKED_AT`, which is no optimum.
        end: The end of `LOOKED_AT` at which the loss is lowest; None where the best ratio lies between the ends.
        within: Smallest and largest ratio whose loss is within `NEAR` of the lowest. An end of `LOOKED_AT` means that
            the range may reach beyond it.
    """

    ratio: float | None
    end: Literal["smallest", "largest"] | None
    within: tuple[float, float]


def scaling_best_teacher(student: float, tokens: float, tokens_per_parameter: float) -> ScalingBest:
    """Return a student's best teacher, among teachers trained on `tokens_per_parameter` tokens per parameter.

    Args:
        student: Number of the student's parameters, without embeddings.
        tokens: Number of tokens that the student is trained on.
        tokens_per_parameter: Number of a teacher's training tokens over its parameters.
    """

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
    """Return a warning that names the teachers more than `LARGEST_RATIO` times the student's size; None without any."""
    large = [f"{one.name} ({one.size / student:.3g} x)" for one in teachers if one.size > LARGEST_RATIO * student]
    if not large:
        return None
    return (
        f"more than {LARGEST_RATIO} x the student: {', '.join(large)}; a study of pre-training distillation advises "
        "students of at least a tenth of their teacher (arXiv 2410.16215)"
    )


def _bottom(loss: Callable[[float], float], low: float, high: float) -> float:
    """Return where the loss is lowest between `low` and `high`, by ternary search."""
    for _ in range(2 * _NUM_HALVINGS):
        third = (high - low) / 3
        if loss(low + third) <= loss(high - third):
            high -= third
        else:
            low += third
    return (low + high) / 2


def _crossing(loss: Callable[[float], float], limit: float, inside: float, outside: float) -> float:
    """Return where the loss crosses the limit between `inside`, where it is below, and `outside`, where it is above."""
    for _ in range(_NUM_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if loss(middle) <= limit else (inside, middle)
    return inside
