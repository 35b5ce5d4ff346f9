"""Advice: every source by itself, with where it holds and how far they are apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from law_tables import planted, valley

from capgap.pipeline.law.advise import advise
from capgap.pipeline.law.fit import fit_table
from capgap.pipeline.law.summary import advice_lines
from capgap.pipeline.law.table import write_table
from capgap.pipeline.plan.published import GivenTeacher
from capgap.schemas.errors import SettingError
from capgap.schemas.law_fit import LawFit

TEACHERS = [GivenTeacher("7B", 7e9), GivenTeacher("13B", 13e9), GivenTeacher("70B", 70e9)]
RATIOS = np.geomspace(1, 32, 6).tolist()


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> LawFit:
    path = tmp_path_factory.mktemp("law") / "runs.jsonl"
    write_table(path, planted(valley(4.0), [1e6, 2e6, 4e6, 8e6], RATIOS))
    return fit_table(path)


def test_without_a_fit_the_published_laws_answer_and_their_disagreement_is_said() -> None:
    advice = advise(3_000_000_000, 126_000_000_000, TEACHERS)
    gap, scaling = advice.answers
    assert gap.choice == "7B" and "arXiv:2311.07052" in gap.source
    assert scaling.best_size is not None and scaling.best_size / 3e9 > 5
    assert advice.disagreement.startswith("best sizes are")
    assert "7B" in advice.disagreement and str(scaling.choice) in advice.disagreement


def test_a_fit_answers_first_with_its_interval(fit: LawFit) -> None:
    teachers = [GivenTeacher("6M", 6e6), GivenTeacher("12M", 12e6), GivenTeacher("60M", 60e6)]
    answer = advise(3_000_000, 3_000_000, teachers, fit).answers[0]
    assert answer.source.startswith("fit of ") and "common init" in answer.source
    assert answer.best_size == pytest.approx(12e6, rel=0.15)
    assert answer.interval is not None and answer.interval.low < 12e6 < answer.interval.high
    assert answer.choice == "12M" and answer.within_validity
    advice = advise(3_000_000, 3_000_000, teachers, fit)
    assert advice.verdict == "the fit applies: take 12M" and answer.outside == ()


def test_a_fit_says_when_the_student_lies_outside_of_it_and_its_interval_widens(fit: LawFit) -> None:
    inside = advise(3_000_000, 3_000_000, TEACHERS, fit).answers[0]
    near = advise(60_000_000, 60_000_000, TEACHERS, fit).answers[0]
    outside = advise(3_000_000_000, 3_000_000_000, TEACHERS, fit).answers[0]
    assert near.within_validity is False and outside.within_validity is False
    assert inside.interval is not None and near.interval is not None
    assert near.interval.high / near.interval.low > 1.5 * inside.interval.high / inside.interval.low
    longer = advise(3_000_000, 30_000_000_000, TEACHERS, fit).answers[0]
    assert longer.within_validity is False, "other tokens a parameter were not measured"
    # students of 1M to 8M, with teachers of up to 32 x, and 2M tokens: 0.25 to 2 a parameter
    assert outside.outside[0] == "the student is 375 x the largest that was measured (8M)"
    assert outside.outside[1] == "teacher 7B is 27.3 x the largest that was measured (256M)"
    assert longer.outside[0] == "tokens a parameter is 5,000 x the largest that was measured (2)"
    assert advise(3_000_000_000, 3_000_000_000, TEACHERS, fit).verdict.startswith("the fit does not apply: the student")
    assert advise(3_000_000_000, 126_000_000_000, TEACHERS).verdict.startswith("no fit of your own")
    published = advise(3_000, 126_000_000_000, TEACHERS).answers[1].outside
    assert published[0] == "the student is 47,700 x smaller than the smallest that was measured (143M)"


def test_tokens_a_parameter_have_room_of_a_factor_of_two_and_are_named_as_measured(fit: LawFit) -> None:
    # the fit has 0.25 to 2 tokens a parameter
    for ratio, sentence in (
        (0.12, "tokens a parameter is 2.08 x smaller than the smallest that was measured (0.25)"),
        (0.13, None),
        (3.9, None),
        (4.1, "tokens a parameter is 2.05 x the largest that was measured (2)"),
    ):
        answer = advise(4_000_000, round(4_000_000 * ratio), [GivenTeacher("12M", 12e6)], fit).answers[0]
        assert answer.outside == (() if sentence is None else (sentence,))
        assert answer.within_validity == (sentence is None)


def test_a_law_names_no_size_for_a_student_a_thousand_times_as_large(fit: LawFit) -> None:
    largest = max(curve.student_size for curve in fit.curves)
    near, far = (advise(factor * largest, 10**9, TEACHERS, fit).answers[0] for factor in (9, 1000))
    assert near.best_size is not None and far.best_size is None and far.interval is None and far.choice is None
    assert far.summary == "no answer: the student is outside the measured sizes by a factor of more than 10"
    assert any("the student is 1,000 x the largest" in sentence for sentence in far.outside)


def test_a_fit_without_a_law_gives_no_number_and_says_what_was_seen(tmp_path: Path) -> None:
    write_table(tmp_path / "runs.jsonl", planted(valley(4.0), [1e6], RATIOS))
    answer = advise(1_000_000, 2_000_000, TEACHERS, fit_table(tmp_path / "runs.jsonl")).answers[0]
    assert answer.best_size is None and answer.choice is None
    assert "no law, sizes of students with an interior best teacher: 1, and 3" in answer.summary
    assert "nearest student m1000000 (1M) interior" in answer.summary
    assert "t4000000 (4 x)" in answer.summary


def test_one_teacher_twice_is_no_choice() -> None:
    with pytest.raises(SettingError, match="each only once"):
        advise(3_000_000_000, 126_000_000_000, [TEACHERS[0], TEACHERS[0]])


def test_a_teacher_more_than_ten_times_the_student_is_warned_of() -> None:
    advice = advise(3_000_000_000, 126_000_000_000, TEACHERS)
    assert advice.warning is not None and "70B (23.3 x)" in advice.warning and "13B" not in advice.warning
    assert list(advice_lines(advice))[-1].startswith("warning: more than 10 x the student")
    assert advise(3_000_000_000, 126_000_000_000, TEACHERS[:2]).warning is None


def test_a_fit_warns_of_them_too(fit: LawFit) -> None:
    notes = fit.curves[0].notes
    assert any(note.startswith("more than 10 x the student: t16000000 (16 x)") for note in notes), notes
