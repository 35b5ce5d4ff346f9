from __future__ import annotations

from typing import Any

from capgap.pipeline.plan.judging import answer_tokens, judge_requests
from capgap.schemas.run_file import RunFile


def run(**judge: Any) -> RunFile:
    settings = {
        "name": "n",
        "out": "o",
        "corpus": {},
        "teacher": {"model": {}},
        "cache": {},
        "student": {"model": {}},
        "seeds": [0, 1],
    }
    arms: dict[str, Any] = {"distilled": {}, "cross_entropy": {"alpha": 0}}
    return RunFile.model_validate({**settings, "arms": arms, "judge": {"model": "one", **judge}})


def test_answers_are_at_most_as_long_as_they_may_be() -> None:
    found = answer_tokens(run(answers={"max_tokens": 100}))
    assert found.value == 12 * 2 * 100
    assert found.source == "at most: 12 questions, 2 answers of up to 100 tokens"


def test_the_judge_is_asked_once_an_answer_and_twice_a_pair() -> None:
    assert judge_requests(run()) == 12 * 2 * 5
    # at each seed: two arms with each other, and both with the teacher
    assert judge_requests(run(mode="pairwise")) == 12 * 2 * 2 * (2 * 3)
    assert judge_requests(run(mode="both", teacher=False)) == 12 * 2 * 4 + 12 * 2 * 2 * 2
