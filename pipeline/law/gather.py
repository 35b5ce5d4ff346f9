"""The table of a grid, from manifests and measurements alone: it can be made again at any time.

A result counts while its stages are current under the grid as it stands; every other run of the grid is in the table
as missing, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capgap.pipeline.law.expand import (
    Arm,
    Cell,
    cache_folder,
    corpus_folder,
    corpus_run,
    teacher_folder,
    teacher_run,
)
from capgap.pipeline.law.pruned import pruned_sizes
from capgap.pipeline.law.worker import read_failures, with_arms
from capgap.pipeline.plan.sizes import model_size
from capgap.pipeline.plan.work import vocab_size_of
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.workflow.state import StageState, State, states
from capgap.schemas.errors import InputError
from capgap.schemas.facts import CacheFacts, CorpusFacts
from capgap.schemas.law import LawCache, LawModel, LawRun, LawTeacher, Setting
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.manifest import Manifest
from capgap.schemas.results import RESULTS_NAME, EvalResults, ModelResult
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_model import StudentSettings, TeacherSettings

# What differs from arm to arm by the grid's own axes, and what stands elsewhere in the row.
_AXES = ("alpha", "max_tokens", "precision")

_EVAL = Instance("eval")


@dataclass
class Outcome:
    """What became of one cell.

    Attributes:
        results: of its arms that are measured, by name.
        teacher_loss: of the teacher whose cache it read, measured beside them.
        manifests: of the trainings, by name of the arm.
        missing: why an arm has no result, by name.
    """

    results: dict[str, ModelResult] = field(default_factory=dict)
    teacher_loss: float | None = None
    manifests: dict[str, Manifest] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def outcome_of(cell: Cell, why: str = "") -> Outcome:
    """What became of a cell, from its folder.

    Args:
        cell: which.
        why: it cannot be made, where that is known from elsewhere, for example from its teacher.
    """
    found = Outcome()
    try:
        known = states(cell.run)
    except InputError:  # what it reads is not there
        return Outcome(missing={arm.name: why or "not made yet" for arm in cell.arms})
    measured = _measured(cell)
    failures = read_failures(cell.run)
    for arm in cell.arms:
        trained = known[cell.trained(arm).name]
        if arm.name in measured and trained.manifest is not None:
            found.results[arm.name] = measured[arm.name]
            found.manifests[arm.name] = trained.manifest
        else:
            found.missing[arm.name] = _reason(cell, trained, known[_EVAL.name], failures, why)
    if measured:
        teacher = _read_results(cell.run).teacher
        found.teacher_loss = None if teacher is None else teacher.loss
    return found


def is_finished(cell: Cell) -> bool:
    """Whether every arm of the cell is trained and measured as the grid says."""
    try:
        known = states(cell.run)
    except InputError:
        return False
    return all(state.state is State.CURRENT for state in known.values() if state.instance.stage != "report")


def is_made(run: RunFile, stages: Iterable[str]) -> bool:
    """Whether these stages of a run are current or reused."""
    known = states(run)
    return all(stage in run.reuse or known[stage].state is State.CURRENT for stage in stages)


def _measured(cell: Cell) -> dict[str, ModelResult]:
    """Results that are current, by arm: the eval stage may have been left fewer arms than the grid has."""
    manifest = read_manifest(Path(cell.run.out) / _EVAL.name)
    if manifest is None:
        return {}
    arms = [arm for arm in cell.arms if cell.trained(arm).name in manifest.inputs]
    run = with_arms(cell.run, [cell.trained(arm) for arm in arms])
    if not arms or states(run)[_EVAL.name].state is not State.CURRENT:
        return {}
    return {model.arm: model for model in _read_results(cell.run).models if model.arm is not None}


def _read_results(run: RunFile) -> EvalResults:
    return EvalResults.model_validate_json((Path(run.out) / _EVAL.name / RESULTS_NAME).read_bytes())


def _reason(cell: Cell, trained: StageState, measured: StageState, failures: Mapping[str, str], why: str) -> str:
    names = (Instance("student", seed=cell.seed).name, trained.instance.name, _EVAL.name)
    failed = next((f"{name}: {failures[name]}" for name in names if name in failures), "")
    if failed or why:
        return failed or why
    if trained.state is State.CURRENT:
        return f"trained, not measured: {measured.why or measured.state}"
    return f"not trained: {trained.why}"


@dataclass(frozen=True)
class Sizes:
    """What all rows say of the models, whether they were made or not.

    Attributes:
        students: by name, of a common init.
        teachers: by name, without a loss where none was measured.
        pruned: students that are cut out of their teachers, by name in the grid; none where the grid has no such.
    """

    students: dict[str, LawModel]
    teachers: dict[str, LawModel]
    pruned: dict[str, LawModel] = field(default_factory=dict)

    def student(self, cell: Cell) -> LawModel:
        """What the cell trains."""
        return (self.pruned if cell.init == "pruned" else self.students)[cell.student]


def sizes_of(grid: LawGrid, vocab_size: int) -> Sizes:
    """Sizes of all models: counted from their shapes or configurations.

    Raises:
        InputError: a given model cannot be read.
        SettingError: as `pruned_sizes`.
    """
    teachers = {name: _size(name, grid.teacher_settings(name), vocab_size, "teachers") for name in grid.teachers}
    students = {name: _size(name, settings, vocab_size, "students") for name, settings in grid.students.items()}
    return Sizes(students, teachers, pruned_sizes(grid, students, vocab_size) if "pruned" in grid.inits else {})


def _size(name: str, given: TeacherSettings | StudentSettings, vocab_size: int, setting: str) -> LawModel:
    size = model_size(None, given.path, given.model, vocab_size)
    if size.total is None or size.outside_embedding is None:
        raise InputError("the model cannot be counted", where=f"{setting}.{name}", found=size.where)
    return LawModel(
        name=name, num_parameters=round(size.total), num_non_embedding_parameters=round(size.outside_embedding)
    )


def vocab_size_of_grid(grid: LawGrid) -> int:
    """Of the grid's corpus, made or not; 0 where its tokenizer cannot be read."""
    return round(vocab_size_of(corpus_run(grid), read_manifest(Path(corpus_folder(grid)))) or 0)


