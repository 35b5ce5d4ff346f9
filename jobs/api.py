"""`capgap.run`: makes the stages of a run file from a notebook or program, like the command `capgap run`.

path, shipped name or dict --settings laid over it--> RunFile --walk--> RunResult
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from capgap.jobs.problems import Origin, errors_of, not_finite
from capgap.jobs.reader import read_file, require_no_class, together, trust_loggers
from capgap.pipeline.plan.room import require_disk_space
from capgap.pipeline.stages import run_file_type
from capgap.pipeline.workflow.driver import walk
from capgap.pipeline.workflow.graph import downstream, instances, select
from capgap.pipeline.workflow.state import RunStates, State
from capgap.schemas.errors import SettingError
from capgap.schemas.printable import fit_to_show
from capgap.schemas.run_file import RunFile

_REPORT = Path("report", "report.json")


@dataclass(frozen=True)
class RunResult:
    """The results of a run.

    Attributes:
        out: folder of the run.
        folders: folders of the requested stages, by the stage's name, such as `train/distilled/seed-0`.
        made: names of the stages that were made by this call; the others were current.
        report: the numbers of the run's report, `report.json`; empty if the run has no current report.
        run: all settings as they were used.
    """

    out: Path
    folders: dict[str, Path]
    made: tuple[str, ...]
    report: dict[str, Any] = field(repr=False)
    run: RunFile = field(repr=False)


def run(
    run_file: str | Path | Mapping[str, Any],
    *,
    only: str | Collection[str] = (),
    from_stage: str | None = None,
    remake: str | Collection[str] = (),
    force: bool = False,
    wait: bool = True,
    **settings: Any,
) -> RunResult:
    """Make every stage of a run file current, each in its own process, and return where its results are.

        result = capgap.run("demo", out="runs/mine", train={"learning_rate": 1e-3})
        result = capgap.run("run.yaml", **{"train.learning_rate": 1e-3})
        capgap.open_cache(result.folders["cache"])

    Stages that are current are not made again, so the same call again does nothing, and after an interruption it
    resumes.

    Args:
        run_file: path of a run file, name of a shipped one, such as `demo`, or its settings as a dict.
        only: make only this stage, such as `train` or `train/distilled/seed-0`, or only these stages.
        from_stage: make this stage and all that depend on it.
        remake: stages to make again, replacing their results. Only so are results replaced that cost device time.
        force: make stages again even if they are current.
        wait: wait for a device that another stage holds; if false, that is an error.
        settings: settings that override the run file's, by section (`train={"alpha": 1.0}`) or by dotted name. Only
            here may `loggers` name a class of your own: a run file, also as a dict, may come from somebody else.

    Raises:
        InputError: the run file is missing or not YAML, or a stage cannot read its inputs.
        SettingError: a setting is unknown, missing or of the wrong type, or no stage has that name.
        MismatchError: a result that cost device time would be replaced, and `remake` does not name its stage.
        StageFailedError: the process of a stage failed, and has printed the reason to stderr.
    """
    only = (only,) if isinstance(only, str) else only
    if only and from_stage is not None:
        raise SettingError(
            "only and from_stage exclude each other", found=f"{', '.join(only)} and {from_stage}", expected="one"
        )
    checked = _checked(run_file, settings)
    if only:
        chosen = select(checked, *only)
    else:
        chosen = instances(checked) if from_stage is None else downstream(checked, from_stage)
    made = walk(
        checked,
        chosen,
        log=lambda name, why: print(fit_to_show(f"{name}: {why}"), flush=True),
        remake=(remake,) if isinstance(remake, str) else remake,
        force=force,
        wait=wait,
        require=require_disk_space,
    )
    out = Path(checked.out)
    folders = {instance.name: out / instance.name for instance in chosen}
    return RunResult(out, folders, tuple(made), _report(checked), checked)


def _checked(run_file: str | Path | Mapping[str, Any], settings: Mapping[str, Any]) -> RunFile:
    """Return the run file with the settings over it; raise SettingError for values that cannot be used."""
    kind = run_file_type()
    path, document = read_file(kind, None if isinstance(run_file, Mapping) else run_file)
    values = dict(run_file) if isinstance(run_file, Mapping) else document.values
    if path is None:
        # the dict may be a file of somebody else, whereas the caller has typed the settings
        require_no_class(Origin(kind, values, None, {}, {}), values)
    for name, value in settings.items():
        trust_loggers(value, tuple(name.split(".")))
        values = _laid_over(values, name, value)
    origin = Origin(kind, values, path, document.lines, {}, document.words)
    try:
        checked = kind.model_validate(values)
    except ValidationError as error:
        raise together(errors_of(error, origin)) from None
    if problems := list(not_finite(checked.model_dump(), origin)):
        raise together(problems)
    return checked


def _laid_over(values: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Return the values with one setting replaced, or, if the new value is a mapping, merged into its section."""
    first, _, rest = name.partition(".")
    under = values.get(first)
    if rest:
        value = _laid_over(under if isinstance(under, Mapping) else {}, rest, value)
    elif isinstance(value, Mapping) and isinstance(under, Mapping):
        merged = dict(under)
        for inner, one in value.items():
            merged = _laid_over(merged, str(inner), one)
        value = merged
    return {**values, first: value}


def _report(run: RunFile) -> dict[str, Any]:
    known = RunStates(run)
    if "report" not in known.instances or known.of("report").state is not State.CURRENT:
        return {}
    found = json.loads((Path(run.out) / _REPORT).read_bytes())
    assert isinstance(found, dict), "the report is a record"
    return found
