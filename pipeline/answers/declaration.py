"""The declaration of the answers stage, which is all that the rest of the pipeline knows about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import maker_of, measured_models
from capgap.schemas.errors import InputError
from capgap.schemas.run_file import RunFile


def answering(run: RunFile) -> list[Instance]:
    """Return one instance of the stage for each model that answers."""
    return [] if run.judge is None else measured_models(run, "answers", run.asks_teacher("judge"))


def _decisive(run: RunFile, instance: Instance) -> dict[str, Any]:
    from capgap.pipeline.answers.questions import own_questions_digest

    assert run.judge is not None
    found = run.judge.decisive()
    own = {"own_questions": own_questions_digest()} if run.judge.questions is None else {}
    return {"judge": {name: found[name] for name in ("questions", "answers")}, **own}


def _sources(run: RunFile, instance: Instance) -> list[Path]:
    """Return the file of the user's questions; capgap's own questions are covered by a digest in the settings."""
    if run.judge is None or run.judge.questions is None:
        return []
    path = Path(run.judge.questions)
    if not path.is_file():
        raise InputError("no such file", where=f"judge.questions: {path}", expected="questions as JSONL")
    return [path]


STAGE = Stage(
    name="answers",
    help="let every model answer the judge's questions",
    code="capgap.pipeline.answers.stage",
    section="judge",
    instances=answering,
    inputs=lambda run, instance: [maker_of(run, instance)],
    settings=_decisive,
    sources=_sources,
    on_device=True,
)
