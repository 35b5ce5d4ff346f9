"""A judge's server, and a run whose models have answered."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_runs import KEY, finish_models, settings
from judge_server import JudgeServer, judge_server

from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.run_file import RunFile

ARMS: dict[str, dict[str, Any]] = {"distilled": {}, "cross_entropy": {"alpha": 0}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with judge_server() as started:
        yield started


@pytest.fixture(scope="session")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a teacher and two arms, all of which have answered."""
    folder = tmp_path_factory.mktemp("answered")
    run = RunFile.model_validate(settings(folder, {}, arms=ARMS))
    finish_models(run)
    for instance in instances(run):
        if instance.stage == "answers":
            carry_out(run, instance)
    return folder


@pytest.fixture
def make_run(answered: Path, tmp_path: Path, server: JudgeServer) -> Callable[..., RunFile]:
    """The run again in a folder of its own, before the judge; takes settings of the judge."""
    shutil.copytree(answered / "out", tmp_path / "out")

    def make(**judge: Any) -> RunFile:
        given = settings(tmp_path, {"base_url": server.url, **judge}, arms=ARMS)
        # a file's path decides, and the models were asked what stands in that one
        given["judge"]["questions"] = str(answered / "questions.jsonl")
        return RunFile.model_validate(given)

    return make
