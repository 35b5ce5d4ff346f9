"""A judge that answers nonsense, too late, too often or not at all: named, and nothing is lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from judge_runs import QUESTIONS
from judge_server import Answer, Body, JudgeServer, said

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.lease import leases
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import InputError, MachineError, MismatchError, SettingError
from capgap.schemas.judge_results import JudgeResults, Verdict
from capgap.schemas.run_file import RunFile

JUDGE = Instance("judge")
NUM_VERDICTS = 3 * len(QUESTIONS) * 2
FIVE = said("Rating: [[5]]")


def results(run: RunFile) -> JudgeResults:
    return JudgeResults.model_validate_json((Path(run.out) / "judge" / "judge.json").read_bytes())


def verdicts(run: RunFile) -> list[Verdict]:
    lines = (Path(run.out) / "judge" / "verdicts.jsonl").read_text().splitlines()
    return [Verdict.model_validate_json(line) for line in lines]


def kept(run: RunFile) -> int:
    return len(list((Path(run.out) / "judge" / "work" / "verdicts").glob("*.json")))


def first_of_math(body: Body) -> bool:
    asked = body["messages"][1]["content"]
    return "3 times 4?" in asked and "answer 2" not in asked


def test_nonsense_is_asked_about_again_kept_as_it_came_and_in_no_mean(make_run, server: JudgeServer) -> None:
    server.judge = lambda body, number: said("Bananas: 9!") if first_of_math(body) else FIVE
    run = make_run(num_asks=3)
    carry_out(run, JUDGE)
    found = results(run)
    assert len(server.asked) == NUM_VERDICTS + 3 * 2
    assert (found.num_verdicts, found.num_invalid) == (NUM_VERDICTS, 3)
    for model in found.models:
        assert model.num_invalid == 1
        assert model.turn_1 is not None and model.turn_1.value == 5.0
        assert set(model.by_category) == {"writing", "cooking"}  # math has no rating of a first answer
    (bad, *_) = (verdict for verdict in verdicts(run) if verdict.invalid)
    assert [ask.reply for ask in bad.asks] == ["Bananas: 9!"] * 3
    assert bad.invalid == "no rating could be read in 3 replies" and bad.rating is None
    assert bad.asks[1].messages[-2] == {"role": "assistant", "content": "Bananas: 9!"}


def test_what_is_said_clearly_when_asked_again_counts(make_run, server: JudgeServer) -> None:
    server.judge = lambda body, number: FIVE if len(body["messages"]) > 2 else said("five")
    run = make_run()
    carry_out(run, JUDGE)
    assert results(run).num_invalid == 0
    assert len(server.asked) == 2 * NUM_VERDICTS


def test_a_judge_of_pure_nonsense_has_no_means(make_run, server: JudgeServer) -> None:
    server.judge = lambda body, number: said("", finish="length")
    run = make_run(mode="both", num_asks=1)
    carry_out(run, JUDGE)
    found = results(run)
    assert found.num_invalid == found.num_verdicts == NUM_VERDICTS * 3
    assert all(model.average is None and model.by_category == {} for model in found.models)
    for pair in found.pairs:
        assert (pair.num_wins, pair.num_ties, pair.num_losses, pair.num_invalid) == (0, 0, 0, 2 * len(QUESTIONS))
        assert pair.win_rate is None and pair.consistency is None


def test_after_a_timeout_the_same_command_asks_about_exactly_what_is_missing(make_run, server: JudgeServer) -> None:
    silence = threading.Event()

    def slow(body: Body, number: int) -> Answer:
        if number >= 5:
            silence.wait()
        return FIVE

    server.judge = slow
    # long enough for an answer on any machine
    run = make_run(num_parallel=1, timeout_s=4, num_retries=1)
    with pytest.raises(MachineError) as caught:
        carry_out(run, JUDGE)
    silence.set()
    assert str(caught.value) == (
        f"{server.url}: the judge does not answer in time; found 2 requests of up to 4 s; raise judge.timeout_s, or "
        f"run the same command again, which goes on where this one stopped; 5 of {NUM_VERDICTS} verdicts are kept"
    )
    assert kept(run) == 5
    state = states(run)["judge"]
    assert (state.state, state.why) == (State.PARTIAL, f"5 of {NUM_VERDICTS} verdicts")
    done = set(server.prompts()[:5])
    server.asked.clear()
    server.judge = lambda body, number: FIVE
    carry_out(make_run_again(run, timeout_s=60.0), JUDGE)
    assert len(server.asked) == NUM_VERDICTS - 5
    assert not done & set(server.prompts())
    assert results(run).num_invalid == 0


def make_run_again(run: RunFile, **judge: object) -> RunFile:
    assert run.judge is not None
    return run.model_copy(update={"judge": run.judge.model_copy(update=judge)})


def test_those_under_way_when_one_fails_are_kept(make_run, server: JudgeServer) -> None:
    all_are_asked, failed = threading.Barrier(4), threading.Event()

    def judge(body: Body, number: int) -> Answer:
        if number < 4:
            all_are_asked.wait()
        if number == 0:
            failed.set()
            return Answer({"error": {"message": "broken"}}, status=500)
        failed.wait()
        return FIVE

    server.judge = judge
    run = make_run(num_parallel=4, num_retries=0)
    with pytest.raises(MachineError, match=r"the judge fails; found .*broken.*verdicts are kept"):
        carry_out(run, JUDGE)
    assert kept(run) == len(server.asked) - 1 >= 3


def test_a_busy_judge_is_asked_again_after_the_time_that_it_asks_for(make_run, server: JudgeServer) -> None:
    busy = Answer({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0.01"})
    server.judge = lambda body, number: busy if number < 3 else FIVE
    run = make_run(num_parallel=1)
    carry_out(run, JUDGE)
    assert len(server.asked) == NUM_VERDICTS + 3
    assert results(run).num_invalid == 0


def test_a_judge_that_stays_busy_stops_the_stage_by_name(make_run, server: JudgeServer) -> None:
    server.judge = lambda body, number: Answer({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.01"})
    with pytest.raises(MachineError, match=r"rate limit is reached; found .*slow down.*; lower judge.num_parallel"):
        carry_out(make_run(num_parallel=1, num_retries=2), JUDGE)
    assert len(server.asked) == 3


def test_a_judge_that_is_not_there_is_named(make_run) -> None:
    run = make_run(base_url="http://127.0.0.1:9/v1", num_retries=0)
    with pytest.raises(MachineError, match=r"http://127.0.0.1:9/v1: the judge cannot be reached; .*0 of 18 verdicts"):
        carry_out(run, JUDGE)


def test_a_request_that_is_refused_is_an_invalid_verdict_with_what_was_said(make_run, server: JudgeServer) -> None:
    refusal = Answer({"error": {"message": "too many tokens"}}, status=400)
    server.judge = lambda body, number: refusal if first_of_math(body) else FIVE
    run = make_run()
    carry_out(run, JUDGE)
    refused = [verdict for verdict in verdicts(run) if verdict.invalid]
    assert len(refused) == 3 == results(run).num_invalid
    assert all("too many tokens" in verdict.invalid and verdict.asks[0].messages for verdict in refused)


def test_a_judge_that_is_cut_off_in_its_thoughts_is_asked_again(make_run, server: JudgeServer) -> None:
    server.judge = lambda body, number: (
        FIVE if len(body["messages"]) > 2 else said("Perhaps [[3]]? But wait", finish="length")
    )
    run = make_run()
    carry_out(run, JUDGE)
    assert {verdict.rating for verdict in verdicts(run)} == {5.0} and len(server.asked) == 2 * NUM_VERDICTS


def test_a_stage_ends_though_the_requests_that_a_resume_has_left_are_all_refused(make_run, server: JudgeServer) -> None:
    broken = Answer({"error": {"message": "broken"}}, status=500)
    server.judge = lambda body, number: broken if first_of_math(body) else FIVE
    run = make_run(num_parallel=1, num_retries=0)
    with pytest.raises(MachineError, match="the judge fails"):
        carry_out(run, JUDGE)
    assert 0 < kept(run) < NUM_VERDICTS
    # from here on it answers nothing that it has not answered before
    refusal = Answer({"error": {"message": "too many tokens"}}, status=400)
    server.judge = lambda body, number: refusal
    num_kept = kept(run)
    carry_out(run, JUDGE)
    assert results(run).num_invalid == NUM_VERDICTS - num_kept


def test_a_judge_that_refuses_everything_stops_the_stage_and_nothing_is_taken_for_a_verdict(
    make_run, server: JudgeServer
) -> None:
    server.judge = lambda body, number: Answer({"error": {"message": "no temperature here"}}, status=400)
    run = make_run()
    with pytest.raises(InputError, match=r"refuses every request; found refused: .*no temperature here"):
        carry_out(run, JUDGE)
    assert kept(run) == 0
    server.judge = lambda body, number: FIVE
    carry_out(run, JUDGE)
    assert results(run).num_invalid == 0


@pytest.mark.parametrize("body", ["<html>busy</html>", "{", "[]", '{"choices": []}', '{"choices": [{}]}'])
def test_what_is_not_of_openai_s_form_is_named(make_run, server: JudgeServer, body: str) -> None:
    server.judge = lambda _, number: Answer(body)
    with pytest.raises(MachineError, match="does not answer in OpenAI's form"):
        carry_out(make_run(num_retries=0), JUDGE)


def test_a_model_that_is_not_there_is_named(make_run, server: JudgeServer) -> None:
    server.judge = lambda body, number: Answer({"error": {"message": "no model tiny-judge"}}, status=404)
    with pytest.raises(SettingError, match=r"no such model.*; found .*no model tiny-judge.*change judge.model"):
        carry_out(make_run(), JUDGE)


def test_an_endpoint_that_lists_no_models_judges_all_the_same(make_run, server: JudgeServer) -> None:
    server.models = Answer({"error": "no such page"}, status=404)
    run = make_run()
    carry_out(run, JUDGE)
    assert results(run).judge.served == {}


def test_verdicts_of_two_judges_are_never_mixed(make_run, server: JudgeServer) -> None:
    server.judge = lambda body, number: FIVE if number < 4 else Answer({}, status=500)
    run = make_run(num_parallel=1, num_retries=0)
    with pytest.raises(MachineError):
        carry_out(run, JUDGE)
    server.models = [{"id": "tiny-judge", "object": "model", "created": 2, "owned_by": "a test", "root": "/other"}]
    with pytest.raises(MismatchError, match=r"another judge answers than the one that began; found .*/other.*/m"):
        carry_out(run, JUDGE)
    # when the server was started is no part of who judges
    server.models = [{"id": "tiny-judge", "object": "model", "created": 3, "owned_by": "a test", "root": "/m"}]
    server.judge = lambda body, number: FIVE
    carry_out(run, JUDGE)


def test_the_judge_is_sent_its_settings(make_run, server: JudgeServer) -> None:
    carry_out(make_run(temperature=0.3, max_tokens=77), JUDGE)
    assert {(b["model"], b["temperature"], b["max_completion_tokens"]) for b in server.asked} == {
        ("tiny-judge", 0.3, 77)
    }
    server.asked.clear()
    carry_out(make_run(temperature=None), JUDGE)
    assert server.asked and all("temperature" not in body for body in server.asked)


def test_no_device_is_held_while_a_judge_is_asked(make_run, server: JudgeServer) -> None:
    with leases(["cpu"], "another run", wait=False):
        carry_out(make_run(), JUDGE, wait=False)
    assert len(server.asked) == NUM_VERDICTS
