"""What the stages answers and judge write: answers, verdicts, and the figures made of them.

answers.jsonl   an `Answered` a line        stage answers, one folder a model
verdicts.jsonl  a `Verdict` a line          stage judge: every prompt, every reply
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
    """Its own."""

    category: str = Field(min_length=1)
    """For example `math`."""

    turns: tuple[str, ...]
    """What is asked, and what is asked after the first answer."""

    reference: tuple[str, ...] = ()
    """A right answer to each turn; empty where there is none."""

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
    """Without special tokens."""

    num_tokens: int
    """Generated."""

    finish: Literal["stop", "length", "no_room"]
    """`stop`: the model ended it. `length`: `max_tokens` or the model's positions did. `no_room`: the conversation
    alone fills the model's positions, and nothing was generated."""


class Answered(Record):
    """A question with a model's answers."""

    question: Question
    """As it was asked."""

    temperature: float
    """The temperature at which it was answered."""

    replies: tuple[Reply, Reply]
    """To both turns."""


class Ask(Record):
    """One request to the judge."""

    messages: tuple[dict[str, str], ...]
    """All that it was sent."""

    reply: str
    """What it said."""

    finish: str | None
    """Why it ended, in the endpoint's words."""

    answered_by: str
    """The model that answered, in the endpoint's words."""


class Item(Record):
    """What one verdict is about."""

    kind: Kind
    """A number for one answer, or the better of two."""

    question_id: int | str
    """Which question."""

    category: str
    """The question's category."""

    turn: Literal[1, 2]
    """Which answer of the conversation."""

    models: tuple[str, ...]
    """The one whose answer it is; or two, in the order in which the judge saw them."""


class Verdict(Record):
    """What the judge made of an item."""

    item: Item
    """What was judged."""

    asks: tuple[Ask, ...]
    """Every prompt and reply; more than one where the first could not be read."""

    rating: float | None = None
    """From 1 to 10, for `single`; None where the verdict is invalid."""

    winner: Winner | None = None
    """For `pairwise`, in the order in which the judge saw the answers; None where the verdict is invalid."""

    invalid: str = ""
    """Why there is no verdict, in words; empty where there is one."""


class Mean(Record):
    """A mean over questions."""

    value: float
    """The mean."""

    interval: Interval
    """95 %, from resampling questions."""


class ModelRatings(Record):
    """The ratings of one model; a mean is None where no rating was valid."""

    model: str
    """Instance that made it."""

    arm: str | None
    """None for the teacher."""

    seed: int | None
    """None for the teacher."""

    turn_1: Mean | None
    """Over the valid ratings of first answers."""

    turn_2: Mean | None
    """Over those of second answers."""

    average: Mean | None
    """The mean of both; None where either is."""

    by_category: dict[str, float]
    """The mean of both turns, of categories with a valid rating of each."""

    num_invalid: int
    """Verdicts that could not be read; in no mean."""

    num_cut: int
    """Answers that did not end by themselves."""


class PairResult(Record):
    """Two models held against each other, each answer in both orders."""

    first: str
    """Instance that made the one."""

    second: str
    """Instance that made the other."""

    num_wins: int
    """Answers of `first` that were better in both orders."""

    num_ties: int
    """Pairs of answers of which neither was better in both orders."""

    num_losses: int
    """Answers of `second` that were better in both orders."""

    num_invalid: int
    """Pairs without a verdict in one order or both; in no figure."""

    win_rate: Mean | None
    """(wins + ties / 2) / all valid pairs, of `first`; None where there is none."""

    consistency: float | None
    """Share of valid pairs with one verdict in both orders, ties included."""

    num_first_place: int
    """Valid pairs in which whichever answer stood first was called better, in both orders."""

    num_second_place: int
    """The same of whichever stood second."""


class JudgeIdentity(Record):
    """Who judged, as its endpoint says."""

    model: str
    """That was asked for."""

    served: dict[str, str] = Field(default_factory=dict)
    """What the endpoint lists of it; empty where it lists no models."""


class JudgeResults(Record):
    """Everything in `judge.json`."""

    judge: JudgeIdentity
    """Who judged."""

    answered_by: dict[str, int]
    """Replies by the name that the endpoint gave to the model behind them."""

    num_questions: int
    """Questions, of two turns each."""

    num_bootstrap: int
    """Resamples behind each interval."""

    models: tuple[ModelRatings, ...] = ()
    """The teacher first, if it was judged, then arm after arm by seed; empty without `single`."""

    pairs: tuple[PairResult, ...] = ()
    """Empty without `pairwise`."""

    num_verdicts: int
    """All of them."""

    num_invalid: int
    """How many of these could not be read."""
