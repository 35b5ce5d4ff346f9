"""A stage that is killed in the middle of its requests goes on with exactly those that have no verdict."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from judge_runs import QUESTIONS
from judge_server import Answer, Body, JudgeServer, said

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.judge_results import JudgeResults

NUM_VERDICTS = 3 * len(QUESTIONS) * 2
NUM_ANSWERED = 7
TIMEOUT_S = 1800


def test_after_kill_9_exactly_the_missing_verdicts_are_asked_for(make_run, server: JudgeServer, tmp_path: Path) -> None:
    never = threading.Event()

    def judge(body: Body, number: int) -> Answer:
        if number >= NUM_ANSWERED:
            never.wait(TIMEOUT_S)
        return said("Rating: [[5]]")

    server.judge = judge
    run = make_run(num_parallel=3)
    path = tmp_path / "run.json"
    path.write_text(run.model_dump_json())
    folder = tmp_path / "out" / "judge" / "work" / "verdicts"
    command = [sys.executable, "-m", "capgap.jobs.cli", "judge", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while len(list(folder.glob("*.json"))) < NUM_ANSWERED or len(server.asked) < NUM_ANSWERED + 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    never.set()
    done = set(server.prompts()[:NUM_ANSWERED])
    everything = set(server.prompts())
    server.asked.clear()
    server.judge = lambda body, number: said("Rating: [[6]]")
    carry_out(run, Instance("judge"))
    again = server.prompts()
    assert len(again) == len(set(again)) == NUM_VERDICTS - NUM_ANSWERED
    assert done.isdisjoint(again)
    # those that were under way are asked about once more
    assert everything - done <= set(again)
    found = JudgeResults.model_validate_json((tmp_path / "out" / "judge" / "judge.json").read_bytes())
    assert found.num_verdicts == NUM_VERDICTS and found.num_invalid == 0
