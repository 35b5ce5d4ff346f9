"""What the published laws say, in words: their source, their range, and no optimum where none was seen."""

from __future__ import annotations

import pytest

from capgap.pipeline.plan.predictions import predictions, scaling_prediction
from capgap.pipeline.plan.published import GivenTeacher, distilled_loss, supervised_loss


def test_every_prediction_names_its_source_and_whether_it_applies() -> None:
    teachers = [GivenTeacher("7B", 7e9), GivenTeacher("13B", 13e9), GivenTeacher("70B", 70e9)]
    gap, scaling = predictions(3e9, 126e9, teachers)
    assert "2311.07052" in gap.source and "2502.08606" in scaling.source
    assert gap.within_validity and gap.sentence == f"law of capacity gap: {gap.summary}"
    assert not scaling.within_validity, "its models end at 12.6B"
    assert scaling.sentence.startswith("distillation scaling law (outside what it was measured on): best at ")
    assert predictions(3e9, 126e9, teachers[:1])[1].within_validity
    assert gap.best_size == pytest.approx(7.4825e9, rel=1e-4)
    assert "nearest: 7B, 2.33 x" in gap.summary
    assert "20 tokens a parameter (an assumption, none was given)" in scaling.summary
    assert set(scaling.losses) == {"7B", "13B", "70B"}
    assert not any(one.within_validity for one in predictions(1e6, 2e6, teachers))


def test_known_teacher_tokens_are_used() -> None:
    (_, scaling) = predictions(3e9, 126e9, [GivenTeacher("7B", 7e9, 2e12)])
    assert "286 tokens a parameter (the median given); 7B, 2.33 x, " in scaling.summary
    assert scaling.losses["7B"] == pytest.approx(distilled_loss(3e9, 126e9, supervised_loss(7e9, 2e12)))


def test_without_a_teacher_at_hand_the_laws_speak_of_the_student_alone() -> None:
    gap, scaling = predictions(1e9, 20e9, [])
    assert gap.summary == "2.498 S - 11.498M = 2.49B, 2.49 x the student"
    assert scaling.summary.startswith("best at 80.9B, 80.9 x the student; 29.2 to 226 x come within 0.005 nats/token")
    assert scaling.losses == {} and gap.within_validity and scaling.within_validity


def test_a_best_teacher_at_the_end_of_the_search_is_at_or_beyond_it() -> None:
    """A student of 12.6B on 4B tokens: `capgap plan` once called the last ratio of its scan, 256, the best."""
    long = scaling_prediction(12.6e9, 4e9, [])
    assert long.best_size is None
    assert long.summary.startswith("best at or beyond 1000 x the student, the largest teacher looked at, for teachers")
    # a student of ten tokens knows nothing: the weakest teacher is best
    small = scaling_prediction(1e6, 10, [])
    assert small.best_size is None and small.summary.startswith("best at or below 0.1 x the student, the smallest")


def test_an_open_range_of_teachers_nearly_as_good_is_called_open() -> None:
    near_the_end = scaling_prediction(12.6e9, 40e9, [GivenTeacher("t", 12.6e9, 100 * 12.6e9)])
    assert near_the_end.best_size is not None
    assert " to 1000 x or more come within" in near_the_end.summary
