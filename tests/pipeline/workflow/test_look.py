"""A run as it looks from outside."""

from __future__ import annotations

import time
from pathlib import Path

from capgap.pipeline.stage.folder import WORK_FOLDER, begin, plan_units
from capgap.pipeline.stage.heartbeat import heartbeat
from capgap.pipeline.stage.progress import progress
from capgap.pipeline.workflow.look import Look, last_loss, look_at
from capgap.pipeline.workflow.state import State, states


def test_a_stage_at_work_is_seen_with_how_far_it_is(make_run, make_finished) -> None:
    run = make_run()
    make_finished(run, "corpus")
    state = states(run)["teacher"]
    state.folder.mkdir(parents=True)
    begin(state.folder, state.order)
    (state.folder / "metrics.csv").write_text("step,train_loss,heldout_kl\n10,5.5,\n")
    with heartbeat(state.folder / WORK_FOLDER) as beat:
        plan_units(state.folder / WORK_FOLDER, "steps", 50, "checkpoints/step-*.ckpt")
        beat.begin_phase("at work", "cpu")
        with progress("teacher: train", 50, "steps", 20, lines=False) as meter:
            meter.advance(5, tokens=100)
            deadline = time.monotonic() + 600
            while not _has_counted(looks := {look.name: look for look in look_at(run)}, 25):
                assert time.monotonic() < deadline, "it is written once a second"
                time.sleep(0.1)
    assert (looks["corpus"].state, looks["corpus"].at_work) == (State.CURRENT, ())
    teacher = looks["teacher"]
    assert (teacher.state, teacher.why, teacher.loss) == (State.PARTIAL, "0 of 50 steps", 5.5)
    (beat,) = teacher.at_work
    assert (beat.device, beat.count.done, beat.count.total) == ("cpu", 25, 50)
    assert teacher.tokens_per_s > 0 and teacher.eta_s > 0 and teacher.seen_s_ago < 60
    assert looks["cache"].state == State.MISSING and looks["cache"].seen_s_ago is None


def _has_counted(looks: dict[str, Look], done: int) -> bool:
    return any(beat.count and beat.count.done == done for beat in looks["teacher"].at_work)


def test_the_last_loss_is_that_of_the_last_whole_row_that_has_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert last_loss(path) is None
    path.write_text("step,train_loss,heldout_kl\n")
    assert last_loss(path) is None
    path.write_text("step,train_loss,heldout_kl\n10,5.5,\n20,4.25,\n20,,0.5\n30,3.")
    assert last_loss(path) == 4.25
    path.write_text("step,train_loss,heldout_kl\n" + "10,5.5,\n" * 100_000 + "20,1.5,\n")
    assert last_loss(path) == 1.5
