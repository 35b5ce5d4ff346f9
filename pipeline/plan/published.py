"""Published laws of distillation, as formulas: N parameters, D tokens, L losses in nats a token.

Neither was fitted by capgap. The first is of students pruned from their own teacher; the second has teachers and
students of fresh weights, and finds the teacher's loss, not its size, to decide. They disagree.
"""

from __future__ import annotations

import math

# Zhang et al., Towards the Law of Capacity Gap in Distilling Language Models, ACL 2025 (arXiv 2311.07052)
MINIMA_SLOPE, MINIMA_INTERCEPT = 2.498, -11.498e6
MINIMA_LARGEST_STUDENT = 3e9

# Busbridge et al., Distillation Scaling Laws, ICML 2025 (arXiv 2502.08606): models of 143M to 12.6B, up to 512B tokens.
# Taken from secondary sources; E, A, B, gamma, A', B', gamma', c0, c1 and f1 were not checked against the paper.
BUSBRIDGE_SIZES = (143e6, 12.6e9)
BUSBRIDGE_TOKENS = 512e9
_E, _A, _B, _ALPHA, _BETA, _GAMMA = 1.220, 3355.0, 18186.0, 0.408, 0.431, 0.452
_A1, _B1, _ALPHA1, _BETA1, _GAMMA1 = 2243.0, 24181.0, 0.321, 0.637, 0.764
_C0, _C1, _D1, _F1 = 2.549, 522.61, 1.315, 0.090


def minima_teacher(num_student_parameters: float) -> float:
    """The teacher that is best for a student pruned from it, in parameters; fitted to students below 3B."""
    return MINIMA_SLOPE * num_student_parameters + MINIMA_INTERCEPT


def supervised_loss(num_parameters: float, num_tokens: float) -> float:
    """Loss of a model trained on text alone; parameters without embeddings. Busbridge et al., eq. 1."""
    return float(_E + (_A / num_parameters**_ALPHA + _B / num_tokens**_BETA) ** _GAMMA)


def distilled_loss(num_student_parameters: float, num_tokens: float, teacher_loss: float) -> float:
    """Loss of a student of a teacher with that loss; parameters without embeddings. Busbridge et al., eq. 8.

    L_T + L_T^-c0 (1 + (L_T / (L_S d1))^(1/f1))^(-c1 f1) (A' / N^alpha' + B' / D^beta')^gamma', where L_S is the
    student's supervised loss on as many tokens.
    """
    relative = teacher_loss / (supervised_loss(num_student_parameters, num_tokens) * _D1)
    damping = -_C1 * _F1 * math.log1p(relative ** (1 / _F1))
    learnt = (_A1 / num_student_parameters**_ALPHA1 + _B1 / num_tokens**_BETA1) ** _GAMMA1
    return float(teacher_loss + teacher_loss**-_C0 * math.exp(damping) * learnt)


def best_ratio(
    num_student_parameters: float, num_tokens: float, teacher_tokens_per_parameter: float = 20.0, within: float = 0.005
) -> tuple[float, float, float]:
    """By `distilled_loss`: teacher over student where the student's loss is lowest, and the least and the largest ratio
    that come within `within` nats of it.

    Ratios from 0.25 to 256 are looked at. The teacher has seen `teacher_tokens_per_parameter` tokens a parameter.
    """

    def loss(ratio: float) -> float:
        size = ratio * num_student_parameters
        teacher_loss = supervised_loss(size, teacher_tokens_per_parameter * size)
        return distilled_loss(num_student_parameters, num_tokens, teacher_loss)

    ratios = [2 ** (step / 16) for step in range(-32, 129)]
    losses = list(map(loss, ratios))
    lowest = min(losses)
    near = [ratio for ratio, value in zip(ratios, losses, strict=True) if value <= lowest + within]
    return ratios[losses.index(lowest)], near[0], near[-1]
