"""The judge stage: a language model gives verdicts on the answers of every model. The stage uses no device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from capgap.pipeline.answers.kept import read_answers
from capgap.pipeline.judge.asking import ask_about, kept_verdicts, with_what_is_kept
from capgap.pipeline.judge.endpoint import JudgeEndpoint
from capgap.pipeline.judge.items import Answers, Model, Task, tasks
from capgap.pipeline.judge.summary import summarise
from capgap.pipeline.models.endpoint import key_of
from capgap.pipeline.stage.context import Instance, StageContext, StageInput, StageResult
from capgap.pipeline.stage.folder import WORK_FOLDER, plan_units
from capgap.pipeline.store.files import write_atomically
from capgap.schemas.errors import MachineError, MismatchError
from capgap.schemas.judge_results import ANSWERS_NAME, JUDGE_NAME, VERDICTS_NAME, Answered, JudgeIdentity, Verdict
from capgap.schemas.results import TEACHER
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_judge import JudgeSettings

_VERDICTS_FOLDER = "verdicts"
_IDENTITY_NAME = "judge-identity.json"


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse errors that can be found before anything is asked.

    Raises:
        SettingError: the key holds characters that a key cannot have.
    """
    assert run.judge is not None
    key_of(run.judge)


def run(context: StageContext) -> StageResult:
    """Ask the judge about every item without a verdict, and write `verdicts.jsonl` and `judge.json`.

    Raises:
        MachineError: the judge cannot be reached, is too slow or fails; verdicts so far are kept.
        SettingError: the endpoint rejects the key, or does not serve the model.
        InputError: the judge refuses every request.
        MismatchError: the models answered different questions, or another judge answers than the one that began.
    """
    settings = context.run.judge
    assert settings is not None
    answers = _read_answers(context)
    found = tasks(answers, settings.modes)
    work = context.folder / WORK_FOLDER
    judge, verdicts = _judge(found, settings, work)
    lines = [verdict.model_dump_json() + "\n" for verdict in verdicts]
    results = summarise(judge, answers, verdicts, settings.num_bootstrap)
    write_atomically(context.folder / VERDICTS_NAME, "".join(lines))
    write_atomically(context.folder / JUDGE_NAME, results.model_dump_json(indent=2) + "\n")
    totals = {
        "judge": judge.model,
        "models": len(answers),
        "questions": results.num_questions,
        "verdicts": results.num_verdicts,
        "invalid": results.num_invalid,
    }
    return StageResult(totals=totals)


def _judge(found: list[Task], settings: JudgeSettings, work: Path) -> tuple[JudgeIdentity, list[Verdict]]:
    folder = work / _VERDICTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    plan_units(work, "verdicts", len(found), f"{_VERDICTS_FOLDER}/*.json")
    begun = _begun_by(work)
    kept = kept_verdicts(found, folder)
    missing = [task for task in found if task.key not in kept]
    if begun is not None and not missing:
        return begun, [kept[task.key] for task in found]
    with JudgeEndpoint(settings) as endpoint:
        try:
            judge = endpoint.identity()
            if begun is None:
                write_atomically(work / _IDENTITY_NAME, judge.model_dump_json())
            elif begun != judge:
                raise MismatchError(
                    "another judge answers than the one that began",
                    where=settings.base_url,
                    found=judge.served or "a judge that its endpoint does not list",
                    expected=begun.served or "a judge that its endpoint does not list",
                    fix="serve the first judge again, or start over with --remake judge",
                )
            kept |= ask_about(missing, endpoint, settings, folder, kept.values())
        except MachineError as error:
            raise with_what_is_kept(error, len(kept_verdicts(found, folder)), len(found)) from None
    return judge, [kept[task.key] for task in found]


def _begun_by(work: Path) -> JudgeIdentity | None:
    path = work / _IDENTITY_NAME
    return JudgeIdentity.model_validate_json(path.read_bytes()) if path.is_file() else None


def _read_answers(context: StageContext) -> Answers:
    answers: dict[Model, tuple[Answered, ...]] = {}
    for made in context.inputs.values():
        arm, seed = _arm_and_seed(made.manifest.instance)
        (maker,) = made.manifest.inputs
        answers[Model(maker, arm, seed)] = read_answers(made.path / ANSWERS_NAME)
    asked = {tuple(one.question for one in answered) for answered in answers.values()}
    if len(asked) > 1:
        raise MismatchError(
            "the models answered different questions",
            where=", ".join(context.inputs),
            fix="make all answers again: capgap answers RUN.yaml --force",
        )
    return answers


def _arm_and_seed(instance: str) -> tuple[str | None, int | None]:
    """Return arm and seed of `answers/ARM/seed-SEED` or `answers/seed-SEED`; both are None for `answers/teacher`."""
    *arm, last = instance.split("/")[1:]
    if last == TEACHER:
        return None, None
    return arm[0] if arm else None, int(last.removeprefix("seed-"))
