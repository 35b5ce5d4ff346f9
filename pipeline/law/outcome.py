"""Reads the outcome of a grid's cells from their manifests and measurements.

A result counts as long as its stages are current under the grid's present settings. Every other run of the grid counts
as missing, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from capgap.pipeline.law.expand import Cell
from capgap.pipeline.law.worker import read_failures, with_arms
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.state import StageState, State, states
from capgap.schemas.errors import InputError
from capgap.schemas.manifest import Manifest
from capgap.schemas.results import RESULTS_NAME, EvalResults, ModelResult
from capgap.schemas.run_file import RunFile

_EVAL = Instance("eval")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one cell.

    Attributes:
        results: Results of the measured arms, by the arm's name.
        teacher_loss: Loss of the teacher whose cache the cell has read, nats/token; None where it was not measured.
        manifests: Manifests of the trainings with a result, by the arm's name.
        missing: Why an arm has no result, by the arm's name.
        finished: Whether every arm is trained and measured under the grid's present settings.
    """

    results: Mapping[str, ModelResult] = field(default_factory=dict)
    teacher_loss: float | None = None
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    finished: bool = False


def outcome_of(cell: Cell, why: str = "") -> Outcome:
    """Read the outcome of a cell from its folder.

    Args:
        cell: The cell.
        why: Why the cell cannot be made, if that is known from elsewhere, for example from its teacher; else empty.
    """
    try:
        known = states(cell.run)
    except InputError:  # a teacher or cache that the cell reads is missing
        return Outcome(missing={arm.name: why or "not made yet" for arm in cell.arms})
    measured = _measured(cell, known[_EVAL.name])
    by_arm = {model.arm: model for model in measured.models} if measured is not None else {}
    failures = read_failures(cell.run)
    results, manifests, missing = {}, {}, {}
    for arm in cell.arms:
        trained = known[cell.trained(arm).name]
        if arm.name in by_arm and trained.manifest is not None:
            results[arm.name], manifests[arm.name] = by_arm[arm.name], trained.manifest
        else:
            missing[arm.name] = _reason(cell, trained, known[_EVAL.name], failures, why)
    teacher = None if measured is None else measured.teacher
    return Outcome(
        results=results,
        teacher_loss=None if teacher is None else teacher.loss,
        manifests=manifests,
        missing=missing,
        finished=_is_current(known.values()),
    )


def stages_left(cell: Cell) -> frozenset[str]:
    """Return the names of the cell's instances that are not current: first weights, trainings and measurement."""
    every = [Instance("student", seed=cell.seed), *map(cell.trained, cell.arms), _EVAL]
    try:
        known = states(cell.run)
    except InputError:  # a teacher or cache that the cell reads is missing
        return frozenset(one.name for one in every)
    return frozenset(one.name for one in every if known[one.name].state is not State.CURRENT)


def made_stages(run: RunFile, stages: Iterable[str]) -> tuple[str, ...]:
    """Return which of the stages are current or reused.

    Raises:
        InputError: A folder that the run reuses does not hold the stage.
    """
    known = states(run)
    return tuple(stage for stage in stages if stage in run.reuse or known[stage].state is State.CURRENT)


def _is_current(known: Iterable[StageState]) -> bool:
    return all(state.state is State.CURRENT for state in known if state.instance.stage != "report")


def _measured(cell: Cell, evaluated: StageState) -> EvalResults | None:
    """Return the current results of the eval stage; None where it has none.

    They count for the arms that they hold even if the other arms of the cell had failed when it was measured.
    """
    if evaluated.manifest is None:
        return None
    if evaluated.state is not State.CURRENT:
        arms = [arm for arm in cell.arms if cell.trained(arm).name in evaluated.manifest.inputs]
        if not 0 < len(arms) < len(cell.arms):
            return None
        fewer = with_arms(cell.run, [cell.trained(arm) for arm in arms])
        if states(fewer)[_EVAL.name].state is not State.CURRENT:
            return None
    return EvalResults.model_validate_json((Path(cell.run.out) / _EVAL.name / RESULTS_NAME).read_bytes())


def _reason(cell: Cell, trained: StageState, measured: StageState, failures: Mapping[str, str], why: str) -> str:
    names = (Instance("student", seed=cell.seed).name, trained.instance.name, _EVAL.name)
    failed = next((f"{name}: {failures[name]}" for name in names if name in failures), "")
    if failed or why:
        return failed or why
    if trained.state is State.CURRENT:
        return f"trained, not measured: {measured.why or measured.state}"
    return f"not trained: {trained.why}"