def corpus_manifest(grid: LawGrid) -> Manifest:
    """Of the grid's corpus.

    Raises:
        InputError: it is not made.
    """
    folder = Path(corpus_folder(grid))
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError("the corpus is not made", where=folder, fix="start it with `capgap law run GRID.yaml`")
    return manifest


def rows(
    grid: LawGrid,
    cells: Iterable[Cell],
    outcomes: Mapping[str, Outcome],
    sizes: Sizes,
    tokens: Mapping[str, Mapping[str, int]],
) -> list[LawRun]:
    """The table.

    Args:
        grid: the grid.
        cells: all of them.
        outcomes: by name of the cell.
        sizes: of its models.
        tokens: that each student is to be trained on, by student and budget.
    """
    every = list(cells)
    corpus = corpus_manifest(grid)
    losses: dict[str, float] = {}
    for cell in every:
        measured = outcomes[cell.name].teacher_loss
        if measured is not None:
            # measured beside every student: the same, but for rounding where a GPU batches it otherwise
            losses.setdefault(cell.reads, measured)
    table = []
    for cell in every:
        about = _About(grid, cell, corpus)
        for arm in cell.arms:
            outcome = outcomes[cell.name]
            result, manifest = outcome.results.get(arm.name), outcome.manifests.get(arm.name)
            taught = arm.alpha > 0
            table.append(
                LawRun(
                    student=_as_made(sizes.student(cell), result),
                    teacher=_teacher(grid, cell.reads, sizes, losses) if taught else None,
                    cache=about.cache() if taught else None,
                    budget=arm.budget,
                    tokens=about.tokens(tokens[cell.student][arm.budget], manifest),
                    alpha=arm.alpha,
                    init=cell.init,
                    init_source=cell.init_source,
                    arm=arm.name,
                    seed=cell.seed,
                    loss=result.loss if result else None,
                    missing=None if result else outcome.missing[arm.name],
                    metrics=_metrics(result, taught=taught) if result else {},
                    wall_s=manifest.wall_s if manifest else None,
                    common=about.common(),
                    per_student=about.per_student(arm),
                )
            )
    return table


