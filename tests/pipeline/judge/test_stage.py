from __future__ import annotations

import json
from pathlib import Path

from judge_runs import QUESTIONS
from judge_server import Answer, Body, JudgeServer, said

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.judge_results import JudgeResults, Verdict
from capgap.schemas.run_file import RunFile

JUDGE = Instance("judge")
NUM_MODELS = 3
NUM_SINGLE = NUM_MODELS * len(QUESTIONS) * 2
NUM_PAIRWISE = 3 * 2 * len(QUESTIONS) * 2


def results(run: RunFile) -> JudgeResults:
    return JudgeResults.model_validate_json((Path(run.out) / "judge" / "judge.json").read_bytes())


def verdicts(run: RunFile) -> list[Verdict]:
    lines = (Path(run.out) / "judge" / "verdicts.jsonl").read_text().splitlines()
    return [Verdict.model_validate_json(line) for line in lines]


def rated(body: Body, number: int) -> Answer:
    """7 for a first answer and 4 for a second one; the winner stands first."""
    asked = json.dumps(body["messages"])
    if "Two language models" in asked:
        return said("A says more. Better: [[A]]")
    return said("Fine. Rating: [[4]]" if "answer 2" in asked else "Good. Rating: [[7.0]]")


def test_every_answer_is_rated_and_every_pair_is_held_against_each_other_in_both_orders(
    make_run, server: JudgeServer
) -> None:
    server.judge = rated
    run = make_run(mode="both")
    manifest = carry_out(run, JUDGE)
    found = results(run)
    assert len(server.asked) == len(set(server.prompts())) == NUM_SINGLE + NUM_PAIRWISE == found.num_verdicts
    assert [model.model for model in found.models] == [
        "teacher",
        "train/distilled/seed-0",
        "train/cross_entropy/seed-0",
    ]
    for model in found.models:
        assert model.turn_1 is not None and model.turn_2 is not None and model.average is not None
        assert (model.turn_1.value, model.turn_2.value, model.average.value) == (7.0, 4.0, 5.5)
        assert model.by_category == {"writing": 5.5, "math": 5.5, "cooking": 5.5}
    # whatever stands first wins: no model does
    for pair in found.pairs:
        num = 2 * len(QUESTIONS)
        assert (pair.num_wins, pair.num_ties, pair.num_losses, pair.num_invalid) == (0, num, 0, 0)
        assert (pair.consistency, pair.num_first_place, pair.num_second_place) == (0.0, num, 0)
        assert pair.win_rate is not None and pair.win_rate.value == 0.5
    assert found.judge.served == {"id": "tiny-judge", "owned_by": "a test", "root": "/m"}
    assert found.answered_by == {"tiny-judge-1": found.num_verdicts}
    assert manifest.totals["invalid"] == 0
    assert all(verdict.asks[0].messages for verdict in verdicts(run))
    assert states(run)["judge"].state is State.CURRENT
