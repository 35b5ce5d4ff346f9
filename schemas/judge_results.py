"""The files that the stages answers and judge write: answers, verdicts and the results.

answers.jsonl   one `Answered` per line     stage answers, one folder per model
verdicts.jsonl  one `Verdict` per line      stage judge: every prompt, every reply
judge.json      a `JudgeResults`            stage judge
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import Record
from capgap.schemas.results import Interval

ANSWERS_NAME = "answers.jsonl"
VERDICTS_NAME = "verdicts.jsonl"
JUDGE_NAME = "judge.json"

NUM_TURNS = 2

Kind = Literal["single", "pairwise"]

Winner = Literal["first", "second", "tie"]


class Question(Record):
    """One question of two turns, as MT-Bench writes them."""

    question_id: int | str
    """Id of the question in its file."""

    category: str = Field(min_length=1)
    """Category of the question, for example `math`."""

    turns: tuple[str, ...]
    """The first question, and the second one, which is asked after the first answer."""

    reference: tuple[str, ...] = ()
    """A right answer to each turn; empty if there is none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.turns) != NUM_TURNS or not all(turn.strip() for turn in self.turns):
            raise ValueError(f"turns: found {len(self.turns)}, expected {NUM_TURNS}, none empty")
        if self.reference and len(self.reference) != NUM_TURNS:
            raise ValueError(f"reference: found {len(self.reference)}, expected one for each of {NUM_TURNS} turns")
        return self


class Reply(Record):
    """A model's answer to one turn."""

    text: str
    """Text of the answer, without special tokens."""

    num_tokens: int
    """Number of generated tokens."""

    finish: Literal["stop", "length", "no_room"]
    """Why the answer ended. `stop`: the model ended it. `length`: it reached `max_tokens` or the model's last position.
    `no_room`: the conversation alone fills the model's positions, so that nothing was generated."""


class Answered(Record):
    """A question with a model's answers."""

    question: Question
    """The question as it was asked."""

    temperature: float
    """Sampling temperature of the answers."""

    replies: tuple[Reply, Reply]
    """The answers to both turns."""


class Ask(Record):
    """One request to the judge."""

    messages: tuple[dict[str, str], ...]
    """All messages that were sent."""

    reply: str
    """Text of the judge's reply."""

    finish: str | None
    """Why the reply ended, in the endpoint's words."""

    answered_by: str
    """Name of the model that replied, in the endpoint's words."""


class Item(Record):
    """The answer, or pair of answers, that one verdict judges."""

    kind: Kind
    """`single`: a rating of one answer. `pairwise`: the better of two answers."""

    question_id: int | str
    """Id of the question."""

    category: str
    """The question's category."""

    turn: Literal[1, 2]
    """The turn whose answer is judged."""

    models: tuple[str, ...]
    """The model whose answer is judged, or two models in the order in which the judge saw their answers."""


class Verdict(Record):
    """The judge's verdict about an item."""

    item: Item
    """The answer, or pair of answers, that was judged."""

    asks: tuple[Ask, ...]
    """All requests and replies; more than one if the first reply held no readable verdict."""

    rating: float | None = None
    """For `single`, the rating from 1 to 10; None if the verdict is invalid."""

    winner: Winner | None = None
    """For `pairwise`, the better answer, in the order in which the judge saw them; None if the verdict is invalid."""

    invalid: str = ""
    """Why there is no verdict, in words; empty if there is one."""


class Mean(Record):
    """A mean over questions."""

    value: float
    """The mean."""

    interval: Interval
    """The 95 % interval, from resampling questions."""


class ModelRatings(Record):
    """The ratings of one model. A mean is None if no rating was valid."""

    model: str
    """Instance that made the model."""

    arm: str | None
    """Arm of the student; None for the teacher."""

    seed: int | None
    """Seed of the student; None for the teacher."""

    turn_1: Mean | None
    """Mean of the valid ratings of first answers."""

    turn_2: Mean | None
    """Mean of the valid ratings of second answers."""

    average: Mean | None
    """Mean of `turn_1` and `turn_2`; None if either is None."""

    by_category: dict[str, float]
    """Mean of both turns for each category that has a valid rating of each turn."""

    num_invalid: int
    """Number of verdicts that could not be read; they count in no mean."""

    num_cut: int
    """Number of answers that the model did not end by itself."""


class PairResult(Record):
    """The comparison of two models, each pair of answers in both orders."""

    first: str
    """Instance that made one model."""

    second: str
    """Instance that made the other model."""

    num_wins: int
    """Number of pairs in which the answer of `first` was better in both orders."""

    num_ties: int
    """Number of pairs in which neither answer was better in both orders."""

    num_losses: int
    """Number of pairs in which the answer of `second` was better in both orders."""

    num_invalid: int
    """Number of pairs without a verdict in one order or both; they count in no other number."""

    win_rate: Mean | None
    """Win rate of `first`: (wins + ties / 2) / all valid pairs; None if there is no valid pair."""

    consistency: float | None
    """Share of valid pairs with the same verdict in both orders, including ties; None if there is no valid pair."""

    num_first_place: int
    """Number of valid pairs in which the answer shown first was called better in both orders."""

    num_second_place: int
    """Number of valid pairs in which the answer shown second was called better in both orders."""


class JudgeIdentity(Record):
    """The model that judged, as its endpoint describes it."""

    model: str
    """Name of the model that was requested."""

    served: dict[str, str] = Field(default_factory=dict)
    """The endpoint's entry for this model in its list of models; empty if it lists none."""


class JudgeResults(Record):
    """The content of `judge.json`."""

    judge: JudgeIdentity
    """The model that judged."""

    answered_by: dict[str, int]
    """Number of replies by the name of the model that the endpoint reported with them."""

    num_questions: int
    """Number of questions, of two turns each."""

    num_bootstrap: int
    """Number of bootstrap resamples for each interval."""

    models: tuple[ModelRatings, ...] = ()
    """Ratings of the teacher first, if it was judged, then of the arms, by seed; empty without `single`."""

    pairs: tuple[PairResult, ...] = ()
    """Comparisons of two models; empty without `pairwise`."""

    num_verdicts: int
    """Number of all verdicts."""

    num_invalid: int
    """Number of verdicts that could not be read."""
