"""The declaration of the judge stage, which is all that the rest of the pipeline knows about it."""

from __future__ import annotations

from typing import Any

from capgap.pipeline.answers.declaration import answering
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import names, once
from capgap.schemas.run_file import RunFile

# settings that decide the answers are left out here, as the answers are inputs of this stage
_OF_THE_ANSWERS = ("questions", "answers", "teacher")


def _decisive(run: RunFile, instance: Instance) -> dict[str, Any]:
    from capgap.pipeline.judge.prompts import prompts_digest

    assert run.judge is not None
    settings = {name: value for name, value in run.judge.decisive().items() if name not in _OF_THE_ANSWERS}
    return {"judge": settings, "prompts": prompts_digest()}


STAGE = Stage(
    name="judge",
    help="let a language model judge the answers",
    code="capgap.pipeline.judge.stage",
    section="judge",
    instances=lambda run: once("judge", "judge", run),
    inputs=lambda run, instance: names(answering(run)),
    settings=_decisive,
)
