from __future__ import annotations

import pytest
from judge_runs import QUESTIONS

from capgap.pipeline.judge.prompts import messages_for, rating_in, reminded, winner_in
from capgap.schemas.judge_results import Answered, Question, Reply


def answered(number: int, *texts: str) -> Answered:
    first, second = (Reply(text=text, num_tokens=1, finish="stop") for text in texts)
    return Answered(question=Question.model_validate(QUESTIONS[number]), temperature=0, replies=(first, second))


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[7.5]]", 7.5),
        ("Rating: [[ 10 ]]", 10.0),
        ("I say [[3]]. Rating: [[3]]", 3.0),
        ("<think>[[2]]? no</think> Rating: [[8]]", 8.0),
        ("", None),
        ("Rating: 7", None),
        ("Rating: [7]", None),
        ("A 7 of 10.", None),
        ("[[N]]", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-3]]", None),
        ("[[7/10]]", None),
        ("[[1e1]]", None),
        ("[[inf]]", None),
        ("Not [[3]] but [[8]]", None),
        ("<think>Rating: [[8]]</think>", None),
        ("<think>The first claim is wrong. Perhaps Rating: [[3]]? But wait, the second point is", None),
        ("<think>[[2]]</think> Rating: [[8]] <think>or is it [[7]]", 8.0),
        ("[[\u0667]]", None),
    ],
)
def test_a_rating_is_a_number_from_1_to_10_in_double_brackets_said_once(reply: str, rating: float | None) -> None:
    assert rating_in(reply) == rating


@pytest.mark.parametrize(
    ("reply", "winner"),
    [
        ("Better: [[A]]", "first"),
        ("Better: [[b]]", "second"),
        ("Better: [[Tie]]", "tie"),
        ("Better: A", None),
        ("[[C]]", None),
        ("[[A]] or [[B]]", None),
        ("[[A, B]]", None),
        ("", None),
    ],
)
def test_a_winner_is_one_of_three_words_in_double_brackets_said_once(reply: str, winner: str | None) -> None:
    assert winner_in(reply) == winner


def test_of_a_reply_that_was_cut_off_only_what_stands_behind_thoughts_counts() -> None:
    # the server wrote <think> into the prompt
    cut = "So maybe Rating: [[3]] and Better: [[A]]? But let me check"
    assert rating_in("Maybe [[3]]? But let me", is_cut=True) is None and winner_in("[[A]]? Wait", is_cut=True) is None
    assert rating_in(f"{cut}</think> Rating: [[8]]\nIt", is_cut=True) == 8
    assert winner_in(f"{cut}</think> Better: [[B]]\nIt", is_cut=True) == "second"
    assert winner_in("<think>so maybe [[A]] but let me check") is None


def test_a_first_answer_is_shown_without_the_second_turn_and_a_second_one_with_both() -> None:
    one = answered(0, "first words", "second words")
    (_, first), (system, second) = (messages_for((one,), turn) for turn in (1, 2))
    assert "Write a line." in first["content"] and "first words" in first["content"]
    assert "And one more." not in first["content"] and "second words" not in first["content"]
    places = [
        second["content"].index(part) for part in ("Write a line.", "first words", "And one more.", "second words")
    ]
    assert places == sorted(places)
    assert "Judge the second answer" in system["content"]


def test_a_reference_is_shown_turn_by_turn_where_there_is_one() -> None:
    sums = answered(1, "eleven", "fifteen")
    system, first = messages_for((sums,), 1)
    assert "=== reference answer 1 ===\n12\n" in first["content"] and "\n15\n" not in first["content"]
    assert "Hold what was answered against it" in system["content"]
    assert "\n15\n" in messages_for((sums,), 2)[1]["content"]
    assert "reference" not in str(messages_for((answered(0, "a", "b"),), 2)).lower()


def test_of_two_models_the_first_is_a_and_neither_is_named() -> None:
    pair = answered(1, "eleven", "sixteen"), answered(1, "twelve", "")
    _, asked = messages_for(pair, 2)
    content = asked["content"]
    assert "=== answer 1 of A ===\neleven\n" in content and "=== answer 1 of B ===\ntwelve\n" in content
    assert "=== answer 2 of A ===\nsixteen\n" in content and "=== answer 2 of B ===\n(nothing)\n" in content
    swapped = messages_for(pair[::-1], 2)[1]["content"]
    assert "=== answer 1 of A ===\ntwelve\n" in swapped and "=== answer 1 of B ===\neleven\n" in swapped


def test_a_prompt_itself_reads_as_no_verdict() -> None:
    for models in ((answered(0, "a", "b"),), (answered(0, "a", "b"), answered(0, "c", "d"))):
        said = " ".join(message["content"] for message in messages_for(models, 2))
        assert rating_in(said) is None and winner_in(said) is None


def test_who_was_not_understood_is_told_what_to_say() -> None:
    messages = messages_for((answered(0, "a", "b"),), 1)
    *before, reply, reminder = reminded("single", messages, "Very nice.")
    assert tuple(before) == messages
    assert reply == {"role": "assistant", "content": "Very nice."}
    assert "`Rating: [[N]]`" in reminder["content"]
    assert "`Better: [[tie]]`" in reminded("pairwise", messages, "")[-1]["content"]