@dataclass(frozen=True)
class _About:
    """What rows say of how a cell was made."""

    grid: LawGrid
    cell: Cell
    corpus: Manifest

    @property
    def _recording(self) -> RecordingName:
        return self.grid.train_settings(self.cell.student).recording or self.grid.cache.recordings[0]

    def tokens(self, asked: int, manifest: Manifest | None) -> int:
        """As trained; for a run that was not, whole steps of what was asked for."""
        if manifest is not None:
            return int(manifest.totals["num_tokens"])  # type: ignore[arg-type]
        step = self.grid.train_settings(self.cell.student).batch_sequences * self.grid.corpus.seq_len
        return max(1, asked // step) * step

    def cache(self) -> LawCache:
        """The cache, as it is or as it is to be."""
        recording, settings = self._recording, self.grid.cache
        manifest = read_manifest(_location(cache_folder(self.grid, self.cell.reads)))
        if manifest is not None:
            facts = CacheFacts.model_validate(manifest.facts)
            kept = facts.recordings[recording]
            return LawCache(
                identity=manifest.identity,
                recording=recording,
                num_ids=kept.num_ids,
                profile=kept.profile,
                temperature=self._temperature(facts.temperature),
                num_tokens=manifest.shard_sets[recording].num_tokens,
            )
        return LawCache(
            identity=states(teacher_run(self.grid, self.cell.reads))["cache"].order.identity,
            recording=recording,
            num_ids=settings.num_ids(recording),
            profile=settings.stored_profile if recording == "topk" else None,
            temperature=self._temperature(settings.temperature),
            num_tokens=settings.max_tokens or self.corpus.shard_sets["student"].num_tokens,
        )

    def _temperature(self, recorded: float) -> float:
        asked = self.grid.train_settings(self.cell.student).temperature
        return recorded if asked is None else asked

    def common(self) -> dict[str, Setting]:
        """What must be equal in all rows."""
        facts = CorpusFacts.model_validate(self.corpus.facts)
        heldout = self.corpus.shard_sets["heldout"]
        settings = self.grid.train_settings(self.cell.student)
        return {
            "tokenizer": facts.tokenizer.fingerprint,
            "corpus": self.corpus.identity,
            "heldout": heldout.shards[0].file.sha256,
            "heldout_sequences": min(self.grid.eval.num_sequences, heldout.num_sequences),
            "context": facts.context,
            "seq_len": heldout.seq_len,
            "precision": settings.precision,
            "divergence": settings.divergence,
        }

    def per_student(self, arm: Arm) -> dict[str, Setting]:
        """What must be equal in all rows of one student and budget: how it was trained."""
        values = self.cell.run.train_settings(arm.name).decisive()
        return {name: value for name, value in values.items() if name not in _AXES and not _is_group(value)}


def _is_group(value: Any) -> bool:
    return isinstance(value, dict | list | tuple)


def _as_made(counted: LawModel, result: ModelResult | None) -> LawModel:
    """A model that was measured was counted as it is; another size than all others have is refused with the table."""
    if result is None:
        return counted
    made = ("num_parameters", "num_non_embedding_parameters")
    return counted.model_copy(update={name: getattr(result, name) for name in made})


def _teacher(grid: LawGrid, name: str, sizes: Sizes, losses: Mapping[str, float]) -> LawTeacher:
    size, folder = sizes.teachers[name], Path(teacher_folder(grid, name))
    manifest = read_manifest(folder)
    trained = None if manifest is None else manifest.totals.get("num_tokens")
    return LawTeacher(
        **size.model_dump(),
        loss=losses.get(name),
        train_tokens=None if trained is None else int(trained),  # type: ignore[arg-type]
    )


def _location(folder: str) -> Path | str:
    from capgap.pipeline.store import is_url

    return folder if is_url(folder) else Path(folder)


def _metrics(result: ModelResult, *, taught: bool) -> dict[str, float]:
    """Every number that the eval stage measured; what compares with a teacher only where the student had that one."""
    values = result.model_dump(mode="json")
    nearness = values.pop("against_teacher") or {}
    for name in ("loss", "seed", "num_parameters", "num_non_embedding_parameters"):
        del values[name]
    return _numbers(values) | (_numbers(nearness) if taught else {})


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
