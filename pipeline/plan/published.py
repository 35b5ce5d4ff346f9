"""What others published of the best teacher's size, as functions of sizes and tokens.

Sizes are parameters. Neither law is used in a fit: each is shown beside the measurement, with what it was measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.schemas.law_fit import Prediction

Array = npt.NDArray[np.float64]

NEAR = 0.005
"""Nats per token within which predicted losses count as equally good."""


LARGEST_RATIO = 10
"""Teacher over student up to which distillation is advised: the student should have about a tenth of its teacher's
parameters at least (pre-training distillation, arXiv 2410.16215; read in a secondary source)."""


@dataclass(frozen=True)
class PublishedLaw:
    """A law and where it comes from.

    Attributes:
        name: as it is called here.
        source: paper.
        validity: what it was measured on, in words.
        min_student, max_student: parameters.
        max_teacher: parameters.
        min_tokens, max_tokens: of the student's training; None where the source has no such variable.
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
            and max(teachers) <= self.max_teacher
            and (self.min_tokens is None or tokens >= self.min_tokens)
            and (self.max_tokens is None or tokens <= self.max_tokens)
        )


@dataclass(frozen=True)
class GivenTeacher:
    """A teacher that could be chosen.

    Attributes:
        name: for people.
        size: parameters.
        tokens: it was trained on; None where nobody knows.
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
"""How long a teacher is taken to have trained where nobody says."""


def gap_best_teacher(student: float) -> float | None:
    """Best teacher for a student of this size: 2.498 S - 11.498M; None where that is smaller than the student."""
    best = GAP_SLOPE * student + GAP_INTERCEPT
    return best if best >= student else None


def supervised_loss(size: float, tokens: float) -> float:
    """Nats per token of a model trained on text alone: E + (A / N^alpha + B / D^beta)^gamma."""
    return float(_alone(np.asarray(size), tokens))


def distilled_loss(student: float, tokens: float, teacher_loss: float) -> float:
    """Nats per token of a student whose teacher has this loss.

    L_T + L_T^-c0 (1 + (L_T / (L_S d1))^(1/f1))^(-c1 f1) (A' / N^alpha' + B' / D^beta')^gamma', where L_S is what the
    student would reach alone.
    """
    return float(_distilled(student, tokens, np.asarray(teacher_loss)))


def scaling_best_teacher(student: float, tokens: float, tokens_per_parameter: float) -> float | None:
    """Size of the best teacher, trained on so many tokens a parameter; None where it is not within 0.1 x to 1000 x."""
    sizes = student * np.geomspace(0.1, 1000, 4001)
    losses = _distilled(student, tokens, _alone(sizes, tokens_per_parameter * sizes))
    best = int(np.argmin(losses))
    return float(sizes[best]) if 0 < best < len(sizes) - 1 else None


def _alone(sizes: Array, tokens: Array | float) -> Array:
    losses: Array = 1.220 + (3355 / sizes**0.408 + 18186 / tokens**0.431) ** 0.452
    return losses


def _distilled(student: float, tokens: float, teacher_losses: Array) -> Array:
    alone = supervised_loss(student, tokens)
    gap = (1 + (teacher_losses / (alone * 1.315)) ** (1 / 0.090)) ** (-522.61 * 0.090)
    own = (2243 / student**0.321 + 24181 / tokens**0.637) ** 0.764
    losses: Array = teacher_losses + teacher_losses**-2.549 * gap * own
    return losses


def predictions(student: float, tokens: float, teachers: Sequence[GivenTeacher]) -> tuple[Prediction, ...]:
    """What both laws say of a student and the teachers at hand."""
    return _by_gap(student, tokens, teachers), _by_scaling(student, tokens, teachers)


def nearest(teachers: Sequence[GivenTeacher], size: float) -> str:
    """Name of the teacher whose size is nearest, as a ratio."""
    return min(teachers, key=lambda teacher: abs(np.log(teacher.size / size))).name


def _by_gap(student: float, tokens: float, teachers: Sequence[GivenTeacher]) -> Prediction:
    best = gap_best_teacher(student)
    if best is None:
        said = (
            f"2.498 S - 11.498M is below the student's own size for S = {human(student)}: no prediction; "
            f"its slope alone would say {human(GAP_SLOPE * student)}"
        )
    else:
        said = (
            f"2.498 S - 11.498M = {human(best)}, {best / student:.2f} x the student; nearest: {nearest(teachers, best)}"
        )
    return _prediction(CAPACITY_GAP, student, tokens, teachers, best, said, {})


def _by_scaling(student: float, tokens: float, teachers: Sequence[GivenTeacher]) -> Prediction:
    ratios = [teacher.tokens / teacher.size for teacher in teachers if teacher.tokens]
    ratio = float(np.median(ratios)) if ratios else CHINCHILLA_TOKENS_PER_PARAMETER
    losses = {
        teacher.name: distilled_loss(
            student, tokens, supervised_loss(teacher.size, teacher.tokens or ratio * teacher.size)
        )
        for teacher in teachers
    }
    least = min(losses.values())
    chosen = min(losses, key=lambda name: losses[name])
    as_good = [name for name, loss in losses.items() if loss <= least + NEAR and name != chosen]
    best = scaling_best_teacher(student, tokens, ratio)
    where = (
        f"best at {human(best)}, {best / student:.1f} x the student"
        if best
        else "no best size between 0.1 x and 1000 x the student"
    )
    rest = f" (within {NEAR} nats: {', '.join(as_good)})" if as_good else ""
    trained = "the median given" if ratios else "an assumption, none was given"
    alone = supervised_loss(student, tokens)
    gain = f"{abs(alone - least):.3f} nats {'below' if least < alone else 'above'} training without a teacher"
    said = (
        f"{where}, for teachers trained on {ratio:.3g} tokens a parameter ({trained}); "
        f"of those at hand {chosen}{rest}, {gain}"
    )
    return _prediction(DISTILLATION_SCALING, student, tokens, teachers, best, said, losses)


def _prediction(
    law: PublishedLaw,
    student: float,
    tokens: float,
    teachers: Sequence[GivenTeacher],
    best: float | None,
    said: str,
    losses: dict[str, float],
) -> Prediction:
    return Prediction(
        law=law.name,
        source=law.source,
        validity=law.validity,
        within_validity=law.covers(student, tokens, [teacher.size for teacher in teachers]),
        best_size=best,
        said=said,
        losses=losses,
    )


def warning_of_ratio(student: float, teachers: Sequence[GivenTeacher]) -> str | None:
    """A warning that names the teachers more than `LARGEST_RATIO` times as large as the student; None without any."""
    large = [f"{one.name} ({one.size / student:.3g} x)" for one in teachers if one.size > LARGEST_RATIO * student]
    if not large:
        return None
    return (
        f"more than {LARGEST_RATIO} x the student: {', '.join(large)}; a study of pre-training distillation advises "
        "students of at least a tenth of their teacher (arXiv 2410.16215)"
    )


def human(count: float) -> str:
    """Three digits and k, M, B or T: 7544e6 is `7.54B`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"
