"""What a judge adds to a run: the tokens that the models generate, and the requests that the judge answers."""

from __future__ import annotations

from capgap.pipeline.answers.questions import read_questions
from capgap.pipeline.judge.items import Model, pairs
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.judge_results import NUM_TURNS
from capgap.schemas.plan import Figure
from capgap.schemas.run_file import RunFile


def answer_tokens(run: RunFile) -> Figure:
    """Return the largest number of tokens that one model generates for its answers.

    Raises:
        InputError: The questions cannot be read.
    """
    assert run.judge is not None
    num_questions, longest = len(read_questions(run.judge.questions)), run.judge.answers.max_tokens
    source = f"at most: {num_questions} questions, {NUM_TURNS} answers of up to {longest:,} tokens"
    return Figure(value=num_questions * NUM_TURNS * longest, source=source)


def judge_requests(run: RunFile) -> int:
    """Return the number of requests to the judge, if each of its replies can be read.

    Raises:
        InputError: The questions cannot be read.
    """
    assert run.judge is not None
    num_answers = len(read_questions(run.judge.questions)) * NUM_TURNS
    # the teacher's instance has no seed
    models = [Model(i.name, i.arm, i.seed) for i in instances(run) if i.stage == "answers"]
    single = num_answers * len(models) if "single" in run.judge.modes else 0
    in_both_orders = 2 * num_answers * len(list(pairs(models))) if "pairwise" in run.judge.modes else 0
    return single + in_both_orders
