"""Real Ray, real writers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from round_runs import FIRST

from capgap.pipeline.generate import replicas
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.run_file import RunFile

pytest.importorskip("ray")


@pytest.mark.slow
def test_two_replicas_write_what_one_process_writes(make_rounds: Callable[..., RunFile], monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    alone = carry_out(make_rounds(), FIRST)
    written: list[int] = []
    make_by_replicas = replicas.make_by_replicas

    def seen(job, units, context):
        for record in make_by_replicas(job, units, context):
            written.append(record.counts.num_prompts)
            yield record

    told: list[float] = []
    monkeypatch.setattr("capgap.pipeline.stage.fleet.advance_within", told.append)
    # so that none is too slow to say it
    monkeypatch.setattr("capgap.pipeline.stage.fleet._ANSWER_S", 600.0)
    monkeypatch.setattr(replicas, "make_by_replicas", seen)
    together = carry_out(make_rounds(replicas=2), FIRST, remake=True)
    assert together.content == alone.content
    num_units = len(list((Path(make_rounds().out) / FIRST.name).glob("*.answers.parquet")))
    assert len(written) == num_units > 2
    assert sum(told) == pytest.approx(sum(written)), "every prompt is heard of, and none twice"
